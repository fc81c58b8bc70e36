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
    absorption, excess = [], []
    for c in children:
        p = parent[c]
        with_child = [s for s in range(len(on)) if on[s][c]]
        alone = [s for s in range(len(on)) if on[s][p] and not any(on[s][o] for o in children if parent[o] == p)]
        if len(with_child) >= min_samples and len(alone) >= min_samples:
            rate = mean([not fires[s][p] for s in with_child])
            absorption.append(rate)
            excess.append(rate - mean([not fires[s][p] for s in alone]))
    recall = [share_of(lambda s, p=p: fires[s][p], lambda s, p=p: on[s][p]) for p in parents]
    parts = {
        "mcc": own,
        "mcc_parent": [own[p] for p in parents],
        "mcc_child": [own[c] for c in children],
        "f1": f1,
        "parent_recall": [r for r in recall if r is not None],
        "absorption_rate": absorption,
        "excess_absorption": excess,
    }
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
    assert len(actual) == 7


def test_absorption_by_hand():
    """The parent is silent in 3 of 4 samples with the child, and in 1 of 2 without."""
    truth = truth_of([-1, 0])
    coefficients = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0]] * 2 + [[0.0, 0.0]] * 2)
    features = torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    metrics = ground_truth_metrics(3 * torch.eye(8)[:2], features, truth, coefficients, min_samples=2)
    assert metrics["absorption_rate"] == pytest.approx(3 / 4)
    assert metrics["excess_absorption"] == pytest.approx(3 / 4 - 1 / 2)
    assert metrics["parent_recall"] == pytest.approx(2 / 6)
    assert metrics["f1"] == pytest.approx((2 * 2 / (6 + 3) + 1) / 2)
    assert (metrics["mcc"], metrics["mcc_parent"], metrics["mcc_child"]) == pytest.approx((1, 1, 1))


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
    assert {name for name, value in metrics.items() if value is not None} == {"mcc", "mcc_parent", "mcc_child"}


def test_without_a_hierarchy_there_is_nothing_to_absorb():
    truth = truth_of([-1, -1, -1])
    coefficients = (torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    coefficients[:, 2] = 0.0  # never on
    metrics = ground_truth_metrics(torch.eye(8)[:3], coefficients, truth, coefficients)
    assert {name: value for name, value in metrics.items() if value is not None} == {
        "mcc": pytest.approx(1.0), "f1": pytest.approx(1.0),
    }  # fmt: skip
    json.dumps(metrics, allow_nan=False)
