import copy
import json
import math
import os
import shutil
import signal
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import sae_lens
import torch

from tests.activations.models import save_tiny_gemma
from tests.activations.sources import MemorySource, sparse_mixtures
from topk_ortho import topk_ortho_loss, topk_pairs
from topk_ortho.activations.batches import Batches
from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, SyntheticConfig, TextConfig
from topk_ortho.activations.source import split_shards
from topk_ortho.activations.synthetic import SyntheticActivations
from topk_ortho.evaluation.stability import RELATIONS
from topk_ortho.sae import ActiveFeatures
from topk_ortho.training.build import build_sae
from topk_ortho.training.checkpoint import checkpoints, load_checkpoint
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.interrupt import Interrupted
from topk_ortho.training.metric_table import METRICS
from topk_ortho.training.run_folder import open_run
from topk_ortho.training.trainer import Trainer

ARCHITECTURES = ["standard", "topk", "batchtopk", "jumprelu", "matryoshka"]


@pytest.fixture(scope="module")
def source():
    return sparse_mixtures()


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Figures take longer than these runs; one test makes them."""
    if request.function is not test_what_a_run_leaves:
        monkeypatch.setattr("topk_ortho.training.results.write_report", lambda *_: None)


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def open_trainer(source, out_dir):
    """Make a trainer of small sizes; its thread and its hold of the folder end with the next one, or with the test."""
    opened = ExitStack()

    def open_(source=source, *, resume=False, overwrite=False, start=True, **changes):
        opened.close()
        sae = {"architecture": "standard", "n_features": 32, "l0": 3, "sparsity_weight": 0.03}
        arguments = {
            "steps": 60, "batch_size": 100, "log_every": 40, "eval_every": 20, "held_out_tokens": 200,
            "checkpoint_every": 0, "out_dir": out_dir,
        } | changes  # fmt: skip
        arguments["sae"] = SAEConfig(**(sae | changes.get("sae", {})))
        arguments["penalty"] = PenaltyConfig(**({"fraction": 0.05} | changes.get("penalty", {})))
        config = TrainConfig(**arguments)
        run = opened.enter_context(open_run(config, resume=resume, overwrite=overwrite, start=start))
        trainer = Trainer(config, source, run)
        opened.callback(trainer.batches.close)
        return trainer

    with opened:
        yield open_


def lines(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_and_is_saved_for_saelens(architecture, open_trainer, source, out_dir):
    trainer = open_trainer(sae={"architecture": architecture, "initial_threshold": 0.3}, steps=120)
    before = trainer.evaluation()["explained_variance"]
    summary = trainer.fit()
    assert summary["explained_variance"] > max(0.6, before + 0.1)

    sae = sae_lens.SAE.load_from_disk(out_dir / "sae")
    x = trainer.held_out.float()
    reconstruction = sae(x)
    fvu = (x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert 1 - fvu.item() == pytest.approx(summary["explained_variance"], abs=1e-4)
    assert (sae.encode(x) > 0).sum().item() / len(x) == pytest.approx(summary["l0"], abs=0.02)


def test_what_a_run_leaves(open_trainer, out_dir):
    trainer = open_trainer()
    summary = trainer.fit()
    assert {path.name for path in out_dir.iterdir()} == {
        ".topk_ortho.lock", "config.json", "metrics.jsonl", "checkpoints", "sae", "summary.json", "figures",
        "report.html",
    }  # fmt: skip
    saved = json.loads((out_dir / "summary.json").read_text())
    assert {name: saved[name] for name in summary} == summary
    assert json.loads((out_dir / "config.json").read_text()) == trainer.config.as_json()
    log = lines(out_dir)
    assert [line["step"] for line in log] == [20, 40, 60]
    assert set(log[0]) == {
        "step", "tokens", "lr", "loss", "fvu", "sparsity", "auxiliary", "penalty", "penalty_weight", "l0",
        "dead_fraction", "gradient_norm", "tokens_per_second", "data_ms", "sae_ms", "penalty_ms", "memory_bytes",
        "explained_variance", "normalized_mse", "held_out_l0", "mean_max_decoder_cosine", "penalised_pairs",
        "pair_threshold",
        "pair_jaccard", "tau", "density_histogram",
    }  # fmt: skip
    assert set(log[0]) | set(summary) <= {metric.key for metric in METRICS} | {"steps", "device"}
    assert [line["pair_jaccard"] is None for line in log] == [True, False, False]
    assert all(0 <= line["pair_jaccard"] <= 1 for line in log[1:])
    assert [line["tokens"] for line in log] == [2000, 4000, 6000]
    assert summary["explained_variance"] == log[-1]["explained_variance"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_measured_on_held_out_tokens_does_not_depend_on_the_batch_size(architecture, open_trainer, tmp_path):
    measured = []
    for batch_size in (7, 100):
        out_dir = tmp_path / str(batch_size)
        trainer = open_trainer(
            sae={"architecture": architecture},
            penalty={"target": "activations"},
            batch_size=batch_size,
            steps=1,
            lr=1e-30,  # the dictionary stays as it is
            held_out_tokens=1000,
            out_dir=out_dir,
        )
        trainer.sae.observe = lambda features: None  # the threshold of BatchTopK too
        summary = trainer.fit()
        numbers = {name: summary[name] for name in ("l0", "penalty", "pair_threshold", "mean_max_decoder_cosine")}
        names = ("explained_variance", "normalized_mse", "held_out_l0", "density_histogram")
        measured.append(numbers | {name: lines(out_dir)[-1][name] for name in names})
    assert measured[0] == measured[1]
    assert measured[0]["penalty"] > 0


def strictly(text):
    """JSON as its standard has it, without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_equal_held_out_tokens_leave_explained_variance_undefined(open_trainer, source, out_dir):
    shards = list(source.shards)
    for number in split_shards(source, 200, seed=0)[0]:
        shards[number] = torch.full_like(shards[number], 0.3)
    summary = open_trainer(MemorySource(shards), steps=4, checkpoint_every=2, keep_checkpoints=1).fit()
    assert summary["explained_variance"] is None
    assert strictly((out_dir / "summary.json").read_text())["explained_variance"] is None
    assert [strictly(line)["explained_variance"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()] == (
        [None] * 2
    )
    assert summary["normalized_mse"] > 0
    assert [path.name for path in checkpoints(out_dir / "checkpoints")] == ["step-00000004"], "none is the best"


def test_a_clock_that_stands_still_gives_no_speed(open_trainer, out_dir, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    summary = open_trainer(steps=2).fit()
    assert summary["tokens_per_second"] is lines(out_dir)[-1]["tokens_per_second"] is None
    assert summary["seconds"] == lines(out_dir)[-1]["sae_ms"] == 0


def test_pairs_kept_of_none_are_undefined(open_trainer, out_dir):
    open_trainer(penalty={"tau": 0.999}).fit()
    assert [line["pair_jaccard"] for line in lines(out_dir)] == [None] * 3


def test_held_out_shards_without_tokens_are_refused(open_trainer):
    shards = [torch.randn(50, 16)] * 2
    (held_out,), _ = split_shards(MemorySource(shards), 200, seed=0)
    shards[held_out] = torch.zeros(0, 16)
    with pytest.raises(ValueError, match="memory: the shards that are held out have no tokens"):
        open_trainer(MemorySource(shards))


@pytest.mark.parametrize(("tau", "counts"), [(None, lambda n: n == 24), (0.6, lambda n: 0 < n < 24)])
def test_penalised_pairs_are_those_above_tau(tau, counts, open_trainer):
    trainer = open_trainer(penalty={"fraction": 0.05, "tau": tau, "similarity": "abs"})
    assert counts(trainer.evaluation()["penalised_pairs"])


def test_lines_without_an_evaluation_are_short(open_trainer, out_dir):
    open_trainer(log_every=7, eval_every=21, steps=21).fit()
    assert ["explained_variance" in line for line in lines(out_dir)] == [False, False, True]


@pytest.mark.quick
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", ["decoder", "activations"])
def test_step_descends_the_documented_loss(architecture, target, open_trainer, source):
    """Gradients of the loss written out densely with autograd; half-way through the warm-up."""
    trainer = open_trainer(
        sae={"architecture": architecture, "decoder_norm": "none", "widths": (8, 32)},
        penalty={"target": target, "weight": 0.7},
        steps=10,
        warmup_fraction=0.1,
        clip_norm=None,
    )
    config, sae = trainer.config, copy.deepcopy(trainer.sae)
    sae.requires_grad_(True)
    x = next(trainer.batches)
    trainer.train_step(x)

    x = x * trainer.scale
    output = sae(x)
    dense = output.features.to_dense() if isinstance(output.features, ActiveFeatures) else output.features
    errors = [(x - r).square().sum(dim=1).mean() / trainer.variance for r in (output.reconstruction, *output.inner)]
    penalised = sae.W_dec.T if target == "decoder" else dense
    penalty = topk_ortho_loss(penalised, 0.05, similarity="positive", priority=trainer.dead_features.firing_rate)
    loss = sum(errors) / len(errors) + 0.5 * config.sae.sparsity_weight * sae.sparsity(output, trainer.variance)
    (loss + 0.7 * penalty).backward()
    assert penalty > 0
    for (name, actual), expected in zip(trainer.sae.named_parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_dead_features_get_the_auxiliary_loss(open_trainer):
    trainer = open_trainer(
        sae={"architecture": "topk", "auxk": 4, "decoder_norm": "none"}, clip_norm=None, penalty={"target": "none"}
    )
    trainer.dead_features.tokens_since_fired[:5] = 10**9
    trainer.sae.b_enc.data[:5] = -3.0  # none of them fires
    result = trainer.train_step(next(trainer.batches))
    assert result.auxiliary > 0
    assert trainer.sae.W_enc.grad[:5].any()
    assert result.loss == pytest.approx((result.fvu + result.auxiliary / 8).item(), rel=1e-5)


def test_resampling_brings_dead_features_back(open_trainer):
    trainer = open_trainer(
        sae={"dead_features": "resample", "resample_every": 5},
        penalty={"target": "none"},
        steps=30,
        dead_after_tokens=400,
    )
    trainer.sae.b_enc.data[:6] = -100.0
    for _ in range(5):
        trainer.train_step(next(trainer.batches))
    assert trainer.dead_features.n_dead(500) == 0
    assert trainer.sae.b_enc[:6].abs().max() < 1
    features = trainer.sae(next(trainer.batches) * trainer.scale).features
    assert (features[:, :6] > 0).any(dim=0).sum() >= 4


def test_no_resampling_in_the_last_fifth(open_trainer):
    dead_features = open_trainer(sae={"dead_features": "resample", "resample_every": 5}, steps=30).dead_features
    assert [step for step in range(1, 31) if dead_features.resamples_after(step)] == [5, 10, 15, 20]


def test_penalty_every_few_steps_with_its_weight_scaled(open_trainer):
    trainer = open_trainer(penalty={"every": 3, "weight": 0.1})
    results = [trainer.train_step(next(trainer.batches)) for _ in range(6)]
    assert [r.penalty_weight for r in results] == pytest.approx([0.3, 0, 0, 0.3, 0, 0])
    assert [r.penalty.item() > 0 for r in results] == [True, False, False, True, False, False]


def test_learning_rate_warms_up_and_falls(open_trainer):
    trainer = open_trainer(steps=50, warmup_fraction=0.08, decay_fraction=0.2, lr=0.5)
    rates = []
    for _ in range(50):
        trainer.train_step(next(trainer.batches))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, *[0.5] * 37, *(0.05 * n for n in range(9, 0, -1))])


def test_gradient_is_clipped(open_trainer):
    for clip_norm, expected in ((0.01, 0.01), (None, None)):
        trainer = open_trainer(clip_norm=clip_norm, sae={"decoder_norm": "none"})
        result = trainer.train_step(next(trainer.batches))
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in trainer.sae.parameters()))
        assert norm == pytest.approx(expected or result.gradient_norm.item(), rel=1e-3)
        assert result.gradient_norm > 0.011


