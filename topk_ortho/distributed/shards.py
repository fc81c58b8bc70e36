"""Columns on many ranks: how they are dealt out for the work, how shards go round, and which blocks a rank computes.

The ranks may hold any numbers of columns. For the work each has N / R of them, rounded up or down. A shard is
feature-major, ``[n, M]``, so that columns are sent without a copy. Shards go round in a ring, from every rank to the
next. After ``R // 2`` steps every two shards have met on a rank. If R is even, two shards that are R / 2 ranks apart
meet on both of them in the last step, and either rank computes a half of their block. So each block of the gram is
computed once, and all ranks have the same work.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.precision import matmul_precision
from topk_ortho.backends.tile_stream import Tile, TileShape, multipliable, tile_shape, tiles
from topk_ortho.definitions import Precision
from topk_ortho.distributed.ranks import Ranks


class Block(NamedTuple):
    """A part of the gram, by the places of its columns."""

    rows: range
    """Places of the columns of x on one side of the products"""
    cols: range
    """Places on the other side: those of `rows` if the block is on the diagonal, else higher than all of these"""

    def within(self, chunk_bounds: list[int]) -> list["Block"]:
        """Its parts whose rows and columns are in the same chunk of places; chunks begin at the bounds."""
        parts = []
        for start, stop in itertools.pairwise(chunk_bounds):
            rows = range(max(start, self.rows.start), min(stop, self.rows.stop))
            cols = range(max(start, self.cols.start), min(stop, self.cols.stop))
            if rows and cols:
                parts.append(Block(rows, cols))
        return parts


class Shards:
    """Which columns of a matrix each rank holds, as given and as dealt out for the work.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    sizes : list of int
        How many columns each of them has been given, in the order of ranks.
    device : torch.device
        Where the columns are.
    permutation : Tensor, shape [N], int64, optional
        The feature at every place. Places are dealt out in order, so that rank r has those from r N / R on. By default
        a feature's place is its number.
    """

    def __init__(self, ranks: Ranks, sizes: list[int], device: torch.device, permutation: Tensor | None = None):
        self.ranks = ranks
        self.n_features = sum(sizes)
        given = [0, *itertools.accumulate(sizes)]
        self._bounds = [rank * self.n_features // ranks.size for rank in range(ranks.size + 1)]
        self.first_given = given[ranks.rank]
        self.here = self.places(ranks.rank)
        self._moves = permutation is not None or given != self._bounds
        if self._moves:
            features = torch.arange(self.n_features, device=device)
            feature_of = features if permutation is None else permutation
            place_of = torch.empty_like(features).scatter_(0, feature_of, features)
            places = place_of[given[ranks.rank] : given[ranks.rank + 1]]
            self._departing = places.argsort()
            self._n_sent: list[int] = torch.bincount(self.owners(places), minlength=ranks.size).tolist()
            givers = _interval_of(feature_of[self.here.start : self.here.stop], given)
            self._arriving = givers.argsort(stable=True)
            self._n_received: list[int] = torch.bincount(givers, minlength=ranks.size).tolist()

    def places(self, rank: int) -> range:
        """The places that a rank works on."""
        return range(self._bounds[rank], self._bounds[rank + 1])

    def owners(self, places: Tensor) -> Tensor:
        """The rank that works on each of some places."""
        return _interval_of(places, self._bounds)

    def deal(self, rows: Tensor) -> Tensor:
        """What belongs to the places of this rank, [n, ...], from what belongs to its given columns, [N_local, ...]."""
        if not self._moves:
            return rows.contiguous()
        received = self.ranks.exchange(rows[self._departing], self._n_sent, self._n_received)
        return torch.empty_like(received).index_copy_(0, self._arriving, received)

    def collect(self, rows: Tensor) -> Tensor:
        """The reverse of `deal`."""
        if not self._moves:
            return rows
        received = self.ranks.exchange(rows[self._arriving], self._n_received, self._n_sent)
        return torch.empty_like(received).index_copy_(0, self._departing, received)

    def ring(self, rows: Tensor, n_steps: int) -> Iterator[tuple[int, Tensor]]:
        """The shards that come to this rank in so many steps, as (rank, shard): its own first, then those before it.

        The next one is on its way while the caller works on this one.
        """
        rank, size = self.ranks.rank, self.ranks.size
        for step in range(n_steps + 1):
            owner = (rank - step) % size
            if step == n_steps:
                yield owner, rows
                return
            arriving = rows.new_empty(len(self.places((owner - 1) % size)), *rows.shape[1:])
            wait = self.ranks.shift(rows, arriving)
            yield owner, rows
            wait()
            rows = arriving

    def block(self, rank: int, owner: int) -> Block:
        """The block that a rank computes when it is visited by the shard of `owner`, in the first R // 2 steps."""
        rows, cols = self.places(min(rank, owner)), self.places(max(rank, owner))
        if 2 * abs(rank - owner) == self.ranks.size:  # both ranks see both shards
            middle = len(rows) // 2
            rows = rows[:middle] if rank < owner else rows[middle:]
        return Block(rows, cols)

    def n_steps(self, chunk_bounds: list[int]) -> int:
        """Steps of the ring until no rank has a block left that has pairs of one chunk."""
        size = self.ranks.size
        for step in range(size // 2, 0, -1):
            if any(self.block(rank, (rank - step) % size).within(chunk_bounds) for rank in range(size)):
                return step
        return 0


class Dealt(NamedTuple):
    """The columns of a dense x that this rank works on, and the norms of all."""

    shards: Shards
    rows: Tensor
    """[n, M] the columns at the places of this rank, feature-major, scaled where `in_range` says so"""
    norms: Tensor
    """[N] the norms of the columns at all places, scaled in the same way"""
    factor: Tensor | None
    """[N_local] what the given columns were scaled by, None if no column of any rank was"""

    def tile_shape(self) -> TileShape:
        """Size of the tiles, none larger than the shards, of which some have one column more."""
        return tile_shape(self.rows.device, -(-self.shards.n_features // self.shards.ranks.size))

    def tiles(self, precision: Precision, chunk_bounds: list[int] | None = None) -> Iterator[Tile]:
        """The tiles that this rank computes, with the places where they begin; of pairs of one chunk alone, if given.

        Where row == col, a tile is on the diagonal. All ranks must take all of their tiles.
        """
        shards, shape, rank = self.shards, self.tile_shape(), self.shards.ranks.rank
        bounds = chunk_bounds or [0, shards.n_features]
        own = multipliable(self.rows.T)
        for owner, rows in shards.ring(self.rows, shards.n_steps(bounds)):
            visiting = own if owner == rank else multipliable(rows.T)
            lower, higher = (own, visiting) if rank < owner else (visiting, own)
            first_row, first_col = shards.places(min(rank, owner)).start, shards.places(max(rank, owner)).start
            for block in shards.block(rank, owner).within(bounds):
                part = lower[:, block.rows.start - first_row : block.rows.stop - first_row]
                columns = higher[:, block.cols.start - first_col : block.cols.stop - first_col]
                norms = self.norms[block.rows.start : block.rows.stop]
                with matmul_precision(own.device, precision):  # not while ranks wait for each other: it holds a lock
                    for row, col, products in tiles(part, norms, shape, None if owner == rank else columns):
                        yield Tile(block.rows.start + row, block.cols.start + col, products)


def _interval_of(numbers: Tensor, bounds: list[int]) -> Tensor:
    """The interval, from one bound to the next, in which each number is."""
    return torch.searchsorted(torch.tensor(bounds, device=numbers.device), numbers, right=True) - 1
