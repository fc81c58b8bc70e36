"""Every stage of the radix select alone, and the chain of them on lists of numbers."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.arguments import (
    DEVICE,
    assert_same,
    copy_of,
    first_digits,
    numbers,
    radix_at,
    range_of_first_digit,
)
from tests.kernels.steps import arrive, certify, next_digit, next_guess, tie_row
from topk_ortho.kernels.radix_select import (
    CERTIFIED,
    COLLECT,
    DIGITS,
    MOST_DIGITS,
    NO_FAILURE,
    OVERFLOW,
    PASS,
    SAMPLE_DIGIT,
    SCREEN,
    SHORTFALL,
    TIES,
    begin,
    digit_of,
    new_radix_select,
    row_bounds,
)

N = 1000
STAGES = {"pass": PASS, "screen": SCREEN, "digits": DIGITS, "ties": TIES, "collect": COLLECT, "certified": CERTIFIED}
STAGES = {name: stage.value for name, stage in STAGES.items()}
ONE = 0x3F800000
SHIFT = SAMPLE_DIGIT[0]
ALL = 30
"""Width of the range that holds every similarity."""


def bits_of(number):
    return int(np.float32(number).view(np.int32))


def float_of(bits):
    return float(np.int32(bits).view(np.float32))


def from_the_top(histogram, wanted, counted=0):
    """(bin, counted from it on, counted beyond it) for the highest bin from which on `wanted` are counted."""
    for b in reversed(range(len(histogram))):
        if counted + histogram[b] >= wanted:
            return b, counted + int(histogram[b]), counted
        counted += int(histogram[b])
    return None


@pytest.mark.quick
def test_a_new_radix_select_is_blank():
    radix = new_radix_select(DEVICE, N)
    assert [tuple(t.shape) for t in radix] == [(7,), (3,), (4096,), (4, 256), (2, 256), (N,), (1,), (1,), (1,)]
    for name in set(radix._fields) - {"bounds"}:
        assert not getattr(radix, name).any(), f"{name} is not blank, or shares memory with another"
        getattr(radix, name).fill_(1)


class TestBegin:
    """The first bound, and the stage that it leads to."""

    @staticmethod
    def begin(
        *, state=None, flags=0, deviation=None, negative=0.5, rank=0, histogram=None, can_overflow=True, m=12,
        sum_error=0.0,
    ):  # fmt: skip
        """(radix, plan, bound, slack) from poison."""
        radix = radix_at(
            77, N, bound=math.nan, slack=math.nan, least=math.nan, lowest=7, width=7, above=7, tie_row=7, n_passes=7,
            failure=7,
        )  # fmt: skip
        if histogram is not None:
            radix.sample_histogram.copy_(torch.from_numpy(histogram))
        before = copy_of(radix)
        begin(
            radix,
            numbers([flags], torch.int32),
            None if state is None else numbers([state, math.nan, math.nan], torch.float32),
            None if deviation is None else numbers([deviation, negative], torch.float32),
            rank,
            m,
            sum_error,
            can_overflow,
        )
        assert_same(actual=radix, expected=before, but=("plan", "bounds"))
        return radix, radix.plan.tolist(), *radix.bounds[:2].tolist()

    @pytest.mark.parametrize(
        ("arguments", "stage"),
        [
            pytest.param({"can_overflow": False}, "pass", id="no_guess_and_all_fit"),
            pytest.param({"can_overflow": True}, "digits", id="no_guess_and_not_all_fit"),
            pytest.param({"state": 0.25}, "pass", id="guess"),
            pytest.param({"state": 0.25, "flags": 1}, "digits", id="raw_columns_out_of_range"),
            pytest.param({"state": 0.25, "flags": 3}, "digits", id="raw_columns_not_finite"),
            pytest.param({"can_overflow": False, "flags": 1}, "digits", id="out_of_range_and_all_fit"),
            pytest.param({"state": 0.25, "flags": 1, "deviation": 0.001}, "pass", id="rounded_columns_have_unit_norm"),
            pytest.param({"deviation": 0.001, "can_overflow": False}, "pass", id="rounded_and_all_fit"),
            pytest.param({"deviation": 0.001}, "screen", id="rounded_without_a_guess"),
        ],
    )
    def test_stage(self, arguments, stage):
        radix, plan, bound, _ = self.begin(**arguments)
        assert plan == [STAGES[stage], 0, ALL, 0, N, int(stage == "pass"), NO_FAILURE.value]
        assert bound == arguments.get("state", -1.0)
        assert radix.n_survivors.tolist() == radix.n_certified.tolist() == [0]

    @pytest.mark.parametrize(
        ("guess", "bound"),
        [
            (0.5, 0.5),
            (0.0, 0.0),
            (-0.5, -0.5),
            (-0.999, np.float32(-0.999)),
            (1.0, 1.0),
            (1.5, 1.0),
            (math.inf, 1.0),
            (-1.0, "sampled"),
            (-2.0, "sampled"),
            (-math.inf, "sampled"),
            (math.nan, "sampled"),
        ],
        ids=str,
    )
    def test_guess_of_the_state(self, guess, bound):
        """What is no guess falls back on the sample; no bound is above 1, which every cosine would miss."""
        histogram = np.zeros(4096, dtype=np.int64)
        if bound == "sampled":
            histogram[4000], bound = 10, float_of((4000 << SHIFT) + (1 << (SHIFT - 1)))
        _, plan, actual, _ = self.begin(state=guess, rank=5, histogram=histogram)
        assert actual == bound
        assert plan[0] == PASS.value
        assert plan[4] == (-1 if bound == 0 else N), (
            "zeros may be many: they are kept only if the radix select finds them needed"
        )

    @given(data=st.data())
    def test_sampled(self, data):
        """The value at `rank` from the top, as if a bin were uniform; 0 in the first."""
        generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
        histogram = np.zeros(4096, dtype=np.int64)
        n_bins = data.draw(st.sampled_from([1, 2, 30]))
        bins = generator.choice(4064, n_bins, replace=False)  # below the bin of 1.0
        bins[0] = data.draw(st.sampled_from([0, bins[0]]))
        histogram[bins] = generator.integers(1, 1000, n_bins)
        rank = data.draw(st.integers(1, int(histogram.sum())))
        found, n_from, n_beyond = from_the_top(histogram, rank)
        low, high = float_of(found << SHIFT), float_of((found + 1) << SHIFT)
        _, plan, bound, _ = self.begin(rank=rank, histogram=histogram)
        expected = high - (high - low) * (rank - n_beyond) / (n_from - n_beyond) if found else 0
        assert bound == pytest.approx(expected, rel=1e-6, abs=1e-37)
        assert low <= bound < high
        assert plan == [PASS.value, 0, ALL, 0, N if found else -1, 1, NO_FAILURE.value]

    @pytest.mark.parametrize(("rank", "stage"), [(30, "pass"), (31, "digits")], ids=["all_of_it", "one_too_few"])
    def test_the_sample_holds_too_few(self, rank, stage):
        histogram = np.zeros(4096, dtype=np.int64)
        histogram[[0, 3000, 4000]] = 10
        _, plan, bound, _ = self.begin(rank=rank, histogram=histogram)
        assert plan[0] == STAGES[stage]
        assert (bound == -1.0) == (stage == "digits")

    def test_a_state_outranks_the_sample(self):
        """Nothing was sampled then."""
        _, plan, bound, _ = self.begin(state=0.75, rank=5, histogram=np.zeros(4096, dtype=np.int64))
        assert (plan[0], bound) == (PASS.value, 0.75)

    @pytest.mark.parametrize("sum_error", [2.0**-24, 2.0**-22], ids=str)
    @pytest.mark.parametrize(("m", "deviation"), [(1, 0.0), (32768, 1e-4), (12, 2.0**-8), (4096, 2.0**-7)], ids=str)
    def test_slack(self, deviation, m, sum_error):
        """It covers columns that moved by the deviation, and two sums of m products that are rounded; not much more."""
        *_, slack = self.begin(state=0.5, deviation=deviation, m=m, sum_error=m * sum_error)
        least = 2 * deviation + deviation**2 + m * sum_error
        assert least <= slack <= 1.2 * least + 64 * 2.0**-23
        # a lane sums m / 64 products, each of three roundings, with two of the inverse norms; six steps join the lanes
        assert least + (m / 64 + 11) * 2.0**-24 <= slack, "the sums of the exact values err too"

    def test_nothing_is_known_of_the_sums(self):
        self.begin(state=0.5, sum_error=None)
        with pytest.raises(AssertionError, match="nothing is known of the rounding of this device"):
            self.begin(state=0.5, deviation=0.001, sum_error=None)

    def test_no_slack_for_columns_that_are_not_rounded(self):
        assert self.begin(state=0.5)[-1] == 0

    def test_slack_of_a_screen_without_a_guess(self):
        """The guess that it makes has to allow for it."""
        _, plan, _, slack = self.begin(deviation=2.0**-8)
        assert plan[0] == SCREEN.value
        assert slack == self.begin(state=0.5, deviation=2.0**-8)[-1] > 0

    @pytest.mark.parametrize(
        ("arguments", "least"),
        [
            ({"deviation": 0.001, "negative": 0.0}, 0.0),
            ({"deviation": 0.001, "negative": 2.0**-149}, -2.0),
            ({"deviation": 0.001, "negative": 0.5}, -2.0),
            ({}, -2.0),
        ],
        ids=str,
    )
    def test_least(self, arguments, least):
        """Products are 0 only where they are so exactly, if they were rounded and no entry is negative."""
        radix, *_ = self.begin(state=0.5, **arguments)
        assert radix.bounds[2] == least

    def test_no_sampled_bound_is_above_one(self):
        histogram = np.zeros(4096, dtype=np.int64)
        histogram[ONE >> SHIFT] = 100
        *_, bound, _ = self.begin(rank=10, histogram=histogram)
        assert bound <= 1


@triton.jit
def _row_bounds_kernel(bounds_ptr, plan_ptr, floor, result_ptr, n, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(result_ptr + rows, row_bounds(bounds_ptr, plan_ptr, floor, rows), mask=rows < n)


class TestRowBounds:
    """To exceed it is to be above the bound, or equal to it in a row up to tie_row, and above the floor."""

    @staticmethod
    def row_bounds(*, floor=-1.0, **fields):
        radix, result = radix_at(PASS.value, N, **fields), torch.empty(6, device=DEVICE)
        _row_bounds_kernel[(1,)](radix.bounds, radix.plan, floor, result, 6, BLOCK=8)
        return result.cpu().numpy()

    SIMILARITIES = np.unique(
        np.concatenate(
            [np.nextafter(np.float32(c), np.float32([-2, c, 2])) for c in (-1.0, -0.5, -0.3, 0.0, 0.3, 0.5, 0.7, 1.0)]
        )
    )
    """Around every bound and every floor below; -0.0 is 0.0."""
    SIMILARITIES = SIMILARITIES[(SIMILARITIES >= -1) & (SIMILARITIES <= 1)]

    @pytest.mark.parametrize("tie_row", [-1, 3, N])
    @pytest.mark.parametrize("floor", [-1.0, 0.3, 0.5, 0.7])
    @pytest.mark.parametrize("bound", [float_of(1), 0.3, 0.5, float_of(bits_of(0.5) - 1), 1.0], ids=str)
    def test_positive_bounds(self, bound, floor, tie_row):
        by_row = self.row_bounds(bound=bound, floor=floor, tie_row=tie_row)
        bound, floor = np.float32(bound), np.float32(floor)
        for row in range(6):
            for s in self.SIMILARITIES:
                is_kept = (s > bound or (s == bound and row <= tie_row)) and s > floor
                assert (s > by_row[row]) == is_kept, (row, s)

    @pytest.mark.parametrize("floor", [-1.0, 0.0, 0.3])
    @pytest.mark.parametrize("bound", [0.0, -0.3, -1.0])
    def test_a_bound_of_zero_or_less_keeps_zeros(self, bound, floor):
        """|cosine| = 0 is a pair like others; below zero there is nothing to tell apart."""
        by_row = self.row_bounds(bound=bound, floor=floor)
        for s in self.SIMILARITIES[self.SIMILARITIES >= 0]:
            assert (s > by_row[0]) == (s > np.float32(floor)), s

    def test_zeros_that_are_tied(self):
        by_row = self.row_bounds(bound=0.0, tie_row=2)
        assert (by_row[:3] < 0).all()
        assert (by_row[3:] == 0).all()

    @pytest.mark.parametrize(("bound", "floor"), [(0.5, -1.0), (0.5, 0.7), (-1.0, 0.3)])
    def test_slack_lowers_bound_and_floor(self, bound, floor):
        by_row = self.row_bounds(bound=bound, floor=floor, slack=0.125)
        assert by_row == pytest.approx(max(bound, floor) - 0.125, abs=1e-7)

    @pytest.mark.parametrize(
        ("bound", "floor", "by_row"),
        [
            pytest.param(0.0, 0.0, 0.0, id="nothing_is_guessed_and_zeros_do_not_count"),
            pytest.param(0.0, -1.0, 0.0, id="zeros_may_count_and_the_bound_excludes_them"),
            pytest.param(0.1, -1.0, 0.0, id="bound_within_the_slack"),
            pytest.param(-1.0, 0.1, 0.0, id="floor_within_the_slack"),
            pytest.param(0.5, -1.0, 0.375, id="bound_beyond_the_slack"),
            pytest.param(-0.25, -1.0, -1.125, id="zeros_count"),
        ],
    )
    def test_what_slack_does_not_let_through(self, bound, floor, by_row):
        """Exact zeros are never recorded for the sake of the slack alone."""
        tie_row = -1 if bound == 0 else N
        actual = self.row_bounds(bound=bound, floor=floor, slack=0.125, least=0.0, tie_row=tie_row)
        assert actual == pytest.approx(by_row, abs=1e-7)
        if by_row == 0:
            assert (actual == 0).all()


@pytest.mark.parametrize("n_programs", [1, 2, 700])
def test_one_program_is_the_last(n_programs):
    """In every launch; the counter is ready for the next one."""
    arrived = numbers([0], torch.int64)
    for _ in range(3):
        is_last = torch.full((n_programs,), -1, dtype=torch.int32, device=DEVICE)
        arrive(arrived, is_last)
        assert sorted(is_last.tolist()) == [0] * (n_programs - 1) + [1]
        assert arrived.tolist() == [0]


class TestCertify:
    """Done if enough pairs survived, or all above the floor did, and all of them fit."""

    K, CAPACITY = 100, 150

    def certify(
        self, *, n_survivors=120, n_certified=None, bound=0.5, floor=-1.0, is_rounded=False, n_passes=1
    ):  # fmt: skip
        radix = radix_at(PASS.value, N, bound=bound, slack=0.125, n_passes=n_passes)
        radix.n_survivors.fill_(n_survivors)
        radix.n_certified.fill_(n_survivors if n_certified is None else n_certified)
        before = copy_of(radix)
        certify(radix, self.K, self.CAPACITY, floor, is_rounded=is_rounded)
        return radix, before

    @pytest.mark.parametrize(
        ("arguments", "is_certified"),
        [
            pytest.param({"n_survivors": 99}, False, id="one_short_of_k"),
            pytest.param({"n_survivors": 100}, True, id="k"),
            pytest.param({"n_survivors": 150}, True, id="capacity"),
            pytest.param({"n_survivors": 151}, False, id="one_more_than_capacity"),
            pytest.param({"n_survivors": 2**33}, False, id="more_than_int32"),
            pytest.param({"n_survivors": 140, "n_certified": 99}, False, id="too_few_reach_the_bound"),
            pytest.param({"n_survivors": 150, "n_certified": 99}, False, id="too_few_reach_the_bound_of_capacity"),
            pytest.param({"n_survivors": 140, "n_certified": 100}, True, id="enough_reach_the_bound"),
            pytest.param({"n_survivors": 151, "n_certified": 100}, False, id="enough_reach_the_bound_but_none_fit"),
            pytest.param({"n_survivors": 0, "bound": -1.0}, True, id="no_bound_and_no_pair"),
            pytest.param({"n_survivors": 9, "bound": 0.25, "floor": 0.25}, True, id="bound_at_the_floor"),
            pytest.param({"n_survivors": 9, "bound": 0.24, "floor": 0.25}, True, id="bound_below_the_floor"),
            pytest.param({"n_survivors": 9, "bound": 0.26, "floor": 0.25}, False, id="bound_above_the_floor"),
            pytest.param({"n_survivors": 151, "bound": 0.25, "floor": 0.25}, False, id="bound_at_the_floor_none_fit"),
        ],
    )
    @pytest.mark.parametrize("is_rounded", [False, True], ids=["exact", "rounded"])
    def test_edges(self, is_rounded, arguments, is_certified):
        radix, before = self.certify(is_rounded=is_rounded, **arguments)
        if is_certified:
            assert radix.plan[0] == CERTIFIED.value
            assert torch.equal(radix.plan[1:], before.plan[1:])
            assert_same(actual=radix, expected=before, but=("plan",))
        else:
            failure = OVERFLOW if arguments["n_survivors"] > self.CAPACITY else SHORTFALL
            stage, slack = (SCREEN, 0.125) if is_rounded else (DIGITS, 0.0)
            assert radix.plan.tolist() == [stage.value, *before.plan[1:6].tolist(), failure.value]
            assert radix.bounds.tolist() == [before.bounds[0], slack, before.bounds[2]]
            assert radix.n_survivors.tolist() == radix.n_certified.tolist() == [0]
            assert_same(actual=radix, expected=before, but=("plan", "bounds", "n_survivors", "n_certified"))

    @pytest.mark.parametrize("n_survivors", [99, 151])
    @pytest.mark.parametrize("n_passes", [2, 4])
    def test_a_second_pass_of_a_screen(self, n_passes, n_survivors):
        """The screen has done what it could. It was not the first pass that failed, if there was one."""
        radix, before = self.certify(n_survivors=n_survivors, is_rounded=True, n_passes=n_passes)
        assert radix.plan.tolist() == [DIGITS.value, *before.plan[1:].tolist()]
        assert radix.bounds.tolist() == [0.5, 0.0, -2.0]
        assert radix.n_survivors.tolist() == radix.n_certified.tolist() == [0]


@triton.jit
def _digit_kernel(bits_ptr, lowest, width, result_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + offs, mask=offs < n, other=0)
    tl.store(result_ptr + offs, digit_of(bits, lowest, width), mask=offs < n)


class TestDigits:
    """The bins divide the range of a digit."""

    @staticmethod
    def digits_of(bits, lowest, width):
        bits = numbers(bits, torch.int32)
        result = torch.empty_like(bits)
        _digit_kernel[(1,)](bits, lowest, width, result, len(bits), BLOCK=triton.next_power_of_2(len(bits)))
        return result.tolist()

    def test_the_first(self):
        edges = [0, 1, ONE - 1, ONE, bits_of(2.0**-8), bits_of(2.0**-8) - 1, bits_of(2.0**-126), bits_of(0.75)]
        bits = np.array(edges + np.random.default_rng(0).integers(0, ONE, 400).tolist(), dtype=np.int32)
        bits = np.append(bits, np.random.default_rng(1).random(400, dtype=np.float32).view(np.int32))
        digits = self.digits_of(bits.tolist(), 0, ALL)
        assert digits == first_digits(bits.view(np.float32)).tolist()
        assert 0 <= min(digits) <= max(digits) < 256
        for digit in set(digits):
            lowest, width = range_of_first_digit(digit)
            ends = [lowest, min(lowest + 2**width - 1, ONE)]
            assert self.digits_of(ends, 0, ALL) == [digit] * 2
            assert self.digits_of([ends[0] - 1, ends[1] + 1], 0, ALL) != [digit] * 2

    @pytest.mark.parametrize(("width", "n_bins", "size"), [(23, 256, 2**15), (19, 256, 2**11), (9, 256, 2), (3, 8, 1)])
    def test_the_others(self, width, n_bins, size):
        """Equal bins of the whole range, and none for what is beyond it."""
        lowest = bits_of(0.3)
        offsets = [0, 1, size - 1, size, 2**width - size - 1, 2**width - size, 2**width - 1]
        digits = self.digits_of([lowest + offset for offset in offsets], lowest, width)
        assert digits == [offset // size for offset in offsets]
        assert digits[-1] == n_bins - 1
        assert self.digits_of([0, lowest - 1, lowest + 2**width, ONE], lowest, width) == [-1] * 4

    def test_so_many_reach_the_last_bit(self):
        """However the first digit turns out."""
        for width in (19, 23):
            for _ in range(MOST_DIGITS - 1):
                width = max(0, width - 8)
            assert width == 0


class TestNextDigit:
    """The digit that holds the k-th value, by counts from the top."""

    @given(data=st.data())
    def test_against_a_loop(self, data):
        width = data.draw(st.sampled_from([ALL, 23, 19, 15, 11, 7, 3]))
        n_all_bins = {ALL: 248, 7: 128, 3: 8}.get(width, 256)
        generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
        histogram = np.zeros(256, dtype=np.int64)
        n_bins = data.draw(st.sampled_from([0, 1, 2, n_all_bins * 3 // 4]))
        bins = generator.choice(n_all_bins, n_bins, replace=False)
        histogram[bins] = generator.integers(1, data.draw(st.sampled_from([2, 100, 2**40])), n_bins)
        n_above = 0 if width == ALL else data.draw(st.integers(0, 50))
        lowest = 0 if width == ALL else int(generator.integers(0, (ONE >> width) + 1)) << width
        total = int(histogram.sum())
        k = n_above + data.draw(st.integers(1, max(1, total)) | st.just(total + 1) | st.just(max(1, total)))
        answer = from_the_top(histogram, k, n_above)
        capacity = (
            data.draw(st.integers(k, 2 * k)) if answer is None else max(k, answer[1] + data.draw(st.integers(-1, 1)))
        )

        radix = radix_at(
            DIGITS.value, N, bound=0.5, lowest=lowest, width=width, above=n_above, tie_row=N - 9, n_passes=3, failure=2
        )
        radix.digit_histograms.fill_(2**40)
        radix.digit_histograms[2].copy_(torch.from_numpy(histogram))
        before = copy_of(radix)
        next_digit(radix, radix.digit_histograms[2], k, capacity)

        if answer is None:
            expected, bound = [COLLECT.value, lowest, width, n_above, N - 9, 4], -1.0
        else:
            found, n_from, n_beyond = answer
            if width == ALL:
                lowest, following = range_of_first_digit(found)
            else:
                following = max(0, width - 8)
                lowest += found << following
            bound = float_of(lowest)
            if n_from <= capacity:
                expected = [COLLECT.value, lowest, following, n_beyond, 2**31 - 1, 4]
            else:
                expected = [(DIGITS if following else TIES).value, lowest, following, n_beyond, N - 9, 4]
        assert radix.plan.tolist() == [*expected, 2]
        assert radix.bounds.tolist() == [bound, *before.bounds[1:].tolist()]
        assert_same(actual=radix, expected=before, but=("plan", "bounds"))


class TestNextGuess:
    """A guess that k pairs reach, from counts of rounded similarities."""

    K, CAPACITY, SLACK = 100, 150, 2.0**-9

    def next_guess(self, first, second=None, *, floor=-1.0, least=-2.0, slack=SLACK, n_passes=1, failure=1):
        """(radix, plan, bound, slack) after counts by bin of the first digit, or after those of the second."""
        radix = radix_at(
            SCREEN.value, N, bound=0.125, slack=slack, least=least, tie_row=7, n_passes=n_passes, failure=failure
        )
        for row, counts in enumerate((first, second or {})):
            for digit, n in counts.items():
                radix.screen_histograms[row, digit] = n
        if second is not None:
            found, _, n_beyond = from_the_top(radix.screen_histograms[0].tolist(), self.K)
            lowest, width = range_of_first_digit(found)
            radix.plan[1:4] = numbers([lowest, width, n_beyond], torch.int64)
        before = copy_of(radix)
        next_guess(radix, self.K, self.CAPACITY, floor)
        assert_same(actual=radix, expected=before, but=("plan", "bounds"))
        assert radix.bounds[2] == least
        return radix, radix.plan.tolist(), *radix.bounds[:2].tolist()

    HALF = int(first_digits(np.array([0.5], dtype=np.float32))[0])
    """Bin of numbers from 0.5 to 0.53125, of which each has 2**11 in its 256 parts."""

    def test_the_first_digit(self):
        """What is above 0.5 - 2 slack is in the bin below too, and fits."""
        _, plan, bound, slack = self.next_guess(
            {self.HALF + 9: 60, self.HALF: 70, self.HALF - 1: 20, self.HALF - 2: 999}
        )
        assert plan == [PASS.value, 0, ALL, 0, 2**31 - 1, 3, 1]
        assert bound == 0.5 - self.SLACK
        assert slack == self.SLACK

    def test_the_first_digit_is_too_coarse(self):
        """The bins that hold what the pass would record have one pair more than fits."""
        counts = {self.HALF + 9: 60, self.HALF: 70, self.HALF - 1: 21}
        _, plan, bound, slack = self.next_guess(counts)
        assert plan == [SCREEN.value, bits_of(0.5), 19, 60, 7, 2, 1]
        assert (bound, slack) == (0.125, self.SLACK)

    @pytest.mark.parametrize(
        ("part", "n_above_part", "n_in_part", "stage"),
        [(200, 30, 60, "pass"), (200, 30, 61, "digits"), (0, 0, 90, "pass"), (0, 1, 90, "digits")],
        ids=["fits", "does_not_fit", "lowest_fits", "lowest_does_not_fit"],
    )
    def test_the_second_digit(self, part, n_above_part, n_in_part, stage):
        """The guess comes from the lower edge of the part of the bin; where too many are above it, DIGITS."""
        second = {part: n_in_part, part + 1: n_above_part}
        if part > 0:
            second[part - 1] = 70
        first = {self.HALF + 9: 60, self.HALF: sum(second.values()), self.HALF - 1: 99}
        _, plan, bound, slack = self.next_guess(first, second)
        t = float_of(bits_of(0.5) + (part << 11))
        if stage == "pass":
            assert plan == [PASS.value, 0, ALL, 0, 2**31 - 1, 3, 1]
            assert bound == np.float32(t) - np.float32(self.SLACK)
            assert slack == self.SLACK
        else:
            assert plan == [DIGITS.value, 0, ALL, 0, 7, 2, 1]
            assert (bound, slack) == (0.125, 0.0)

    @pytest.mark.parametrize(("n", "stage"), [(30, "pass"), (31, "digits")], ids=["fit", "do_not_fit"])
    def test_bins_between_the_cut_and_the_guess(self, n, stage):
        """What is above 0.5 - 2 / 16 = 0.375 is recorded, for certain if it is beyond the bin of 0.375."""
        first = {self.HALF: 120, self.HALF - 4: n, self.HALF - 8: 99}
        assert self.next_guess(first, slack=2.0**-4)[1][0] == SCREEN.value
        assert self.next_guess(first, {0: 120}, slack=2.0**-4)[1][0] == STAGES[stage]

    @pytest.mark.parametrize(("floor", "stage"), [(-1.0, "screen"), (0.5, "screen"), (0.75, "pass")], ids=str)
    def test_a_floor_leaves_fewer(self, floor, stage):
        """All above the floor, less the slack, are recorded; a bound below the floor is certified by it."""
        _, plan, bound, _ = self.next_guess({self.HALF + 9: 60, self.HALF: 99}, floor=floor)
        assert plan[0] == STAGES[stage]
        if stage == "pass":
            assert bound == 0.5 - self.SLACK < floor

    @pytest.mark.parametrize(
        ("counts", "floor", "least", "stage"),
        [
            pytest.param({200: 10}, 0.0, -2.0, "pass", id="fewer_than_k_are_positive"),
            pytest.param({0: 990, 200: 10}, 0.0, 0.0, "pass", id="zeros_do_not_count"),
            pytest.param({0: 990, 200: 10}, -1.0, 0.0, "digits", id="zeros_count_and_the_cut_excludes_them"),
            pytest.param({0: 990, 200: 10}, -1.0, -2.0, "digits", id="zeros_count"),
            pytest.param({80: 90, 200: 10}, -1.0, 0.0, "pass", id="within_the_slack_of_zero_and_zeros_are_told_apart"),
        ],
    )
    def test_zeros(self, counts, floor, least, stage):
        """A guess within the slack of 0 is 0, and exact zeros are not recorded for it."""
        _, plan, *_ = self.next_guess(counts, floor=floor, least=least)
        expected = [PASS.value, 0, ALL, 0, -1, 3] if stage == "pass" else [DIGITS.value, 0, ALL, 0, 7, 2]
        assert plan == [*expected, 1]

    def test_within_the_slack_of_zeros(self):
        """Which cannot be told apart: all pairs would be recorded."""
        first = {80: 140, 200: 11}
        assert self.next_guess(first)[1][0] == SCREEN.value
        assert self.next_guess(first, {0: 140})[1][0] == DIGITS.value

    def test_without_a_first_pass(self):
        _, plan, *_ = self.next_guess({self.HALF: 120}, n_passes=0, failure=0)
        assert plan == [PASS.value, 0, ALL, 0, 2**31 - 1, 2, 0]


SIMILARITIES = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, 0.5, 1.0, float_of(1), float_of(ONE - 1), float_of(bits_of(0.5) + 1), 0.25]),
    st.integers(bits_of(0.75), bits_of(0.75) + 1030).map(float_of),
)
"""Any, common ones, and some that share digits."""


class TestChain:
    """What the stages find together, histograms counted here."""

    @staticmethod
    def selected_by(values, rows, k, capacity, floor):
        """Values [p] of pairs by row, through DIGITS and TIES; (radix, kept)."""
        bits = values.view(np.int32)
        radix = radix_at(DIGITS.value, N, n_passes=0)
        for histogram in radix.digit_histograms:
            if radix.plan[0] == DIGITS.value:
                _, lowest, width, *_ = radix.plan.tolist()
                offset = bits.astype(np.int64) - lowest
                digit = first_digits(values) if width == ALL else offset >> max(0, width - 8)
                counted = digit[(values > floor) & (offset >= 0) & (offset < 2**width)]
                counts = np.bincount(counted, minlength=256)
                histogram.add_(torch.from_numpy(counts).to(DEVICE))
                next_digit(radix, histogram, k, capacity)
        if radix.plan[0] == TIES.value:
            tied = rows[bits == int(radix.plan[1])]
            radix.row_ties.copy_(torch.from_numpy(np.bincount(tied, minlength=N)))
            tie_row(radix, k)
        bound, last_row = float(radix.bounds[0]), int(radix.plan[4])
        return radix, (values > floor) & ((values > bound) | ((values == bound) & (rows <= last_row)))

    @given(data=st.data())
    def test_keeps_the_first_k_and_no_more_than_fit(self, data):
        values = np.array(data.draw(st.lists(SIMILARITIES, min_size=1, max_size=60)), dtype=np.float32)
        n_rows = data.draw(st.sampled_from([1, 3, 30]))
        rows = np.arange(len(values)) * n_rows // len(values)
        k = data.draw(st.integers(1, len(values)))
        # ties of one row cannot be told apart
        capacity = k + data.draw(st.sampled_from([0, 1, 5])) + np.bincount(rows).max()
        floor = data.draw(st.sampled_from([-1.0, 0.0, 0.25, 0.75]))
        radix, kept = self.selected_by(values, rows, k, int(capacity), floor)

        assert radix.plan[0] == COLLECT.value
        passing = values > floor
        assert min(k, passing.sum()) <= kept.sum() <= capacity
        order = np.lexsort((np.arange(len(values)), -values))
        first = order[passing[order]][:k]
        assert kept[first].all(), "one of the first k is not kept"

    def test_ends_early_when_all_fit(self):
        """Passes: one for each digit that was needed, and one for ties."""
        values = np.linspace(0.5, 1, 500, dtype=np.float32)
        rows = np.arange(500)
        same = np.full(500, 0.5, dtype=np.float32)
        assert self.selected_by(values, rows, 100, 300, -1.0)[0].plan[5] == 1
        assert self.selected_by(values, rows, 100, 103, -1.0)[0].plan[5] == 2
        assert self.selected_by(same, rows, 100, 300, -1.0)[0].plan[5] == MOST_DIGITS + 1
        assert self.selected_by(same, rows, 100, 500, -1.0)[0].plan[5] == 1
        assert self.selected_by(same, rows, 100, 300, 0.5)[0].plan[5] == 1


class TestTieRow:
    """The first row up to which ties make up k."""

    @given(data=st.data())
    def test_against_a_cumulative_sum(self, data):
        n = data.draw(st.sampled_from([2, 1023, 1024, 1025, 3000]))
        generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
        ties = generator.integers(0, 5, n) * (generator.random(n) < data.draw(st.sampled_from([0.01, 0.5, 1.0])))
        ties[data.draw(st.integers(0, n - 1))] += 1
        n_above = data.draw(st.integers(0, 100))
        wanted = data.draw(st.integers(1, int(ties.sum())))
        radix = radix_at(TIES.value, n, bound=0.5, lowest=bits_of(0.5), above=n_above, n_passes=4)
        radix.row_ties.copy_(torch.from_numpy(ties))
        tie_row(radix, n_above + wanted)
        expected = int(np.searchsorted(np.cumsum(ties), wanted))
        assert radix.plan.tolist() == [COLLECT.value, bits_of(0.5), ALL, n_above, expected, 5, 0]
        assert radix.bounds.tolist() == [0.5, 0.0, -2.0]

    def test_more_ties_than_int32(self):
        radix = radix_at(TIES.value, 4, above=5)
        radix.row_ties.fill_(2**31 - 1)
        tie_row(radix, 5 + 2**32)
        assert radix.plan[4] == 2