@pytest.mark.parametrize("normalize", ["none", "rms"])
def test_mean_scale_and_variance_are_those_of_the_training_tokens(normalize, open_trainer, source):
    trainer = open_trainer(sae={"normalize_activations": normalize})
    training = set(range(20)) - set(trainer.held_out_shards)
    x = torch.cat([source.shards[n] for n in training]).double()
    scale = 1.0 if normalize == "none" else (16 / x.square().sum(dim=1).mean().item()) ** 0.5
    assert trainer.scale == pytest.approx(scale)
    x = x * scale
    assert trainer.variance == pytest.approx((x - x.mean(dim=0)).square().sum(dim=1).mean().item())
    torch.testing.assert_close(trainer.sae.b_dec.detach(), x.mean(dim=0).float())


def test_firing_rate_is_an_average_over_batches(open_trainer):
    trainer = open_trainer()
    expected = torch.zeros(32)
    for _ in range(3):
        x = next(trainer.batches)
        expected = 0.99 * expected + 0.01 * (trainer.sae(x * trainer.scale).features > 0).float().mean(dim=0)
        trainer.train_step(x)
    torch.testing.assert_close(trainer.dead_features.firing_rate, expected)


def test_held_out_shards_are_not_trained_on(open_trainer, source):
    trainer = open_trainer(held_out_tokens=450)
    assert len(trainer.held_out_shards) == 5
    assert torch.equal(trainer.held_out, torch.cat([source.shards[n] for n in trainer.held_out_shards]))
    assert not set(trainer.held_out_shards) & set(trainer.batches.shards)
    assert sorted(trainer.held_out_shards + trainer.batches.shards) == list(range(20))


