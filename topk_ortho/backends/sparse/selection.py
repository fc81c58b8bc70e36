"""The most similar of the pairs that meet."""

from collections.abc import Iterable
from typing import NamedTuple

from topk_ortho.backends.moments import Moments
from topk_ortho.backends.sparse.coordinates import Coordinates, unit_columns
from topk_ortho.backends.sparse.products import Slab, Slabs
from topk_ortho.backends.survivors import Survivors
from topk_ortho.definitions import Query, floor_of, n_pairs
from topk_ortho.selection import Selection, finish


def topk_pairs(x: Coordinates, size: int, query: Query, *, is_ordered: bool, slabs: Slabs) -> Selection:
    """Select as everywhere, and list up to `size` of the pairs whose cosine is not 0; not more may be selected.

    They are listed in the total order, or else, which takes less time, by (row, col).
    """
    x_hat, _, norms = unit_columns(x)
    streamed = stream(x_hat, query, slabs)
    survivors = streamed.survivors
    cosines, index = (survivors.first_in_order if is_ordered else survivors.first_unsorted)(query.k)
    n_zeros = streamed.n_zeros if floor_of(query, streamed.tau) < 0 else 0
    return finish(cosines, index, query, tau=streamed.tau, norms=norms, size=size, n_zeros=n_zeros)


class Streamed(NamedTuple):
    """What one pass over the pairs that meet has streamed."""

    survivors: Survivors
    """Among the pairs whose cosine is not 0, added in (row, col) order"""
    tau: float | None
    """The tau in force"""
    n_zeros: int
    """Pairs of cosine 0"""


def stream(x_hat: Coordinates, query: Query, slabs: Slabs) -> Streamed:
    """Stream the pairs that meet, as `topk_ortho.backends.tiled` streams all pairs."""
    survivors, moments, n_met = stream_slabs(slabs.of(x_hat), x_hat, query)
    n_zeros = n_pairs(x_hat.n_features) - n_met
    if query.n_std is None:
        return Streamed(survivors, query.tau, n_zeros)
    moments.add_zeros(n_zeros)
    return Streamed(survivors, moments.adaptive_tau(query.n_std), n_zeros)


def stream_slabs(slabs: Iterable[Slab], x_hat: Coordinates, query: Query) -> tuple[Survivors, Moments, int]:
    """Survivors of some slabs, the moments of |cosine|, empty unless tau is adaptive, and how many pairs are not 0."""
    survivors, moments, n_met = Survivors(query, floor_of(query)), Moments(), 0
    survivors.add(x_hat.values.new_empty(0), x_hat.features.new_empty(0))
    for slab in slabs:
        pairs, cosines = slab.cosines().not_zero()
        n_met += pairs.numel()
        if query.n_std is not None and pairs.numel():
            moments.add(cosines.double().abs().unsqueeze(0), pairs.numel())
        survivors.add(cosines, pairs)
    return survivors, moments, n_met
