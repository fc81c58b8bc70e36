"""Features in rows: each op with dim=0 is the op on the transposed x."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import topk_ortho
from tests import oracle
from tests.inputs import normal
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho import MaxCosineLoss, RefreshedPairs, SparseFeatures, TopKOrthoLoss

LOSSES: dict[str, Callable[..., Any]] = {
    "topk_ortho_loss": lambda x, dim: topk_ortho.topk_ortho_loss(x, 0.1, dim=dim),
    "topk_pairs": lambda x, dim: topk_ortho.topk_pairs(x, 0.1, dim=dim).values.square().sum(),
    "max_cosine_loss": lambda x, dim: topk_ortho.max_cosine_loss(x, dim=dim),
    "nearest_columns": lambda x, dim: topk_ortho.nearest_columns(x, dim=dim).cosines.sum(),
    "TopKOrthoLoss": lambda x, dim: TopKOrthoLoss(0.1, dim=dim)(x),
    "TopKOrthoLoss, kept": lambda x, dim: TopKOrthoLoss(0.1, dim=dim, refresh="adaptive")(x),
    "RefreshedPairs": lambda x, dim: RefreshedPairs(0.1, dim=dim)(x).values.square().sum(),
    "MaxCosineLoss": lambda x, dim: MaxCosineLoss(dim=dim)(x),
}


@pytest.mark.parametrize("name", LOSSES)
def test_rows_are_features(name: str):
    W = normal(30, 7)
    results = []
    for dim, x in ((1, W.T.clone()), (0, W.clone())):
        x.requires_grad_()
        value = LOSSES[name](x, dim)
        (gradient,) = torch.autograd.grad(value, x)
        results.append((value, gradient if dim == 0 else gradient.T))
    for of_columns, of_rows in zip(*results, strict=True):
        torch.testing.assert_close(of_rows, of_columns)


def test_pairs_are_pairs_of_rows():
    W = normal(30, 7)
    pairs = topk_ortho.topk_pairs(W, k=40, dim=0)
    expected = oracle.select(float64(W.T), 40)
    assert pairs.n_features == 30
    assert_within(actual=pairs.values.abs(), expected=abs(expected.values), bound=cosine_bound(W.T))


def test_priority_is_of_rows():
    W = normal(30, 7).requires_grad_()
    priority = torch.zeros(30)
    priority[4] = 1.0
    topk_ortho.topk_ortho_loss(W, 1.0, dim=0, priority=priority).backward()
    assert W.grad is not None
    assert (W.grad.abs().sum(dim=1) == 0).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("dim", [2, -1, True, "0", 0.0, None], ids=str)
def test_another_dim_is_refused(dim: Any):
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"dim must be 1 \(features are columns of x\) or 0 .*, got"):
            loss(normal(30, 7), dim)


@pytest.mark.parametrize(
    "x", [SparseFeatures.from_dense(torch.eye(4)), torch.eye(4).to_sparse_csr(), torch.eye(4).to_sparse()]
)
def test_rows_of_a_sparse_x_are_refused(x: Any):
    with pytest.raises(ValueError, match="dim must be 1 for a sparse x, whose features are its columns; got 0"):
        topk_ortho.topk_pairs(x, dim=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5), r"at least 1 column and 2 rows, which are its features as dim=0, got shape \[1, 5\]"),
        ((5, 0), r"at least 1 column and 2 rows, which are its features as dim=0, got shape \[5, 0\]"),
        ((5,), r"2-D \[N, M\] with features in rows, as dim=0, got shape \[5\]"),
    ],
)
def test_shapes_are_named_as_they_came(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        topk_ortho.topk_pairs(torch.ones(shape), dim=0)
