"""k, order, floor, guesses, and the records of a streamed pass."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.inputs import seeded
from topk_ortho import definitions, warm_start
from topk_ortho.backends.survivors import Survivors
from topk_ortho.definitions import Query
from topk_ortho.warm_start import MARGIN_LEAST, MARGIN_MOST, MARGIN_START


@pytest.mark.quick
@pytest.mark.parametrize(
    ("n_features", "fraction", "k"),
    [
        pytest.param(2, 1e-9, 1, id="at_least_one"),
        pytest.param(2, 1.0, 1, id="the_only_pair"),
        pytest.param(10, 1.0, 45, id="all"),
        pytest.param(10, 0.5, 22, id="45_ordered_entries_are_22_pairs"),
        pytest.param(10, 0.0333, 1, id="2.997_entries_are_1_pair"),
        pytest.param(1000, 1e-3, 499, id="default"),
        pytest.param(65_536, 1e-3, 2_147_450, id="beyond_int32_entries"),
        pytest.param(1_000_000, 1.0, 499_999_500_000, id="a_million_columns"),
    ],
)
def test_k_from_fraction(n_features, fraction, k):
    assert definitions.k_from_fraction(n_features, fraction) == k


@given(st.integers(2, 2_000_000), st.floats(1e-12, 1.0))
def test_k_from_fraction_equals_the_definition(n_features, fraction):
    k = definitions.k_from_fraction(n_features, fraction)
    assert k == oracle.k_of(n_features, fraction)
    assert 1 <= k <= definitions.n_pairs(n_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("similarity", ["abs", "positive"])
@pytest.mark.parametrize("count", [1, 7, 60, 249, 250, 251, 499, 500, 1000])
def test_first_of_the_total_order(similarity, count, dtype):
    generator = seeded(0)
    values = torch.randint(-4, 5, (500,), generator=generator).to(dtype) / 4
    index = torch.randperm(1000, generator=generator)[:500]
    values[(values == 0) & (index % 2 == 0)] = -0.0
    key = {"abs": values.abs(), "positive": values}[similarity]
    expected = np.lexsort((index.numpy(), -key.numpy()))[:count]
    first_values, first_index = definitions.first_in_order(values, index, similarity, count)
    assert first_index.tolist() == index[expected].tolist()
    assert first_values.tolist() == values[expected].tolist()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("query", "adaptive", "floor"),
    [
        pytest.param(Query(k=1), None, -1.0, id="none_refuses_nothing"),
        pytest.param(Query(k=1, tau=0.0), None, 0.0, id="tau_zero_refuses_zeros"),
        pytest.param(Query(k=1, tau=0.3), None, 0.3, id="tau"),
        pytest.param(Query(k=1, n_std=1.0), None, -1.0, id="adaptive_not_known_yet"),
        pytest.param(Query(k=1, n_std=1.0), 0.2, 0.2, id="adaptive"),
        pytest.param(Query(k=1, similarity="positive"), None, 0.0, id="positive"),
        pytest.param(Query(k=1, similarity="positive", tau=0.3), None, 0.3, id="positive_tau"),
        pytest.param(Query(k=1, similarity="positive", n_std=-9.0), -0.4, 0.0, id="positive_adaptive_negative"),
    ],
)
def test_floor_of(query, adaptive, floor):
    assert definitions.floor_of(query, adaptive) == floor


class TestGuessFromSample:
    """`guess_from_sample` aims a little below the k-th value."""

    def test_rank(self):
        """k = 100 of 10,000 pairs are 1% of 1,000 sampled ones: rank ceil(11.5 + 3 sqrt(11.5) + 1) = 23."""
        similarities = torch.randperm(1000, generator=seeded(0)).view(20, 50) / 1000
        assert warm_start.guess_from_sample(similarities, 100, 10_000) == pytest.approx(0.977)

    @pytest.mark.parametrize("k", [9_000, 10_000], ids=["nearly_all", "all"])
    def test_no_guess_if_the_sample_is_too_small(self, k):
        assert warm_start.guess_from_sample(torch.linspace(0, 1, 1000), k, 10_000) == -1.0

    @pytest.mark.parametrize("seed", range(20))
    def test_rarely_misses_and_rarely_overshoots(self, seed):
        population = torch.randn(100_000, generator=seeded(seed)).abs()
        k = 2_000
        guess = warm_start.guess_from_sample(
            population[torch.randperm(100_000, generator=seeded(seed))[:10_000]], k, 100_000
        )
        assert k <= (population > guess).sum() <= 1.6 * k


class TestState:
    """The warm-start state: (guess, margin, passes)."""

    ordered = torch.linspace(1, 0, 101)  # of 101 survivors, the r-th is 1 - (r - 1) / 100

    def test_initial(self):
        state = warm_start.initial_state()
        assert (state.dtype, state.tolist()) == (torch.float32, pytest.approx([-1.0, MARGIN_START, 0.0]))

    @pytest.mark.parametrize(
        ("k", "n_ordered", "guess"),
        [
            pytest.param(40, 101, 0.51, id="at_rank_50_by_the_margin"),
            pytest.param(40, 50, 0.51, id="just_enough"),
            pytest.param(40, 49, 2 * 0.61 - 0.71, id="extended_from_rank_30_through_rank_40"),
            pytest.param(40, 40, 2 * 0.61 - 0.71, id="exactly_k"),
            pytest.param(1, 1, 1.0, id="k_is_one"),
            pytest.param(40, 39, -1.0, id="fewer_than_k"),
            pytest.param(40, 0, -1.0, id="none"),
        ],
    )
    def test_guess(self, k, n_ordered, guess):
        doubles_to_a_quarter = torch.tensor([0.5, 0.125, 2.0])
        state = warm_start.next_state(doubles_to_a_quarter, self.ordered[:n_ordered], k, n_passes=2)
        assert state[0] == pytest.approx(guess)

    @pytest.mark.parametrize(
        ("margin", "n_passes", "expected"),
        [
            pytest.param(0.2, 1, 0.196, id="shrinks"),
            pytest.param(MARGIN_LEAST, 1, MARGIN_LEAST, id="shrinks_no_further"),
            pytest.param(0.2, 2, 0.4, id="doubles_after_a_second_pass"),
            pytest.param(0.8, 2, MARGIN_MOST, id="doubles_no_further"),
        ],
    )
    def test_margin(self, margin, n_passes, expected):
        state = warm_start.next_state(torch.tensor([0.5, margin, 0.0]), self.ordered, 10, n_passes)
        assert state[1:].tolist() == pytest.approx([expected, n_passes])

    def test_is_a_new_tensor(self):
        state = warm_start.initial_state()
        warm_start.next_state(state, self.ordered, 10, 1)
        assert torch.equal(state, warm_start.initial_state())


def blocks_of(n, n_rows, n_cols):
    """Pairs (index [p]) of each tile of the upper triangle, panel by panel, and the tile's first index."""
    for row, start in itertools.product(range(0, n, n_rows), range(0, n, n_cols)):
        col = row + start
        if col >= n:
            continue
        pairs = [
            r * n + c for r in range(row, min(row + n_rows, n)) for c in range(max(r + 1, col), min(col + n_cols, n))
        ]
        yield torch.tensor(pairs, dtype=torch.int64), row * n + col


