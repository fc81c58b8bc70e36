"""The kernels in order: whatever the guess, the selection is exact, and it takes the passes that it should."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.conftest import use_case
from tests.inputs import EDGES, activations, dyadic, normal, seeded
from tests.kernels.arguments import FEW
from tests.on_device import with_fields
from tests.tolerances import assert_selection, float64
from topk_ortho import TopKPairs, topk_pairs
from topk_ortho.backends.registry import BACKENDS
from topk_ortho.backends.triton import TritonBackend
from topk_ortho.kernels.radix_select import MOST_DIGITS, MOST_SCREEN_DIGITS
from topk_ortho.warm_start import MARGIN_LEAST, SampleSizes

N = 40
N_PAIRS = N * (N - 1) // 2
AFTER_A_PASS = {"plain": range(3, 3 + MOST_DIGITS), "screened": (3, 4)}
"""Passes of a repair by route: the one that failed, one for each digit that was needed, and one that collects."""
WITHOUT_A_PASS = {"plain": range(2, 2 + MOST_DIGITS), "screened": (2, 3)}
"""Where no guess was to be had, or the columns as they are were refused."""
OF_TIES = {"plain": 3 + MOST_DIGITS, "screened": 3 + MOST_SCREEN_DIGITS + MOST_DIGITS}
"""All digits, those of a screen before them, and one pass that counts ties by row."""
OF_TIED_ZEROS = {"plain": 3 + MOST_DIGITS, "screened": 3 + 1 + MOST_DIGITS}
"""A screen knows zeros by one digit."""


@pytest.fixture(params=["plain", "screened"], autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """float32 in "highest" precision without and with a screen in fp16; few records and small samples either way."""
    use_case({"plain": "triton", "screened": "triton_screened"}[request.param], monkeypatch)
    sample_from(8, monkeypatch)
    return request.param


def sample_from(least_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample a matrix of so many features or more."""
    backend = with_fields(BACKENDS["triton"], sample=SampleSizes(least_features=least_features))
    monkeypatch.setitem(BACKENDS, "triton", backend)


