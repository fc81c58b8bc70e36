"""The boundary that torch sees for a sparse x: as `topk_ortho.custom_ops`, over coordinates.

    topk_ortho::sparse_topk_pairs    -> the selected pairs whose cosine is not 0, padded; the cosines are differentiable
    topk_ortho::sparse_max_cosine    -> for every column its largest cosine to another column, and which column that is
    topk_ortho::sum_of_squares       -> sum of the squared cosines of all pairs
    topk_ortho::sparse_pair_gradient, topk_ortho::sum_of_squares_gradient    their gradients in the values of x

`topk_ortho.backends.sparse.coordinates.Coordinates` cross the boundary as their fields, in their order.
"""

from typing import Any, cast

import torch
from torch import Tensor

from topk_ortho.backends.base import MaxCosine, WeightedPairs
from topk_ortho.backends.registry import BACKENDS
from topk_ortho.backends.sparse import closed_form
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.coordinates import Coordinates
from topk_ortho.backends.sparse.gradient import pair_gradient
from topk_ortho.backends.sparse.max_cosine import max_cosine
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.sparse.selection import topk_pairs
from topk_ortho.custom_ops import (
    MAY_READ_ON_THE_HOST,
    QUERY,
    SELECTION,
    WEIGHTED_PAIRS,
    fake_max_cosine,
    fake_selection,
    partner_pairs,
    refuse_nan,
    refuse_second_derivatives,
    refuse_vmap,
    weighted_pairs,
)
from topk_ortho.definitions import Query, accumulation_dtype
from topk_ortho.selection import Selection

