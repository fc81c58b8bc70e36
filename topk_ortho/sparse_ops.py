"""The boundary that torch sees for a sparse x: as `topk_ortho.custom_ops`, over coordinates.

    topk_ortho::select_sparse_pairs      -> the selected pairs whose cosine is not 0, padded; `values` is differentiable
    topk_ortho::sparse_row_max           -> for every column its largest cosine and the column that has it
    topk_ortho::sum_of_squares           -> of the cosines of all pairs
    topk_ortho::sparse_pair_gradient, topk_ortho::sum_of_squares_gradient    the gradients in the values of x

Coordinates are those of `topk_ortho.backends.entries.Coordinates`.
"""

from typing import Any

import torch
from torch import Tensor

from topk_ortho.backends import sparse
from topk_ortho.backends.base import Query, accumulation_dtype
from topk_ortho.backends.entries import Coordinates
from topk_ortho.custom_ops import MAY_READ_ON_THE_HOST, held, refuse_nan, refuse_vmap


@torch.library.custom_op("topk_ortho::select_sparse_pairs", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def select_sparse_pairs(
    samples: Tensor,
    features: Tensor,
    values: Tensor,
    n_samples: int,
    n_features: int,
    size: int,
    k: int,
    tau: float | None,
    n_std: float | None,
    similarity: str,
    priority: Tensor | None,
    is_ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `topk_ortho.backends.sparse.SparseSelection` for the outputs."""
    refuse_nan(priority)
    query = Query(k=k, tau=tau, n_std=n_std, similarity=similarity)  # type: ignore[arg-type]
    x = Coordinates(samples, features, values, n_samples, n_features)
    return sparse.select_sparse_pairs(x, size, query, is_ordered)


@select_sparse_pairs.register_fake
def _(
    samples: Tensor,
    features: Tensor,
    values: Tensor,
    n_samples: int,
    n_features: int,
    size: int,
    k: int,
    tau: float | None,
    n_std: float | None,
    similarity: str,
    priority: Tensor | None,
    is_ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(values)
    cosines = values.new_empty(size, dtype=dtype)
    rows, cols = (values.new_empty(size, dtype=torch.int64) for _ in range(2))
    n_listed, n_selected = (values.new_empty((), dtype=torch.int64) for _ in range(2))
    threshold, tau_used = cosines.new_empty(()), cosines.new_empty(())
    return cosines, rows, cols, n_listed, n_selected, threshold, tau_used


@torch.library.custom_op("topk_ortho::sparse_row_max", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def sparse_row_max(
    samples: Tensor,
    features: Tensor,
    values: Tensor,
    n_samples: int,
    n_features: int,
    permutation: Tensor | None,
    n_chunks: int,
) -> tuple[Tensor, Tensor]:
    """Values and partners of `topk_ortho.backends.base.RowMax`; chunks are nearly equal parts of `permutation`."""
    chunks = None if permutation is None else permutation.tensor_split(n_chunks)
    return sparse.sparse_row_max(Coordinates(samples, features, values, n_samples, n_features), chunks)[:2]


@sparse_row_max.register_fake
def _(
    samples: Tensor,
    features: Tensor,
    values: Tensor,
    n_samples: int,
    n_features: int,
    permutation: Tensor | None,
    n_chunks: int,
) -> tuple[Tensor, Tensor]:
    highest = values.new_empty(n_features, dtype=accumulation_dtype(values))
    return highest, torch.empty_like(highest, dtype=torch.int64)


@torch.library.custom_op("topk_ortho::sparse_pair_gradient", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def sparse_pair_gradient(
    samples: Tensor,
    features: Tensor,
    values: Tensor,
    n_samples: int,
    n_features: int,
    rows: Tensor,
    cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
) -> Tensor:
    """See `topk_ortho.backends.sparse.sparse_pair_gradient`."""
    x = Coordinates(samples, features, values, n_samples, n_features)
    return sparse.sparse_pair_gradient(x, rows, cols, grad_rows, grad_cols)


@sparse_pair_gradient.register_fake
def _(
    samples: Tensor,
    features: Tensor,
    values: Tensor,
    n_samples: int,
    n_features: int,
    rows: Tensor,
    cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
) -> Tensor:
    return torch.empty_like(values)


@torch.library.custom_op("topk_ortho::sum_of_squares", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def sum_of_squares(samples: Tensor, features: Tensor, values: Tensor, n_samples: int, n_features: int) -> Tensor:
    """See `topk_ortho.backends.sparse.sum_of_squares`."""
    return sparse.sum_of_squares(Coordinates(samples, features, values, n_samples, n_features))


@sum_of_squares.register_fake
def _(samples: Tensor, features: Tensor, values: Tensor, n_samples: int, n_features: int) -> Tensor:
    return values.new_empty((), dtype=accumulation_dtype(values))


@torch.library.custom_op("topk_ortho::sum_of_squares_gradient", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def sum_of_squares_gradient(
    samples: Tensor, features: Tensor, values: Tensor, n_samples: int, n_features: int, grad: Tensor
) -> Tensor:
    """See `topk_ortho.backends.sparse.sum_of_squares_gradient`."""
    return sparse.sum_of_squares_gradient(Coordinates(samples, features, values, n_samples, n_features), grad)


@sum_of_squares_gradient.register_fake
def _(samples: Tensor, features: Tensor, values: Tensor, n_samples: int, n_features: int, grad: Tensor) -> Tensor:
    return torch.empty_like(values)


def _setup_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    samples, features, values, n_samples, n_features, *_, priority, _is_ordered = inputs
    _cosines, rows, cols, _n_listed, _n_selected, threshold, tau = output
    ctx.mark_non_differentiable(threshold, tau)
    ctx.save_for_backward(samples, features, values, rows, cols, priority)
    ctx.shape = n_samples, n_features


def _backward_select(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    samples, features, values, rows, cols, priority = ctx.saved_tensors
    weights = held(grads[0], rows, cols, priority)
    grad = sparse_pair_gradient(samples, features, values, *ctx.shape, rows, cols, *weights)
    return None, None, grad, *[None] * 9


def _setup_row_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    samples, features, values, n_samples, n_features, *_ = inputs
    _highest, partners = output
    ctx.save_for_backward(samples, features, values, partners)
    ctx.shape = n_samples, n_features


def _backward_row_max(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    samples, features, values, partners = ctx.saved_tensors
    columns = torch.arange(partners.numel(), device=partners.device)
    grad = sparse_pair_gradient(samples, features, values, *ctx.shape, columns, partners, grads[0], grads[0])
    return None, None, grad, *[None] * 4


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.shape = inputs[3:]


def _backward_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, sum_of_squares_gradient(*ctx.saved_tensors, *ctx.shape, grad), None, None


select_sparse_pairs.register_autograd(_backward_select, setup_context=_setup_select)
sparse_row_max.register_autograd(_backward_row_max, setup_context=_setup_row_max)
sum_of_squares.register_autograd(_backward_sum, setup_context=_setup_sum)

for _op in (
    select_sparse_pairs, sparse_row_max, sparse_pair_gradient, sum_of_squares, sum_of_squares_gradient,
):  # fmt: skip
    _op.register_vmap(refuse_vmap)