class TestSurvivors:
    """Streaming in bounded memory keeps the first k of the order, whatever overflows."""

    @pytest.mark.quick
    @given(data=st.data())
    def test_keeps_the_first_k(self, data):
        n = data.draw(st.integers(2, 24))
        levels = data.draw(st.sampled_from([1, 2, 4, 1000]))
        similarity = data.draw(st.sampled_from(["abs", "positive"]))
        value_of = (
            torch.randint(-levels, levels + 1, (n * n,), generator=seeded(data.draw(st.integers(0, 99)))) / levels
        )
        k = data.draw(st.integers(1, n * (n - 1) // 2))
        guess = data.draw(st.sampled_from([-1.0, 0.0, 0.25, 0.5]))
        query = Query(k=k, similarity=similarity)
        capacity = k + data.draw(st.integers(0, 20))
        survivors = Survivors(query, max(guess, definitions.floor_of(query)), capacity)

        everything = []
        for index, first_index in blocks_of(n, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))):
            values = value_of[index]
            everything.append(index)
            passes = definitions.similarity_of(values, similarity) > survivors.screening_bound(first_index)
            n_before = survivors.n_records
            assert n_before <= survivors.capacity
            survivors.add(values[passes], index[passes])
            assert survivors.n_records <= max(survivors.capacity, n_before)

        index = torch.cat(everything)
        values = value_of[index]
        floor = definitions.floor_of(query)
        scores = definitions.similarity_of(values, similarity)
        above = scores >= guess if guess > floor else scores > floor
        index, values = index[above], values[above]
        order = np.lexsort((index.numpy(), -definitions.similarity_of(values, similarity).numpy()))[:k]
        kept_values, kept_index = survivors.first_in_order(k)
        assert kept_index.tolist() == index[order].tolist()
        assert kept_values.tolist() == values[order].tolist()

    def test_capacity_is_a_small_multiple_of_k(self):
        assert 10**6 < Survivors(Query(k=10**6), -1.0).capacity < 3 * 10**6
        assert 1 < Survivors(Query(k=1), -1.0).capacity < 10**5

    def test_full_is_not_an_overflow(self):
        survivors = Survivors(Query(k=2), -1.0, capacity=4)
        survivors.add(torch.full((4,), 0.5), torch.arange(4))
        assert (survivors.n_overflows, survivors.bound) == (0, -1.0)
        survivors.add(torch.full((1,), 0.5), torch.tensor([9]))
        assert (survivors.n_overflows, survivors.bound, survivors.bound_index) == (1, 0.5, 1)

    def test_a_tie_with_the_bound_survives_only_below_its_index(self):
        """The bound rises to a value at index 5; tiles to come in the panel hold lower and higher indices."""
        survivors = Survivors(Query(k=3), -1.0, capacity=3)
        survivors.add(torch.tensor([0.9, 0.5, 0.5, 0.5]), torch.tensor([8, 2, 5, 6]))
        assert (survivors.bound, survivors.bound_index) == (0.5, 5)
        survivors.add(torch.tensor([0.5, 0.5, -0.5]), torch.tensor([9, 7, 3]))
        values, index = survivors.first_in_order(3)
        assert index.tolist() == [8, 2, 3]
        assert torch.equal(values, torch.tensor([0.9, 0.5, -0.5]))

    @pytest.mark.parametrize(("tau", "index"), [(None, [2, 0, 1]), (0.5, [2])], ids=["guess", "floor"])
    def test_what_equals_the_guess_survives_and_what_equals_the_floor_does_not(self, tau, index):
        survivors = Survivors(Query(k=3, tau=tau), 0.5)
        survivors.add(torch.tensor([0.5, -0.5, 0.75, 0.25]), torch.arange(4))
        assert survivors.first_in_order(3)[1].tolist() == index

    @pytest.mark.parametrize("bound", [0.25, 0.9999999, 1e-30])
    def test_screen_lets_every_tie_with_a_positive_bound_pass(self, bound):
        """A product and norm * screen are each rounded a few times, by up to 2**-24."""
        screen = Survivors(Query(k=1), bound).screening_bound(0)
        assert bound * (1 - 2**-18) < screen < bound * (1 - 2**-21)

    def test_screen_at_a_bound_of_zero(self):
        """Zeros tie with the bound only up to its index; later tiles need not look at them."""
        survivors = Survivors(Query(k=2), -1.0, capacity=2)
        survivors.add(torch.zeros(3), torch.tensor([4, 7, 9]))
        assert (survivors.bound, survivors.bound_index) == (0.0, 7)
        assert survivors.screening_bound(6) < 0
        assert survivors.screening_bound(8) == 0
