"""Radix select on the device: find a bound that enough pairs exceed, and no more than the records can hold.

Enough are k pairs, or all that are above the floor if these are fewer.

Every call enqueues the same kernels, in the same order. One number on the device, the stage, says whose turn it is: a
kernel reads it first and returns at once if it is not its own. So the host never reads a result to decide what to
launch next, whatever the data are.

    PASS     The gram is streamed once with a guess as the bound. If at least k pairs were recorded and all of them fit
             the capacity, the stage becomes CERTIFIED and the remaining kernels have nothing to do.
    SCREEN   If that pass was over rounded columns, a better guess is found from the rounded similarities, by one or two
             digits of the k-th of them, and PASS has its turn once more.
    DIGITS   Otherwise the k-th similarity is found exactly, by one pass for each of up to four digits of its bits. The
             stage ends early, as soon as the pairs from some digit on fit the capacity.
    TIES     If the pairs equal to the k-th similarity alone do not fit, a pass counts them by row, to find the last row
             whose ties are needed.
    COLLECT  A pass records what was found: enough pairs and at most `capacity`, by construction.

Between two passes is a step: to certify the pass, to derive a guess from the counts, to narrow the range, or to find
the last row of ties. The program of the pass that ends last takes it, see `is_last_program`.

A pair is recorded if its similarity exceeds the bound, or equals it and the row of the pair is at most `tie_row`.

**Digits.** The bits of floats >= 0 order as the floats do, and those of 1.0 are below 2**30. The bins of the first
digit are sixteenths of an octave from 2**-8 on, and octaves below. Among normally distributed cosines of which a
thousandth is selected, fewer than 2 k pairs are above the lower edge of the bin that holds the k-th, so that one digit
is mostly enough. Every further digit divides the bin that was found into 256 bins, or into its single numbers.

**The guess of a screen.** A rounded similarity is within the slack of the one that is computed again for a record.
Where k rounded similarities are at least t, k of those computed again are at least t - slack, which is the guess. The
pass records all that may reach it, those whose rounded similarity is at least t - 2 slack. At least k of them reach it,
which certifies the pass. So t may be any number up to the k-th rounded similarity, provided that what is above
t - 2 slack fits: the lower edge of its bin of the first digit if the counts say so, else of that of the second, which
is nearly the k-th itself. Where it cannot fit, as among many ties, it is the turn of DIGITS at once. The pass is
certified like any other, by what was computed again, so that the selection does not rest on this reasoning. With
M = 4,096 and N = 16,384 on an H200, a call whose guess holds takes 3.0 ms, one that needs the guess of a screen
8.3 ms, and one that counted the digits of float32 products took 66 ms.

All threads of a program load a number, and one of them stores it. So a program that replaces a number that it has read
has a barrier between its loads and its stores: without one, a thread could load what another has already replaced.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch

PASS, SCREEN, DIGITS, TIES, COLLECT, CERTIFIED = (tl.constexpr(stage) for stage in range(6))
STAGE, LOWEST, WIDTH, ABOVE, TIE_ROW, PASSES_SO_FAR, FAILURE = (tl.constexpr(place) for place in range(7))
"""Places in `RadixSelect.plan`."""
BOUND, SLACK, LEAST = (tl.constexpr(place) for place in range(3))
"""Places in `RadixSelect.bounds`."""
GUESS, MARGIN, N_PASSES = (tl.constexpr(place) for place in range(3))
"""Places in a warm-start state: those of `topk_ortho.warm_start`, which kernels may not import."""
NO_FAILURE, SHORTFALL, OVERFLOW = (tl.constexpr(failure) for failure in range(3))
"""What went wrong in the first pass: nothing, it recorded too few pairs, or there were more than fit."""
MOST_DIGITS, MOST_SCREEN_DIGITS = 4, 2
"""Digits that the stages DIGITS and SCREEN count at most."""
DIGIT_BINS = tl.constexpr(256)
"""Bins of a digit. Triton 3.6 compiles a histogram to instructions in proportion to its bins, so that with 4096 it
would take longer than the products."""
ALL_WIDTH = tl.constexpr(30)
"""Width of the range that holds every similarity."""
_N_OCTAVES = tl.constexpr(119)  # octaves below 2**-8, of which the first holds 0
_OCTAVE, _SIXTEENTH = tl.constexpr(23), tl.constexpr(19)  # width of the bins of the first digit
_EVERY_ROW = tl.constexpr(2**31 - 1)
SAMPLE_DIGIT = (18, 12)
"""(shift, bits) of the digit that the histogram of the sample counts. A bin is 1/32 to 1/16 of a similarity wide;
within it the guess is interpolated linearly."""


class RadixSelect(NamedTuple):
    """Tensors that the kernels of one call share."""

    plan: Tensor
    """int64 [7]: the stage; the bits of the smallest similarity that may still be the k-th, and the width w of the
    range of 2**w numbers from there on that holds it; the number of pairs known to be above that range; the last row
    whose ties are recorded; passes over the gram so far; the failure of the first pass"""
    bounds: Tensor
    """float32 [3]: the bound; the slack, by which a similarity may fall short of the bound in the rounded products of
    a pass and still be recorded; what it must exceed even so, unless the bound is below 0: 0 if a rounded product is 0
    only where the exact one is, else -2"""
    sample_histogram: Tensor
    """int64 [4096], number of pairs of the sample by digit"""
    digit_histograms: Tensor
    """int64 [4, 256], for every digit of the stage DIGITS the number of pairs by that digit"""
    screen_histograms: Tensor
    """int64 [2, 256], the same for the stage SCREEN"""
    row_ties: Tensor
    """int32 [N], number of pairs equal to the k-th similarity, by row"""
    n_survivors: Tensor
    """int64 [1], number of pairs that the last pass found, whether or not they fit"""
    n_certified: Tensor
    """int64 [1], number of those that reach the bound in the precision asked for"""
    arrived: Tensor
    """int64 [1], programs of the running launch that are done, see `is_last_program`"""


def new_radix_select(device: torch.device, n_features: int) -> RadixSelect:
    """Tensors for a new call, before its first kernel."""
    sizes = 2 ** SAMPLE_DIGIT[1], MOST_DIGITS * DIGIT_BINS.value, MOST_SCREEN_DIGITS * DIGIT_BINS.value, 7, 1, 1, 1
    zeros = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
    sample_histogram, digit_histograms, screen_histograms, plan, n_survivors, n_certified, arrived = zeros
    return RadixSelect(
        plan=plan,
        bounds=torch.empty(3, dtype=torch.float32, device=device),
        sample_histogram=sample_histogram,
        digit_histograms=digit_histograms.view(MOST_DIGITS, DIGIT_BINS.value),
        screen_histograms=screen_histograms.view(MOST_SCREEN_DIGITS, DIGIT_BINS.value),
        row_ties=torch.zeros(n_features, dtype=torch.int32, device=device),
        n_survivors=n_survivors,
        n_certified=n_certified,
        arrived=arrived,
    )


@triton.jit
def stage_of(plan_ptr):
    """The current stage."""
    return tl.load(plan_ptr + STAGE)


@triton.jit
def _first_digit(bits):
    """Bin of the first digit that holds a similarity with these bits."""
    fine = _N_OCTAVES + ((bits - (_N_OCTAVES << _OCTAVE)) >> _SIXTEENTH)
    return tl.where(bits < (_N_OCTAVES << _OCTAVE), bits >> _OCTAVE, fine)


@triton.jit
def digit_of(bits, lowest, width):
    """Bin that holds a similarity with these bits, in the range of 2**width numbers from `lowest` on; -1 beyond it."""
    offset = bits - lowest
    digit = tl.where(width == ALL_WIDTH, _first_digit(bits), offset >> tl.maximum(width - 8, 0))
    return tl.where((offset >= 0) & (offset < (1 << width)), digit, -1)


@triton.jit
def _range_of(digit, lowest, width):
    """(lowest, width) of the range of numbers that a bin holds."""
    shift = tl.maximum(width - 8, 0)
    is_fine = digit >= _N_OCTAVES
    fine = (_N_OCTAVES << _OCTAVE) + ((digit - _N_OCTAVES) << _SIXTEENTH)
    first_lowest = tl.where(is_fine, fine, digit << _OCTAVE)
    first_width = tl.where(is_fine, _SIXTEENTH, _OCTAVE)
    is_first = width == ALL_WIDTH
    return tl.where(is_first, first_lowest, lowest + (digit << shift)), tl.where(is_first, first_width, shift)


@triton.jit
def _store_range(plan_ptr, lowest, width, n_above):
    """Where to look for the k-th similarity."""
    tl.store(plan_ptr + LOWEST, lowest)
    tl.store(plan_ptr + WIDTH, width)
    tl.store(plan_ptr + ABOVE, n_above)


@triton.jit
def _store_range_of_all(plan_ptr):
    """The k-th similarity may be any."""
    _store_range(plan_ptr, tl.zeros((), tl.int64), tl.full((), ALL_WIDTH, tl.int64), tl.zeros((), tl.int64))


@triton.jit
def row_bounds(bounds_ptr, plan_ptr, floor, offs_row):
    """For every row, what a similarity must exceed to be recorded: the bound with ties, floor and slack counted in."""
    bound = tl.load(bounds_ptr + BOUND)
    just_below = (bound.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    just_below = tl.where(bound > 0, just_below, -1.0)
    by_row = tl.where(offs_row <= tl.load(plan_ptr + TIE_ROW), just_below, bound)
    by_row = tl.maximum(by_row, floor)
    least = tl.where(by_row >= 0, tl.load(bounds_ptr + LEAST), -2.0)
    return tl.maximum(by_row - tl.load(bounds_ptr + SLACK), least)


@triton.jit
def _highest_bin_with(wanted, histogram, n_above, BINS: tl.constexpr):
    """(bin, number of pairs from it on, number of pairs beyond it) for the highest bin with `wanted` pairs from it on.

    `n_above` pairs are above all bins and count as well. If there are fewer than `wanted` in all, the bin is -1.
    """
    from_bin = n_above + tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    bins = tl.arange(0, BINS)
    found = tl.max(tl.where(from_bin >= wanted, bins, -1), axis=0)
    n_from = tl.sum(tl.where(bins == found, from_bin, 0), axis=0)
    return found, n_from, n_from - tl.sum(tl.where(bins == found, histogram, 0), axis=0)


@triton.jit
def _begin_kernel(
    plan_ptr, bounds_ptr, histogram_ptr,  # [7] int64, [3] float32, [4096] int64
    flags_ptr, state_ptr, deviation_ptr,  # [1] int32, [3] float32, [2] float32
    rank, n_features, M, sum_error, can_overflow,
    HAS_STATE: tl.constexpr, IS_ROUNDED: tl.constexpr,
    SHIFT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    bound = -1.0
    if rank > 0:
        histogram = tl.load(histogram_ptr + tl.arange(0, BINS))
        found, n_from, n_beyond = _highest_bin_with(rank, histogram, 0, BINS)
        if found >= 0:
            # the sample is taken to be spread evenly within the bin
            low = (found << SHIFT).to(tl.float32, bitcast=True)
            high = ((found + 1) << SHIFT).to(tl.float32, bitcast=True)
            share = (rank - n_beyond).to(tl.float32) / (n_from - n_beyond).to(tl.float32)
            bound = tl.where(found > 0, tl.minimum(high - (high - low) * share, 1.0), 0.0)
    if HAS_STATE:
        guess = tl.load(state_ptr + GUESS)
        bound = tl.where(guess > -1.0, tl.minimum(guess, 1.0), bound)
    slack, least = 0.0, -2.0
    flags = tl.load(flags_ptr)
    stage = tl.where(flags > 0, DIGITS, PASS)
    if IS_ROUNDED:
        # Products of fp16 numbers are exact in float32, and `sum_error` bounds the rounding of their sums. M / 64 + 64
        # units of 2**-24 cover `rescore`, of which a lane sums M / 64 terms over all slabs. The factor 1.01 covers the
        # norms of rounded columns and the rounding of this formula.
        deviation = tl.load(deviation_ptr)
        slack = 1.01 * (2.0 * deviation + deviation * deviation + sum_error + (M // 64 + 64) * 2.0**-24)
        least = tl.where(tl.load(deviation_ptr + 1) > 0, -2.0, 0.0)
        stage = PASS
    # without a guess a pass would record every pair, which is in vain if they cannot fit
    stage = tl.where((bound <= -1.0) & (can_overflow > 0), SCREEN if IS_ROUNDED else DIGITS, stage)
    tl.store(bounds_ptr + BOUND, bound)
    tl.store(bounds_ptr + SLACK, slack)
    tl.store(bounds_ptr + LEAST, least)
    tl.store(plan_ptr + STAGE, stage.to(tl.int64))
    _store_range_of_all(plan_ptr)
    # Pairs equal to the guess may be needed, so they are recorded. But there may be very many zeros, and they are
    # needed only if fewer than k pairs are above 0, which the pass then shows.
    tl.store(plan_ptr + TIE_ROW, tl.where(bound == 0.0, -1, n_features).to(tl.int64))
    tl.store(plan_ptr + PASSES_SO_FAR, tl.where(stage == PASS, 1, 0).to(tl.int64))
    tl.store(plan_ptr + FAILURE, tl.full((), NO_FAILURE, tl.int64))


@triton.jit
def is_last_program(arrived_ptr):
    """Tell whether this program of a launch is the last one to come here, after all that it had to write.

    Exactly one program gets True. It sees what all others have written, so that it can take the step that follows on
    the launch, which therefore needs no kernel of its own. Every program calls this once, in a one-dimensional grid.
    """
    tl.debug_barrier()  # until all threads of this program have written
    n_before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    is_last = n_before == tl.num_programs(0) - 1
    if is_last:
        tl.store(arrived_ptr, tl.zeros((), tl.int64))  # for the next launch
    tl.debug_barrier()  # no thread reads before the one that added
    return is_last


@triton.jit
def _begin_digits(plan_ptr, bounds_ptr):
    """Go to DIGITS, where nothing is rounded."""
    tl.store(plan_ptr + STAGE, tl.full((), DIGITS, tl.int64))
    tl.store(bounds_ptr + SLACK, 0.0)


@triton.jit
def certify(
    plan_ptr, bounds_ptr, n_survivors_ptr, n_certified_ptr,  # [7] int64, [3] float32, [1] int64 x 2
    k, capacity, floor,
    IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """After a pass: go to CERTIFIED, or to a repair; after the first one over rounded columns, that is SCREEN."""
    n_survivors = tl.load(n_survivors_ptr)
    is_complete = (tl.load(n_certified_ptr) >= k) | (tl.load(bounds_ptr + BOUND) <= floor)
    is_first = tl.load(plan_ptr + PASSES_SO_FAR) == 1
    tl.debug_barrier()
    if is_complete & (n_survivors <= capacity):
        tl.store(plan_ptr + STAGE, tl.full((), CERTIFIED, tl.int64))
    else:
        tl.store(n_survivors_ptr, tl.zeros((), tl.int64))
        tl.store(n_certified_ptr, tl.zeros((), tl.int64))
        if is_first:
            tl.store(plan_ptr + FAILURE, tl.where(n_survivors > capacity, OVERFLOW, SHORTFALL).to(tl.int64))
        if IS_ROUNDED & is_first:
            tl.store(plan_ptr + STAGE, tl.full((), SCREEN, tl.int64))
        else:
            _begin_digits(plan_ptr, bounds_ptr)


@triton.jit
def next_guess(
    plan_ptr, bounds_ptr, histograms_ptr,  # [7] int64, [3] float32, [2, BINS] int64
    k, capacity, floor,
    BINS: tl.constexpr,
):  # fmt: skip
    """After a pass of SCREEN: narrow the range that holds the k-th rounded similarity, or make a guess of it."""
    bins = tl.arange(0, BINS)
    width = tl.load(plan_ptr + WIDTH)
    is_first = width == ALL_WIDTH
    first_histogram = tl.load(histograms_ptr + bins)
    histogram = tl.load(histograms_ptr + tl.where(is_first, 0, BINS) + bins)
    found, n_from, n_beyond = _highest_bin_with(k, histogram, tl.load(plan_ptr + ABOVE), BINS)
    # if fewer than k pairs are in bins, the floor is 0 or more, and a guess of 0 serves
    lowest, width = _range_of(tl.maximum(found, 0).to(tl.int64), tl.load(plan_ptr + LOWEST), width)
    similarity = lowest.to(tl.int32).to(tl.float32, bitcast=True)
    slack = tl.load(bounds_ptr + SLACK)
    guess = tl.maximum(similarity - slack, 0.0)
    # the pass will record what is above the cut, by the first digit at most `n_most` pairs and at least `n_least`
    cut = tl.maximum(tl.maximum(guess, floor) - slack, tl.load(bounds_ptr + LEAST))
    digit_of_cut = _first_digit(tl.maximum(cut, 0.0).to(tl.int32, bitcast=True))
    n_most = tl.sum(tl.where(bins >= digit_of_cut, first_histogram, 0), axis=0)
    n_least = tl.sum(tl.where(bins > digit_of_cut, first_histogram, 0), axis=0)
    n_least = tl.where(similarity > cut, tl.maximum(n_least, n_from), n_least)
    # where the cut excludes zeros, they may be missing
    is_enough = (similarity > cut) | (guess <= floor)
    n_passes = tl.load(plan_ptr + PASSES_SO_FAR) + 1
    tl.debug_barrier()
    if is_first & (found > 0) & (n_most > capacity):
        _store_range(plan_ptr, lowest, width, n_beyond)
        tl.store(plan_ptr + PASSES_SO_FAR, n_passes)
    else:
        _store_range_of_all(plan_ptr)
        if is_enough & (n_least <= capacity):
            tl.store(bounds_ptr + BOUND, guess)
            tl.store(plan_ptr + TIE_ROW, tl.where(guess > 0, _EVERY_ROW, -1).to(tl.int64))
            tl.store(plan_ptr + PASSES_SO_FAR, n_passes + 1)
            tl.store(plan_ptr + STAGE, tl.full((), PASS, tl.int64))
        else:
            tl.store(plan_ptr + PASSES_SO_FAR, n_passes)
            _begin_digits(plan_ptr, bounds_ptr)


@triton.jit
def next_digit(
    plan_ptr, bounds_ptr, histogram_ptr,  # [7] int64, [3] float32, [BINS] int64
    k, capacity,
    BINS: tl.constexpr,
):  # fmt: skip
    """After a pass of DIGITS: narrow the range that holds the k-th similarity, or end the stage."""
    histogram = tl.load(histogram_ptr + tl.arange(0, BINS))
    found, n_from, n_beyond = _highest_bin_with(k, histogram, tl.load(plan_ptr + ABOVE), BINS)
    digit = tl.maximum(found, 0).to(tl.int64)
    lowest, width = _range_of(digit, tl.load(plan_ptr + LOWEST), tl.load(plan_ptr + WIDTH))
    n_passes = tl.load(plan_ptr + PASSES_SO_FAR) + 1
    tl.debug_barrier()
    tl.store(plan_ptr + PASSES_SO_FAR, n_passes)
    if found < 0:  # fewer than k pairs are above the floor: record them all
        tl.store(bounds_ptr + BOUND, -1.0)
        tl.store(plan_ptr + STAGE, tl.full((), COLLECT, tl.int64))
    else:
        _store_range(plan_ptr, lowest, width, n_beyond)
        tl.store(bounds_ptr + BOUND, lowest.to(tl.int32).to(tl.float32, bitcast=True))
        if n_from <= capacity:
            tl.store(plan_ptr + TIE_ROW, tl.full((), _EVERY_ROW, tl.int64))
            tl.store(plan_ptr + STAGE, tl.full((), COLLECT, tl.int64))
        elif width == 0:
            tl.store(plan_ptr + STAGE, tl.full((), TIES, tl.int64))


@triton.jit
def tie_row(
    plan_ptr, row_ties_ptr,  # [7] int64, [N] int32
    k, n_features,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """After the pass that counted ties: find the last row whose ties are needed to make up k."""
    wanted = k - tl.load(plan_ptr + ABOVE)
    n_before = tl.zeros((), tl.int64)
    tie_row = tl.zeros((), tl.int64)
    for first in range(0, n_features, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        ties = tl.load(row_ties_ptr + offs, mask=offs < n_features, other=0).to(tl.int64)
        up_to = n_before + tl.cumsum(ties, axis=0)
        tie_row += tl.sum(tl.where((up_to < wanted) & (offs < n_features), 1, 0), axis=0)
        n_before += tl.sum(ties, axis=0)
    n_passes = tl.load(plan_ptr + PASSES_SO_FAR) + 1
    tl.debug_barrier()
    tl.store(plan_ptr + TIE_ROW, tie_row)
    tl.store(plan_ptr + PASSES_SO_FAR, n_passes)
    tl.store(plan_ptr + STAGE, tl.full((), COLLECT, tl.int64))


def begin(
    radix: RadixSelect, flags: Tensor, state: Tensor | None, deviation: Tensor | None, rank: int, n_rows: int,
    sum_error: float | None, can_overflow: bool,
) -> None:  # fmt: skip
    """Choose the first bound: the guess in `state`, else the similarity at `rank` in the sampled histogram, else none.

    `deviation` [2] comes with an operand from `round_columns`, and `sum_error` bounds the rounding of its gram beyond
    it. Without it the operand has the columns as they are, and `flags` of the norms may say that they must not be
    multiplied: then the first pass is left out.
    """
    assert deviation is None or sum_error is not None, "nothing is known of the rounding of this device"
    shift, bits = SAMPLE_DIGIT
    launch(
        _begin_kernel, (1,),
        radix.plan, radix.bounds, radix.sample_histogram,
        flags, flags if state is None else state, flags if deviation is None else deviation,
        rank, radix.row_ties.numel(), n_rows, sum_error or 0.0, int(can_overflow),
        HAS_STATE=state is not None, IS_ROUNDED=deviation is not None, SHIFT=shift, BINS=2**bits,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