def capacity_of(k: int, route: str) -> int:
    return min(N_PAIRS, (k + k // 2) * (2 if route == "screened" else 1) + N)


def check(x: Tensor, k: int, guess: float | None, **arguments) -> tuple[TopKPairs, int]:
    """(pairs, passes over the gram); the selection is that of the definition."""
    state = torch.tensor([-1.0 if guess is None else guess, 0.15, 0.0])
    pairs = topk_pairs(x, k=k, backend="triton", state=state, **arguments)
    assert_selection(pairs, x, k=k, **arguments)
    assert MARGIN_LEAST <= state[1] <= TritonBackend.most_margin
    assert state[2] == int(state[2])
    if len(pairs.rows) == k:
        assert state[0] <= pairs.threshold
    return pairs, int(state[2])


EXACT = {
    "ties": dyadic(6, N, seed=1),
    "all_equal": torch.ones(4, N),
    "all_zero": torch.zeros(3, N),
    "orthogonal": torch.eye(N),
    "signed_ties": torch.cat([torch.eye(N // 2), -torch.eye(N // 2)], dim=1),
    "duplicates": dyadic(16, N // 4, seed=2).repeat(1, 4),
    "ties_of_any_norm": dyadic(6, N, seed=1) * 2.0 ** torch.randint(-30, 100, (N,), generator=seeded(1)),
}
"""Every cosine has few bits: the selection is that of the oracle, pair by pair."""
EDGE_NAMES = [name for name in EDGES if "huge" in name or "tiny" in name]
ROUNDED = {
    "normal": normal(12, N),
    "sparse": activations(30, N, seed=1),
    "bfloat16": normal(12, N, seed=2, dtype=torch.bfloat16),
    "float16": activations(30, N, seed=2, dtype=torch.float16),
    "nearly_parallel": normal(12, 1) + 0.01 * normal(12, N, seed=1),
    "one_row": normal(1, N),
} | {f"edge_{name}": EDGES[name] for name in EDGE_NAMES}


def kth_of(x: Tensor, k: int, similarity: str) -> float:
    values = oracle.cosines(float64(x))
    return float(np.sort(np.abs(values) if similarity == "abs" else values)[-k])


@FEW
@given(data=st.data())
def test_anything(data, route):
    """Guesses, floors, orders, precisions and numbers at random."""
    name = data.draw(st.sampled_from([*EXACT, *ROUNDED]))
    x = (EXACT | ROUNDED)[name]
    n_pairs = x.shape[1] * (x.shape[1] - 1) // 2
    k = data.draw(st.sampled_from([1, 2, 7, 60, 60, n_pairs // 2, n_pairs - 1, n_pairs]))
    arguments = {
        "similarity": data.draw(st.sampled_from(["abs", "positive"])),
        "precision": data.draw(st.sampled_from(["highest", "highest", "high", "medium"])),
    }
    kth = np.float32(kth_of(x, k, arguments["similarity"]))
    floors = [None, None, None, 0.0, 0.25, max(0.0, min(0.99, float(kth))), "adaptive"]
    arguments["tau"] = data.draw(st.sampled_from(floors))
    if arguments["tau"] == "adaptive":
        arguments["n_std"] = data.draw(st.sampled_from([-0.5, 0.0, 1.0, 2.5]))
    near = [kth, np.nextafter(kth, np.float32(2)), np.nextafter(kth, np.float32(-2)), kth - 0.05, kth + 0.05]
    odd = [0.0, -0.5, 0.999, 1.0, 2.0, math.nan, math.inf, -math.inf]
    guess = data.draw(st.none() | st.sampled_from([float(g) for g in near]) | st.sampled_from(odd))
    pairs, _ = check(x, k, guess, **arguments)
    if name in EXACT and arguments["tau"] != "adaptive":
        expected = oracle.select(float64(x), k, arguments["tau"], similarity=arguments["similarity"])
        assert pairs.rows.tolist() == expected.rows.tolist()
        assert pairs.cols.tolist() == expected.cols.tolist()
        assert pairs.values.tolist() == expected.values.tolist()


class TestPasses:
    """Which stages ran, by the number of passes."""

    K = 60

    @pytest.fixture
    def x(self):
        return normal(12, N)

    def test_a_good_guess(self, x):
        _, n_passes = check(x, self.K, kth_of(x, self.K, "abs") - 0.001)
        assert n_passes == 1

    @pytest.mark.parametrize("guess", [-1.0, math.nan], ids=str)
    def test_no_guess_takes_that_of_the_sample(self, guess):
        _, n_passes = check(normal(12, 150), 1000, guess)
        assert n_passes == 1

    @pytest.mark.parametrize("guess", [0.99, math.inf], ids=str)
    def test_too_high(self, x, guess, route):
        """Few pairs, if any."""
        _, n_passes = check(x, self.K, guess)
        assert n_passes in AFTER_A_PASS[route]

    def test_one_pair_short(self, x, route):
        """The k-th pair itself is missing."""
        kth = kth_of(x, self.K, "abs")
        assert check(x, self.K, kth + 2e-6)[1] in AFTER_A_PASS[route]
        assert check(x, self.K, kth - 2e-6)[1] == 1

    @pytest.mark.parametrize("guess", [0.02, -0.5], ids=str)
    def test_too_low(self, x, guess, route):
        """More than the records hold."""
        _, n_passes = check(x, self.K, guess)
        assert n_passes in AFTER_A_PASS[route]

    def test_low_but_all_fit(self, x, route):
        """As many survivors as records, then one more."""
        capacity = capacity_of(self.K, route)
        if route == "plain":  # a screen keeps more than what exceeds the guess
            assert check(x, self.K, kth_of(x, capacity, "abs") - 1e-6)[1] == 1
            assert check(x, self.K, kth_of(x, capacity + 1, "abs") - 1e-6)[1] in AFTER_A_PASS[route]
        assert check(x, self.K, kth_of(x, capacity * 5 // 4, "abs"))[1] in AFTER_A_PASS[route]

    @pytest.mark.parametrize("guess", [0.0, 0.999], ids=str)
    def test_more_ties_than_fit(self, guess, route):
        pairs, n_passes = check(torch.ones(4, N), self.K, guess)
        assert n_passes == OF_TIES[route]
        assert pairs.rows.tolist() == [0] * (N - 1) + [1] * (self.K - N + 1)
        assert pairs.cols.tolist() == [*range(1, N), *range(2, self.K - N + 3)]

    def test_a_row_of_ties_is_longer_than_k(self, route):
        pairs, n_passes = check(torch.ones(4, N), 1, 0.5)
        assert n_passes == OF_TIES[route]
        assert (pairs.rows.tolist(), pairs.cols.tolist()) == ([0], [1])

    @pytest.mark.parametrize("x", [torch.zeros(3, N), torch.eye(N)], ids=["all_zero", "orthogonal"])
    def test_zeros_are_pairs(self, x, route):
        pairs, n_passes = check(x, self.K, 0.5)
        assert n_passes == OF_TIED_ZEROS[route]
        assert pairs.rows.tolist() == [0] * (N - 1) + [1] * (self.K - N + 1)

    def test_ties_above_which_there_are_others(self, route):
        """One cluster at 1.0 that fits, zeros that do not."""
        x = torch.eye(N)
        x[:, 30:] = 0
        x[35, 30:] = 1.0
        pairs, n_passes = check(x, self.K, 0.5)
        assert n_passes == OF_TIED_ZEROS[route]
        assert pairs.rows.tolist() == [r for r in range(30, N) for _ in range(r + 1, N)] + [0] * 15

    def test_all_pairs_need_no_guess(self, x):
        for guess in (None, 0.5, math.nan):
            assert check(x, N_PAIRS, guess)[1] == 1

    def test_one_pair(self, x, route):
        assert check(x, 1, 0.999)[1] in AFTER_A_PASS[route]
        assert check(x, 1, kth_of(x, 1, "abs") - 1e-4)[1] == 1

    @pytest.mark.parametrize(("guess", "precision"), [(0.5, "highest"), (0.999, "highest"), (0.5, "medium")], ids=str)
    def test_norms_out_of_range(self, guess, precision, route):
        """Products of the columns as they are would overflow: no pass is made of them. Rounded ones have unit norm."""
        x = normal(12, N) * 1e30
        is_rounded = precision == "medium" or route == "screened"
        k = (oracle.cosines(float64(x)) ** 2 > 0.25).sum() - 5
        assert k > 20
        _, n_passes = check(x, int(k), guess, precision=precision)
        if is_rounded:
            assert n_passes == 1 if guess == 0.5 else n_passes in AFTER_A_PASS[route]
        else:
            assert n_passes in WITHOUT_A_PASS[route]


class TestFloors:
    """Fewer than k pairs may be the answer."""

    def test_a_guess_at_the_floor_needs_no_more(self):
        x = normal(12, N)
        pairs, n_passes = check(x, 150, 0.6, tau=0.6)
        assert n_passes == 1
        assert 20 < len(pairs.rows) < 150

    def test_a_guess_above_the_floor(self):
        """Fewer than k above it: the first digit says that there are no more above the floor."""
        x = normal(12, N)
        pairs, n_passes = check(x, 150, 0.7, tau=0.6)
        assert n_passes == 3
        assert 20 < len(pairs.rows) < 150

    def test_nothing_is_above_the_floor(self):
        pairs, n_passes = check(torch.eye(N), 20, 0.9, tau=0.5)
        assert n_passes == 3
        assert len(pairs.rows) == 0
        assert pairs.threshold == 0.5

    @pytest.mark.parametrize(("guess", "n_std"), [(0.05, 1.0), (0.3, -0.5), (0.99, 1.0), (None, -0.5)], ids=str)
    def test_adaptive(self, guess, n_std):
        """Moments of all pairs, by the first pass or by its repair."""
        x = normal(12, N)
        pairs, n_passes = check(x, 200, guess, tau="adaptive", n_std=n_std)
        if guess is not None:
            assert (n_passes > 1) == (guess != 0.3)
        assert pairs.tau > 0.05

    def test_adaptive_of_huge_columns(self):
        """The moments are those of the repair alone. No screen could give them."""
        x = normal(12, N) * 1e30
        _, n_passes = check(x, 100, 0.5, tau="adaptive")
        assert n_passes in WITHOUT_A_PASS["plain"]

    @pytest.mark.parametrize("guess", [0.3, 0.0, None], ids=str)
    def test_positive(self, guess, route):
        """190 cosines are positive, the others 0: pairs, but not positive ones."""
        x = torch.eye(N)
        x[:20, 20:] = 0
        x[20:, 20:] = normal(20, 20).abs()
        pairs, _ = check(x, 150, guess, similarity="positive")
        assert len(pairs.rows) == 150
        pairs, n_passes = check(x, 200, guess, similarity="positive")
        assert len(pairs.rows) == 190
        if guess == 0.3:
            assert n_passes == 3
        elif route == "plain":  # a screen of columns with negative entries cannot tell zeros from what is just above
            assert n_passes == 1


class TestZeros:
    """Columns without negative entries, most pairs of which never meet: their zeros are not recorded in vain."""

    @pytest.fixture
    def x(self):
        """55 cosines of 0.92, 10 of 0.1, and zeros."""
        x = torch.zeros(60, N)
        x[0, :11] = 1.0
        x[torch.arange(1, 12), torch.arange(11)] = 0.3
        x[torch.arange(20, 49), torch.arange(11, 40)] = 1.0
        x[torch.arange(20, 40, 2), torch.arange(12, 32, 2)] = 0.1
        return x

    @pytest.mark.parametrize("arguments", [{"tau": 0.0}, {"similarity": "positive"}], ids=str)
    @pytest.mark.parametrize("guess", [None, 0.0], ids=str)
    def test_fewer_than_k_are_positive(self, x, guess, arguments):
        pairs, n_passes = check(x, 70, guess, **arguments)
        assert len(pairs.rows) == 65
        assert n_passes == 1

    @pytest.mark.parametrize("tau", [None, 0.0, 2.0**-12, 0.05])
    def test_a_guess_of_zero(self, x, tau):
        _, n_passes = check(x, 60, 0.0, tau=tau)
        assert n_passes == 1

    @pytest.mark.parametrize("entry", [2.0**-25, 2.0**-45, 2.0**-60], ids=str)
    def test_what_is_almost_zero_counts(self, x, entry):
        """Columns that meet in entries that fp16 cannot tell from 0 are selected for all that."""
        x[31, 39] = entry
        pairs, n_passes = check(x, 70, None, tau=0.0)
        assert len(pairs.rows) == 66
        assert (pairs.rows[-1], pairs.cols[-1]) == (22, 39)
        assert pairs.values[-1] == pytest.approx(entry, rel=0.01)
        assert n_passes == 1

    def test_zeros_that_are_needed(self, x, route):
        """Without a floor the first of the zeros belong to the selection."""
        pairs, n_passes = check(x, 70, 0.0)
        assert (pairs.values == 0).sum() == 5
        assert n_passes == OF_TIED_ZEROS[route]

    def test_products_that_vanish_are_zeros_too(self, x):
        """A pair that meets, but in entries whose product is 0 in float32, has no precedence over the other zeros."""
        x[57, [37, 38]] = 1e-30
        pairs, _ = check(x, 66, 0.0)
        assert (pairs.rows[-1], pairs.cols[-1]) == (0, 11)

    def test_a_line_that_falls_below_zero(self, x, route):
        """The similarities at the ranks (1 - margin) k and k give no guess above 0: one of 0 is certified at once."""
        state = torch.tensor([0.5, 0.15, 0.0])
        passes = []
        for _ in range(4):
            assert_selection(topk_pairs(x, k=60, backend="triton", state=state), x, k=60)
            assert state[0] == 0
            passes.append(int(state[2]))
        assert passes[0] in AFTER_A_PASS[route]
        assert passes[1:] == [1, 1, 1]


class TestWarmStart:
    """A state of its own making."""

    def test_becomes_one_pass_on_drifting_columns(self, route):
        x, drift = normal(12, N), normal(12, N, seed=9)
        state = torch.tensor([0.999, 0.15, 0.0])
        passes = []
        for step in range(5):
            drifted = x + 1e-3 * step * drift
            assert_selection(topk_pairs(drifted, k=60, backend="triton", state=state), drifted, k=60)
            passes.append(int(state[2]))
        assert passes[0] in AFTER_A_PASS[route]
        assert passes[1:] == [1, 1, 1, 1]

    def test_survives_a_change_of_everything(self):
        """A state of other columns, k, floor or order is a bad guess at worst."""
        state = torch.tensor([-1.0, 0.15, 0.0])
        for x, k, arguments in (
            (normal(12, N), 60, {}),
            (torch.ones(4, N), 60, {}),
            (normal(12, N), N_PAIRS, {}),
            (normal(12, N, seed=4) * 1e30, 5, {"similarity": "positive"}),
            (torch.eye(N), 30, {"tau": 0.1}),
            (normal(12, N, seed=5), 300, {"tau": "adaptive"}),
        ):
            assert_selection(topk_pairs(x, k=k, backend="triton", state=state, **arguments), x, k=k, **arguments)


class TestWithoutASample:
    """A few features are not sampled: without a state, a repair starts at once if not all pairs fit."""

    @pytest.fixture(autouse=True)
    def _no_sample(self, route, monkeypatch):
        sample_from(2**30, monkeypatch)

    def test_straight_to_a_repair(self, route):
        _, n_passes = check(normal(12, N), 60, None)
        assert n_passes in WITHOUT_A_PASS[route]

    def test_all_fit(self):
        _, n_passes = check(normal(12, N), N_PAIRS - 5, None)
        assert n_passes == 1

    def test_many_pairs_just_below_the_bound(self, route):
        """Cosines of 0.5, a little more or less each: the slack of a screen lets more of them pass than fit.

        Digits of the products as they are then follow, and no slack is left.
        """
        x = torch.cat([torch.ones(1, N), torch.eye(N)]) + 1e-3 * torch.randn(N + 1, N, generator=seeded(0))
        _, n_passes = check(x, 20, None)
        n_in_vain = {"plain": 0, "screened": MOST_SCREEN_DIGITS + 1}[route]
        assert n_passes - n_in_vain in WITHOUT_A_PASS["plain"]


def test_mostly_negative_cosines(route):
    """Nothing that is sampled is positive: a guess is not to be had. A screen cannot tell the others from zeros."""
    x = torch.eye(N) - 1e-4
    x[:, 39] = x[:, 38] + x[:, 37]
    pairs, n_passes = check(x, 20, None, similarity="positive")
    assert list(zip(pairs.rows.tolist(), pairs.cols.tolist(), strict=True)) == [(37, 39), (38, 39)]
    assert n_passes == {"plain": 2, "screened": 4}[route]


@pytest.mark.parametrize("route", ["screened"], indirect=True)
class TestScreen:
    """A repair that goes through its screen: passes over products of float32 columns are for what it leaves open."""

    @pytest.mark.parametrize(
        ("guess", "n_passes"), [(0.99, 3), (0.02, 3), (None, 2)], ids=["too_high", "too_low", "none"]
    )
    def test_one_digit_is_enough(self, guess, n_passes, monkeypatch):
        """And a pass; of columns of any norm, some of them dead."""
        sample_from(2**30, monkeypatch)
        x = normal(12, N) * 2.0 ** torch.randint(-30, 60, (N,), generator=seeded(1))
        x[:, [0, 7, 39]] = 0
        assert check(x, 60, guess)[1] == n_passes

    def test_a_second_digit(self):
        """The bin of the k-th similarity, from 0.5 to 0.53, holds 300 of 780 pairs, and 140 fit."""
        x = torch.cat([torch.ones(1, N), torch.eye(N) * torch.linspace(0.92, 1.0, N)])
        similarities = oracle.cosines(float64(x))
        assert ((similarities > 0.5) & (similarities < 0.53)).sum() > 300 > capacity_of(33, "screened")
        assert check(x, 33, 0.99)[1] == 4

    def test_ties(self):
        """All of the same value fit, and the first of them are selected."""
        x = torch.eye(N)
        x[39, :13] = 1.0
        pairs, n_passes = check(x, 50, 0.9)
        expected = oracle.select(float64(x), 50, None)
        assert pairs.rows.tolist() == expected.rows.tolist()
        assert pairs.cols.tolist() == expected.cols.tolist()
        assert n_passes == 3

    def test_rounding_both_ways(self):
        """66 pairs whose cosine the rounding raises to a bin beyond it, and one of a larger cosine that it lowers.

        The 66th rounded cosine is 0.75, the 67th is 0.7490, and the slack is 0.0008. The guess has to be below
        0.7494 to be reached by 66 pairs, and the pass has to record what is at least 0.7490 after rounding.
        """
        raised = mostly_shared(12, 33, 0.5 - 9 * 2.0**-11, 18 * 2.0**-8)
        lowered = mostly_shared(2, 10, 0.5 - 19 * 2.0**-11, 25 * 2.0**-8)
        x = torch.block_diag(raised, lowered, torch.eye(N - 14))
        cosine = oracle.cosines(float64(x)).max()
        assert cosine == pytest.approx(0.74965, abs=1e-5)
        pairs, n_passes = check(x, 66, 0.99)
        assert (pairs.rows[0], pairs.cols[0]) == (12, 13)
        assert pairs.values[1:].tolist() == pytest.approx([0.74943] * 65, abs=1e-5)
        assert n_passes == 3


def mostly_shared(n: int, n_shared: int, *own: float) -> Tensor:
    """Unit columns [n_shared + len(own) * n, n] with these entries of their own; in the others they are all equal."""
    shared = ((1 - sum(entry**2 for entry in own)) / n_shared) ** 0.5
    return torch.cat([torch.full((n_shared, n), shared), *(entry * torch.eye(n) for entry in own)])
