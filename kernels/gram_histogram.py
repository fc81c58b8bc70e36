"""Passes of a repair: count pairs by a digit of their similarity, and count the ties of each row.

    digit = digit_of(bits(similarity)),    counted iff it is in the range that holds the k-th similarity

`topk_ortho.kernels.radix_select` says what the digits are, and uses the counts. They are integers, so they are exact in
whatever order tiles finish.
"""

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.gram_survivors import add_moments, store_moments
from topk_ortho.kernels.launch import Operand
from topk_ortho.kernels.radix_select import (
    DIGIT_BINS,
    DIGITS,
    LOWEST,
    SCREEN,
    TIES,
    WIDTH,
    RadixSelect,
    digit_of,
    stage_of,
)
from topk_ortho.kernels.tiles import cosines, n_tiles_of, quartered_tile


@triton.jit
def _gram_histogram_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr, flags_ptr,  # [M, N], [N] float32 x 2, [1] int32
    plan_ptr, histogram_ptr,                                        # [7] int64, [BINS] int64
    moments_ptr,                                                    # [n_programs, 3] float64
    M, N, n_loaded, floor,
    STAGE: tl.constexpr, IS_ABS: tl.constexpr, HAS_MOMENTS: tl.constexpr, BINS: tl.constexpr,
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
            if HAS_MOMENTS:
                count, mean, squares = add_moments(cosine, count, mean, squares)
            similarity = tl.abs(cosine) if IS_ABS else cosine
            is_counted = (similarity > floor) & (similarity >= 0.0)
            bits = tl.where(is_counted, similarity, 0.0).to(tl.int32, bitcast=True)
            digit = digit_of(bits, lowest, width)
            is_counted = is_counted & (digit >= 0)
            counts += tl.histogram(
                tl.reshape(digit, (BLOCK * BLOCK // 4,)), BINS, mask=tl.reshape(is_counted, (BLOCK * BLOCK // 4,))
            )
    tl.atomic_add(histogram_ptr + tl.arange(0, BINS), counts, mask=counts > 0)
    if HAS_MOMENTS:
        store_moments(moments_ptr, count, mean, squares)


@triton.jit
def _gram_row_ties_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr, flags_ptr,  # [M, N], [N] float32 x 2, [1] int32
    plan_ptr, row_ties_ptr,                                         # [7] int64, [N] int32
    M, N, n_loaded,
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


def gram_histogram(
    operand: Operand, radix: RadixSelect, histogram: Tensor, moments: Tensor | None, floor: float,
    *, is_abs: bool, is_screen: bool,
) -> None:  # fmt: skip
    """Add the pairs above `floor` to the histogram of a digit, and fill `moments` if given.

    Returns at once unless the stage is SCREEN if `is_screen`, else DIGITS.
    """
    _gram_histogram_kernel[(operand.n_programs,)](
        plan_ptr=radix.plan, histogram_ptr=histogram, moments_ptr=radix.plan if moments is None else moments,
        floor=floor, STAGE=(SCREEN if is_screen else DIGITS).value, IS_ABS=is_abs, HAS_MOMENTS=moments is not None,
        BINS=DIGIT_BINS.value, **operand.arguments(),
    )  # fmt: skip


def gram_row_ties(operand: Operand, radix: RadixSelect, *, is_abs: bool) -> None:
    """At stage TIES: add the pairs equal to the k-th similarity to `radix.row_ties`, by row."""
    _gram_row_ties_kernel[(operand.n_programs,)](
        plan_ptr=radix.plan, row_ties_ptr=radix.row_ties, IS_ABS=is_abs, **operand.arguments()
    )
