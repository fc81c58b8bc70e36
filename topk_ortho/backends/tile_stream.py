"""Blocks of the gram as tiles in plain torch, and the pairs among them that survive.

    tile[r, c] = sum_m x_hat[m, r] * x[m, c],    cosine = tile[r, c] / norm[c],    survives if similarity > bound

Only one panel of x_hat exists at a time; the other side of the product is x itself, whose norms go into the comparison.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.moments import Moments
from topk_ortho.backends.norms import inverse_norms
from topk_ortho.backends.survivors import Survivors
from topk_ortho.definitions import EPS, Query, accumulation_dtype


class TileShape(NamedTuple):
    """Size of a tile of the gram."""

    rows: int
    cols: int
    """Not fewer than rows, so that only the first tile of a panel meets the diagonal."""


# CPU: a tile of 5 MB stays in the last-level cache between the product and the comparison, and is large enough for full
# GEMM speed; measured from (512, 1024) to (2048, 2048).
# Accelerators: large enough to hide the launches of the comparison; not yet measured.
_CPU_TILE, _ACCELERATOR_TILE = TileShape(768, 1536), TileShape(4096, 8192)


def tile_shape(device: torch.device, n_columns: int, wanted: TileShape | None = None) -> TileShape:
    """Size of the tiles, the wanted or the best known for a device, none larger than a gram of so many columns."""
    rows, cols = wanted or (_CPU_TILE if device.type == "cpu" else _ACCELERATOR_TILE)
    return TileShape(min(rows, n_columns), min(cols, n_columns))


class Tile(NamedTuple):
    """Products of a part of a block."""

    row: int
    """The tile's first column of x on the block's row side"""
    col: int
    """The tile's first column of x on the block's column side"""
    products: Tensor
    """[rows, cols] x_hat.T @ x, overwritten by the next tile"""


def tiles(x: Tensor, norms: Tensor, shape: TileShape, columns: Tensor | None = None) -> Iterator[Tile]:
    """Tiles of the block of x [M, n] with `columns` [M, m], panel by panel; of the upper triangle without `columns`.

    In the triangle every pair of a later panel has a higher index, and the first tile of a panel, where row == col,
    holds entries that are no pairs.
    """
    inverse = inverse_norms(norms)
    buffer = x.new_empty(shape.rows * shape.cols)
    others = x if columns is None else columns
    for row in range(0, x.shape[1], shape.rows):
        panel = (x[:, row : row + shape.rows] * inverse[row : row + shape.rows]).T
        for col in range(row if columns is None else 0, others.shape[1], shape.cols):
            part = others[:, col : col + shape.cols]
            size = (panel.shape[0], part.shape[1])
            yield Tile(row, col, torch.mm(panel, part, out=buffer[: size[0] * size[1]].view(size)))


class TileStream:
    """Collects the pairs of tiles that survive, and the moments of |cosine| over all of their pairs.

    Parameters
    ----------
    query : Query
        What is asked for; moments are taken only if its tau is adaptive.
    guess : float
        The first bound of the survivors.
    n_features : int
        N, of which the index of a pair is made.
    like : Tensor
        A tensor of the dtype and on the device of the tiles.
    shape : TileShape
        Size that no tile exceeds.
    capacity : int, optional
        As in `Survivors`.
    """

    def __init__(
        self, query: Query, guess: float, n_features: int, like: Tensor, shape: TileShape, capacity: int | None = None
    ):
        self.survivors = Survivors(query, guess, capacity)
        self.moments = Moments()
        self._query = query
        self._n_features = n_features
        self._scan = Scan(like, shape)
        self._lower = LowerTriangle(like, shape)

    def add(self, row: int, col: int, products: Tensor, norms: Tensor, *, is_diagonal: bool) -> None:
        """Add a tile of products [rows, cols], see `tiles`, which begins at the pair (row, col) of features.

        `norms` [cols] are those of its columns. On the diagonal entries that are no pairs are left out.
        """
        query, scan = self._query, self._scan
        inverse = inverse_norms(norms)
        scores = scan.load(products, absolute=query.similarity == "abs" or query.n_std is not None)
        if query.n_std is not None:
            magnitudes = scores.mul_(inverse)
            if is_diagonal:
                n_pairs = self._lower.n_pairs_in(magnitudes)
                if n_pairs:
                    self.moments.add(magnitudes, n_pairs, partial(self._lower.fill, value=0.0))
            else:
                self.moments.add(magnitudes, magnitudes.numel())
            scores = scan.load(products, absolute=query.similarity == "abs")
        if is_diagonal:
            self._lower.fill(scores, -torch.inf)
        bound = self.survivors.screening_bound(row * self._n_features + col)
        local_row, local_col = scan.above(norms.clamp_min(EPS) * bound)
        cosines = products[local_row, local_col].mul_(inverse[local_col]).clamp_(-1, 1)
        self.survivors.add(cosines, (local_row + row) * self._n_features + (local_col + col))


class LowerTriangle:
    """Entries on and below the diagonal in the first tile of a panel: they are no pairs, or repeat those above it."""

    def __init__(self, x: Tensor, shape: TileShape):
        self._mask = torch.ones(shape.rows, shape.rows, dtype=torch.bool, device=x.device).tril_()

    def fill(self, tile: Tensor, value: float) -> None:
        """Overwrite these entries of a tile [rows, cols >= rows]."""
        n_rows = tile.shape[0]
        tile[:, :n_rows].masked_fill_(self._mask[:n_rows, :n_rows], value)

    def n_pairs_in(self, tile: Tensor) -> int:
        """How many entries of a tile [rows, cols >= rows] are pairs."""
        n_rows = tile.shape[0]
        return tile.numel() - n_rows * (n_rows + 1) // 2


class Scan:
    """Finds the rare scores of a tile that exceed their column's bound, in memory that every tile reuses.

    A score is a cosine, or its magnitude, times the norm of the column.

    A vectorised maximum over groups of eight rows leaves an eighth to compare, and the flags are searched eight at a
    time as int64: a third of the time of comparing and searching every score (2 cores, AVX-512).
    """

    GROUP = 8
    """Rows that are compared together"""

    def __init__(self, x: Tensor, shape: TileShape):
        n_groups = -(-shape.rows // self.GROUP)
        self._scores = x.new_empty(n_groups * self.GROUP * shape.cols)
        self._highest = x.new_empty(n_groups * shape.cols)
        self._flags = torch.zeros(n_groups * shape.cols + 7 & ~7, dtype=torch.bool, device=x.device)

    def load(self, products: Tensor, absolute: bool) -> Tensor:
        """Scores of a tile, [rows, cols], for the caller to change before `above`."""
        n_rows, n_cols = products.shape
        rows = self._scores[: -(-n_rows // self.GROUP) * self.GROUP * n_cols].view(-1, n_cols)
        rows[n_rows:] = -torch.inf
        self.hold(rows)
        return torch.abs(products, out=rows[:n_rows]) if absolute else rows[:n_rows].copy_(products)

    def hold(self, scores: Tensor) -> None:
        """Look through these scores [rows, cols] where they lie; rows are a multiple of `GROUP`."""
        self._grouped = scores.view(-1, self.GROUP, scores.shape[1])

    def above(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column in the tile of every score above `bound` [cols]."""
        n_groups, _, n_cols = self._grouped.shape
        n_flags = n_groups * n_cols
        n_words = n_flags + 7 >> 3
        highest = torch.amax(self._grouped, dim=1, out=self._highest[:n_flags].view(n_groups, n_cols))
        torch.gt(highest, bound, out=self._flags[:n_flags].view(n_groups, n_cols))
        self._flags[n_flags : 8 * n_words] = False
        words = self._flags[: 8 * n_words].view(torch.int64)
        hits = words.nonzero().squeeze(1)
        hit, lane = words[hits].view(torch.bool).view(-1, 8).nonzero().unbind(1)
        position = 8 * hits[hit] + lane
        group = position.div(n_cols, rounding_mode="floor")
        col = position - group * n_cols
        scores = self._grouped[group, :, col]  # [flagged, rows of a group]
        flagged, offset = (scores > bound[col].unsqueeze(1)).nonzero().unbind(1)
        return group[flagged] * self.GROUP + offset, col[flagged]


def multipliable(x: Tensor) -> Tensor:
    """x itself if a matrix product takes it without a copy, else one copy in the accumulation dtype."""
    x = x.to(accumulation_dtype(x))
    return x if 1 in x.stride() else x.contiguous()
