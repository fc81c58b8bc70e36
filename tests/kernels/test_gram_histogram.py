"""Counts of similarities by digit, and of ties by row, against counts of all pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import dyadic, normal
from tests.kernels.arguments import (
    FEW,
    assert_same,
    copy_of,
    empty_moments,
    exact_products,
    first_digits,
    gram_of,
    in_padded_lines,
    inverse_of,
    operand_of,
    radix_at,
    range_of_first_digit,
)
from tests.kernels.steps import next_digit, next_guess, tie_row
from tests.tolerances import assert_within, cosine_bound
from topk_ortho.kernels.gram_histogram import gram_histogram, gram_row_ties
from topk_ortho.kernels.launch import Operand
from topk_ortho.kernels.radix_select import DIGITS, SCREEN, TIES

ALL = 30
"""Width of the range that holds every similarity; its bins are those of the first digit."""

pytestmark = pytest.mark.usefixtures("small_tiles")


def similarities_of(cosine: np.ndarray, *, is_abs: bool) -> np.ndarray:
    """Float32, of all pairs."""
    s = (np.abs(cosine) if is_abs else cosine)[np.triu_indices(len(cosine), 1)]
    return s.astype(np.float32) + np.float32(0)


def counts_of(s: np.ndarray, lowest: int = 0, width: int = ALL, floor: float = -1.0) -> np.ndarray:
    """How many are in each bin of the 2**width numbers from the one with bits `lowest` on."""
    s = s[(s >= 0) & (s > np.float32(floor))]
    offset = s.view(np.int32).astype(np.int64) - lowest
    digit = first_digits(s) if width == ALL else offset >> max(0, width - 8)
    return np.bincount(digit[(offset >= 0) & (offset < 2**width)], minlength=256)


def count(
    operand: Operand, lowest: int = 0, width: int = ALL, *, floor: float = -1.0, is_abs: bool = True,
    is_screen: bool = False,
) -> np.ndarray:  # fmt: skip
    """Counts that were added to a histogram of ones; those of other digits do not change."""
    stage = SCREEN if is_screen else DIGITS
    name = "screen_histograms" if is_screen else "digit_histograms"
    radix = radix_at(stage.value, operand.x.shape[1], lowest=lowest, width=width, above=3)
    histograms = getattr(radix, name).fill_(1)
    before = copy_of(radix)
    gram_histogram(operand, radix, 1, None, 5, 99, floor, is_abs=is_abs, is_screen=is_screen)
    assert_same(actual=radix, expected=before, but=(name, "plan", "bounds"))
    of_all = (histograms - 1).cpu().numpy()
    assert of_all[1].sum() == of_all.sum()
    return of_all[1]


class TestHistogram:
    """Each digit, under each floor."""

    @FEW
    @given(data=st.data())
    def test_any_digit_to_the_bit(self, data):
        n = data.draw(st.integers(2, 35))
        n_values = data.draw(st.sampled_from([None, 2]))
        operand, cosine = exact_products(n, data.draw(st.integers(0, 99)), n_values)
        is_abs = data.draw(st.booleans())
        s = similarities_of(cosine, is_abs=is_abs)
        width = data.draw(st.sampled_from([ALL, 23, 19, 15, 11, 7, 3]))
        one = np.abs(data.draw(st.sampled_from(s.tolist())) * np.float32(1)).reshape(1)
        lowest = int(one.view(np.int32)[0]) >> width << width  # the digits above are those of a pair
        arguments = {
            "floor": data.draw(st.sampled_from([-1.0, 0.0, 0.25, float(np.abs(s[0]))])),
            "is_abs": is_abs,
            "is_screen": data.draw(st.booleans()),
        }
        expected = counts_of(s, lowest, width, -1.0 if arguments["is_screen"] else arguments["floor"])
        assert count(operand, lowest, width, **arguments).tolist() == expected.tolist()

    @pytest.mark.parametrize("width", [ALL, 19, 11, 3], ids=["first", "second", "third", "last"])
    def test_digits(self, width):
        """Pairs that share the digits above one with the median."""
        operand, cosine = exact_products(34, n_values=7)
        s = similarities_of(cosine, is_abs=True)
        median = int(np.sort(s)[len(s) // 2].view(np.int32))
        lowest = median >> width << width
        expected = counts_of(s, lowest, width)
        assert expected.sum() >= 5
        assert count(operand, lowest, width).tolist() == expected.tolist()

    @pytest.mark.parametrize(("is_abs", "is_scaled"), [(True, False), (False, True)], ids=["abs", "signed_scaled"])
    def test_ties_zeros_and_ones(self, is_abs, is_scaled):
        """1.0 and 0.0 are bins like others; what is negative has none."""
        x = dyadic(6, 40, seed=1)
        x[:, [0, 39]] = 0
        s = similarities_of(gram_of(x), is_abs=is_abs)
        expected = counts_of(s)
        assert expected[0] > 0
        assert expected[247] > 0
        assert expected.sum() == (s.size if is_abs else (s >= 0).sum())
        operand = operand_of(x, is_scaled=is_scaled)
        assert count(operand, is_abs=is_abs).tolist() == expected.tolist()

    def test_floor_is_excluded(self):
        x = dyadic(6, 40, seed=1)
        for floor in (0.0, 0.5):
            s = similarities_of(gram_of(x), is_abs=True)
            assert count(operand_of(x), floor=floor).sum() == (s > floor).sum()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_any_products(self, dtype):
        """From every bin on, as many as there are at its lower edge, give or take an error of a cosine."""
        x = normal(40, 40, dtype=dtype)
        error = cosine_bound(x)
        s = np.abs(gram_of(x)[np.triu_indices(40, 1)])
        operand = operand_of(x, "ieee" if dtype == torch.float32 else "half", is_scaled=True)
        from_bin = count(operand)[::-1].cumsum()[::-1]
        assert from_bin[0] == 780
        for digit in range(1, 247):
            edge = np.array(range_of_first_digit(digit)[0], dtype=np.int32).view(np.float32)
            assert (s >= edge + error).sum() <= from_bin[digit] <= (s >= edge - error).sum()

    def test_huge_columns(self):
        x = dyadic(6, 40, seed=1)
        expected = counts_of(similarities_of(gram_of(x), is_abs=True))
        x[:, ::3] *= 2.0**100
        assert count(operand_of(x, is_scaled=True)).tolist() == expected.tolist()

    def test_padded_lines(self):
        x = dyadic(6, 37, seed=1)
        expected = counts_of(similarities_of(gram_of(x), is_abs=True))
        assert count(operand_of(in_padded_lines(x))).tolist() == expected.tolist()

    @pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
    def test_offsets_past_int32(self, columns, far_apart):
        x = dyadic(7, 3) if columns else normal(3, 7)
        far = Operand(x=far_apart(x, columns=columns), factor=inverse_of(x), scale=None, kind="ieee")
        assert count(far).tolist() == count(operand_of(x)).tolist()


@pytest.mark.parametrize("width", [ALL, 19], ids=["first", "later"])
@pytest.mark.parametrize("is_screen", [False, True], ids=["digits", "screen"])
def test_the_next_step(is_screen, width):
    """The last program takes it, with what all have counted."""
    x = normal(20, 60)
    radix = radix_at((SCREEN if is_screen else DIGITS).value, 60, slack=2.0**-9, lowest=0, width=width, above=0)
    if width != ALL:
        radix.plan[1] = 0x3E800000  # from 0.25 on
        radix.screen_histograms[0, 207:] = 9
    number = int(width != ALL)
    gram_histogram(operand_of(x), radix, number, None, 40, 70, 0.125, is_abs=True, is_screen=is_screen)
    again = radix_at((SCREEN if is_screen else DIGITS).value, 60, slack=2.0**-9, lowest=0, width=width, above=0)
    again.plan[1] = 0 if width == ALL else 0x3E800000
    for name in ("digit_histograms", "screen_histograms"):
        getattr(again, name).copy_(getattr(radix, name))
    if is_screen:
        next_guess(again, 40, 70, 0.125)
    else:
        next_digit(again, again.digit_histograms[number], 40, 70)
    assert again.plan[5] > 1
    assert_same(actual=radix, expected=again)


def moments_of(operand: Operand, floor: float, *, is_abs: bool) -> tuple[np.ndarray, float]:
    """(lines, mean + 2 standard deviations)."""
    moments = empty_moments(operand, n_std=2.0)
    radix = radix_at(DIGITS.value, operand.x.shape[1])
    gram_histogram(operand, radix, 0, moments, 5, 99, floor, is_abs=is_abs, is_screen=False)
    return moments.lines.cpu().numpy(), moments.tau.item()


@pytest.mark.parametrize(
    ("x", "floor", "is_abs"),
    [(normal(20, 35), -1.0, True), (normal(20, 35), 0.0, False), (torch.ones(20, 35), 0.5, True)],
    ids=["all_counted", "some_counted", "all_equal"],
)
def test_moments_of_all_pairs(x, floor, is_abs):
    """They are of the |cosine| of all pairs, whatever is counted: as in the first pass."""
    operand = operand_of(x)
    lines, tau = moments_of(operand, floor, is_abs=is_abs)
    count, mean, squares = lines.T
    assert len(count) > 1 or operand.n_tiles == 1
    magnitude = np.abs(gram_of(x)[np.triu_indices(35, 1)])
    assert count.sum() == magnitude.size
    mean_of_all = (count * mean).sum() / magnitude.size
    std = ((squares + count * (mean - mean_of_all) ** 2).sum() / magnitude.size) ** 0.5
    assert_within(actual=mean_of_all, expected=magnitude.mean(), bound=cosine_bound(x))
    assert_within(actual=std, expected=magnitude.std(), bound=cosine_bound(x))
    assert_within(actual=tau, expected=magnitude.mean() + 2 * magnitude.std(), bound=3 * cosine_bound(x))


class TestRowTies:
    """Pairs equal to one value, by row."""

    @staticmethod
    def ties(operand, value, *, is_abs=True):
        """Counts that were added to ones."""
        lowest = int(np.float32(value).view(np.int32))
        radix = radix_at(TIES.value, operand.x.shape[1], bound=value, lowest=lowest, above=5)
        radix.row_ties.fill_(1)
        before = copy_of(radix)
        gram_row_ties(operand, radix, 9, is_abs=is_abs)
        assert_same(actual=radix, expected=before, but=("row_ties", "plan"))
        before.row_ties.copy_(radix.row_ties)
        tie_row(before, 9)
        assert_same(actual=radix, expected=before)
        return (radix.row_ties - 1).tolist()

    @staticmethod
    def expected(cosine, value, *, is_abs=True):
        s = np.abs(cosine) if is_abs else cosine
        return np.triu(s.astype(np.float32) == np.float32(value), 1).sum(axis=1).tolist()

    @FEW
    @given(data=st.data())
    def test_any_shape(self, data):
        n = data.draw(st.integers(2, 35))
        operand, cosine = exact_products(n, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3])))
        value = abs(float(cosine[0, 1]))
        is_abs = data.draw(st.booleans())
        assert self.ties(operand, value, is_abs=is_abs) == self.expected(cosine, value, is_abs=is_abs)

    @pytest.mark.parametrize(
        ("value", "is_abs", "is_scaled"), [(0.0, True, False), (0.25, False, True), (1.0, True, True)], ids=str
    )
    def test_dyadic(self, value, is_abs, is_scaled):
        x = dyadic(8, 40, seed=1)
        x[:, 20] = 0
        x[:, 33] = -2 * x[:, 2]
        x[:, 34] = 4 * x[:, 3]
        expected = self.expected(gram_of(x), value, is_abs=is_abs)
        assert sum(expected) > 0
        assert self.ties(operand_of(x, is_scaled=is_scaled), value, is_abs=is_abs) == expected

    def test_all_tied(self):
        assert self.ties(operand_of(torch.ones(4, 34)), 1.0) == list(range(33, -1, -1))

    def test_padded_lines(self):
        assert self.ties(operand_of(in_padded_lines(torch.ones(4, 34))), 1.0) == list(range(33, -1, -1))

    def test_neighbours_of_the_value_are_not_ties(self):
        operand, cosine = exact_products(30, n_values=4)
        value = np.abs(cosine[0, 1]).astype(np.float32)
        for neighbour in (np.nextafter(value, np.float32(0)), np.nextafter(value, np.float32(1))):
            assert sum(self.ties(operand, float(neighbour))) == 0


@pytest.mark.parametrize("kernel", ["screen", "digits", "row_ties"])
@pytest.mark.parametrize("stage", range(6), ids=["pass", "screen", "digits", "ties", "collect", "certified"])
def test_only_at_its_stage(stage, kernel):
    operand = operand_of(torch.ones(4, 30))
    radix = radix_at(stage, 30, lowest=0x3F800000 if kernel == "row_ties" else 0)
    moments = empty_moments(operand)
    before = copy_of(radix)
    its_stage, name = {
        "screen": (SCREEN, "screen_histograms"), "digits": (DIGITS, "digit_histograms"), "row_ties": (TIES, "row_ties")
    }[kernel]  # fmt: skip
    its_turn = stage == its_stage.value
    if kernel == "row_ties":
        gram_row_ties(operand, radix, 9, is_abs=True)
    else:
        gram_histogram(operand, radix, 0, moments, 9, 99, -1.0, is_abs=True, is_screen=kernel == "screen")
        assert moments.lines.isnan().all() == moments.tau.isnan().all() != its_turn
    assert int(getattr(radix, name).sum()) == (435 if its_turn else 0)
    assert_same(actual=radix, expected=before, but=(name, "plan", "bounds") if its_turn else ())
