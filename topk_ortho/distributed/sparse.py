"""A sparse x on many ranks: everybody gets all entries, which are few, and makes a share of the products.

The entries of features in [first, first + N_local) are those of one rank. A share is a range of first features of
pairs, so that every pair is summed on one rank. The largest cosine of each feature, whose search does not divide by
pairs, is found by every rank for itself.
"""

import torch
from torch import Tensor

from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.device import kernels_unavailable_reason
from topk_ortho.backends.sparse.coordinates import Coordinates, unit_columns
from topk_ortho.backends.sparse.gradient import pair_gradient
from topk_ortho.backends.sparse.max_cosine import max_cosine
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.sparse.selection import stream_slabs
from topk_ortho.definitions import Precision, Query, accumulation_dtype, floor_of, n_pairs
from topk_ortho.distributed.gradient import attach
from topk_ortho.distributed.ranks import Facts, Ranks
from topk_ortho.distributed.topk import SelectedHere, finish, merged
from topk_ortho.sparse_features import SparseFeatures, coordinates_of

_SLABS = Slabs()


class SparseColumns:
    """The entries of the features that this rank has been given, which `join` makes part of a whole.

    Raises
    ------
    ValueError
        As in `topk_ortho.topk_pairs`, for a sparse x.
    """

    def __init__(self, x: SparseFeatures | Tensor):
        reason = None if x.device.type == "cpu" else kernels_unavailable_reason(x.device)
        if reason is not None:
            raise ValueError(f"a sparse x must be on the CPU, or where Triton's kernels run: {reason}")
        self._own, _ = coordinates_of(x)
        self._places = self._own.values.detach().nonzero().squeeze(1)
        if self._own.n_features or len(self._places):
            unit_columns(self._own._replace(values=self._own.values.detach()))  # checks

    def facts(self) -> Facts:
        """What the ranks tell each other of their columns."""
        return {"columns": self._own.n_features, "entries": len(self._places)}

    def join(self, ranks: Ranks, facts: list[Facts], chunks: list[Tensor] | None = None) -> None:
        """Gather the entries of all ranks."""
        self._ranks, self._chunks = ranks, None if chunks is None else tuple(chunks)
        before = facts[: ranks.rank]
        self.first_given = sum(fact["columns"] for fact in before)
        self.n_features = sum(fact["columns"] for fact in facts)
        self._first_entry = sum(fact["entries"] for fact in before)
        n_entries = sum(fact["entries"] for fact in facts)
        own = self._own.take(self._places)
        samples, features, values = (
            ranks.gather(part.detach(), self._first_entry, n_entries)
            for part in (own.samples, own.features + self.first_given, own.values.to(accumulation_dtype(own.values)))
        )
        self._all = Coordinates(samples, features, values, self._own.n_samples, self.n_features)

    def select(self, query: Query, state: Tensor | None) -> SelectedHere:
        """The selected pairs that this rank finds; pairs of cosine 0 count, and are not listed. No state is needed."""
        ranks = self._ranks
        x_hat, _, _ = unit_columns(self._all)
        shares = _SLABS.of(x_hat, (ranks.rank, ranks.size))
        survivors, moments, n_met = stream_slabs(shares, x_hat, query)
        n_zeros = n_pairs(self.n_features) - int(ranks.sum(torch.tensor(n_met, device=x_hat.values.device)))
        tau = query.tau
        if query.n_std is not None:
            moments = merged(moments, ranks, x_hat.values.device)
            moments.add_zeros(n_zeros)
            tau = moments.adaptive_tau(query.n_std)
        return finish(
            survivors, query, ranks, self.n_features, tau=tau, n_zeros=n_zeros if floor_of(query, tau) < 0 else 0
        )

    def nearest(self, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        """(features, partners, cosines) of the most similar other feature of the chunk, for the features given here."""
        cosines, partners, _ = max_cosine(self._all, self._chunks, _SLABS)
        features = torch.arange(self._own.n_features, device=partners.device) + self.first_given
        return features, partners[features], cosines[features]

    def attach(self, rows: Tensor, cols: Tensor, cosines: Tensor, priority: Tensor | None = None) -> Tensor:
        """The cosines of pairs of features, differentiable in x; `priority` [N] is that of all features."""
        return attach(self._own.values, cosines, self._gradient, rows, cols, priority)

    def _gradient(self, values: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gradient in the values of this rank of the weighted cosines of all ranks."""
        gradient = self._ranks.sum(pair_gradient(self._all, pairs, _SLABS).contiguous())
        own = torch.zeros_like(values)
        own[self._places] = gradient[self._first_entry : self._first_entry + len(self._places)]
        return own
