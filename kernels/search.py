"""The search for a cut that just enough pairs exceed, on the device: one program decides what the next kernels do.

A call enqueues the same kernels every time; each looks at `stage` and returns at once if it is not its turn. So nothing
is read on the host, whatever the data:

    PASS     one pass from a guess; CERTIFIED if it kept at least k pairs, and no more than the capacity
    DIGITS   else the k-th similarity is found exactly, by a pass for each digit of its bits: 8, 8, 7 and 7. The bits of
             floats >= 0 order as the floats do, and 1.0 is below 2**30. It ends as soon as the pairs from the digit on
             fit the capacity
    TIES     if even the pairs equal to the k-th value do not fit: up to which row they are needed, by a pass that
             counts them by row
    COLLECT  a pass that keeps what the search found: between k and `capacity` pairs, by construction

A kept pair is above `cut`, or equal to it with a row up to `tie_row`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PASS, DIGITS, TIES, COLLECT, CERTIFIED = (tl.constexpr(stage) for stage in range(5))
STAGE, LOWEST, ABOVE, TIE_ROW, N_PASSES, FAILURE = (tl.constexpr(field) for field in range(6))
"""Fields of `Search.plan`."""
CUT, SLACK = (tl.constexpr(field) for field in range(2))
"""Fields of `Search.bounds`."""
NO_FAILURE, SHORTFALL, OVERFLOW = (tl.constexpr(failure) for failure in range(3))
"""Of the first pass: it kept too few pairs, or more than fit."""
DIGITS_OF_SIMILARITY = ((22, 8), (14, 8), (7, 7), (0, 7))
"""(shift, bits) of each digit, the highest first. Triton 3.6 compiles a histogram to instructions in proportion to
its bins, so that digits of 12 bits would take longer than the products."""
SAMPLE_DIGIT = (18, 12)
"""(shift, bits) of the sampled histogram: steps of 1/32 to 1/16 of a similarity, and a straight line within."""


class Search(NamedTuple):
    """What the kernels of one call share."""

    plan: Tensor
    """int64 [6]: stage; bits of the smallest similarity that may be the k-th; pairs known above that digit; the last
    row of ties that are kept; passes over the gram; why the first of them failed"""
    bounds: Tensor
    """float32 [2]: cut; slack, by which a pair may be below the cut in the product of the pass and yet be kept"""
    histogram: Tensor
    """int64 [4096], pairs by digit"""
    row_ties: Tensor
    """int32 [N], pairs equal to the k-th value by row"""
    n_survivors: Tensor
    """int64 [1], pairs that the last pass kept, whether or not they fit"""
    n_certified: Tensor
    """int64 [1], those of them at the cut or above in the precision asked for"""


def new_search(device: torch.device, n_features: int) -> Search:
    """Before the first kernel."""
    zeros = torch.zeros(6 + 4096 + 2, dtype=torch.int64, device=device)
    return Search(
        plan=zeros[:6],
        bounds=torch.empty(2, dtype=torch.float32, device=device),
        histogram=zeros[6:-2],
        row_ties=torch.zeros(n_features, dtype=torch.int32, device=device),
        n_survivors=zeros[-2:-1],
        n_certified=zeros[-1:],
    )


@triton.jit
def stage_of(plan_ptr):
    """Current stage."""
    return tl.load(plan_ptr + STAGE)


@triton.jit
def above(bounds_ptr, plan_ptr, floor, offs_row):
    """Bound of every row that the similarities kept exceed."""
    cut = tl.load(bounds_ptr + CUT)
    just_below = (cut.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    just_below = tl.where(cut > 0, just_below, -1.0)
    bound = tl.where(offs_row <= tl.load(plan_ptr + TIE_ROW), just_below, cut)
    return tl.maximum(bound, floor) - tl.load(bounds_ptr + SLACK)


@triton.jit
def _last_with(histogram, above, wanted, BINS: tl.constexpr):
    """The highest bin from which on `wanted` are counted, -1 if none; the counts from it on, and beyond it."""
    from_bin = above + tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    bins = tl.arange(0, BINS)
    found = tl.max(tl.where(from_bin >= wanted, bins, -1), axis=0)
    n_from = tl.sum(tl.where(bins == found, from_bin, 0), axis=0)
    return found, n_from, n_from - tl.sum(tl.where(bins == found, histogram, 0), axis=0)


@triton.jit
def _begin_kernel(
    plan_ptr, bounds_ptr, histogram_ptr,  # [6] int64, [2] float32, [4096] int64
    flags_ptr, state_ptr, deviation_ptr,  # [1] int32, [3] float32, [1] float32
    rank, n_features, M, can_overflow,
    HAS_STATE: tl.constexpr, IS_ROUNDED: tl.constexpr,
    SHIFT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    cut = -1.0
    if rank > 0:
        bins = tl.arange(0, BINS)
        histogram = tl.load(histogram_ptr + bins)
        found, n_from, n_beyond = _last_with(histogram, 0, rank, BINS)
        tl.store(histogram_ptr + bins, tl.zeros((BINS,), tl.int64))
        if found >= 0:
            # as if the sample were uniform within a bin
            low = (found << SHIFT).to(tl.float32, bitcast=True)
            high = ((found + 1) << SHIFT).to(tl.float32, bitcast=True)
            share = (rank - n_beyond).to(tl.float32) / (n_from - n_beyond).to(tl.float32)
            cut = tl.where(found > 0, tl.minimum(high - (high - low) * share, 1.0), 0.0)
    if HAS_STATE:
        guess = tl.load(state_ptr)
        cut = tl.where(guess > -1.0, tl.minimum(guess, 1.0), cut)
    slack = 0.0
    flags = tl.load(flags_ptr)
    stage = tl.where(flags > 0, DIGITS, PASS)
    if IS_ROUNDED:
        # Products of fp16 are exact in float32. Every addition of the pass errs by at most 2**-23 of a sum of
        # magnitudes that the norms bound, if the matrix unit keeps one bit more than float32 while it aligns; M / 4 and
        # 32 more cover what it cuts off before that and the sums of `rescore`, and 1.01 the norms of rounded columns
        # and the rounding of all this.
        deviation = tl.load(deviation_ptr)
        slack = 1.01 * (2.0 * deviation + deviation * deviation + (M + M // 4 + 32) * 2.0**-23)
        stage = PASS
    # without a guess everything is kept: in vain if it cannot fit
    stage = tl.where((cut <= -1.0) & (can_overflow > 0), DIGITS, stage)
    tl.store(bounds_ptr + CUT, cut)
    tl.store(bounds_ptr + SLACK, tl.where(stage == PASS, slack, 0.0))
    tl.store(plan_ptr + STAGE, stage.to(tl.int64))
    tl.store(plan_ptr + LOWEST, tl.zeros((), tl.int64))
    tl.store(plan_ptr + ABOVE, tl.zeros((), tl.int64))
    # pairs equal to a guess may be wanted; zeros only if all others are, which the pass then shows
    tl.store(plan_ptr + TIE_ROW, tl.where(cut == 0.0, -1, n_features).to(tl.int64))
    tl.store(plan_ptr + N_PASSES, tl.where(stage == PASS, 1, 0).to(tl.int64))
    tl.store(plan_ptr + FAILURE, tl.full((), NO_FAILURE, tl.int64))


@triton.jit
def _certify_kernel(
    plan_ptr, bounds_ptr, n_survivors_ptr, n_certified_ptr,  # [6] int64, [2] float32, [1] int64 x 2
    tau_ptr,                                                 # [1] float32
    k, capacity, floor,
    IS_ADAPTIVE: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) == PASS:
        n_survivors = tl.load(n_survivors_ptr)
        if IS_ADAPTIVE:
            floor = tl.maximum(floor, tl.load(tau_ptr))
        is_complete = (tl.load(n_certified_ptr) >= k) | (tl.load(bounds_ptr + CUT) <= floor)
        if is_complete & (n_survivors <= capacity):
            tl.store(plan_ptr + STAGE, tl.full((), CERTIFIED, tl.int64))
        else:
            tl.store(plan_ptr + STAGE, tl.full((), DIGITS, tl.int64))
            tl.store(plan_ptr + FAILURE, tl.where(n_survivors > capacity, OVERFLOW, SHORTFALL).to(tl.int64))
            tl.store(bounds_ptr + SLACK, 0.0)
            tl.store(n_survivors_ptr, tl.zeros((), tl.int64))
            tl.store(n_certified_ptr, tl.zeros((), tl.int64))


@triton.jit
def _next_digit_kernel(
    plan_ptr, bounds_ptr, histogram_ptr,  # [6] int64, [2] float32, [4096] int64
    k, capacity,
    SHIFT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) == DIGITS:
        bins = tl.arange(0, BINS)
        histogram = tl.load(histogram_ptr + bins)
        tl.store(histogram_ptr + bins, tl.zeros((BINS,), tl.int64))
        found, n_from, n_beyond = _last_with(histogram, tl.load(plan_ptr + ABOVE), k, BINS)
        lowest = tl.load(plan_ptr + LOWEST) + (tl.maximum(found, 0).to(tl.int64) << SHIFT)
        tl.store(plan_ptr + N_PASSES, tl.load(plan_ptr + N_PASSES) + 1)
        if found < 0:  # fewer than k pairs are above the floor: keep them all
            tl.store(bounds_ptr + CUT, -1.0)
            tl.store(plan_ptr + STAGE, tl.full((), COLLECT, tl.int64))
        else:
            tl.store(plan_ptr + LOWEST, lowest)
            tl.store(bounds_ptr + CUT, lowest.to(tl.int32).to(tl.float32, bitcast=True))
            if n_from <= capacity:
                tl.store(plan_ptr + TIE_ROW, tl.full((), 2147483647, tl.int64))  # of all rows
                tl.store(plan_ptr + STAGE, tl.full((), COLLECT, tl.int64))
            else:
                tl.store(plan_ptr + ABOVE, n_beyond)
                if SHIFT == 0:
                    tl.store(plan_ptr + STAGE, tl.full((), TIES, tl.int64))


@triton.jit
def _tie_row_kernel(
    plan_ptr, row_ties_ptr,  # [6] int64, [N] int32
    k, n_features,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) == TIES:
        wanted = k - tl.load(plan_ptr + ABOVE)
        n_before = tl.zeros((), tl.int64)
        tie_row = tl.zeros((), tl.int64)
        for first in range(0, n_features, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            ties = tl.load(row_ties_ptr + offs, mask=offs < n_features, other=0).to(tl.int64)
            up_to = n_before + tl.cumsum(ties, axis=0)
            tie_row += tl.sum(tl.where((up_to < wanted) & (offs < n_features), 1, 0), axis=0)
            n_before += tl.sum(ties, axis=0)
        tl.store(plan_ptr + TIE_ROW, tie_row)
        tl.store(plan_ptr + N_PASSES, tl.load(plan_ptr + N_PASSES) + 1)
        tl.store(plan_ptr + STAGE, tl.full((), COLLECT, tl.int64))


@triton.jit
def _next_state_kernel(
    state_ptr, next_state_ptr,      # [3] float32 x 2
    plan_ptr,                       # [6] int64
    similarity_ptr, n_ordered_ptr,  # [capacity] float32 descending, [1] int64 of them hold pairs
    k, margin_start, margin_least, margin_most,
):  # fmt: skip
    """`topk_ortho.selection.next_state`, on the device; an overflow halves the margin, for its guess was too low."""
    is_repaired = stage_of(plan_ptr) != CERTIFIED
    failure = tl.load(plan_ptr + FAILURE)
    margin = tl.load(state_ptr + 1)
    margin = tl.where((margin >= margin_least) & (margin <= margin_most), margin, margin_start)
    factor = tl.where(failure == SHORTFALL, 2.0, tl.where(failure == OVERFLOW, 0.5, 0.98))
    margin = tl.minimum(margin_most, tl.maximum(margin_least, factor * margin))
    n_ordered = tl.load(n_ordered_ptr)
    rank = tl.ceil((1 + margin) * tl.cast(k, tl.float32)).to(tl.int64)
    inner_rank = tl.maximum(tl.floor((1 - margin) * tl.cast(k, tl.float32)).to(tl.int64), 1)
    inner_rank = tl.minimum(inner_rank, k)
    guess = -1.0
    if n_ordered >= rank:
        guess = tl.load(similarity_ptr + rank - 1)
    elif n_ordered >= k:
        guess = 2 * tl.load(similarity_ptr + k - 1) - tl.load(similarity_ptr + inner_rank - 1)
    n_passes = tl.load(plan_ptr + N_PASSES) + tl.where(is_repaired, 1, 0)
    tl.store(next_state_ptr, guess)
    tl.store(next_state_ptr + 1, margin)
    tl.store(next_state_ptr + 2, n_passes.to(tl.float32))


def begin(
    search: Search, flags: Tensor, state: Tensor | None, deviation: Tensor | None, rank: int, n_rows: int,
    can_overflow: bool,
) -> None:  # fmt: skip
    """Choose the first cut: the guess in `state`, else the similarity at `rank` in the sampled histogram, else none.

    `deviation` is that of an operand from `round_columns`; an operand of raw columns is refused by `flags`.
    """
    shift, bits = SAMPLE_DIGIT
    _begin_kernel[(1,)](
        search.plan, search.bounds, search.histogram,
        flags, flags if state is None else state, flags if deviation is None else deviation,
        rank, search.row_ties.numel(), n_rows, int(can_overflow),
        HAS_STATE=state is not None, IS_ROUNDED=deviation is not None, SHIFT=shift, BINS=2**bits,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def certify(search: Search, k: int, capacity: int, floor: float, tau: Tensor | None) -> None:
    """After the first pass: CERTIFIED, or on to DIGITS. `tau` float32 [1] is an adaptive floor, known only now."""
    _certify_kernel[(1,)](
        search.plan, search.bounds, search.n_survivors, search.n_certified,
        search.bounds if tau is None else tau, k, capacity, floor, IS_ADAPTIVE=tau is not None, num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip


def next_digit(search: Search, shift: int, bits: int, k: int, capacity: int) -> None:
    """After the pass that counted a digit: narrow the search, or end it."""
    _next_digit_kernel[(1,)](
        search.plan, search.bounds, search.histogram, k, capacity, SHIFT=shift, BINS=2**bits, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip


def tie_row(search: Search, k: int) -> None:
    """After the pass that counted ties: up to which row k needs them."""
    _tie_row_kernel[(1,)](
        search.plan, search.row_ties, k, search.row_ties.numel(), BLOCK=1024, num_warps=4, enable_fp_fusion=True
    )


def next_state(
    search: Search, state: Tensor, similarity: Tensor, n_ordered: Tensor, k: int, margins: tuple[float, float, float]
) -> Tensor:
    """Warm-start state float32 [3] after a call; `margins` are the first, the least and the most."""
    result = torch.empty_like(state)
    _next_state_kernel[(1,)](
        state, result, search.plan, similarity, n_ordered, k, *margins, num_warps=1, enable_fp_fusion=True
    )
    return result
