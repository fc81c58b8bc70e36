"""The boundary that torch sees for a dense x: opaque custom ops with fake kernels and registered gradients.

    topk_ortho::topk_pairs      x -> the selected pairs, padded to k; the cosines are differentiable, the choice is not
    topk_ortho::max_cosine      x -> for every column its largest cosine to another column, and which column that is
    topk_ortho::pair_gradient   the gradient of both

They take plain, already checked arguments and look only at what tracing cannot see: the values of x and of priority.
Selection may read counts on the host and take a second pass, so the ops are opaque to the compiler. A `Query` crosses
the boundary as its fields, in their order.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from topk_ortho.backends.base import MaxCosine, WeightedPairs
from topk_ortho.backends.device import may_synchronize
from topk_ortho.backends.registry import backend_for
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.definitions import Query, accumulation_dtype
from topk_ortho.selection import Selection

MAY_READ_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)
QUERY = "SymInt k, float? tau, float? n_std, str similarity, str precision"
SELECTION = f"({', '.join(['Tensor'] * len(Selection._fields))})"
WEIGHTED_PAIRS = "Tensor rows, Tensor cols, Tensor row_weights, Tensor col_weights"


@torch.library.custom_op(
    "topk_ortho::topk_pairs",
    mutates_args=(),
    schema=f"(Tensor x, {QUERY}, str backend, Tensor? priority, Tensor? state, bool structural_zeros) -> {SELECTION}",
    tags=MAY_READ_ON_THE_HOST,
)
def topk_pairs(x: Tensor, *arguments: Any) -> Selection:
    """Select pairs by the backend of that name, see `topk_ortho.selection.Selection`."""
    *query, backend, priority, state, _structural_zeros = arguments
    synchronizes = may_synchronize(x.device, state)
    if synchronizes:
        refuse_nan(priority)
    asked = Query(*query)
    selection = backend_for(backend, x, is_selection=asked.n_std is None).topk_pairs(x, asked, state)
    if not synchronizes and priority is not None and priority.is_floating_point():
        selection = selection._replace(cosines=torch.where(priority.isnan().any(), torch.nan, selection.cosines))
    return selection


@topk_pairs.register_fake
def _(x: Tensor, *arguments: Any) -> Selection:
    *query, _backend, _priority, state, _structural_zeros = arguments
    return fake_selection(x, Query(*query).k, x.shape[1], state)


@torch.library.custom_op("topk_ortho::max_cosine", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def max_cosine(
    x: Tensor, permutation: Tensor | None, n_chunks: int, precision: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `topk_ortho.backends.base.MaxCosine`; chunks are `n_chunks` nearly equal parts of `permutation`."""
    chunks = None if permutation is None else permutation.tensor_split(n_chunks)
    return backend_for(backend, x).max_cosine(x, chunks, precision)  # type: ignore[arg-type]


@max_cosine.register_fake
def _(x: Tensor, *_arguments: Any) -> MaxCosine:
    return fake_max_cosine(x, x.shape[1])


@torch.library.custom_op(
    "topk_ortho::pair_gradient",
    mutates_args=(),
    schema=f"(Tensor x, Tensor norms, Tensor cosines, {WEIGHTED_PAIRS}, str backend, bool structural_zeros) -> Tensor",
)
def pair_gradient(x: Tensor, norms: Tensor, cosines: Tensor, *arguments: Any) -> Tensor:
    """See `topk_ortho.backends.base.Backend.pair_gradient`; with `structural_zeros` the gradient is 0 where x is 0."""
    *weighted, backend_name, structural_zeros = arguments
    if backend_name == "auto" and not structural_zeros:
        backend_name = "tiled"  # a gradient that is dense is the same work whatever zeros x has
    pairs, backend = WeightedPairs(*weighted), backend_for(backend_name, x)
    if structural_zeros and isinstance(backend, SparseBackend):  # it need not compute what is then set to 0
        return backend.structural_gradient(x, pairs)
    grad = backend.pair_gradient(x, norms, cosines, pairs)
    return grad.masked_fill_(x == 0, 0) if structural_zeros else grad


