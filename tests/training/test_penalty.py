import pytest
import torch

from topk_ortho import max_cosine_loss, topk_ortho_loss, topk_pairs
from topk_ortho.sae import StandardSAE, TopKSAE
from topk_ortho.training.config import PenaltyConfig
from topk_ortho.training.penalty import Penalty

FIRING_RATE = torch.arange(12.0)


def inputs():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(2))


def make(sae_class):
    arguments = (8, 12) if sae_class is StandardSAE else (8, 12, 4)
    return sae_class(*arguments, generator=torch.Generator().manual_seed(1))


def penalty_of(**settings):
    return Penalty(PenaltyConfig(**settings), torch.Generator().manual_seed(5))


@pytest.mark.parametrize("target", ["decoder", "activations"])
@pytest.mark.parametrize("priority", ["firing-rate", "none"])
@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
def test_value_and_gradient_are_those_of_the_public_op(target, priority, sae_class):
    sae = make(sae_class)
    features = sae(inputs()).features
    settings = {"fraction": 0.2, "tau": 0.1, "reduction": "sum"}
    term = penalty_of(target=target, priority=priority, **settings)(sae, features, FIRING_RATE)

    dense = features if sae_class is StandardSAE else features.to_dense()
    x = sae.W_dec.T if target == "decoder" else dense
    expected = topk_ortho_loss(
        x, similarity="positive", priority=FIRING_RATE if priority == "firing-rate" else None, **settings
    )
    torch.testing.assert_close(term.value, expected.detach())
    assert term.value > 0
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec)
    expected_gradients = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    actual = torch.autograd.grad(term.target, parameters, term.gradient, allow_unused=True)
    for a, e in zip(actual, expected_gradients, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["decoder", "activations"])
def test_max_cosine_over_random_chunks(target):
    sae = make(TopKSAE)
    features = sae(inputs()).features
    term = penalty_of(target=target, op="max_cosine", n_chunks=3)(sae, features, FIRING_RATE)
    x = sae.W_dec.T if target == "decoder" else features.to_dense()
    expected = max_cosine_loss(x, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(term.value, expected.detach())
    assert term.gradient.any()


def test_weight_warms_up_and_pauses():
    penalty = penalty_of(weight=0.5, warmup_fraction=0.5, every=2)
    assert [penalty.weight(step, 8) for step in range(8)] == pytest.approx([0.2, 0, 0.6, 0, 1.0, 0, 1.0, 0])
    assert [penalty_of(weight=0.5).weight(step, 8) for step in range(3)] == [0.5] * 3
    assert penalty_of(target="none").weight(0, 8) == 0


@pytest.mark.parametrize("target", ["decoder", "activations", "none"])
def test_selection_is_that_of_the_target(target):
    sae = make(TopKSAE)
    features = sae(inputs()).features
    pairs = penalty_of(target=target, fraction=0.2, similarity="abs", tau="adaptive").select(sae, features)
    x = features.to_dense() if target == "activations" else sae.W_dec.T
    expected = topk_pairs(x.detach(), 0.2, tau="adaptive")
    assert torch.equal(pairs.rows, expected.rows)
    assert torch.equal(pairs.cols, expected.cols)
    assert pairs.tau == pytest.approx(expected.tau, rel=1e-5)
