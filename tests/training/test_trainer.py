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
    trainer = Trainer(config(tmp_path, warmup_steps=0), activations)
    sae = copy.deepcopy(trainer.sae)
    x = next(trainer.activations)
    trainer.train_step(x)

    reconstruction, features = sae(x)
    unexplained = (x - reconstruction).square().sum(dim=1).mean() / trainer.variance
    l1 = features.sum(dim=1).mean() / trainer.variance**0.5
    penalty = topk_ortho_loss(sae.W_dec.T, 0.05, similarity="positive", priority=trainer.firing_rate)
    (unexplained + 0.03 * l1 + 0.3 * penalty).backward()
    for (name, actual), expected in zip(trainer.sae.named_parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_penalty_separates_the_decoder(activations, tmp_path):
    summaries = {}
    for target in ("none", "decoder"):
        penalty = PenaltyConfig(target=target, weight=3.0, fraction=0.05)
        summaries[target] = Trainer(config(tmp_path, penalty=penalty), activations).fit()
    assert summaries["decoder"]["mean_max_decoder_cosine"] < 0.9 * summaries["none"]["mean_max_decoder_cosine"]


def test_unknown_device_is_refused():
    assert resolve_device("auto") == resolve_device(str(resolve_device("auto")))
    for device in ("cuda:99", "abacus"):
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