@pair_gradient.register_fake
def _(x: Tensor, *_arguments: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_topk_pairs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, *_query, backend, priority, _state, structural_zeros = inputs
    selection = Selection(*output)
    ctx.mark_non_differentiable(selection.threshold, selection.tau, selection.norms, selection.state)
    ctx.set_materialize_grads(False)  # else there would be zeros for every other output, as long as the list of pairs
    ctx.save_for_backward(x, selection.norms, selection.cosines, selection.rows, selection.cols, priority)
    ctx.backend, ctx.structural_zeros = backend, structural_zeros


def _backward_topk_pairs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norms, cosines, rows, cols, priority = ctx.saved_tensors
    grad = None
    if grads[0] is not None:
        pairs = weighted_pairs(rows, cols, grads[0], priority)
        grad = pair_gradient(x, norms, cosines, *pairs, ctx.backend, ctx.structural_zeros)
    return grad, *[None] * (len(Query._fields) + 4)


def _setup_max_cosine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    cosines, partners, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], norms, cosines, partners)
    ctx.backend = inputs[-1]


def _backward_max_cosine(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norms, cosines, partners = ctx.saved_tensors
    grad = None
    if grads[0] is not None:
        grad = pair_gradient(x, norms, cosines, *partner_pairs(partners, grads[0]), ctx.backend, False)
    return grad, *[None] * 4


topk_pairs.register_autograd(_backward_topk_pairs, setup_context=_setup_topk_pairs)
max_cosine.register_autograd(_backward_max_cosine, setup_context=_setup_max_cosine)


def fake_selection(values: Tensor, size: int, n_features: int, state: Tensor | None = None) -> Selection:
    """A selection of the right shapes and dtypes, for tracing; `values` are those of x."""
    dtype = accumulation_dtype(values)
    norms = values.new_empty(n_features, dtype=dtype)
    return Selection(
        cosines=values.new_empty(size, dtype=dtype),
        rows=values.new_empty(size, dtype=torch.int64),
        cols=values.new_empty(size, dtype=torch.int64),
        n_listed=values.new_empty((), dtype=torch.int64),
        n_selected=values.new_empty((), dtype=torch.int64),
        threshold=values.new_empty((), dtype=dtype),
        tau=values.new_empty((), dtype=dtype),
        norms=norms,
        state=norms.new_empty(0) if state is None else torch.empty_like(state),
    )


def fake_max_cosine(values: Tensor, n_features: int) -> MaxCosine:
    """A result of the right shapes and dtypes, for tracing; `values` are those of x."""
    cosines = values.new_empty(n_features, dtype=accumulation_dtype(values))
    return MaxCosine(cosines, torch.empty_like(cosines, dtype=torch.int64), torch.empty_like(cosines))


def refuse_nan(priority: Tensor | None) -> None:
    """Raise a ValueError if a priority is NaN; this waits for the device."""
    is_bad = priority.isnan() if priority is not None and priority.is_floating_point() else None
    if is_bad is not None and is_bad.any():
        raise ValueError(f"priority has {int(is_bad.sum())} NaN; every column needs a number")


def weighted_pairs(rows: Tensor, cols: Tensor, grad: Tensor, priority: Tensor | None) -> WeightedPairs:
    """Pairs with the gradient in their cosines; the column of higher priority gets none of it."""
    if priority is None:
        return WeightedPairs(rows, cols, grad, grad)
    of_rows, of_cols = priority.index_select(0, rows), priority.index_select(0, cols)
    return WeightedPairs(rows, cols, grad * (of_rows <= of_cols), grad * (of_cols <= of_rows))


def partner_pairs(partners: Tensor, grad: Tensor) -> WeightedPairs:
    """Every column with its most similar partner, and the gradient in their cosines."""
    columns = torch.arange(partners.numel(), device=partners.device)
    return WeightedPairs(columns, partners, grad, grad)


def refuse_second_derivatives(ctx: Any, *grads: Tensor) -> NoReturn:
    """Refuse to differentiate a gradient, and say why."""
    raise NotImplementedError(
        "topk_ortho ops have no second derivatives: differentiate their loss without create_graph=True"
    )


def refuse_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
    """Refuse torch.func.vmap, and say why."""
    raise NotImplementedError(
        "topk_ortho ops do not support torch.func.vmap: each matrix needs a selection of its own; loop over the batch"
    )


pair_gradient.register_autograd(refuse_second_derivatives)
for _op in (topk_pairs, max_cosine, pair_gradient):
    _op.register_vmap(refuse_vmap)
