"""The benchmark of how often all pairs of a decoder are compared."""

import json
from pathlib import Path

import pytest
import torch

from bench import refresh
from bench.mixtures import Size, make_trainer, mixtures
from bench.refresh import WAYS, table, timed_steps
from topk_ortho import topk_pairs
from topk_ortho.training.config import PenaltyConfig


def test_a_line_for_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "refresh.jsonl"
    refresh.main(["--size", "128", "16", "64", "4", "--steps", "6", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["way"] for line in lines] == list(WAYS)
    assert lines[0]["penalty_s"] == 0
    assert all(0 < line["penalty_s"] < line["step_s"] for line in lines[1:] if "th step" not in line["way"])
    for line in lines:
        is_kept = line["way"].startswith(("adaptive", "certified"))
        assert (line["recall"] is not None) == is_kept
        assert (line["interval"] is not None) == line["way"].startswith("adaptive")
    recall = {line["way"]: line["recall"] for line in lines}
    assert recall["certified, every step"] == 1
    assert capsys.readouterr().out.count("\n| ") == len(WAYS)


def test_other_ways_stay(tmp_path: Path):
    """Those of the same setting, in the order of the table, while a way that is measured again replaces its line."""
    out = tmp_path / "refresh.jsonl"
    setting = {"n_features": 128, "d_in": 16, "batch_size": 64, "l0": 4, "lr": 3e-4}
    others = [{"way": "OrtSAE, every step"}, {"way": "no penalty"}, {"way": "C2R, every step", "lr": 1.0}]
    measured = {"steps": 2, "timed_steps": 1, "step_s": 1.0, "penalty_s": 0.0, "interval": None, "recall": None}
    out.write_text("".join(json.dumps({**setting, **measured, **line}) + "\n" for line in others))
    arguments = ["--size", "128", "16", "64", "4", "--out", str(out), "--ways"]
    refresh.main([*arguments, "no penalty", "all pairs, every step", "--steps", "4"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["way"], line["steps"]) for line in lines] == [
        ("no penalty", 4), ("all pairs, every step", 4), ("OrtSAE, every step", 2),
    ]  # fmt: skip


def test_recall_is_measured_on_the_decoder_as_it_is():
    """A selection whose candidates are of another decoder has lost most of the pairs."""
    size = Size(256, 16, 64, 4)
    trainer = make_trainer(mixtures(size, 3), size, PenaltyConfig(refresh="adaptive", fraction=0.01))
    trainer.train_step(trainer.next_batch())
    trainer.batches.close()
    kept = trainer.penalty.topk_pairs.pairs
    assert kept is not None
    assert refresh._recall(trainer) == 1
    kept.reach.fill_(torch.inf)  # never refreshed, however far columns move
    decoder = trainer.sae.W_dec.data
    decoder.add_(0.1 * torch.randn(decoder.shape, generator=torch.Generator().manual_seed(0)))
    exact = topk_pairs(decoder.T, 0.01, similarity="positive")
    found = kept(decoder.T)
    common = set(zip(*map(torch.Tensor.tolist, exact[:2]), strict=True))
    common &= set(zip(*map(torch.Tensor.tolist, found[:2]), strict=True))
    assert 0 < len(common) < exact.rows.numel()
    assert refresh._recall(trainer) == pytest.approx(len(common) / exact.rows.numel())


def test_whole_intervals_between_refreshes_are_timed():
    assert timed_steps(60, []) == range(30, 60)
    assert timed_steps(60, [0, 29, 41]) == range(30, 60)
    assert timed_steps(60, [0, 29, 30, 47]) == range(30, 47)
    assert timed_steps(60, [10, 33, 40, 59]) == range(33, 59)


def test_the_table_compares_the_penalty_with_the_rest_of_the_step():
    line = {"timed_steps": 31, "step_s": 0.02, "penalty_s": 0.0, "interval": None, "recall": None}
    kept = {"timed_steps": 30, "step_s": 0.025, "penalty_s": 0.004, "interval": 7, "recall": 0.9876}
    text = table([{"way": "no penalty", **line}, {"way": "adaptive, every step", **kept}])
    assert "| no penalty | 31 | 20.0 ms | 0.0 ms | 0% |  |  |" in text
    assert text.endswith("| adaptive, every step | 30 | 25.0 ms | 4.0 ms | 19% | every 7 uses | 98.76% |")
