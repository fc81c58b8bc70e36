"""The benchmark of processes against their number, and the model beside it."""

import json
from pathlib import Path

import pytest

from bench import scaling
from bench.plan import plan
from bench.scaling import Size, ring_bytes


def test_a_line_for_every_mode_and_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "scaling.jsonl"
    scaling.main(["--size", "64", "8", "16", "2", "--rounds", "1", "--ranks", "1", "2", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["mode"], line["ranks"]) for line in lines] == [
        *((mode, 1) for mode in ("products", "penalty", "step by features")),
        *((mode, 2) for mode in ("products", "penalty", "step by features", "step by batch")),
    ]
    assert all(line["time_s"] > 0 and line["environment"]["threads"] == 1 for line in lines)
    assert all(line["sent_bytes"] > line["ring_bytes"] > 0 for line in lines[-3:])
    assert [line["ring_bytes"] for line in lines[:4]] == [0] * 4
    printed = capsys.readouterr().out
    assert printed.count("\n| step by features") == 2


def test_the_volume_of_the_ring():
    """Two shards meet once for the loss; for the gradient all pass all others."""
    size = Size(n_features=100, d_in=10, batch_size=7, l0=2)
    assert ring_bytes("penalty", 2, size) == 4 * (1_000 + 1_000)
    assert ring_bytes("penalty", 4, size) == 4 * (2_000 + 3_000)
    assert ring_bytes("step by features", 2, size) == 4 * (2_000 + 2 * 70)
    assert ring_bytes("step by batch", 4, size) == 4 * (5_000 + 6 * (2_000 + 100 + 10))


def test_the_plan_shares_out_all_but_the_batch():
    few, many = (plan(2**20, 2_304, 4_096, 64, 1e-4, n) for n in (8, 64))
    of_batch = "batch, reconstruction, residual and gradients"
    for name, amount in few.memory.items():
        assert many.memory[name] == pytest.approx(amount if name == of_batch else amount / 8, rel=1e-6)
    assert few.memory["weights, gradients and two moments"] == 4 * 2 * 2**17 * 2_304 * 4
    assert few.seconds["products of pairs (tf32)"] == pytest.approx(8 * many.seconds["products of pairs (tf32)"])
    sent = {n: plan(2**20, 2_304, 4_096, 64, 1e-4, n).seconds["shards sent, gradient"] for n in (2, 8)}
    assert sent[8] / sent[2] == pytest.approx((7 / 8) / (1 / 2))
