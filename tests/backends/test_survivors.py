"""The records of a streamed pass."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import seeded
from topk_ortho import definitions
from topk_ortho.backends.survivors import Survivors
from topk_ortho.definitions import Query


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
