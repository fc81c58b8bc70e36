"""Top-k pairs of columns on many ranks: each block once, then a cut that all ranks count together."""

from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.moments import Moments
from topk_ortho.backends.norms import inverse_norms
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.backends.survivors import Survivors
from topk_ortho.backends.tile_stream import TileStream
from topk_ortho.definitions import Query, accumulation_dtype, first_in_order, floor_of, n_pairs, similarity_of
from topk_ortho.distributed.ranks import Ranks
from topk_ortho.distributed.selection import RankedSimilarities, first_of_all
from topk_ortho.distributed.shards import Dealt
from topk_ortho.warm_start import GUESS, SampleSizes, guess_from_sample, next_state


class SelectedHere(NamedTuple):
    """The selected pairs that this rank has found, and what is known of all."""

    cosines: Tensor
    """[p] signed cosines, most similar first"""
    rows: Tensor
    """int64 [p]"""
    cols: Tensor
    """int64 [p], rows < cols"""
    n_selected: Tensor
    """int64 [], pairs that are selected on all ranks"""
    threshold: Tensor
    """[] the k-th similarity; the floor in force, at least 0, if fewer than k pairs passed it"""
    tau: float | None
    """The tau in force"""


def select(x: Dealt, query: Query, state: Tensor | None) -> SelectedHere:
    """Select among the columns of all ranks; the state is written."""
    ranks, device = x.shards.ranks, x.rows.device
    start = None if state is None else ranks.broadcast(state.double())  # one state, or the ranks would part ways
    guess = _guess(x, query, start)
    floor, tau = floor_of(query), query.tau
    survivors, moments = _stream(x, query, max(guess, floor))
    n_passes = 1
    if query.n_std is not None:
        tau = merged(moments, ranks, device).adaptive_tau(query.n_std)
        floor = floor_of(query, tau)
    if guess > floor and ranks.sum(torch.tensor(survivors.n_records, device=device)) < query.k:
        survivors, _ = _stream(x, query._replace(n_std=None), floor)  # tau is known
        n_passes = 2
    if state is not None and start is not None:
        cosines, _ = survivors.first_unsorted(2 * query.k)
        ordered = RankedSimilarities(similarity_of(cosines, query.similarity), ranks)
        state.copy_(next_state(start, ordered, query.k, n_passes))
    return finish(survivors, query, ranks, x.shards.n_features, tau=tau)


def finish(
    survivors: Survivors, query: Query, ranks: Ranks, n_features: int, *, tau: float | None, n_zeros: int = 0
) -> SelectedHere:
    """Cut what all ranks have kept after k pairs, and drop what does not pass the floor.

    `n_zeros` pairs of cosine 0 count besides, and are not listed.
    """
    cosines, index = survivors.first_unsorted(2 * query.k)
    similarity = similarity_of(cosines, query.similarity)
    if tau is not None:
        tau = cosines.new_tensor(tau).item()
    floor = floor_of(query, tau)
    is_selected = similarity > floor
    if ranks.sum(torch.tensor(index.numel(), device=index.device)) > query.k:
        is_selected &= first_of_all(similarity, index, query.k, ranks)
    selected = is_selected.nonzero().squeeze(1)
    cosines, index = first_in_order(cosines[selected], index[selected], query.similarity, selected.numel())
    n_listed = ranks.sum(torch.tensor(index.numel(), device=index.device))
    lowest = similarity_of(cosines, query.similarity).min() if cosines.numel() else cosines.new_tensor(torch.inf)
    lowest = ranks.min(lowest.clone())
    rows = index.div(n_features, rounding_mode="floor")
    return SelectedHere(
        cosines=cosines,
        rows=rows,
        cols=index - rows * n_features,
        n_selected=(n_listed + n_zeros).clamp_max(query.k),
        threshold=torch.where(n_listed == query.k, lowest, max(floor, 0.0)),
        tau=tau,
    )


def merged(moments: Moments, ranks: Ranks, device: torch.device) -> Moments:
    """The moments of all ranks together."""
    own = torch.tensor([moments.state()], dtype=torch.float64, device=device)
    of_all = Moments()
    for count, mean, sum_squares in ranks.gather(own, ranks.rank, ranks.size).tolist():
        of_all.merge(int(count), mean, sum_squares)
    return of_all


def _guess(x: Dealt, query: Query, state: Tensor | None) -> float:
    """Lower estimate of the k-th similarity, the same on all ranks: see `TiledBackend`."""
    shards, device, dtype = x.shards, x.rows.device, accumulation_dtype(x.rows)
    if state is not None and state[GUESS] > -1:
        return state[GUESS].item()
    n_rows, n_cols = SampleSizes().shape(shards.n_features)
    if n_rows == 0:
        return -1.0
    sample = torch.randperm(shards.n_features, generator=torch.Generator().manual_seed(0))[: n_rows + n_cols].to(device)
    is_here = ((sample >= shards.here.start) & (sample < shards.here.stop)).nonzero().squeeze(1)
    places = sample[is_here]
    x_hat = torch.zeros(len(sample), x.rows.shape[1], dtype=dtype, device=device)
    x_hat[is_here] = x.rows[places - shards.here.start].to(dtype) * inverse_norms(x.norms[places])[:, None]
    shards.ranks.sum(x_hat)
    with matmul_precision(device, query.precision):
        similarity = similarity_of(x_hat[:n_rows] @ x_hat[n_rows:].T, query.similarity)
    guess = guess_from_sample(similarity, query.k, n_pairs(shards.n_features))
    # the ranks may round differently
    return shards.ranks.broadcast(torch.tensor(guess, dtype=torch.float64, device=device)).item()


def _stream(x: Dealt, query: Query, guess: float) -> tuple[Survivors, Moments]:
    """Survivors of the blocks of this rank, and the moments of |cosine| over them, empty unless tau is adaptive."""
    like = x.norms.new_empty(0)
    stream = TileStream(query, guess, x.shards.n_features, like, x.tile_shape())
    stream.survivors.add(like, like.new_empty(0, dtype=torch.int64))  # a rank may have no block
    for row, col, products in x.tiles(query.precision):
        stream.add(row, col, products, x.norms[col : col + products.shape[1]], is_diagonal=row == col)
    return stream.survivors, stream.moments
