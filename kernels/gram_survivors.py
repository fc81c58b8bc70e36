"""Record the pairs of columns whose similarity exceeds the bound, streaming the upper triangle of the gram.

    cosine[i, j] = gram[i, j] * factor[i] * factor[j],    recorded iff i < j and it exceeds the bound of row i

Every survivor is counted, but only the first `capacity` are stored; `radix_select.certify` compares the two numbers.
The order of the records is undefined. The same pass computes, if asked to, the mean of |cosine| over all pairs and the
sum of squared deviations from it. Each part of a tile takes deviations from its own mean, and the results are joined by
the formula of Chan, Golub and LeVeque (1983), so that nothing cancels.

Survivors are rare: about 16 in a tile of 128 x 128 at a fraction of 1e-3. All rows of a part of a tile look for their
next survivor at the same time, so that a part needs as many steps as its fullest row has survivors. Each row with
survivors reserves their places by one atomic addition. The usual way, an atomic or a scan for each element, takes
registers that the sums of a tile leave no room for.

Where the hardware copies tiles by itself (the tensor memory accelerator of sm_90), a kernel of its own multiplies
larger tiles; `topk_ortho.kernels.launch.DESCRIBED_CONFIGS` says where.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import Operand, launch
from topk_ortho.kernels.radix_select import (
    COLLECT,
    PASS,
    RadixSelect,
    certify,
    is_last_program,
    row_bounds,
    stage_of,
)
from topk_ortho.kernels.tiles import cosines, n_tiles_of, parts_of, product, quartered_tile, triangle_tile


@triton.jit
def add_moments(cosine, count, mean, squares):
    """Join the |cosine| of a part of a tile to moments: count, mean and sum of squared deviations, float64."""
    is_pair = cosine == cosine
    n_pairs = tl.sum(tl.sum(is_pair.to(tl.int32), axis=1), axis=0)
    magnitude = tl.where(is_pair, tl.abs(cosine), 0.0)
    part_mean = tl.sum(tl.sum(magnitude, axis=1), axis=0) / tl.maximum(n_pairs, 1)
    deviation = tl.where(is_pair, magnitude - part_mean, 0.0)
    part_squares = tl.sum(tl.sum(deviation * deviation, axis=1), axis=0).to(tl.float64)
    part_count = n_pairs.to(tl.float64)
    difference = part_mean.to(tl.float64) - mean
    share = part_count / tl.maximum(count + part_count, 1.0)
    squares += part_squares + difference * difference * count * share
    return count + part_count, mean + difference * share, squares


@triton.jit
def store_moments(moments_ptr, count, mean, squares):
    """Write the moments to the line of this program."""
    line = moments_ptr + 3 * tl.program_id(0)
    tl.store(line, count)
    tl.store(line + 1, mean)
    tl.store(line + 2, squares)


@triton.jit
def store_tau(moments_ptr, tau_ptr, n_std, N_LINES: tl.constexpr):
    """Store the mean plus n_std standard deviations of the |cosine| that all programs saw, and return it, float32."""
    lines = tl.arange(0, N_LINES)
    mask = lines < tl.num_programs(0)
    counts = tl.load(moments_ptr + 3 * lines, mask=mask, other=0.0)
    means = tl.load(moments_ptr + 3 * lines + 1, mask=mask, other=0.0)
    n_pairs = tl.sum(counts, axis=0)
    mean = tl.sum(counts * means, axis=0) / n_pairs
    squares = tl.load(moments_ptr + 3 * lines + 2, mask=mask, other=0.0) + counts * (means - mean) * (means - mean)
    tau = (mean + n_std * tl.sqrt(tl.sum(squares, axis=0) / n_pairs)).to(tl.float32)
    tl.store(tau_ptr, tau)
    return tau


@triton.jit
def _record(
    cosine, bound, offs_row, offs_col,
    values_ptr, rows_ptr, cols_ptr, n_survivors_ptr,
    capacity,
    IS_ABS: tl.constexpr,
):  # fmt: skip
    similarity = tl.abs(cosine) if IS_ABS else cosine
    counts = tl.sum((similarity > bound[:, None]).to(tl.int32), axis=1)
    most = tl.max(counts, axis=0)
    if most > 0:
        counter = n_survivors_ptr + tl.zeros(counts.shape, tl.int32)
        first = tl.atomic_add(counter, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
        slot = tl.minimum(first, capacity).to(tl.int32)
        col = tl.full(counts.shape, -1, tl.int32)
        for i in range(most):
            is_next = (similarity > bound[:, None]) & (offs_col[None, :] > col[:, None])
            col = tl.min(tl.where(is_next, offs_col[None, :], 2147483647), axis=1)
            value = tl.sum(tl.where(offs_col[None, :] == col[:, None], cosine, 0.0), axis=1)
            mask = (i < counts) & (slot < capacity)
            tl.store(values_ptr + slot, value, mask=mask)
            tl.store(rows_ptr + slot, offs_row, mask=mask)
            tl.store(cols_ptr + slot, col, mask=mask)
            slot += 1


@triton.jit
def _end_pass(
    arrived_ptr, plan_ptr, bounds_ptr, n_survivors_ptr, moments_ptr, tau_ptr, k, capacity, floor, n_std,
    N_LINES: tl.constexpr,
):  # fmt: skip
    """Certify the pass in its last program, by an adaptive tau if there are lines of moments."""
    if is_last_program(arrived_ptr):
        if N_LINES > 0:
            floor = tl.maximum(floor, store_tau(moments_ptr, tau_ptr, n_std, N_LINES))
        certify(plan_ptr, bounds_ptr, n_survivors_ptr, n_survivors_ptr, k, capacity, floor, False)


@triton.jit
def _gram_survivors_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr, flags_ptr,  # [M, N], [N] float32 x 2, [1] int32
    plan_ptr, bounds_ptr,                                           # [7] int64, [3] float32
    values_ptr, rows_ptr, cols_ptr, n_survivors_ptr,                # [capacity] float32, int32, int32, [1] int64
    arrived_ptr, moments_ptr, tau_ptr,                              # [1] int64, [n_programs, 3] float64, [1] float32
    M, N, n_loaded, k, capacity, floor, n_std,
    STAGE: tl.constexpr, IS_ABS: tl.constexpr, CERTIFIES: tl.constexpr, N_LINES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) != STAGE:
        return
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    n_tile_rows = tl.cdiv(N, BLOCK)
    for tile in range(tl.program_id(0), n_tiles_of(n_tile_rows), tl.num_programs(0)):
        parts, offs_row, first_col = quartered_tile(
            tile, n_tile_rows, x_ptr, stride_xm, stride_xn, scale_ptr, flags_ptr, M, N, n_loaded,
            BLOCK, BLOCK_M, GROUP, RESTART, PRECISION, SCALED, TRANSPOSED,
        )  # fmt: skip
        bound = row_bounds(bounds_ptr, plan_ptr, floor, offs_row)
        for part in tl.static_range(4):
            offs_col = first_col + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            cosine = cosines(parts[part], factor_ptr, offs_row, offs_col, N, float("nan"))
            if N_LINES > 0:
                count, mean, squares = add_moments(cosine, count, mean, squares)
            _record(
                cosine, bound, offs_row, offs_col, values_ptr, rows_ptr, cols_ptr, n_survivors_ptr, capacity, IS_ABS
            )
    if N_LINES > 0:
        store_moments(moments_ptr, count, mean, squares)
    if CERTIFIES:
        _end_pass(
            arrived_ptr, plan_ptr, bounds_ptr, n_survivors_ptr, moments_ptr, tau_ptr, k, capacity, floor, n_std, N_LINES
        )


@triton.jit
def _sum_of_boxes(
    row_boxes, col_boxes, first_row, first_col, first_m, end_m,
    IS_FEATURE_MAJOR: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What some rows of x add to a tile [BLOCK_ROW, BLOCK_COL] of the gram."""
    gram = tl.zeros((BLOCK_ROW, BLOCK_COL), tl.float32)
    for m in range(first_m, end_m, BLOCK_M):  # the boxes are 0 beyond the last row and column
        # what is transposed is loaded last: a transpose between the loads costs a barrier
        if IS_FEATURE_MAJOR:
            a = row_boxes.load([first_row, m])
            b = tl.trans(col_boxes.load([first_col, m]))
        else:
            b = col_boxes.load([m, first_col])
            a = tl.trans(row_boxes.load([m, first_row]))
        gram = product(a, b, gram, "ieee")
    return gram