_COORDINATES = "Tensor samples, Tensor features, Tensor values, SymInt n_samples, SymInt n_features"
_N_COORDINATES = len(Coordinates._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[Coordinates, tuple[Any, ...]]:
    """The coordinates that arguments begin with, and the rest."""
    return Coordinates(*arguments[:_N_COORDINATES]), arguments[_N_COORDINATES:]


def _slabs() -> Slabs:
    return cast(SparseBackend, BACKENDS["sparse"]).slabs


@torch.library.custom_op(
    "topk_ortho::sparse_topk_pairs",
    mutates_args=(),
    schema=f"({_COORDINATES}, SymInt size, {QUERY}, Tensor? priority, bool is_ordered) -> {SELECTION}",
    tags=MAY_READ_ON_THE_HOST,
)
def sparse_topk_pairs(*arguments: Any) -> Selection:
    """See `topk_ortho.backends.sparse.selection`."""
    x, (size, *query, priority, is_ordered) = _split(arguments)
    refuse_nan(priority)
    return topk_pairs(x, size, Query(*query), is_ordered=is_ordered, slabs=_slabs())


@sparse_topk_pairs.register_fake
def _(*arguments: Any) -> Selection:
    x, (size, *_) = _split(arguments)
    return fake_selection(x.values, size, x.n_features)


@torch.library.custom_op(
    "topk_ortho::sparse_max_cosine",
    mutates_args=(),
    schema=f"({_COORDINATES}, Tensor? permutation, SymInt n_chunks) -> (Tensor, Tensor, Tensor)",
    tags=MAY_READ_ON_THE_HOST,
)
def sparse_max_cosine(*arguments: Any) -> MaxCosine:
    """See `topk_ortho.backends.sparse.max_cosine`; chunks are nearly equal parts of `permutation`."""
    x, (permutation, n_chunks) = _split(arguments)
    return max_cosine(x, None if permutation is None else permutation.tensor_split(n_chunks), _slabs())


@sparse_max_cosine.register_fake
def _(*arguments: Any) -> MaxCosine:
    x, _ = _split(arguments)
    return fake_max_cosine(x.values, x.n_features)


@torch.library.custom_op(
    "topk_ortho::sparse_pair_gradient",
    mutates_args=(),
    schema=f"({_COORDINATES}, {WEIGHTED_PAIRS}) -> Tensor",
    tags=MAY_READ_ON_THE_HOST,
)
def sparse_pair_gradient(*arguments: Any) -> Tensor:
    """See `topk_ortho.backends.sparse.gradient`."""
    x, pairs = _split(arguments)
    return pair_gradient(x, WeightedPairs(*pairs), _slabs())


@torch.library.custom_op(
    "topk_ortho::sum_of_squares", mutates_args=(), schema=f"({_COORDINATES}) -> Tensor", tags=MAY_READ_ON_THE_HOST
)
def sum_of_squares(*coordinates: Any) -> Tensor:
    """See `topk_ortho.backends.sparse.closed_form`."""
    return closed_form.sum_of_squares(Coordinates(*coordinates), _slabs())


@sum_of_squares.register_fake
def _(*coordinates: Any) -> Tensor:
    values = Coordinates(*coordinates).values
    return values.new_empty((), dtype=accumulation_dtype(values))


@torch.library.custom_op(
    "topk_ortho::sum_of_squares_gradient",
    mutates_args=(),
    schema=f"({_COORDINATES}, Tensor grad) -> Tensor",
    tags=MAY_READ_ON_THE_HOST,
)
def sum_of_squares_gradient(*arguments: Any) -> Tensor:
    """See `topk_ortho.backends.sparse.closed_form`."""
    x, (grad,) = _split(arguments)
    return closed_form.sum_of_squares_gradient(x, grad, _slabs())


@sparse_pair_gradient.register_fake
@sum_of_squares_gradient.register_fake
def _(*arguments: Any) -> Tensor:
    x, _ = _split(arguments)
    return torch.empty_like(x.values)


def _in_values(grad: Tensor | None, n_arguments: int) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of an op, coordinates first: `grad` for their values, None for the others."""
    return tuple(grad if i == Coordinates._fields.index("values") else None for i in range(n_arguments))


def _save_coordinates(ctx: Any, inputs: tuple[Any, ...], *others: Tensor | None) -> None:
    x, _ = _split(inputs)
    ctx.save_for_backward(x.samples, x.features, x.values, *others)
    ctx.shape, ctx.n_arguments = (x.n_samples, x.n_features), len(inputs)


def _saved_coordinates(ctx: Any) -> tuple[Coordinates, tuple[Any, ...]]:
    samples, features, values, *others = ctx.saved_tensors
    return Coordinates(samples, features, values, *ctx.shape), tuple(others)


def _setup_topk_pairs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    selection = Selection(*output)
    ctx.mark_non_differentiable(selection.threshold, selection.tau, selection.norms, selection.state)
    ctx.set_materialize_grads(False)  # else there would be zeros for every other output, as long as the list of pairs
    *_, priority, _is_ordered = inputs
    _save_coordinates(ctx, inputs, selection.rows, selection.cols, priority)


def _backward_topk_pairs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, (rows, cols, priority) = _saved_coordinates(ctx)
    grad = None
    if grads[0] is not None:
        grad = sparse_pair_gradient(*x, *weighted_pairs(rows, cols, grads[0], priority))
    return _in_values(grad, ctx.n_arguments)


def _setup_max_cosine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    result = MaxCosine(*output)
    ctx.mark_non_differentiable(result.norms)
    ctx.set_materialize_grads(False)
    _save_coordinates(ctx, inputs, result.partners)


def _backward_max_cosine(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, (partners,) = _saved_coordinates(ctx)
    grad = None
    if grads[0] is not None:
        grad = sparse_pair_gradient(*x, *partner_pairs(partners, grads[0]))
    return _in_values(grad, ctx.n_arguments)


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_coordinates(ctx, inputs)


def _backward_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, _ = _saved_coordinates(ctx)
    return _in_values(sum_of_squares_gradient(*x, grad), ctx.n_arguments)


sparse_topk_pairs.register_autograd(_backward_topk_pairs, setup_context=_setup_topk_pairs)
sparse_max_cosine.register_autograd(_backward_max_cosine, setup_context=_setup_max_cosine)
sum_of_squares.register_autograd(_backward_sum, setup_context=_setup_sum)
for _op in (sparse_pair_gradient, sum_of_squares_gradient):
    _op.register_autograd(refuse_second_derivatives)

for _op in (
    sparse_topk_pairs, sparse_max_cosine, sparse_pair_gradient, sum_of_squares, sum_of_squares_gradient,
):  # fmt: skip
    _op.register_vmap(refuse_vmap)
