"""The boundary that torch sees: opaque custom ops with fake kernels and registered gradients.

    topk_ortho::select_pairs    x -> the selected pairs, padded to k; `values` is differentiable, the selection is not
    topk_ortho::row_max         x -> for every column its largest cosine and the column that has it
    topk_ortho::pair_gradient   the gradient of both

They take plain, already checked arguments and look only at what tracing cannot see: the values of x and of priority.
Selection may read counts on the host and take a second pass, so the ops are opaque to the compiler.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from topk_ortho.backends import sparse
from topk_ortho.backends.base import Query, accumulation_dtype, may_wait
from topk_ortho.backends.registry import backend_for

MAY_READ_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("topk_ortho::select_pairs", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def select_pairs(
    x: Tensor,
    k: int,
    tau: float | None,
    n_std: float | None,
    similarity: str,
    precision: str,
    backend: str,
    priority: Tensor | None,
    state: Tensor | None,
    structural_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `topk_ortho.backends.base.Selection` for the outputs."""
    waits = may_wait(x.device, state)
    if waits:
        refuse_nan(priority)
    query = Query(k=k, tau=tau, n_std=n_std, similarity=similarity, precision=precision)  # type: ignore[arg-type]
    selection = backend_for(backend, x).select_pairs(x, query, state)
    if not waits and priority is not None and priority.is_floating_point():
        selection = selection._replace(values=torch.where(priority.isnan().any(), torch.nan, selection.values))
    return selection


@select_pairs.register_fake
def _(
    x: Tensor,
    k: int,
    tau: float | None,
    n_std: float | None,
    similarity: str,
    precision: str,
    backend: str,
    priority: Tensor | None,
    state: Tensor | None,
    structural_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x)
    rows, cols = x.new_empty(k, dtype=torch.int64), x.new_empty(k, dtype=torch.int64)
    values, norms = x.new_empty(k, dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)
    n_selected, threshold, tau_used = x.new_empty((), dtype=torch.int64), values.new_empty(()), values.new_empty(())
    next_state = norms.new_empty(0) if state is None else torch.empty_like(state)
    return values, rows, cols, n_selected, threshold, tau_used, norms, next_state


@torch.library.custom_op("topk_ortho::row_max", mutates_args=(), tags=MAY_READ_ON_THE_HOST)
def row_max(
    x: Tensor, permutation: Tensor | None, n_chunks: int, precision: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `topk_ortho.backends.base.RowMax`; chunks are `n_chunks` nearly equal parts of `permutation`."""
    chunks = None if permutation is None else permutation.tensor_split(n_chunks)
    return backend_for(backend, x).row_max(x, chunks, precision)  # type: ignore[arg-type]


@row_max.register_fake
def _(
    x: Tensor, permutation: Tensor | None, n_chunks: int, precision: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(x.shape[1], dtype=accumulation_dtype(x))
    return values, torch.empty_like(values, dtype=torch.int64), torch.empty_like(values)


@torch.library.custom_op("topk_ortho::pair_gradient", mutates_args=())
def pair_gradient(
    x: Tensor,
    norms: Tensor,
    rows: Tensor,
    cols: Tensor,
    values: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    backend: str,
    structural_zeros: bool = False,
) -> Tensor:
    """See `topk_ortho.backends.base.Backend.pair_gradient`; with `structural_zeros` it is 0 where x is 0."""
    chosen = backend_for(backend, x)
    if structural_zeros and chosen is sparse:
        return sparse.structural_gradient(x, rows, cols, grad_rows, grad_cols)
    grad = chosen.pair_gradient(x, norms, rows, cols, values, grad_rows, grad_cols)
    return grad.masked_fill_(x == 0, 0) if structural_zeros else grad


@pair_gradient.register_fake
def _(
    x: Tensor,
    norms: Tensor,
    rows: Tensor,
    cols: Tensor,
    values: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    backend: str,
    structural_zeros: bool = False,
) -> Tensor:
    return torch.empty_like(x)


def _setup_select_pairs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, *_, backend, priority, _state, structural_zeros = inputs
    values, rows, cols, _n_selected, threshold, tau, norms, state = output
    ctx.mark_non_differentiable(threshold, tau, norms, state)
    ctx.save_for_backward(x, norms, rows, cols, values, priority)
    ctx.backend, ctx.structural_zeros = backend, structural_zeros


def _backward_select_pairs(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, norms, rows, cols, values, priority = ctx.saved_tensors
    weights = held(grads[0], rows, cols, priority)
    grad = pair_gradient(x, norms, rows, cols, values, *weights, ctx.backend, ctx.structural_zeros)
    return grad, *[None] * 9


def _setup_row_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    values, partners, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(inputs[0], norms, values, partners)
    ctx.backend = inputs[-1]


def _backward_row_max(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, norms, values, partners = ctx.saved_tensors
    columns = torch.arange(partners.numel(), device=partners.device)
    grad = pair_gradient(x, norms, columns, partners, values, grads[0], grads[0], ctx.backend)
    return grad, *[None] * 4


select_pairs.register_autograd(_backward_select_pairs, setup_context=_setup_select_pairs)
row_max.register_autograd(_backward_row_max, setup_context=_setup_row_max)


def refuse_nan(priority: Tensor | None) -> None:
    """Raise if a column has no priority; reads the data."""
    is_bad = priority.isnan() if priority is not None and priority.is_floating_point() else None
    if is_bad is not None and is_bad.any():
        raise ValueError(f"priority has {int(is_bad.sum())} NaN; every column needs a number")


def held(grad: Tensor, rows: Tensor, cols: Tensor, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the row and the col column of each pair see of its gradient: nothing, if it is held constant."""
    if priority is None:
        return grad, grad
    priority_rows, priority_cols = priority[rows], priority[cols]
    return grad * (priority_rows <= priority_cols), grad * (priority_cols <= priority_rows)


def refuse_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
    """Say why, instead of looping."""
    raise NotImplementedError(
        "topk_ortho ops do not support torch.func.vmap: each matrix needs a selection of its own; loop over the batch"
    )


for _op in (select_pairs, row_max, pair_gradient):
    _op.register_vmap(refuse_vmap)
