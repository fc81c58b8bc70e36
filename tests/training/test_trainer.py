import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from topk_ortho import topk_ortho_loss
from topk_ortho.sae import StandardSAE
from topk_ortho.training.activations import Activations
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.metrics import evaluate, mean_max_cosine
from topk_ortho.training.penalty import Penalty
from topk_ortho.training.trainer import Trainer, resolve_device


@pytest.fixture(scope="module")
def activations():
    """Sparse combinations of 24 directions in 16 dimensions, in 40 windows of 50 tokens."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    coefficients = torch.rand(2000, 24, generator=generator) * (torch.rand(2000, 24, generator=generator) < 0.1)
    noise = 0.01 * torch.randn(2000, 16, generator=generator)
    return Activations(list((coefficients @ directions + noise + 0.5).half().split(50)), None)


def config(tmp_path, **changes):
    arguments = {"steps": 100, "batch_size": 100, "warmup_steps": 5, "log_every": 40, "out_dir": tmp_path / "run"}
    arguments |= {"sae": SAEConfig(n_features=32, l1_weight=0.03), "penalty": PenaltyConfig(fraction=0.05)}
    return TrainConfig(**(arguments | changes))


def test_fit_learns_and_saves_what_it_says(activations, tmp_path):
    trainer = Trainer(config(tmp_path), activations)
    before = trainer.summary()
    summary = trainer.fit()
    assert summary["explained_variance"] > 0.8
    assert summary["explained_variance"] > before["explained_variance"] + 0.1

    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert json.loads((out / "config.json").read_text()) == trainer.config.as_json()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [40, 80, 100]
    assert set(lines[0]) == {"step", "tokens", "unexplained", "l1", "penalty", "l0", "dead"}
    saved = load_file(out / "sae.safetensors")
    assert all(torch.equal(saved[name], weights) for name, weights in trainer.sae.state_dict().items())


def test_same_seed_same_run(activations, tmp_path):
    first, second = (Trainer(config(tmp_path, steps=20), activations) for _ in range(2))
    first.fit()
    second.fit()
    assert all(torch.equal(a, b) for a, b in zip(first.sae.parameters(), second.sae.parameters(), strict=True))


def test_step_descends_the_documented_loss(activations, tmp_path):
    penalty = PenaltyConfig(fraction=0.05, weight=0.7)
    trainer = Trainer(config(tmp_path, warmup_steps=1, penalty=penalty), activations)
    sae = copy.deepcopy(trainer.sae)
    x = next(trainer.activations)
    trainer.train_step(x)

    reconstruction, features = sae(x)
    unexplained = (x - reconstruction).square().sum(dim=1).mean() / trainer.variance
    l1 = features.sum(dim=1).mean() / trainer.variance**0.5
    penalty = topk_ortho_loss(sae.W_dec.T, 0.05, similarity="positive", priority=trainer.firing_rate)
    (unexplained + 0.5 * 0.03 * l1 + 0.7 * penalty).backward()  # half-way through the warm-up
    for (name, actual), expected in zip(trainer.sae.named_parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_learning_rate_and_l1_weight_warm_up_and_the_rate_falls_to_zero(activations, tmp_path):
    trainer = Trainer(config(tmp_path, steps=50, warmup_steps=4, lr=0.5), activations)
    rates = []
    for _ in range(50):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.schedule.step()
    expected = [0.1, 0.2, 0.3, 0.4, *[0.5] * 37, *(0.05 * n for n in range(9, 0, -1))]
    assert rates == pytest.approx(expected)
    assert [trainer._warmup(step) for step in (0, 3, 4, 49)] == pytest.approx([0.2, 0.8, 1, 1])


def test_firing_rate_is_an_average_over_batches(activations, tmp_path):
    trainer = Trainer(config(tmp_path), activations)
    expected = torch.zeros(32)
    for _ in range(3):
        x = next(trainer.activations)
        fired = (trainer.sae(x).features > 0).float().mean(dim=0)
        expected = 0.99 * expected + 0.01 * fired
        trainer.train_step(x)
    torch.testing.assert_close(trainer.firing_rate, expected)


def test_variance_is_that_of_the_training_tokens(activations, tmp_path):
    trainer = Trainer(config(tmp_path), activations)
    seen = torch.cat([next(trainer.activations) for _ in range(19)]).double()
    expected = (seen - seen.mean(dim=0)).square().sum(dim=1).mean()
    assert trainer.variance == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(trainer.mean, seen.mean(dim=0).float(), rtol=1e-3, atol=1e-3)


def test_seed_decides_weights_split_and_order(activations, tmp_path):
    one, other = (Trainer(config(tmp_path, seed=seed), activations) for seed in (0, 1))
    assert not torch.equal(one.sae.W_dec, other.sae.W_dec)
    assert not torch.equal(one.held_out, other.held_out)
    assert not torch.equal(next(one.activations), next(other.activations))


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_some_windows_are_held_out_and_some_are_not(activations, tmp_path, fraction):
    few = Activations(activations.windows[:2], None)
    trainer = Trainer(config(tmp_path, held_out_fraction=fraction, batch_size=50), few)
    assert trainer.held_out.shape == next(trainer.activations).shape == (50, 16)


def test_activations_without_variance_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"all activations at blocks.3.hook_resid_post are equal"):
        Trainer(config(tmp_path), Activations([torch.ones(50, 16).half()] * 4, None))


def test_diverged_run_leaves_no_result_of_an_earlier_one(activations, tmp_path):
    Trainer(config(tmp_path, steps=6), activations).fit()
    with pytest.raises(FloatingPointError):
        Trainer(config(tmp_path, lr=1e30), activations).fit()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl"}


def test_penalty_separates_the_decoder(activations, tmp_path):
    summaries = {}
    for target in ("none", "decoder"):
        penalty = PenaltyConfig(target=target, weight=3.0, fraction=0.05)
        summaries[target] = Trainer(config(tmp_path, penalty=penalty), activations).fit()
    assert summaries["decoder"]["mean_max_decoder_cosine"] < 0.9 * summaries["none"]["mean_max_decoder_cosine"]


def test_unknown_device_is_refused():
    for device in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here: "):
            resolve_device(device)


@pytest.mark.parametrize(
    ("target", "what"), [("none", "'unexplained': (nan|inf)"), ("decoder", "x has .* columns with NaN or Inf")]
)
def test_divergence_is_loud(target, what, activations, tmp_path):
    settings = config(tmp_path, lr=1e30, penalty=PenaltyConfig(target=target))
    with pytest.raises(FloatingPointError, match=f"training diverged by step .*{what}.* lower lr"):
        Trainer(settings, activations).fit()


def test_decoder_keeps_unit_directions(activations, tmp_path):
    trainer = Trainer(config(tmp_path), activations)
    trainer.train_step(next(trainer.activations))
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(32))


def test_held_out_windows_are_not_trained_on(activations, tmp_path):
    trainer = Trainer(config(tmp_path, held_out_fraction=0.25), activations)
    assert trainer.held_out.shape == (500, 16)
    seen = torch.cat([next(trainer.activations) for _ in range(15)])
    assert seen.unique(dim=0).shape[0] == 1500
    both = torch.cat([seen.half(), trainer.held_out]).unique(dim=0)
    assert both.shape[0] == 2000


def test_dead_features_are_those_that_stopped_firing(activations, tmp_path):
    trainer = Trainer(config(tmp_path, dead_after_tokens=250), activations)
    trainer.sae.b_enc.data[:3] = -100.0
    assert trainer.n_dead() == 0
    counts = []
    for _ in range(4):
        trainer.train_step(next(trainer.activations))
        counts.append(trainer.n_dead())
    assert counts == [3, 3, 3, 3]
    trainer.sae.b_enc.data[3:5] = -100.0
    counts = []
    for _ in range(3):
        trainer.train_step(next(trainer.activations))
        counts.append(trainer.n_dead())
    assert counts == [3, 3, 5]


@pytest.mark.parametrize("target", ["decoder", "activations", "none"])
@pytest.mark.parametrize("priority", ["firing-rate", "none"])
def test_penalty_is_the_public_op_on_its_target(target, priority):
    W_dec = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    features = torch.randn(20, 12, generator=torch.Generator().manual_seed(2)).relu().requires_grad_()
    firing_rate = torch.arange(12.0)
    settings = PenaltyConfig(target=target, priority=priority, fraction=0.2, tau=0.1, reduction="sum")
    actual = Penalty(settings)(W_dec, features, firing_rate)
    if target == "none":
        assert actual.item() == 0
        return
    x = W_dec.T if target == "decoder" else features
    expected = topk_ortho_loss(
        x,
        0.2,
        tau=0.1,
        similarity="positive",
        reduction="sum",
        priority=firing_rate if priority == "firing-rate" else None,
    )
    source = W_dec if target == "decoder" else features
    gradients = [torch.autograd.grad(loss, source)[0] for loss in (actual, expected)]
    assert torch.equal(actual, expected)
    assert torch.equal(*gradients)


def test_explained_variance_and_l0_against_their_definitions():
    sae = StandardSAE(6, 10, generator=torch.Generator().manual_seed(0))
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)) + 3
    reconstruction, features = sae(x)
    expected = 1 - (x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum()
    metrics = evaluate(sae, x.split(7))
    assert metrics["explained_variance"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["l0"] == pytest.approx((features > 0).sum().item() / 30)


def test_mean_max_cosine_leaves_out_the_feature_itself():
    W_dec = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert mean_max_cosine(W_dec) == pytest.approx((1 + 1 + 0 + 0) / 4, abs=1e-6)
