"""Against loops over samples and all matchings, and cases computed by hand."""

import itertools
import json

import pytest
import torch

from topk_ortho.activations.hierarchy import HierarchicalFeatures, hierarchical_features
from topk_ortho.evaluation import ground_truth_metrics


def truth_of(parent, d_in=8):
    n = len(parent)
    return HierarchicalFeatures(directions=torch.eye(d_in)[:n], parent=torch.tensor(parent), interval=torch.zeros(n, 2))


def mean(values):
    return sum(values) / len(values)


def oracle(W_dec, features, truth, coefficients, min_samples):
    """Pure Python; tries every matching of true features to features."""
    n_true, n_features = len(truth.parent), len(W_dec)
    cosine = [
        [sum(a * b for a, b in zip(t, w, strict=True)) / sum(b * b for b in w) ** 0.5 for w in W_dec.double().tolist()]
        for t in truth.directions.double().tolist()
    ]
    slots = [*range(n_features), *[None] * max(0, n_true - n_features)]
    best = max(
        itertools.permutations(slots, n_true),
        key=lambda match: sum(cosine[t][f] for t, f in enumerate(match) if f is not None),
    )
    own = [0.0 if f is None else cosine[t][f] for t, f in enumerate(best)]
    on = [[c > 0 for c in row] for row in coefficients.tolist()]
    fires = [[f is not None and row[f] > 0 for f in best] for row in features.tolist()]
    parent = truth.parent.tolist()
    parents = sorted({p for p in parent if p >= 0})
    children = [t for t in range(n_true) if parent[t] >= 0]

    def share_of(event, given):
        cases = [event(s) for s in range(len(on)) if given(s)]
        return mean(cases) if cases else None

    f1 = []
    for t in range(n_true):
        n_on = sum(row[t] for row in on)
        if n_on:
            both = sum(a[t] and b[t] for a, b in zip(on, fires, strict=True))
            f1.append(2 * both / (n_on + sum(row[t] for row in fires)))
    absorption, excess = {}, {}
    for c in children:
        p = parent[c]
        with_child = [s for s in range(len(on)) if on[s][c]]
        alone = [s for s in range(len(on)) if on[s][p] and not any(on[s][o] for o in children if parent[o] == p)]
        if len(with_child) >= min_samples and len(alone) >= min_samples:
            rate = mean([not fires[s][p] for s in with_child])
            absorption[c] = rate
            excess[c] = rate - mean([not fires[s][p] for s in alone])
    recall = [share_of(lambda s, t=t: fires[s][t], lambda s, t=t: on[s][t]) for t in range(n_true)]
    closest = {max(range(n_true), key=lambda t: abs(cosine[t][f])) for f in range(n_features)}
    parts = {
        "mcc": own,
        "mcc_parent": [own[p] for p in parents],
        "mcc_child": [own[c] for c in children],
        "f1": f1,
        "parent_recall": [recall[p] for p in parents if recall[p] is not None],
        "child_recall": [recall[c] for c in children if recall[c] is not None],
        "absorption_rate": [*absorption.values()],
        "excess_absorption": [*excess.values()],
        "uniqueness": [len(closest) / n_features],
    }
    grandchildren = {c for c in children if parent[c] in children}
    for number, level in enumerate([set(children) - grandchildren, grandchildren], start=1) if grandchildren else []:
        parts[f"absorption_rate_level_{number}"] = [rate for c, rate in absorption.items() if c in level]
        parts[f"excess_absorption_level_{number}"] = [rate for c, rate in excess.items() if c in level]
    return {name: mean(values) if values else None for name, values in parts.items()}


@pytest.mark.quick
@pytest.mark.parametrize("n_features", [4, 6, 7], ids=["fewer_than_true", "as_many", "more"])
@pytest.mark.parametrize("seed", range(3))
def test_against_the_oracle(n_features, seed):
    generator = torch.Generator().manual_seed(seed)
    rates = {"parent_rate": 0.5, "child_rate": 0.3, "independent_rate": 0.3}
    truth = hierarchical_features(5, 1, 2, 3, generator=generator, **rates)
    _, coefficients = truth.sample(60, generator)
    W_dec = torch.randn(n_features, 5, generator=generator)
    features = torch.randn(60, n_features, generator=generator).relu()
    actual = ground_truth_metrics(W_dec, features, truth, coefficients, min_samples=5)
    assert actual == pytest.approx(oracle(W_dec, features, truth, coefficients, 5), abs=1e-5)
    assert len(actual) == 9


