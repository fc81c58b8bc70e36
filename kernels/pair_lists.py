"""The lists that `topk_ortho.kernels.pair_gradient` gathers from: each pair once for both columns, ordered by column.

    targets = [rows, cols],    and N where the column has weight 0
    order = argsort(targets),    stable
    partners = [cols, rows][order]
    weights = [row_weights, col_weights][order]
    values = [cosines, cosines][order]
    offsets[j] = number of targets < j
    inverse[j] = 1 / max(norm[j], EPS),    and 0 where norm[j] is 0

`pair_targets` writes the targets, torch sorts them, and `pair_lists` writes the rest. The operators of torch that do
the same are about twenty, and the host takes longer to launch them than the device to run them, unless pairs are many.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch

_BLOCK = 256  # not measured


@triton.jit
def _pair_targets_kernel(
    rows_ptr, cols_ptr, row_weights_ptr, col_weights_ptr,  # [p] int64 x 2, float32 x 2
    targets_ptr,                                           # [2 p] int32
    p, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < p
    row = tl.load(rows_ptr + pair, mask=mask)
    col = tl.load(cols_ptr + pair, mask=mask)
    # a weight that is NaN is not 0, so that it reaches the gradient
    row = tl.where(tl.load(row_weights_ptr + pair, mask=mask) == 0.0, N, row)
    col = tl.where(tl.load(col_weights_ptr + pair, mask=mask) == 0.0, N, col)
    tl.store(targets_ptr + pair, row.to(tl.int32), mask=mask)
    tl.store(targets_ptr + (p + pair), col.to(tl.int32), mask=mask)


def pair_targets(rows: Tensor, cols: Tensor, row_weights: Tensor, col_weights: Tensor, n_features: int) -> Tensor:
    """The columns that pairs [p] belong to, int32 [2 p]: first those of rows, then those of cols.

    It is `n_features` where the weight is 0. All tensors are contiguous.
    """
    p = rows.numel()
    targets = torch.empty(2 * p, dtype=torch.int32, device=rows.device)
    launch(
        _pair_targets_kernel,
        (triton.cdiv(p, _BLOCK),),
        rows,
        cols,
        row_weights,
        col_weights,
        targets,
        p,
        n_features,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return targets


@triton.jit
def _pair_lists_kernel(
    targets_ptr, order_ptr,                                             # [2 p] int32, int64
    rows_ptr, cols_ptr, row_weights_ptr, col_weights_ptr, cosines_ptr,  # [p] int64 x 2, float32 x 3
    norm_ptr,                                                           # [N] float32
    inverse_ptr, offsets_ptr,                                           # [N] float32, [N + 1] int64
    partners_ptr, weights_ptr, values_ptr,                              # [2 p] int32, float32 x 2
    p, N, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    n_column_blocks = tl.cdiv(N + 1, BLOCK)
    if tl.program_id(0) < n_column_blocks:
        column = tl.program_id(0) * BLOCK + offs
        norm = tl.load(norm_ptr + column, mask=column < N, other=0.0)
        inverse = tl.where(norm > 0.0, tl.div_rn(1.0, tl.maximum(norm, eps)), 0.0)
        tl.store(inverse_ptr + column, inverse, mask=column < N)
        # binary search: the offset is from `offset` to `offset + n_left`
        offset = tl.zeros((BLOCK,), tl.int64)
        n_left = tl.cast(p, tl.int64) * 2
        while n_left > 0:
            half = n_left // 2
            is_below = tl.load(targets_ptr + offset + half, mask=column <= N) < column
            offset += tl.where(is_below, n_left - half, 0)
            n_left = half
        tl.store(offsets_ptr + column, offset, mask=column <= N)
    else:
        place = (tl.program_id(0) - n_column_blocks).to(tl.int64) * BLOCK + offs
        mask = place < tl.cast(p, tl.int64) * 2
        entry = tl.load(order_ptr + place, mask=mask)
        of_row, of_col = mask & (entry < p), mask & (entry >= p)
        pair = tl.where(entry < p, entry, entry - p)
        col, row = tl.load(cols_ptr + pair, mask=of_row), tl.load(rows_ptr + pair, mask=of_col)
        row_weight = tl.load(row_weights_ptr + pair, mask=of_row)
        col_weight = tl.load(col_weights_ptr + pair, mask=of_col)
        tl.store(partners_ptr + place, tl.where(of_row, col, row).to(tl.int32), mask=mask)
        tl.store(weights_ptr + place, tl.where(of_row, row_weight, col_weight), mask=mask)
        tl.store(values_ptr + place, tl.load(cosines_ptr + pair, mask=mask), mask=mask)


class PairLists(NamedTuple):
    """What `topk_ortho.kernels.pair_gradient` takes of columns and of the pairs that belong to them."""

    inverse: Tensor
    """float32 [N], 1 / max(norm, EPS), 0 for a dead column"""
    offsets: Tensor
    """int64 [N + 1]; the pairs of column j are those from ``offsets[j]`` to ``offsets[j + 1]``"""
    partners: Tensor
    """int32 [2 p], the other column of the pair"""
    weights: Tensor
    """float32 [2 p]"""
    values: Tensor
    """float32 [2 p], the pair's cosine"""


def pair_lists(
    targets: Tensor, order: Tensor,
    rows: Tensor, cols: Tensor, row_weights: Tensor, col_weights: Tensor, cosines: Tensor, norms: Tensor, eps: float,
) -> PairLists:  # fmt: skip
    """Lists of pairs [p] by their sorted `targets` and the `order` that sorted them, int64 [2 p].

    All tensors are contiguous; there may be no pair at all.
    """
    p, n_features, device = rows.numel(), norms.numel(), rows.device
    inverse = torch.empty(n_features, dtype=torch.float32, device=device)
    offsets = torch.empty(n_features + 1, dtype=torch.int64, device=device)
    partners = torch.empty(2 * p, dtype=torch.int32, device=device)
    weights, values = (torch.empty(2 * p, dtype=torch.float32, device=device) for _ in range(2))
    launch(
        _pair_lists_kernel, (triton.cdiv(n_features + 1, _BLOCK) + triton.cdiv(2 * p, _BLOCK),),
        targets, order, rows, cols, row_weights, col_weights, cosines, norms,
        inverse, offsets, partners, weights, values, p, n_features, eps,
        BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return PairLists(inverse, offsets, partners, weights, values)