def test_at_most_half_is_held_out(open_trainer):
    assert len(open_trainer(held_out_tokens=10**9).held_out_shards) == 10


def test_one_shard_is_refused(open_trainer):
    with pytest.raises(ValueError, match="memory fill one shard"):
        open_trainer(MemorySource([torch.randn(500, 16)]))


def test_seed_decides_everything(open_trainer, tmp_path):
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        trainer = open_trainer(seed=seed, steps=5, out_dir=tmp_path / str(number))
        shards = trainer.held_out_shards
        trainer.fit()
        runs.append((shards, weights(trainer)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())
    assert not torch.equal(runs[0][1]["W_dec"], runs[2][1]["W_dec"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_run_equals_an_uninterrupted_one(architecture, open_trainer, tmp_path):
    """Bit by bit, with every kind of state: moments, thresholds, firing, random chunks, warm start, pairs."""
    settings = {
        "sae": {"architecture": architecture, "dead_features": "resample", "resample_every": 7},
        "penalty": {"op": "max_cosine", "n_chunks": 2} if architecture == "topk" else {"every": 2},
        "steps": 40, "eval_every": 10, "log_every": 5, "dead_after_tokens": 500, "buffer_tokens": 700,
    }  # fmt: skip
    whole = open_trainer(**settings, out_dir=tmp_path / "whole")
    whole.fit()
    first = open_trainer(**settings, out_dir=tmp_path / "parts")
    step = first.train_step

    def interrupted(x):
        if first.step == 22:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(x)

    first.train_step = interrupted
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 23"):
        first.fit()
    second = open_trainer(**settings, out_dir=tmp_path / "parts", resume=True)
    assert second.step == 23
    second.fit()
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(second).items())

    def comparable(out_dir):
        noise = {"tokens_per_second", "data_ms", "sae_ms", "penalty_ms", "memory_bytes"}
        by_step = {line["step"]: line for line in lines(out_dir)}
        return {
            step: {name: value for name, value in by_step[step].items() if name not in noise}
            for step in range(5, 41, 5)
        }

    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")


@pytest.fixture
def ctrl_c_is_heard():
    """A shell starts a process in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.parametrize("where", ["train_step", "evaluation"])
def test_a_signal_saves_and_the_previous_handler_is_back(where, open_trainer, out_dir, monkeypatch):
    trainer = open_trainer(steps=10**6, eval_every=5)
    method = getattr(trainer, where)

    def interrupted(*arguments):
        if trainer.step >= 4:
            os.kill(os.getpid(), signal.SIGINT)
        return method(*arguments)

    monkeypatch.setattr(trainer, where, interrupted)
    with pytest.raises(Interrupted) as stop:
        trainer.fit()
    assert stop.value.exit_code == 130
    assert [load_checkpoint(path).step for path in checkpoints(out_dir / "checkpoints")] == [5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (out_dir / "summary.json").exists()


def test_an_ignored_signal_stays_ignored(open_trainer):
    """nohup starts a program with SIGHUP ignored, so that it outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = open_trainer(steps=6)
        step = trainer.train_step
        trainer.train_step = lambda x: os.kill(os.getpid(), signal.SIGHUP) or step(x)
        assert trainer.fit()["steps"] == 6
    finally:
        signal.signal(signal.SIGHUP, before)


def pair_lines(out_dir):
    return [json.loads(line) for line in (out_dir / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("target", ["decoder", "activations", "none"])
def test_the_pairs_that_a_step_selects_are_noted(target, open_trainer, out_dir):
    """Those of the decoder before it moves, or of the features of the step's batch; the weights do not notice."""
    settings = {"steps": 12, "penalty": {"target": target, "every": 2}}
    without = open_trainer(**settings)
    without.fit()
    assert not (out_dir / "pairs.jsonl").exists()
    trainer = open_trainer(**settings, pairs_every=5, overwrite=True)
    noted, seen, step, note = {}, {}, trainer.train_step, trainer.pair_windows.note

    def observed_step(x):
        W_dec = trainer.sae.W_dec.detach().clone()
        result = step(x)
        seen[trainer.step] = result.features.detach() if target == "activations" else W_dec.T
        return result

    def observed_note(number, pairs, relations):
        noted[number] = pairs
        return note(number, pairs, relations)

    trainer.train_step, trainer.pair_windows.note = observed_step, observed_note
    trainer.fit()
    assert list(noted) == [5, 6, 7, 10, 11, 12]
    for number, pairs in noted.items():
        expected = topk_pairs(seen[number], 0.05, similarity="positive")
        assert torch.equal(pairs.rows, expected.rows)
        assert torch.equal(pairs.cols, expected.cols)
    assert all(torch.equal(tensor, weights(without)[name]) for name, tensor in weights(trainer).items())


def test_stability_of_pairs_over_a_run_with_known_truth(open_trainer, tmp_path):
    """Interrupted within a window and where one begins, it leaves the file and the summary of a run left alone."""
    config = SyntheticConfig(d_in=12, n_parents=3, n_children=3, n_independent=4, n_tokens=4_000)
    settings = {"source": SyntheticActivations(config, 0), "steps": 210, "pairs_every": 40, "eval_every": 210}
    summary = open_trainer(**settings, out_dir=tmp_path / "whole").fit()
    whole = pair_lines(tmp_path / "whole")
    assert [(line["step"], line["until"]) for line in whole] == [
        (40, 140), (80, 180), (120, 210), (160, 210), (200, 210),
    ]  # fmt: skip
    for line in whole:
        assert sum(line[name] for name in RELATIONS) == pytest.approx(1)
        assert 0 < line["jaccard_lag_1"] <= 1
        assert (line["persistent_pairs"] is None) == (line["jaccard_lag_100"] is None) == (line["step"] > 80)
    mean = sum(line["jaccard_lag_10"] for line in whole) / 5
    assert summary["pair_stability"]["jaccard_lag_10"] == pytest.approx(mean)
    assert summary["pair_relations"].keys() == set(RELATIONS)

    parts = tmp_path / "parts"
    for stop in (125, 159, None):
        trainer = open_trainer(**settings, out_dir=parts, resume=stop != 125)
        step = trainer.train_step

        def interrupted(x, trainer=trainer, step=step, stop=stop):
            if trainer.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(x)

        trainer.train_step = interrupted
        if stop:
            with pytest.raises(Interrupted):
                trainer.fit()
            with (parts / "pairs.jsonl").open("a") as file:  # by a process that went on and was killed
                file.write(json.dumps(whole[2]) + "\n")
    again = trainer.fit()
    assert (parts / "pairs.jsonl").read_bytes() == (tmp_path / "whole" / "pairs.jsonl").read_bytes()
    for name in ("pair_stability", "pair_relations"):
        assert again[name] == summary[name]
    after = open_trainer(**settings, out_dir=parts, resume=True).fit()
    assert after["pair_stability"] == summary["pair_stability"]
    assert pair_lines(parts) == whole


def test_resuming_a_finished_run_changes_nothing(open_trainer, out_dir):
    trainer = open_trainer(steps=6)
    summary = trainer.fit()
    again = open_trainer(steps=6, resume=True)
    assert again.fit()["explained_variance"] == summary["explained_variance"]
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in weights(again).items())
    assert [line["step"] for line in lines(out_dir)] == [6]


def test_resuming_where_nothing_is_starts_and_says_so(open_trainer, capsys):
    assert open_trainer(resume=True).step == 0
    assert "no checkpoint yet, starting at step 0" in capsys.readouterr().err


def test_only_a_run_that_is_there_goes_on_where_none_may_begin(open_trainer, out_dir):
    message = "holds no run to go on with: check --out-dir; --auto-resume begins one where none is"
    with pytest.raises(ValueError, match=f"{out_dir.name} {message}"):
        open_trainer(resume=True, start=False)
    assert not out_dir.exists()
    open_trainer(steps=6).fit()
    assert open_trainer(steps=6, resume=True, start=False).step == 6
    shutil.rmtree(out_dir / "checkpoints")
    (out_dir / "summary.json").unlink()  # it ended before its first checkpoint
    assert open_trainer(steps=6, resume=True, start=False).step == 0


def test_a_finished_run_goes_on_with_more_steps(open_trainer, out_dir, capsys):
    """By the schedules of the longer run."""
    settings = {"log_every": 1, "warmup_fraction": 0.0, "decay_fraction": 0.5, "keep_checkpoints": 9}
    first = open_trainer(**settings, steps=6)
    first.fit()
    capsys.readouterr()
    longer = open_trainer(**settings, steps=12, resume=True)
    message = "going on at step 6 of 12 in place of 6; the learning rate is 0.003, and falls to 0 from step 7"
    assert message in capsys.readouterr().err
    assert longer.step == 6
    assert all(torch.equal(tensor, weights(longer)[name]) for name, tensor in weights(first).items())
    assert (out_dir / "summary.json").exists(), "it has not begun yet, and may still fail"
    step = longer.train_step

    def checked(x):
        assert not (out_dir / "summary.json").exists(), "it would count as finished"
        return step(x)

    longer.train_step = checked
    assert longer.fit()["steps"] == 12
    rates = {line["step"]: line["lr"] / 0.003 for line in lines(out_dir)}
    assert [rates[step] for step in (3, 4, 6)] == pytest.approx([1, 1, 1 / 3])
    assert [rates[step] for step in (7, 10, 12)] == pytest.approx([1, 1 / 2, 1 / 6])
    assert json.loads((out_dir / "config.json").read_text())["steps"] == 12
    with pytest.raises(ValueError, match="run is at step 12: --steps must be at least that to go on, got 7"):
        open_trainer(**settings, steps=7, resume=True)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_the_sparsity_weight_moves_the_number_of_active_features(architecture, open_trainer, tmp_path):
    """A thousand times the weight brings jumprelu to its l0, and the standard architecture to few features."""
    active = []
    for weight in (1e-3, 1.0):
        sae = {"architecture": architecture, "l0": 2, "sparsity_weight": weight, "initial_threshold": 0.1}
        out_dir = tmp_path / str(weight)
        active.append(open_trainer(sae=sae, steps=150, penalty={"target": "none"}, out_dir=out_dir).fit()["l0"])
    assert active[0] > 2 * active[1]
    if architecture == "jumprelu":
        assert active[1] == pytest.approx(2, rel=0.5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_the_number_of_active_features_is_annealed(architecture, open_trainer, out_dir):
    """In steps, in what is exported, and after a run that was interrupted in between."""
    sae = {"architecture": architecture, "l0": 2, "l0_start": 8, "l0_anneal_fraction": 0.5}
    settings = {"sae": sae, "log_every": 1, "steps": 12, "decay_fraction": 0.0, "warmup_fraction": 0.0}
    trainer = open_trainer(**settings)
    for _ in range(4):
        trainer.train_step(trainer.next_batch())
    trainer.save()
    summary = open_trainer(**settings, resume=True).fit()
    active = {line["step"]: line["l0"] for line in lines(out_dir)}
    assert [active[step] for step in (5, 6, 7, 12)] == pytest.approx([4, 3, 2, 2], abs=0.1)
    saved = json.loads((out_dir / "sae" / "cfg.json").read_text())
    assert saved.get("k", 2) == 2
    whole = open_trainer(**settings, out_dir=out_dir.with_name("whole")).fit()
    assert whole["explained_variance"] == summary["explained_variance"]
    active = {line["step"]: line["l0"] for line in lines(out_dir.with_name("whole"))}
    assert [active[step] for step in (1, 2, 4)] == pytest.approx([8, 7, 5], abs=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_begins_with_saved_weights(architecture, open_trainer, tmp_path):
    """They compute at first what they computed before, in the scale of this run; then they are trained."""
    settings = {"sae": {"architecture": architecture}, "penalty": {"target": "none"}}
    before = open_trainer(**settings, steps=40, out_dir=tmp_path / "first").fit()
    settings |= {"init_from": tmp_path / "first" / "sae", "out_dir": tmp_path / "second"}
    assert before["explained_variance"] > 0.1
    trainer = open_trainer(**settings, steps=20)
    again = trainer.evaluation()
    assert again["mean_max_decoder_cosine"] == pytest.approx(before["mean_max_decoder_cosine"], rel=1e-4)
    assert again["explained_variance"] == pytest.approx(before["explained_variance"], rel=1e-4)
    after = trainer.fit()
    assert after["explained_variance"] > again["explained_variance"] - 0.05
    assert after["explained_variance"] != again["explained_variance"]


def test_saved_weights_of_another_size_are_refused(open_trainer, tmp_path):
    open_trainer(steps=2, out_dir=tmp_path / "first").fit()
    with pytest.raises(ValueError, match=r"init_from holds 32 features: sae.n_features must be 32, got 40"):
        open_trainer(steps=2, sae={"n_features": 40}, init_from=tmp_path / "first" / "sae", out_dir=tmp_path / "second")
    with pytest.raises(ValueError, match=r"nowhere holds no dictionary in SAELens's format, cfg.json and sae_weights"):
        open_trainer(steps=2, init_from=tmp_path / "nowhere", out_dir=tmp_path / "second")


def test_a_longer_run_says_what_begins_anew(open_trainer, capsys):
    settings = {
        "sae": {"architecture": "topk", "l0_start": 9}, "penalty": {"warmup_fraction": 0.25}, "warmup_fraction": 0.5,
    }  # fmt: skip
    open_trainer(**settings, steps=4).fit()
    open_trainer(**settings, steps=20, resume=True)
    message = (
        "falls to 0 from step 17; the learning rate rises until step 10; the weight of the penalty rises until step 5; "
        "the number of active features falls until step 6"
    )
    assert message in capsys.readouterr().err


def test_a_run_whose_rate_does_not_fall_says_so(open_trainer, capsys):
    open_trainer(steps=4, decay_fraction=0.0).fit()
    open_trainer(steps=5, decay_fraction=0.0, resume=True)
    assert "going on at step 4 of 5 in place of 4; the learning rate stays at 0.003" in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_resumed(open_trainer, capsys):
    open_trainer(steps=6).fit()
    with pytest.raises(ValueError, match=r"of other settings: lr was 0.003, is 0.1; sae.n_features was 32, is 40"):
        open_trainer(steps=6, lr=0.1, sae={"n_features": 40}, resume=True)
    assert open_trainer(steps=6, log_every=1, keep_checkpoints=9, resume=True).step == 6


def test_a_run_of_an_older_version_goes_on(open_trainer, out_dir, monkeypatch):
    """It knows nothing of settings that came later, and was made as if they had their defaults."""
    as_json = TrainConfig.as_json

    def as_it_was(config):
        settings = as_json(config)
        del settings["pairs_every"]
        return settings

    monkeypatch.setattr(TrainConfig, "as_json", as_it_was)
    trainer = open_trainer(steps=10)
    for _ in range(4):
        trainer.train_step(trainer.next_batch())
    trainer.save()
    monkeypatch.undo()
    assert open_trainer(steps=10, resume=True).step == 4
    with pytest.raises(ValueError, match="other settings: pairs_every was 0, is 5"):
        open_trainer(steps=10, pairs_every=5, resume=True)


def test_a_torn_checkpoint_is_passed_over_aloud(open_trainer, out_dir, capsys):
    trainer = open_trainer(checkpoint_every=4, steps=10)
    trainer.fit()
    (out_dir / "checkpoints" / "step-00000010" / "state.safetensors").write_bytes(b"torn")
    resumed = open_trainer(checkpoint_every=4, steps=10, resume=True)
    assert resumed.step == 8
    error = capsys.readouterr().err
    assert "passed over" in error
    assert "step-00000010 is damaged" in error
    resumed.fit()
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in weights(resumed).items())


def test_the_best_checkpoint_stays(open_trainer, out_dir, monkeypatch):
    trainer = open_trainer(checkpoint_every=2, keep_checkpoints=1, steps=8)
    values = iter([0.1, 0.9, 0.5, 0.9])
    evaluation = trainer.evaluation
    monkeypatch.setattr(trainer, "evaluation", lambda: evaluation() | {"explained_variance": next(values)})
    trainer.fit()
    assert [path.name for path in checkpoints(out_dir / "checkpoints")] == ["step-00000008", "step-00000004"]


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_run_goes_on(open_trainer, out_dir, monkeypatch, capsys):
    def full(folder, checkpoint, ranks):
        raise OSError("no space left on device")

    trainer = open_trainer(checkpoint_every=2, steps=4)
    monkeypatch.setattr("topk_ortho.training.trainer.save_checkpoint", full)
    trainer.fit()
    assert "no space left on device; earlier checkpoints are as they were" in capsys.readouterr().err
    assert (out_dir / "summary.json").exists()


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_activations_without_variance_are_refused(rounding, open_trainer):
    shards = [1 + rounding * torch.randn(50, 16) for _ in range(8)]
    with pytest.raises(ValueError, match=r"all activations at memory are equal up to rounding"):
        open_trainer(MemorySource(shards))


def test_ctrl_c_while_activations_are_made_ends_their_thread(open_trainer, monkeypatch):
    """Else the process would not end before the buffer is full."""

    def ctrl_c(batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(Batches, "pool", property(ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        open_trainer()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("activations")]


@pytest.mark.parametrize(
    ("target", "what"), [("none", "'fvu': (nan|inf)"), ("decoder", "x has .* columns with NaN or Inf")]
)
def test_divergence_is_loud_and_leaves_no_result(target, what, open_trainer, out_dir):
    trainer = open_trainer(lr=1e30, penalty={"target": target}, warmup_fraction=0.0, clip_norm=None)
    with pytest.raises(FloatingPointError, match=f"training diverged by step .*{what}.* lower lr"):
        trainer.fit()
    assert {path.name for path in out_dir.iterdir()} == {".topk_ortho.lock", "config.json", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("target", "what"),
    [("none", "'explained_variance': (nan|-inf)"), ("activations", "(NaN|exceed|explained_variance)")],
)
def test_divergence_in_the_last_step_is_loud(target, what, open_trainer, out_dir):
    trainer = open_trainer(lr=1e30, steps=1, penalty={"target": target}, warmup_fraction=0.0, clip_norm=None)
    with pytest.raises(FloatingPointError, match=f"training diverged by step 1: .*{what}.* lower lr"):
        trainer.fit()
    assert not (out_dir / "summary.json").exists()


def test_only_numbers_that_overflow_are_divergence(open_trainer):
    trainer = open_trainer(penalty={"op": "max_cosine"})
    trainer.penalty.max_cosine.n_chunks = 100  # as no configuration allows
    with pytest.raises(ValueError, match="n_chunks must be in"):
        trainer.train_step(next(trainer.batches))
    trainer.penalty.max_cosine.n_chunks = 1
    trainer.sae.W_dec.data[3] = torch.tensor([3e38, -3e38]).repeat(8)  # finite as their sum is, and their norm is not
    with pytest.raises(FloatingPointError, match="training diverged by step 0: x has 1 column whose norm is too large"):
        trainer.train_step(next(trainer.batches))


def test_penalty_separates_the_decoder(open_trainer, tmp_path):
    summaries = {}
    for target in ("none", "decoder"):
        penalty = {"target": target, "weight": 3.0}
        summaries[target] = open_trainer(penalty=penalty, steps=100, out_dir=tmp_path / target).fit()
    assert summaries["decoder"]["mean_max_decoder_cosine"] < 0.9 * summaries["none"]["mean_max_decoder_cosine"]


@pytest.mark.parametrize("decoder_norm", ["none", "l2", "l2-hook"])
def test_decoder_norm_is_kept_as_named(decoder_norm, open_trainer):
    trainer = open_trainer(sae={"decoder_norm": decoder_norm})
    for _ in range(3):
        trainer.train_step(next(trainer.batches))
    is_unit = torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(32))
    assert is_unit == (decoder_norm != "none")


@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_a_frozen_decoder_stays_and_the_encoder_learns(architecture, open_trainer, tmp_path):
    settings = {"sae": {"architecture": architecture, "train_decoder": False}, "penalty": {"target": "none"}}
    trainer = open_trainer(**settings, steps=10, checkpoint_every=5)
    W_dec, W_enc = (weights.detach().clone() for weights in (trainer.sae.W_dec, trainer.sae.W_enc))
    trainer.fit()
    assert torch.equal(trainer.sae.W_dec, W_dec)
    assert not torch.equal(trainer.sae.W_enc, W_enc)
    resumed = open_trainer(**settings, steps=10, checkpoint_every=5, resume=True)
    assert torch.equal(resumed.sae.W_dec, W_dec)


@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_a_dictionary_can_start_from_the_true_features(architecture):
    source = SyntheticActivations(SyntheticConfig(d_in=16, n_parents=4, n_children=4, n_independent=4), seed=1)
    config = SAEConfig(architecture=architecture, initial_decoder="truth", n_features=24, l0=4)
    sae = build_sae(config, source, torch.Generator())
    torch.testing.assert_close(sae.W_dec, source.truth.directions)
    # the encoder is tied, for the L1 penalty by the share of features that a token can be made of
    torch.testing.assert_close(sae.W_enc, source.truth.directions * (16 / 24 if architecture == "standard" else 1))


@pytest.mark.parametrize("op", ["c2r", "random_pairs"])
def test_further_ops_train_and_resume(op, open_trainer, tmp_path):
    settings = {"sae": {"architecture": "topk"}, "penalty": {"op": op, "weight": 0.1, "n_chunks": 3}}
    whole = open_trainer(**settings, steps=20, out_dir=tmp_path / "whole")
    whole.fit()
    first = open_trainer(**settings, steps=20, out_dir=tmp_path / "parts")
    for _ in range(8):
        first.train_step(first.next_batch())
    first.save()
    second = open_trainer(**settings, steps=20, out_dir=tmp_path / "parts", resume=True)
    second.fit()
    assert torch.equal(second.sae.W_dec, whole.sae.W_dec)


@pytest.mark.parametrize("refresh", ["adaptive", "certified"])
@pytest.mark.parametrize("inhibition", [0.0, 3.0])
def test_a_selection_that_is_kept_trains_and_resumes(refresh, inhibition, open_trainer, tmp_path):
    penalty = {"weight": 0.3, "fraction": 0.05, "encoder_inhibition": inhibition, "refresh": refresh}
    settings = {"sae": {"dead_features": "resample", "resample_every": 7}, "dead_after_tokens": 250, "lr": 1e-4}

    def start(name, penalty, **more):
        trainer = open_trainer(**settings, steps=20, log_every=1, penalty=penalty, out_dir=tmp_path / name, **more)
        trainer.sae.b_enc.data[:3] = -100.0  # never fire
        return trainer

    whole = start("whole", penalty)
    summary = whole.fit()
    first = start("parts", penalty)
    for _ in range(9):
        first.train_step(first.next_batch())
    first.save()
    second = open_trainer(**settings, steps=20, log_every=1, penalty=penalty, out_dir=tmp_path / "parts", resume=True)
    assert second.fit()["refresh_interval"] == summary["refresh_interval"]
    assert torch.equal(second.sae.W_dec, whole.sae.W_dec)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    intervals = [line["refresh_interval"] for line in lines]
    assert max(intervals) > 1
    assert lines[-1]["refresh_recall"] >= 0.9
    assert lines[-1]["refresh_recall_low"] <= lines[-1]["refresh_recall"] <= lines[-1]["refresh_recall_high"]
    exact = start("exact", penalty | {"refresh": "exact"})
    assert "refresh_interval" not in exact.fit()
    if refresh == "certified":
        assert intervals == list(range(20))  # though features were resampled, which were compared by themselves
        torch.testing.assert_close(whole.sae.W_dec, exact.sae.W_dec, atol=1e-5, rtol=0)


def test_dead_features_are_those_that_stopped_firing(open_trainer):
    trainer = open_trainer(dead_after_tokens=250, sae={"dead_features": "none"})
    trainer.sae.b_enc.data[:3] = -100.0
    assert trainer.dead_features.n_dead(0) == 0
    counts = []
    for _ in range(4):
        trainer.train_step(next(trainer.batches))
        counts.append(trainer.dead_features.n_dead(100 * trainer.step))
    assert counts == [3, 3, 3, 3]
    trainer.sae.b_enc.data[3:5] = -100.0
    counts = []
    for _ in range(3):
        trainer.train_step(next(trainer.batches))
        counts.append(trainer.dead_features.n_dead(100 * trainer.step))
    assert counts == [3, 3, 5]


def test_bfloat16_autocast_trains_float32_weights(open_trainer):
    for architecture in ARCHITECTURES:
        trainer = open_trainer(autocast="bfloat16", sae={"architecture": architecture})
        first = trainer.train_step(next(trainer.batches))
        assert first.loss.isfinite()
        moments = [m for state in trainer.optimizer.state.values() for m in state.values()]
        assert all(t.dtype == torch.float32 for t in [*trainer.sae.parameters(), *moments])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_configuration_names_its_sae(architecture):
    config = SAEConfig(architecture=architecture, n_features=32, l0=4, widths=(8, 32))
    sae = build_sae(config, SimpleNamespace(d_in=16), torch.Generator())
    assert type(sae).__name__.lower() == f"{architecture}sae"
    assert sae.W_dec.shape == (32, 16)
    assert architecture == "standard" or sae.l0 == 4
    assert architecture != "matryoshka" or sae.widths == (8, 32)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's, at a graph break
@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_a_compiled_sae_takes_the_same_step(architecture, open_trainer):
    results = []
    for compiled in (False, True):
        trainer = open_trainer(compile=compiled, sae={"architecture": architecture})
        results.append((trainer.train_step(next(trainer.batches)).loss, weights(trainer)["W_enc"]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)


def test_tokens_of_a_transformer_that_are_left_out_are_counted_and_classes_measured(open_trainer, out_dir, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(chr(97 + number * number % 26) for number in range(3_000)))
    model = ModelConfig(
        name=str(save_tiny_gemma(tmp_path / "model")), hook="blocks.0.hook_resid_post", max_norm_ratio=1.1
    )
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=2_500)
    settings = {"model": model, "text": text, "token_classes": True}
    activations = TransformerActivations(model, text, "float32", tmp_path / "activations", torch.device("cpu"))
    open_trainer(activations, steps=2, **settings).fit()
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["left_out_tokens"] == activations.left_out
    assert min(activations.left_out.values()) > 0
    assert summary["token_classes"] == {"known": 0, "with_latent": 0, "latent_f1": None, "absorption_rate": None}

    with pytest.raises(ValueError, match="token_classes needs the activations of a transformer, not memory"):
        open_trainer(steps=2, overwrite=True, **settings).fit()
