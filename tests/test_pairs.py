"""The result of a selection, and `pair_jaccard`."""

import pytest
import torch

from tests.inputs import normal
from topk_ortho import TopKPairs, pair_jaccard, topk_pairs


def pairs_of(*pairs, n_features=10):
    rows, cols = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return TopKPairs(rows, cols, torch.ones(len(pairs)), torch.tensor(0.5), None, n_features, len(pairs))


def test_fields():
    assert TopKPairs._fields == ("rows", "cols", "values", "threshold", "tau", "n_features", "k")


@pytest.mark.parametrize(
    ("tau", "kind"),
    [(None, type(None)), (0.25, float), (0, float), ("adaptive", float)],
    ids=["none", "number", "integer", "adaptive"],
)
def test_tau_is_what_was_used(tau, kind, small_backend):
    pairs = topk_pairs(normal(9, 11), k=5, tau=tau, backend=small_backend)
    assert type(pairs.tau) is kind
    assert tau in ("adaptive", None) or pairs.tau == tau


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(pairs_of((0, 1), (2, 3)), pairs_of((0, 1), (2, 3)), 1.0, id="equal"),
        pytest.param(pairs_of((0, 1), (2, 3)), pairs_of((2, 3), (0, 1)), 1.0, id="order_does_not_matter"),
        pytest.param(pairs_of((0, 1)), pairs_of((0, 2)), 0.0, id="disjoint"),
        pytest.param(pairs_of((1, 2)), pairs_of((0, 2), (1, 3)), 0.0, id="one_index_in_common_is_not_a_pair"),
        pytest.param(pairs_of((0, 1), (0, 2), (0, 3)), pairs_of((0, 1), (4, 5)), 0.25, id="one_of_four"),
        pytest.param(pairs_of(), pairs_of(), 1.0, id="both_empty"),
        pytest.param(pairs_of(), pairs_of((0, 1)), 0.0, id="one_empty"),
    ],
)
def test_jaccard(a, b, expected):
    assert pair_jaccard(a, b) == pair_jaccard(b, a) == expected
    assert isinstance(pair_jaccard(a, b), float)


def test_jaccard_of_selections():
    x = normal(9, 30)
    a, b = (topk_pairs(x, k=k) for k in (20, 50))
    assert pair_jaccard(a, b) == 0.4


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        pytest.param(None, pairs_of(), TypeError, "a must be a TopKPairs, got NoneType", id="a_type"),
        pytest.param(pairs_of(), (1, 2), TypeError, "b must be a TopKPairs, got tuple", id="b_type"),
        pytest.param(
            pairs_of(n_features=4), pairs_of(n_features=5), ValueError, "same n_features, got 4 and 5", id="n_features"
        ),
    ],
)
def test_jaccard_refuses(a, b, error, message):
    with pytest.raises(error, match=message):
        pair_jaccard(a, b)