@triton.jit
def _described_survivors_kernel(
    row_boxes, col_boxes, factor_ptr,                 # descriptors of [M, N] or its transpose, [N] float32
    plan_ptr, bounds_ptr,                             # [7] int64, [3] float32
    values_ptr, rows_ptr, cols_ptr, n_survivors_ptr,  # [capacity] float32, int32, int32, [1] int64
    arrived_ptr,                                      # [1] int64
    M, N, k, capacity, floor,
    IS_ABS: tl.constexpr, CERTIFIES: tl.constexpr, IS_FEATURE_MAJOR: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    RESTART: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) != PASS:
        return
    SIDE: tl.constexpr = max(BLOCK_ROW, BLOCK_COL)  # of a square, which is cut into tiles across its longer side
    n_across: tl.constexpr = SIDE // BLOCK_COL
    n_in_square: tl.constexpr = SIDE // BLOCK_ROW * n_across
    n_square_rows = tl.cdiv(N, SIDE)
    for tile in range(tl.program_id(0), n_tiles_of(n_square_rows) * n_in_square, tl.num_programs(0)):
        square_row, square_col = triangle_tile(tile // n_in_square, n_square_rows, GROUP)
        place = tl.cast(tile % n_in_square, tl.int32)
        first_row = square_row * SIDE + place // n_across * BLOCK_ROW
        first_col = square_col * SIDE + place % n_across * BLOCK_COL
        if RESTART == 0:
            gram = _sum_of_boxes(
                row_boxes, col_boxes, first_row, first_col, 0, M, IS_FEATURE_MAJOR, BLOCK_ROW, BLOCK_COL, BLOCK_M
            )
        else:
            gram = tl.zeros((BLOCK_ROW, BLOCK_COL), tl.float32)
            for first in range(0, M, RESTART):
                gram += _sum_of_boxes(
                    row_boxes, col_boxes, first_row, first_col, first, tl.minimum(first + RESTART, M),
                    IS_FEATURE_MAJOR, BLOCK_ROW, BLOCK_COL, BLOCK_M,
                )  # fmt: skip
        offs_row = first_row + tl.arange(0, BLOCK_ROW)
        bound = row_bounds(bounds_ptr, plan_ptr, floor, offs_row)
        parts = parts_of(gram, PARTS)
        for part in tl.static_range(PARTS):
            offs_col = first_col + part * (BLOCK_COL // PARTS) + tl.arange(0, BLOCK_COL // PARTS)
            cosine = cosines(parts[part], factor_ptr, offs_row, offs_col, N, float("nan"))
            _record(
                cosine, bound, offs_row, offs_col, values_ptr, rows_ptr, cols_ptr, n_survivors_ptr, capacity, IS_ABS
            )
    if CERTIFIES:
        _end_pass(arrived_ptr, plan_ptr, bounds_ptr, n_survivors_ptr, plan_ptr, plan_ptr, k, capacity, floor, 0.0, 0)


class Moments(NamedTuple):
    """Mean and standard deviation of |cosine| over all pairs, and the tau that follows from them."""

    lines: Tensor
    """float64 [programs, 3]: the count, the mean and the sum of squared deviations of what each program saw"""
    tau: Tensor
    """float32 [1], the mean plus n_std standard deviations, once a pass has seen all pairs"""
    n_std: float


def moments_arguments(moments: Moments | None, unused: Tensor) -> dict[str, Any]:
    """Arguments of a kernel that gathers moments, or, with N_LINES = 0, of one that gathers none."""
    lines, tau, n_std = moments or (unused, unused, 0.0)
    n_lines = 0 if moments is None else triton.next_power_of_2(lines.shape[0])
    return {"moments_ptr": lines, "tau_ptr": tau, "n_std": n_std, "N_LINES": n_lines}


def gram_survivors(
    operand: Operand, radix: RadixSelect, values: Tensor, rows: Tensor, cols: Tensor, moments: Moments | None,
    k: int, floor: float, *, is_abs: bool, is_first: bool, certifies: bool,
) -> None:  # fmt: skip
    """Fill the records [capacity] and `radix.n_survivors`; returns at once unless the stage is the right one.

    That is PASS if `is_first`, else COLLECT. A pass whose records are not computed again `certifies` itself.
    """
    # COLLECT must repeat the very products that were counted, so it takes the same block sizes as they did
    is_lean = is_first and moments is None and operand.scale is None
    operand = replace(operand, is_lean=is_lean)
    assert values.numel() <= 2**31 - 2**16, "slots are int32"
    if is_lean and operand.is_described:
        launch(
            _described_survivors_kernel, (operand.n_programs,),
            plan_ptr=radix.plan, bounds_ptr=radix.bounds,
            values_ptr=values, rows_ptr=rows, cols_ptr=cols, n_survivors_ptr=radix.n_survivors,
            arrived_ptr=radix.arrived, k=k, capacity=values.numel(), floor=floor,
            IS_ABS=is_abs, CERTIFIES=certifies, **operand.described_arguments(),
        )  # fmt: skip
        return
    launch(
        _gram_survivors_kernel, (operand.n_programs,),
        plan_ptr=radix.plan, bounds_ptr=radix.bounds,
        values_ptr=values, rows_ptr=rows, cols_ptr=cols, n_survivors_ptr=radix.n_survivors,
        arrived_ptr=radix.arrived, k=k, capacity=values.numel(), floor=floor,
        STAGE=(PASS if is_first else COLLECT).value, IS_ABS=is_abs, CERTIFIES=certifies,
        **moments_arguments(moments, radix.plan), **operand.arguments(),
    )  # fmt: skip
