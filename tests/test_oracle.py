"""The oracle against cases worked out by hand."""

import numpy as np
import pytest
import torch

from tests import oracle

# columns a = (1, 0), b = (0, 2), c = (3, 4): cosines ab = 0, ac = 3/5, bc = 4/5
X = np.array([[1.0, 0.0, 3.0], [0.0, 2.0, 4.0]])


def test_cosines():
    np.testing.assert_allclose(oracle.cosines(X), [0.0, 0.6, 0.8], rtol=0, atol=1e-15)


def test_all_pairs_come_in_row_col_order():
    rows, cols = oracle.all_pairs(4)
    assert list(zip(rows, cols, strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        pytest.param([3e200, 4e200], [0.6, 0.8], id="square_overflows"),
        pytest.param([0.0, 0.0], [0.0, 0.0], id="dead"),
        pytest.param([3e-13, 4e-13], [0.3, 0.4], id="norm_below_eps"),
        pytest.param([-3.0, 4.0], [-0.6, 0.8], id="signed"),
    ],
)
def test_normalized(column, expected):
    np.testing.assert_allclose(oracle.normalized(np.array([column]).T)[:, 0], expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("n_features", "fraction", "expected"),
    [
        pytest.param(4, 1.0, 6, id="all"),
        pytest.param(10, 1e-3, 1, id="at_least_one"),
        pytest.param(5, 0.5, 5, id="half"),
        pytest.param(100, 1e-3, 4, id="9.9_entries_are_4_pairs"),
        pytest.param(5, 0.37, 3, id="7.4_entries_are_3_pairs"),
    ],
)
def test_k_of(n_features, fraction, expected):
    assert oracle.k_of(n_features, fraction) == expected


def test_tau_of():
    values = np.array([0.1, -0.3, 0.5])  # |values|: mean 0.3, population variance (0.04 + 0 + 0.04) / 3
    assert oracle.tau_of(values, None) is None
    assert oracle.tau_of(values, 0.2) == 0.2
    assert oracle.tau_of(values, "adaptive", 2.0) == pytest.approx(0.3 + 2 * (0.08 / 3) ** 0.5, rel=1e-15)


# a = (1, 0), b = (0, 1), c = (-1, 0), d = (2, 0): ab = 0, ac = -1, ad = 1, bc = 0, bd = 0, cd = -1
SIGNED = np.array([[1.0, 0.0, -1.0, 2.0], [0.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("arguments", "pairs", "threshold"),
    [
        pytest.param({"k": 2}, [(0, 2), (0, 3)], 1.0, id="ties_by_row_col"),
        pytest.param({"k": 5}, [(0, 2), (0, 3), (2, 3), (0, 1), (1, 2)], 0.0, id="zeros_come_last"),
        pytest.param({"k": 5, "tau": 0.0}, [(0, 2), (0, 3), (2, 3)], 0.0, id="tau_is_strict"),
        pytest.param({"k": 5, "tau": 0.3}, [(0, 2), (0, 3), (2, 3)], 0.3, id="fewer_than_k_pass"),
        pytest.param({"k": 2, "similarity": "positive"}, [(0, 3)], 0.0, id="positive_drops_the_rest"),
        pytest.param(
            {"k": 4, "tau": "adaptive", "n_std": 0.5}, [(0, 2), (0, 3), (2, 3)], 0.75, id="mean_half_std_half"
        ),
        pytest.param({"k": 4, "tau": "adaptive", "n_std": 1.0}, [], 1.0, id="tau_equals_the_largest"),
    ],
)
def test_select(arguments, pairs, threshold):
    selected = oracle.select(SIGNED, **arguments)
    assert list(zip(selected.rows, selected.cols, strict=True)) == pairs
    assert selected.threshold == threshold
    signed = {(0, 1): 0, (0, 2): -1, (0, 3): 1, (1, 2): 0, (1, 3): 0, (2, 3): -1}
    assert selected.values.tolist() == [signed[pair] for pair in pairs]


@pytest.mark.parametrize(
    ("values", "reduction", "expected"),
    [
        pytest.param([0.5, -0.5, 1.0], "sum", 1.5, id="sum"),
        pytest.param([0.5, -0.5, 1.0], "mean", 0.5, id="mean"),
        pytest.param([], "mean", 0.0, id="mean_of_none"),
    ],
)
def test_loss_of(values, reduction, expected):
    assert oracle.loss_of(np.array(values), reduction) == expected


def test_max_cosines():
    values, partners = oracle.max_cosines(X)
    np.testing.assert_allclose(values, [0.6, 0.8, 0.8], rtol=1e-15)
    assert partners.tolist() == [2, 2, 1]


def test_max_cosines_of_chunks_takes_the_lowest_of_equals():
    values, partners = oracle.max_cosines(np.ones((2, 5)), chunks=[[3, 0, 1], [4, 2]])
    np.testing.assert_allclose(values, np.ones(5), rtol=1e-15)
    assert partners.tolist() == [1, 0, 4, 0, 2]


# one pair, a = (1, 0) and c = (3, 4): loss = cos**2, d cos / d a = (c_hat - cos a_hat) / |a| = (0, 0.8),
# d cos / d c = (a_hat - cos c_hat) / |c| = (0.64, -0.48) / 5; times 2 cos = 1.2
GRAD_A, GRAD_C = [0.0, 0.96], [0.1536, -0.1152]


@pytest.mark.parametrize(
    ("priority", "expected_a", "expected_c"),
    [
        pytest.param(None, GRAD_A, GRAD_C, id="none"),
        pytest.param([1, 0, 1], GRAD_A, GRAD_C, id="equal"),
        pytest.param([2, 0, 1], [0.0, 0.0], GRAD_C, id="row_is_held"),
        pytest.param([1, 0, 2], GRAD_A, [0.0, 0.0], id="col_is_held"),
    ],
)
def test_loss_gradient(priority, expected_a, expected_c):
    priority = None if priority is None else np.array(priority)
    gradient = oracle.loss_gradient(X, np.array([0]), np.array([2]), "mean", priority)
    np.testing.assert_allclose(gradient.T, [expected_a, [0.0, 0.0], expected_c], rtol=0, atol=1e-15)


def test_loss_gradient_reductions():
    rows, cols = np.array([0, 1]), np.array([2, 2])
    total, mean = (oracle.loss_gradient(X, rows, cols, reduction) for reduction in ("sum", "mean"))
    np.testing.assert_allclose(total, 2 * mean, rtol=1e-15)


def test_loss_gradient_of_no_pair_is_zero():
    none = np.array([], dtype=np.int64)
    assert not oracle.loss_gradient(X, none, none, "mean").any()


def test_max_cosine_gradient():
    gradient = oracle.max_cosine_gradient(
        X[:, [0, 2]], np.array([1, 0])
    )  # both columns choose the one pair: the mean is its cos**2
    np.testing.assert_allclose(gradient.T, [GRAD_A, GRAD_C], rtol=0, atol=1e-15)


def test_pair_values_agree_with_cosines():
    rows, cols = oracle.all_pairs(3)
    values = oracle.pair_values(torch.tensor(X), rows, cols)
    np.testing.assert_allclose(values.numpy(), oracle.cosines(X), rtol=0, atol=1e-15)
