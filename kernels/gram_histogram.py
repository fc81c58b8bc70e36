"""Passes of a repair: count pairs by a digit of their similarity, and count the ties of each row.

    digit = digit_of(bits(similarity)),    counted iff it is in the range that holds the k-th similarity

`topk_ortho.kernels.radix_select` says what the digits are, and uses the counts. They are integers, so they are exact in
whatever order tiles finish.
"""

import triton
import triton.language as tl

from topk_ortho.kernels.gram_survivors import Moments, add_moments, moments_arguments, store_moments, store_tau
from topk_ortho.kernels.launch import Operand, launch
from topk_ortho.kernels.radix_select import (
    DIGIT_BINS,
    DIGITS,
    LOWEST,
    SCREEN,
    TIES,
    WIDTH,
    RadixSelect,
    digit_of,
    is_last_program,
    next_digit,
    next_guess,
    stage_of,
    tie_row,
)
from topk_ortho.kernels.tiles import cosines, n_tiles_of, quartered_tile


@triton.jit
def _gram_histogram_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr, flags_ptr,  # [M, N], [N] float32 x 2, [1] int32
    plan_ptr, bounds_ptr,                                           # [7] int64, [3] float32
    histograms_ptr, histogram_ptr,                                  # [digits, BINS] int64, and the row for this digit
    arrived_ptr, moments_ptr, tau_ptr,                              # [1] int64, [n_programs, 3] float64, [1] float32
    M, N, n_loaded, k, capacity, floor, n_std,
    STAGE: tl.constexpr, IS_ABS: tl.constexpr, N_LINES: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) != STAGE:
        return
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    lowest = tl.load(plan_ptr + LOWEST).to(tl.int32)
    width = tl.load(plan_ptr + WIDTH).to(tl.int32)
    counts = tl.zeros((BINS,), tl.int64)
    n_tile_rows = tl.cdiv(N, BLOCK)
    for tile in range(tl.program_id(0), n_tiles_of(n_tile_rows), tl.num_programs(0)):
        parts, offs_row, first_col = quartered_tile(
            tile, n_tile_rows, x_ptr, stride_xm, stride_xn, scale_ptr, flags_ptr, M, N, n_loaded,
            BLOCK, BLOCK_M, GROUP, RESTART, PRECISION, SCALED, TRANSPOSED,
        )  # fmt: skip
        for part in tl.static_range(4):
            offs_col = first_col + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            cosine = cosines(parts[part], factor_ptr, offs_row, offs_col, N, float("nan"))
            if N_LINES > 0:
                count, mean, squares = add_moments(cosine, count, mean, squares)
            similarity = tl.abs(cosine) if IS_ABS else cosine
            is_counted = similarity >= 0.0
            if STAGE == DIGITS:  # those of a screen are rounded, so that they may be above the floor all the same
                is_counted = is_counted & (similarity > floor)
            bits = tl.where(is_counted, similarity, 0.0).to(tl.int32, bitcast=True)
            digit = digit_of(bits, lowest, width)
            is_counted = is_counted & (digit >= 0)
            counts += tl.histogram(
                tl.reshape(digit, (BLOCK * BLOCK // 4,)), BINS, mask=tl.reshape(is_counted, (BLOCK * BLOCK // 4,))
            )
    tl.atomic_add(histogram_ptr + tl.arange(0, BINS), counts, mask=counts > 0)
    if N_LINES > 0:
        store_moments(moments_ptr, count, mean, squares)
    if is_last_program(arrived_ptr):
        if N_LINES > 0:
            store_tau(moments_ptr, tau_ptr, n_std, N_LINES)
        if STAGE == SCREEN:
            next_guess(plan_ptr, bounds_ptr, histograms_ptr, k, capacity, floor, BINS)
        else:
            next_digit(plan_ptr, bounds_ptr, histogram_ptr, k, capacity, BINS)


@triton.jit
def _gram_row_ties_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr, flags_ptr,  # [M, N], [N] float32 x 2, [1] int32
    plan_ptr, row_ties_ptr, arrived_ptr,                            # [7] int64, [N] int32, [1] int64
    M, N, n_loaded, k,
    IS_ABS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) != TIES:
        return
    value = tl.load(plan_ptr + LOWEST).to(tl.int32).to(tl.float32, bitcast=True)
    n_tile_rows = tl.cdiv(N, BLOCK)
    for tile in range(tl.program_id(0), n_tiles_of(n_tile_rows), tl.num_programs(0)):
        parts, offs_row, first_col = quartered_tile(
            tile, n_tile_rows, x_ptr, stride_xm, stride_xn, scale_ptr, flags_ptr, M, N, n_loaded,
            BLOCK, BLOCK_M, GROUP, RESTART, PRECISION, SCALED, TRANSPOSED,
        )  # fmt: skip
        ties = tl.zeros((BLOCK,), tl.int32)
        for part in tl.static_range(4):
            offs_col = first_col + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            cosine = cosines(parts[part], factor_ptr, offs_row, offs_col, N, float("nan"))
            similarity = tl.abs(cosine) if IS_ABS else cosine
            ties += tl.sum((similarity == value).to(tl.int32), axis=1)
        tl.atomic_add(row_ties_ptr + offs_row, ties, mask=ties > 0)
    if is_last_program(arrived_ptr):
        tie_row(plan_ptr, row_ties_ptr, k, N, 1024)


def gram_histogram(
    operand: Operand, radix: RadixSelect, number: int, moments: Moments | None, k: int, capacity: int, floor: float,
    *, is_abs: bool, is_screen: bool,
) -> None:  # fmt: skip
    """Add pairs to the histogram of a digit, those above `floor` or, for a screen, all; then take the next step.

    For a screen that step derives a new guess from the counts; otherwise it narrows the range that holds the k-th
    similarity. Returns at once unless the stage is SCREEN if `is_screen`, else DIGITS.
    """
    histograms = radix.screen_histograms if is_screen else radix.digit_histograms
    launch(
        _gram_histogram_kernel, (operand.n_programs,),
        plan_ptr=radix.plan, bounds_ptr=radix.bounds, histograms_ptr=histograms, histogram_ptr=histograms[number],
        arrived_ptr=radix.arrived, k=k, capacity=capacity, floor=floor,
        STAGE=(SCREEN if is_screen else DIGITS).value, IS_ABS=is_abs, BINS=DIGIT_BINS.value,
        **moments_arguments(moments, radix.plan), **operand.arguments(),
    )  # fmt: skip


def gram_row_ties(operand: Operand, radix: RadixSelect, k: int, *, is_abs: bool) -> None:
    """At stage TIES: count the pairs equal to the k-th similarity by row, and find the last row that is needed."""
    launch(
        _gram_row_ties_kernel, (operand.n_programs,),
        plan_ptr=radix.plan, row_ties_ptr=radix.row_ties, arrived_ptr=radix.arrived, k=k, IS_ABS=is_abs,
        **operand.arguments(),
    )  # fmt: skip
