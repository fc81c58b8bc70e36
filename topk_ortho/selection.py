"""How many pairs, in which order, and when a streamed selection is exact.

**Order.** Pairs are ordered by similarity descending, then by (row, col) ascending. A pair is carried as its signed
value and one int64, ``row * N + col``, so that the second half of the order is an integer comparison.

**Certificate.** A backend streams the gram once and records *survivors*: pairs above a *cut*. The cut starts at a
guess, hoped to lie just under the k-th similarity, and rises whenever the records overflow: the k-th of the pairs seen
so far never exceeds the k-th of all, so what falls below it is not selected whatever follows. After the pass the
selection is exact if k pairs survived, or if the guess was no higher than the floor that the user asked for. If neither
holds, the guess was wrong: a second pass starts from the floor itself and cannot fail. Memory is bounded by the
capacity plus one tile either way.

**Warm start.** The state is a tensor of three numbers, owned by the caller: the guess for the next call (-1 if there is
none), the margin by which that guess aims below the threshold, as a share of k, and the passes that the last call took.
"""

import math

import torch
from torch import Tensor

from topk_ortho.backends.base import Query, Similarity

MARGIN_START, MARGIN_LEAST, MARGIN_MOST = 0.15, 0.05, 1.0


def n_pairs(n_features: int) -> int:
    """Number of unordered pairs of distinct columns."""
    return n_features * (n_features - 1) // 2


