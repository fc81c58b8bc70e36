"""The source that SAELens draws, and our metrics on it beside SAELens's own."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from sae_lens.synthetic import compute_classification_metrics, feature_uniqueness, mean_correlation_coefficient

from topk_ortho.activations.config import SynthSAEBenchConfig
from topk_ortho.activations.synthsaebench import SynthSAEBenchActivations
from topk_ortho.evaluation import ground_truth_metrics


@cache
def source(seed=0):
    return SynthSAEBenchActivations(SynthSAEBenchConfig(d_in=24, n_true=100, n_tokens=20_000), seed)


def test_a_shard_can_be_had_again_and_differs_from_others():
    again = source.__wrapped__()
    assert source().shard_sizes == [10_000, 10_000]
    assert torch.equal(source().shard(1), again.shard(1))
    assert not torch.equal(source().shard(1), source().shard(0))
    assert not torch.equal(source().shard(1), source(seed=1).shard(1))


def test_shards_are_the_same_from_several_threads_and_leave_the_random_state():
    shards = [source().shard(number) for number in (0, 1)]
    torch.rand(1)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        drawn = list(threads.map(source().shard, [0, 1] * 4))
    assert all(torch.equal(actual, expected) for actual, expected in zip(drawn, shards * 4, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_shards_are_sums_of_the_true_directions():
    x, coefficients = source().sample(0)
    assert torch.equal(source().shard(0), x)
    torch.testing.assert_close(x, coefficients @ source().truth.directions + source().model.feature_dict.bias)
    torch.testing.assert_close(source().truth.directions.norm(dim=1), torch.ones(100))


def test_children_are_on_with_their_parent_and_one_at_a_time():
    """One tree of 1 + 4 + 16 + 64 features, numbered level by level, and 15 features outside it."""
    truth = source().truth
    assert truth.parent.tolist() == [-1, *[p for p in range(21) for _ in range(4)], *[-1] * 15]
    assert truth.level.bincount().tolist() == [16, 4, 16, 64]
    on = source().sample(0)[1] > 0
    for parent in range(21):
        n_on = on[:, truth.parent == parent].sum(dim=1)
        assert set(n_on.tolist()) == {0, 1}
        assert on[n_on > 0, parent].all()


def test_frequencies_fall_as_in_the_benchmark():
    """Zipf's law with exponent 0.5, from 0.4 down to 5e-4, to which features outside the tree are held."""
    weights = torch.arange(1, 101).double() ** -0.5
    expected = 5e-4 + (0.4 - 5e-4) * (weights - weights[-1]) / (1 - weights[-1])
    numbers = [0, *range(85, 100)]
    intended = source().model.activation_generator.firing_probabilities.double()
    torch.testing.assert_close(intended[numbers], expected[numbers], rtol=1e-4, atol=0)
    rates = (source().sample(0)[1] > 0).double().mean(dim=0)
    torch.testing.assert_close(rates[numbers], expected[numbers], rtol=0, atol=0.02)


def test_metrics_are_those_of_saelens():
    """On a dictionary that is near the truth, so that the most similar true feature is the matched one."""
    truth = source().truth
    generator = torch.Generator().manual_seed(0)
    _, coefficients = source().sample(0)
    order = torch.randperm(100, generator=generator)
    W_dec = 3 * (truth.directions + 0.05 * torch.randn(100, 24, generator=generator))[order]
    wrong = torch.rand(coefficients.shape, generator=generator) < 0.02
    features = torch.where(wrong, 1 - coefficients.sign(), coefficients)[:, order]
    actual = ground_truth_metrics(W_dec, features, truth, coefficients)
    theirs = compute_classification_metrics(features, coefficients, W_dec, truth.directions)
    assert actual["mcc"] == pytest.approx(mean_correlation_coefficient(W_dec, truth.directions), abs=1e-5)
    assert actual["f1"] == pytest.approx(theirs.f1_score, abs=1e-5)
    assert 0.3 < actual["f1"] < 0.9
    assert actual["uniqueness"] == 1


@pytest.mark.parametrize("n_features", [40, 300])
def test_uniqueness_is_that_of_saelens(n_features):
    W_dec = torch.randn(n_features, 24, generator=torch.Generator().manual_seed(1))
    truth = source().truth
    actual = ground_truth_metrics(W_dec, torch.zeros(1, n_features), truth, torch.zeros(1, 100))["uniqueness"]
    assert actual == feature_uniqueness(W_dec, truth.directions) < 1