@pytest.mark.parametrize("seed", range(3))
def test_two_levels_against_the_oracle(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = hierarchical_features(5, 1, 2, 0, depth=2, parent_rate=0.9, child_rate=0.4, generator=generator)
    _, coefficients = truth.sample(80, generator)
    W_dec = torch.randn(7, 5, generator=generator)
    features = torch.randn(80, 7, generator=generator).relu()
    actual = ground_truth_metrics(W_dec, features, truth, coefficients, min_samples=3)
    assert actual == pytest.approx(oracle(W_dec, features, truth, coefficients, 3), abs=1e-5)
    assert len(actual) == 13


def test_absorption_by_hand():
    """The parent is silent in 3 of 4 samples with the child, and in 1 of 2 without."""
    truth = truth_of([-1, 0])
    coefficients = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0]] * 2 + [[0.0, 0.0]] * 2)
    features = torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    metrics = ground_truth_metrics(3 * torch.eye(8)[:2], features, truth, coefficients, min_samples=2)
    assert metrics["absorption_rate"] == pytest.approx(3 / 4)
    assert metrics["excess_absorption"] == pytest.approx(3 / 4 - 1 / 2)
    assert metrics["parent_recall"] == pytest.approx(2 / 6)
    assert metrics["child_recall"] == 1
    assert metrics["f1"] == pytest.approx((2 * 2 / (6 + 3) + 1) / 2)
    assert (metrics["mcc"], metrics["mcc_parent"], metrics["mcc_child"]) == pytest.approx((1, 1, 1))


def test_two_levels_by_hand():
    """The root is silent where its child is on; that child never is, whether its own child is on or not."""
    truth = truth_of([-1, 0, 1])
    coefficients = torch.tensor([[1.0, 1, 1]] * 3 + [[1.0, 1, 0]] * 3 + [[1.0, 0, 0]] * 4)
    features = coefficients.clone()
    features[:6, 0] = 0
    metrics = ground_truth_metrics(torch.eye(8)[:3], features, truth, coefficients, min_samples=3)
    assert metrics["absorption_rate_level_1"] == metrics["excess_absorption_level_1"] == 1
    assert metrics["absorption_rate_level_2"] == metrics["excess_absorption_level_2"] == 0
    assert metrics["absorption_rate"] == metrics["excess_absorption"] == 1 / 2
    assert metrics["parent_recall"] == pytest.approx((4 / 10 + 1) / 2)


@pytest.mark.parametrize("n_features", [2, 300])
def test_the_dictionary_may_be_far_smaller_or_larger_than_the_truth(n_features):
    """Its first two features are the true ones of a parent and its child; all others look elsewhere and never fire."""
    truth = truth_of([-1, 0, 0, 0, -1, -1], d_in=400)
    coefficients = torch.zeros(40, 6)
    coefficients[:, 0] = 1
    coefficients[:20, 1] = 1
    coefficients[20:30, 2] = 1
    coefficients[:, 4] = torch.arange(40) % 2
    W_dec = torch.cat([torch.eye(400)[:2], torch.eye(400)[100:]])[:n_features]
    features = torch.zeros(40, n_features)
    features[:, :2] = coefficients[:, :2]
    metrics = ground_truth_metrics(W_dec, features, truth, coefficients)
    assert metrics["mcc"] == pytest.approx(2 / 6)
    assert metrics["f1"] == pytest.approx(2 / 4)
    assert (metrics["parent_recall"], metrics["child_recall"]) == (1, 1 / 2)
    assert metrics["absorption_rate"] == 0
    assert metrics["uniqueness"] == 2 / n_features


def test_features_that_share_a_true_one_are_not_unique():
    """Opposite directions count as the same one, as in SAELens."""
    W_dec = torch.eye(8)[[0, 0, 1, 1]] * torch.tensor([[1.0], [2.0], [1.0], [-1.0]])
    metrics = ground_truth_metrics(W_dec, torch.zeros(5, 4), truth_of([-1, -1, -1]), torch.zeros(5, 3))
    assert metrics["uniqueness"] == 1 / 2


def test_pairs_with_too_few_samples_do_not_count():
    truth = truth_of([-1, 0])
    coefficients = torch.tensor([[1.0, 1.0]] * 12 + [[1.0, 0.0]] * 9)
    metrics = ground_truth_metrics(torch.eye(8)[:2], coefficients, truth, coefficients)
    assert metrics["absorption_rate"] is metrics["excess_absorption"] is None
    assert metrics["parent_recall"] == 1


def test_a_pair_without_any_sample_never_counts():
    truth = truth_of([-1, 0, 0])
    coefficients = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    metrics = ground_truth_metrics(torch.eye(8)[:3], coefficients, truth, coefficients, min_samples=0)
    assert metrics["absorption_rate"] == metrics["excess_absorption"] == 0


@pytest.mark.parametrize("n", [0, 5])
def test_features_that_are_never_on_have_cosines_alone(n):
    metrics = ground_truth_metrics(torch.eye(8)[:2], torch.zeros(n, 2), truth_of([-1, 0]), torch.zeros(n, 2))
    assert {name for name, value in metrics.items() if value is not None} == {
        "mcc",
        "mcc_parent",
        "mcc_child",
        "uniqueness",
    }


def test_without_a_hierarchy_there_is_nothing_to_absorb():
    truth = truth_of([-1, -1, -1])
    coefficients = (torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    coefficients[:, 2] = 0.0  # never on
    metrics = ground_truth_metrics(torch.eye(8)[:3], coefficients, truth, coefficients)
    assert {name: value for name, value in metrics.items() if value is not None} == {
        "mcc": pytest.approx(1.0), "f1": pytest.approx(1.0), "uniqueness": 1,
    }  # fmt: skip
    json.dumps(metrics, allow_nan=False)
