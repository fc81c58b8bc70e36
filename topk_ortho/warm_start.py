"""The warm start: what a call leaves for the next one, so that it begins with a good guess.

The state is a tensor of three numbers that the caller owns. Their places in it are `GUESS`, `MARGIN` and `N_PASSES`.

- guess: estimate of a similarity just under the next call's threshold, -1 if there is none;
- margin: how far below the threshold the guess aims, as a share of k;
- n_passes: passes over the pairs that the last call took.

Without a state, the guess comes from a sample of the columns.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GUESS, MARGIN, N_PASSES = 0, 1, 2
"""Places in the state."""

MARGIN_START, MARGIN_LEAST, MARGIN_MOST = 0.15, 0.05, 1.0
"""Margin before the first call, and its least and greatest value."""


def initial_state(device: torch.device | str | None = None) -> Tensor:
    """Warm-start state before the first call, for the `state` argument of `topk_pairs` and `topk_ortho_loss`.

    Parameters
    ----------
    device : torch.device or str, optional
        Device of the x that it will be used with.

    Returns
    -------
    Tensor, float32 [3]
        (guess for the next call, -1 for none; margin by which it aims low, as a share of k; passes of the last call).
        A call updates it in place.

    Examples
    --------
    >>> state = initial_state()
    >>> pairs = topk_pairs(torch.eye(3), k=1, state=state)
    >>> state[2]  # passes
    tensor(1.)
    """
    return torch.tensor([-1.0, MARGIN_START, 0.0], dtype=torch.float32, device=device)


class Ordered(Protocol):
    """Similarities in descending order: a tensor, or something of which single ones can be looked up."""

    def numel(self) -> int:
        """How many there are."""

    def __getitem__(self, position: int) -> Tensor:
        """The similarity [] at a position, from 0."""


def next_state(state: Tensor, ordered: Ordered, k: int, n_passes: int) -> Tensor:
    """State after a call that kept the similarities `ordered`, descending.

    There are k of them or more, if as many passed the floor, else all that did.

    The next guess is the similarity at rank (1 + margin) k. Where fewer pairs survived, it is extrapolated in a
    straight line from rank (1 - margin) k through rank k, but not below 0, where the guess would exclude nothing; tails
    are convex, so that this aims low. A call that needed a second pass doubles the margin, every other call lets it
    shrink.
    """
    margin = state[MARGIN].item()
    if not MARGIN_LEAST <= margin <= MARGIN_MOST:  # NaN too, from a buffer that nobody initialised
        margin = MARGIN_START
    margin = min(MARGIN_MOST, 2 * margin) if n_passes > 1 else max(MARGIN_LEAST, 0.98 * margin)
    rank = math.ceil((1 + margin) * k)
    if ordered.numel() >= rank:
        guess = ordered[rank - 1].item()
    elif ordered.numel() >= k:
        least = ordered[k - 1].item()
        guess = 2 * least - ordered[max(0, math.floor((1 - margin) * k) - 1)].item()
        if least > 0:  # where the k-th is 0, zeros are needed
            guess = max(guess, 0.0)
    else:
        guess = -1.0
    return torch.tensor([guess, margin, n_passes], dtype=state.dtype, device=state.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSizes:
    """How many pairs are looked at for a guess, where no state has one."""

    rows: int = 256
    """Most columns of x on one side of the sampled pairs. With `cols`, 2**18 pairs are sampled: at fraction 1e-3, 262
    of them are above the threshold."""
    cols: int = 1024
    """Most columns of x on the other side."""
    least_features: int = 128
    """With fewer features nothing is sampled: all their pairs are not many more than a useful sample."""

    def shape(self, n_features: int) -> tuple[int, int]:
        """Columns on either side of the sampled pairs, (0, 0) if nothing is sampled."""
        if n_features < self.least_features:
            return 0, 0
        return min(self.rows, n_features // 8), min(self.cols, n_features // 2)


def sample_rank(n_sampled: int, k: int, count: int) -> int:
    """Rank within a sample of the similarity that about 1.15 k of all pairs exceed; 0 if the sample is too small.

    The sample has `n_sampled` of all `count` pairs.

    The rank is raised by three standard deviations of a binomial count, so that a small sample aims lower.
    """
    expected = (1 + MARGIN_START) * k * n_sampled / count
    rank = math.ceil(expected + 3 * math.sqrt(expected) + 1)
    return rank if rank < n_sampled else 0


def guess_from_sample(similarities: Tensor, k: int, count: int) -> float:
    """Similarity that about 1.15 k of `count` pairs exceed, from a random part of them; -1 if the part is too small."""
    rank = sample_rank(similarities.numel(), k, count)
    return similarities.flatten().topk(rank, sorted=False).values.min().item() if rank else -1.0
