"""The records of one streamed pass, in bounded memory."""

import torch
from torch import Tensor

from topk_ortho.definitions import Query, first_in_order, first_unsorted, floor_of, similarity_of


class Survivors:
    """The first k pairs of the order among all that were added, and a few more.

    A pair survives if its similarity is above `bound`, or equal to it with an index below `bound_index`.

    Parameters
    ----------
    query : Query
        What is asked for.
    guess : float
        The first bound.
    capacity : int, optional
        Records that are held between two tiles, at least k; 2 k + 2**14 by default.
    """

    def __init__(self, query: Query, guess: float, capacity: int | None = None):
        self.query = query
        self.capacity = 2 * query.k + 2**14 if capacity is None else capacity
        self.bound = guess
        # pairs equal to a guess may be the ones that are asked for, pairs equal to the floor never are
        self.bound_index = 2**63 - 1 if guess > floor_of(query) else -1
        self.n_overflows = 0
        self._cosines: list[Tensor] = []
        self._index: list[Tensor] = []
        self.n_records = 0

    def screening_bound(self, first_index: int) -> float:
        """The bound for pairs from `first_index` on, lowered by more than the rounding of a comparison before `add`."""
        if self.bound > 0:
            return self.bound * (1 - 2**-20)
        return self.bound if first_index > self.bound_index else -1.0

    def add(self, cosines: Tensor, index: Tensor) -> None:
        """Record those of the given pairs that survive; raise the bound if the records overflow."""
        similarity = similarity_of(cosines, self.query.similarity)
        keep = (similarity > self.bound) | ((similarity == self.bound) & (index < self.bound_index))
        kept = keep.nonzero().squeeze(1)  # an index_select is a third of the time of indexing
        cosines, index = cosines.index_select(0, kept), index.index_select(0, kept)
        self._cosines.append(cosines)
        self._index.append(index)
        self.n_records += index.numel()
        if self.n_records > self.capacity:
            self.n_overflows += 1
            self._raise_bound()

    def _raise_bound(self) -> None:
        cosines, index = self.first_unsorted(self.query.k)
        similarity = similarity_of(cosines, self.query.similarity)
        lowest = similarity.min()
        self.bound = lowest.item()
        self.bound_index = int(index[similarity == lowest].max())
        self._cosines, self._index, self.n_records = [cosines], [index], index.numel()

    def first_in_order(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and index of the first `count` records, in order."""
        return first_in_order(torch.cat(self._cosines), torch.cat(self._index), self.query.similarity, count)

    def first_unsorted(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and index of the first `count` records, as they were added."""
        return first_unsorted(torch.cat(self._cosines), torch.cat(self._index), self.query.similarity, count)
