"""The sparse route behind the interface of every backend: x is dense, and pairs of cosine 0 are listed like others."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from topk_ortho.backends.base import Backend, MaxCosine, WeightedPairs
from topk_ortho.backends.device import kernels_unavailable_reason
from topk_ortho.backends.sparse.coordinates import Coordinates, unit_columns
from topk_ortho.backends.sparse.gradient import pair_gradient
from topk_ortho.backends.sparse.max_cosine import max_cosine
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.sparse.selection import stream
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.backends.triton import TritonBackend
from topk_ortho.definitions import Precision, Query, floor_of, similarity_of
from topk_ortho.selection import Selection, finish
from topk_ortho.warm_start import next_state


@dataclass(frozen=True, kw_only=True)
class SparseBackend:
    """Computes only the pairs of features that are active together."""

    slabs: Slabs = field(default_factory=Slabs)
    """How the products are cut."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """None on the CPU; elsewhere it is made of Triton's kernels."""
        return None if device.type == "cpu" else kernels_unavailable_reason(device)

    def topk_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """Select among the pairs that meet, then, if that is not enough, pairs of cosine 0 in (row, col) order."""
        n_features = x.shape[1]
        x_hat, _, norms = unit_columns(Coordinates.from_dense(x))
        streamed = stream(x_hat, query, self.slabs)
        cosines, index = streamed.survivors.first_in_order(query.k if state is None else 2 * query.k)
        if state is not None:
            state = next_state(state, similarity_of(cosines, query.similarity), query.k, n_passes=1)
        cosines, index = cosines[: query.k], index[: query.k]
        if floor_of(query, streamed.tau) < 0:
            n_zeros = query.k - index.numel()
            cosines = torch.cat([cosines, cosines.new_zeros(n_zeros)])
            index = torch.cat([index, first_others(index, n_zeros, n_features)])
        return finish(cosines, index, query, tau=streamed.tau, norms=norms, state=state)

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> MaxCosine:
        """Maxima over the pairs that meet, and 0 where that is larger."""
        return max_cosine(Coordinates.from_dense(x), chunks, self.slabs)

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gradient by the dense backend of the device: zeros of x get gradient too, so it is as dense as x."""
        dense: Backend = TiledBackend() if x.device.type == "cpu" else TritonBackend()
        return dense.pair_gradient(x, norms, cosines, pairs)

    def structural_gradient(self, x: Tensor, pairs: WeightedPairs) -> Tensor:
        """`pair_gradient` where x is not 0, and 0 elsewhere."""
        entries = Coordinates.from_dense(x)
        gradient = torch.zeros_like(x)
        gradient[entries.samples, entries.features] = pair_gradient(entries, pairs, self.slabs)
        return gradient


def first_others(index: Tensor, count: int, n_features: int) -> Tensor:
    """The first `count` pairs in (row, col) order, as row * N + col, that are not in `index`."""
    rows = torch.arange(n_features, device=index.device)
    first_of_row = rows * (2 * n_features - rows - 1) // 2  # pairs are numbered in that order
    row, col = index.div(n_features, rounding_mode="floor"), index % n_features
    taken = (first_of_row[row] + col - row - 1).sort().values
    n_free_before = taken - torch.arange(taken.numel(), device=index.device)
    others = torch.arange(count, device=index.device)
    others += torch.searchsorted(n_free_before, others, right=True)
    row = torch.searchsorted(first_of_row, others, right=True) - 1
    return row * n_features + others - first_of_row[row] + row + 1
