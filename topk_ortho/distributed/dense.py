"""A dense x on many ranks: dealt out evenly, multiplied block by block as its shards go round in a ring."""

import itertools

import torch
from torch import Tensor

from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.norms import column_norms, in_range
from topk_ortho.definitions import Precision, Query
from topk_ortho.distributed.gradient import attach, gradient_here
from topk_ortho.distributed.max_cosine import nearest
from topk_ortho.distributed.ranks import Facts, Ranks
from topk_ortho.distributed.shards import Dealt, Shards
from topk_ortho.distributed.topk import SelectedHere, select


class DenseColumns:
    """The columns of a dense x [M, N_local] that this rank has been given, which `join` makes part of a whole.

    Raises
    ------
    ValueError
        If they hold NaN or Inf, or if a norm is too large.
    """

    shards: Shards

    def __init__(self, x: Tensor):
        self._x = x
        self._norms = column_norms(x.detach())
        self._is_huge = in_range(x.detach()[:0], self._norms).factor is not None

    def facts(self) -> Facts:
        """What the ranks tell each other of their columns."""
        return {"columns": self._x.shape[1], "huge columns": self._is_huge}

    def join(self, ranks: Ranks, facts: list[Facts], chunks: list[Tensor] | None = None) -> None:
        """Deal out places by what all ranks have told: in the order of their columns, or chunk by chunk."""
        sizes = [fact["columns"] for fact in facts]
        self.shards = Shards(ranks, sizes, self._x.device, None if chunks is None else torch.cat(chunks))
        lengths = [self.shards.n_features] if chunks is None else map(len, chunks)
        self._chunk_bounds = [0, *itertools.accumulate(lengths)]
        # all ranks send one dtype: where one of them has to scale columns down, all do as if they had
        self._is_scaled = any(fact["huge columns"] for fact in facts)

    @property
    def first_given(self) -> int:
        """The number of the first column of this rank among all."""
        return self.shards.first_given

    def select(self, query: Query, state: Tensor | None) -> SelectedHere:
        """The selected pairs that this rank finds, see `topk_ortho.distributed.topk`."""
        return select(self._deal(self._x.detach()), query, state)

    def nearest(self, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        """(places, partners, cosines) of the most similar other column of the chunk, for the places of this rank."""
        cosines, partners = nearest(self._deal(self._x.detach()), self._chunk_bounds, precision)
        here = self.shards.here
        places = torch.arange(here.start, here.stop, device=self._x.device)
        return places, partners[places], cosines[places]

    def attach(self, rows: Tensor, cols: Tensor, cosines: Tensor, priority: Tensor | None = None) -> Tensor:
        """The cosines of pairs of places, differentiable in x; `priority` [N] is that of all places."""
        return attach(self._x, cosines, self._gradient, rows, cols, priority)

    def _gradient(self, x: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gradient in x of the weighted cosines of all ranks."""
        dealt = self._deal(x)
        gradient = self.shards.collect(gradient_here(dealt, cosines, pairs))
        if dealt.factor is not None:
            gradient *= dealt.factor[:, None]
        return torch.empty_like(x).copy_(gradient.T)

    def _deal(self, x: Tensor) -> Dealt:
        norms, factor = self._norms, None
        if self._is_scaled:
            x, norms, factor = in_range(x.to(norms.dtype), norms)
            factor = torch.ones_like(norms) if factor is None else factor
        shards = self.shards
        norms = shards.ranks.gather(shards.deal(norms), shards.here.start, shards.n_features)
        return Dealt(shards, shards.deal(x.T), norms, factor)
