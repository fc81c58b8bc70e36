"""The state that a call leaves for the next, and the guess from a sample."""

import pytest
import torch

from tests.inputs import seeded
from topk_ortho import warm_start
from topk_ortho.kernels import radix_select
from topk_ortho.warm_start import MARGIN_LEAST, MARGIN_MOST, MARGIN_START


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

    def test_kernels_read_it_by_the_same_places(self):
        names = ("GUESS", "MARGIN", "N_PASSES")
        assert [getattr(radix_select, name).value for name in names] == [getattr(warm_start, name) for name in names]

    def test_is_a_new_tensor(self):
        state = warm_start.initial_state()
        warm_start.next_state(state, self.ordered, 10, 1)
        assert torch.equal(state, warm_start.initial_state())