def k_from_fraction(n_features: int, fraction: float) -> int:
    """Number of unordered pairs in a share of the ordered ones: k = max(1, int(N (N-1) fraction) // 2)."""
    return max(1, int(n_features * (n_features - 1) * fraction) // 2)


def similarity_of(values: Tensor, similarity: Similarity) -> Tensor:
    """What the order compares: |cosine|, or the signed cosine."""
    return values.abs() if similarity == "abs" else values


def first_of(values: Tensor, index: Tensor, similarity: Similarity, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` records of the total order, in it."""
    values, index = first_set(values, index, similarity, count)
    if not (index[1:] > index[:-1]).all():
        by_index = index.argsort()
        values, index = values[by_index], index[by_index]
    rank = _integers_in_order(similarity_of(values, similarity))
    order = rank.bitwise_not().argsort(stable=True)  # ~rank descends and cannot overflow
    return values.index_select(0, order), index.index_select(0, order)


def first_set(values: Tensor, index: Tensor, similarity: Similarity, count: int) -> tuple[Tensor, Tensor]:
    """The same records in the order in which they came; nothing is sorted but ties at the end."""
    if index.numel() <= count:
        return values, index
    score = similarity_of(values, similarity)
    least = score.topk(count, sorted=False).values.min()
    is_first = score > least
    n_ties = count - int(is_first.sum())
    ties = (score == least).nonzero().squeeze(1)
    if ties.numel() > n_ties:
        ties = ties[index[ties].argsort()[:n_ties]]
    is_first[ties] = True
    first = is_first.nonzero().squeeze(1)
    return values.index_select(0, first), index.index_select(0, first)


def _integers_in_order(numbers: Tensor) -> Tensor:
    """Integers that compare as the floating `numbers` do: they sort by radix, ten times faster on a CPU.

    The bits of a float order as it does, except that below zero they order backwards.
    """
    integer, sign_bit = (torch.int64, 63) if numbers.dtype == torch.float64 else (torch.int32, 31)
    bits = (numbers + 0.0).view(integer)  # + 0.0 turns -0.0 into 0.0
    ordered: Tensor = bits ^ ((bits >> sign_bit) & (2**sign_bit - 1))
    return ordered


def floor_of(query: Query, adaptive_tau: float | None = None) -> float:
    """Largest similarity that is refused by definition; below -1 nothing is."""
    tau = query.tau if adaptive_tau is None else adaptive_tau
    if query.similarity == "positive":
        return max(0.0, tau or 0.0)
    return -1.0 if tau is None else tau


class Moments:
    """Mean and population standard deviation of |cosine|, gathered tile by tile.

    Every tile is summed as deviations from the mean so far, so that nothing cancels where all cosines are alike
    (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        """Over all that was added; whoever adds the first tile sets it to that tile's mean before."""
        self._sum_squares = 0.0

    def add(self, deviations: Tensor, count: int) -> None:
        """Add `count` magnitudes [rows, cols], given less `mean`; further entries must be 0."""
        # float64 across the rows: float32 over a whole tile of millions rounds small squares away, always downwards
        total = deviations.sum(dim=1).double().sum().item()
        squares = torch.linalg.vector_norm(deviations, dim=1).double().square().sum().item()
        self.count += count
        self.mean += total / self.count
        self._sum_squares += squares - total * total / self.count

    def add_zeros(self, count: int) -> None:
        """Add `count` magnitudes of 0."""
        if count:
            total = self.count + count
            self._sum_squares += self.mean * self.mean * self.count * count / total
            self.mean *= self.count / total
            self.count = total

    def adaptive_tau(self, n_std: float) -> float:
        """mean + n_std * std."""
        return self.mean + n_std * math.sqrt(max(0.0, self._sum_squares / self.count))


def guess_from_sample(similarities: Tensor, k: int, count: int) -> float:
    """Value that about 1.15 k of `count` pairs exceed, from the similarities of a random part of them; -1 for none."""
    rank = first_rank_of_sample(similarities.numel(), k, count)
    return similarities.flatten().topk(rank, sorted=False).values.min().item() if rank else -1.0


def first_rank_of_sample(n_sampled: int, k: int, count: int) -> int:
    """Rank in a sample of `n_sampled` of `count` pairs whose value about 1.15 k of them exceed; 0 if it has none.

    It is raised by three standard deviations of a binomial count, so that a small sample aims lower.
    """
    expected = (1 + MARGIN_START) * k * n_sampled / count
    rank = math.ceil(expected + 3 * math.sqrt(expected) + 1)
    return rank if rank < n_sampled else 0


def initial_state(device: torch.device | str | None = None) -> Tensor:
    """Warm-start state before the first call, for the `state` argument of `topk_pairs` and `topk_ortho_loss`.

    Parameters
    ----------
    device : torch.device or str, optional
        Of the x that it will be used with.

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


def next_state(state: Tensor, ordered: Tensor, k: int, n_passes: int) -> Tensor:
    """State after a call that left the similarities `ordered`, descending: k or more, if as many passed the floor.

    The next guess is the similarity at rank (1 + margin) k. Where fewer survived it is extended in a straight line from
    rank (1 - margin) k through k; tails are convex, so that aims low. A call that needed a second pass doubles the
    margin, the others let it shrink.
    """
    margin = state[1].item()
    if not MARGIN_LEAST <= margin <= MARGIN_MOST:  # NaN too, from a buffer that nobody initialised
        margin = MARGIN_START
    margin = min(MARGIN_MOST, 2 * margin) if n_passes > 1 else max(MARGIN_LEAST, 0.98 * margin)
    rank = math.ceil((1 + margin) * k)
    if ordered.numel() >= rank:
        guess = ordered[rank - 1].item()
    elif ordered.numel() >= k:
        guess = 2 * ordered[k - 1].item() - ordered[max(0, math.floor((1 - margin) * k) - 1)].item()
    else:
        guess = -1.0
    return torch.tensor([guess, margin, n_passes], dtype=state.dtype, device=state.device)


class Survivors:
    """The records of one pass: the first k pairs of the order among all that were added, in bounded memory.

    A pair survives if its similarity is above `cut`, or equal to it with an index below `cut_index`.
    """

    def __init__(self, query: Query, guess: float):
        self.query = query
        self.capacity = 2 * query.k + 2**14
        self.cut = guess
        # pairs equal to a guess may be the ones that are asked for, pairs equal to the floor never are
        self.cut_index = 2**63 - 1 if guess > floor_of(query) else -1
        self.n_overflows = 0
        self._values: list[Tensor] = []
        self._index: list[Tensor] = []
        self._n_records = 0

    def screen(self, first_index: int) -> float:
        """Bound, lowered by more than rounding, that survivors exceed among pairs from `first_index` on."""
        if self.cut > 0:
            return self.cut * (1 - 2**-20)
        return self.cut if first_index > self.cut_index else -1.0

    def add(self, values: Tensor, index: Tensor) -> None:
        """Record those of the given pairs that survive."""
        similarity = similarity_of(values, self.query.similarity)
        keep = (similarity > self.cut) | ((similarity == self.cut) & (index < self.cut_index))
        kept = keep.nonzero().squeeze(1)  # an index_select is a third of the time of indexing
        values, index = values.index_select(0, kept), index.index_select(0, kept)
        self._values.append(values)
        self._index.append(index)
        self._n_records += index.numel()
        if self._n_records > self.capacity:
            self.n_overflows += 1
            self._raise_cut()

    def _raise_cut(self) -> None:
        values, index = self.first_set(self.query.k)
        similarity = similarity_of(values, self.query.similarity)
        lowest = similarity.min()
        self.cut = lowest.item()
        self.cut_index = int(index[similarity == lowest].max())
        self._values, self._index, self._n_records = [values], [index], index.numel()

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Values and index of the first `count` records, in order."""
        return first_of(torch.cat(self._values), torch.cat(self._index), self.query.similarity, count)

    def first_set(self, count: int) -> tuple[Tensor, Tensor]:
        """The same in the order in which they were added."""
        return first_set(torch.cat(self._values), torch.cat(self._index), self.query.similarity, count)
