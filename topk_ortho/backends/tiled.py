"""Plain torch, on any device: stream the upper triangle of the gram in tiles, keep what survives, certify.

    tile[r, c] = sum_m x_hat[m, r] * x[m, c],    cosine = tile[r, c] / norm[c],    survives if similarity > bound

Only one panel of x_hat exists at a time; the other side of the product is x itself, whose norms go into the comparison.
Extra memory: one tile with its magnitudes, O(k) survivors, and a copy of x only if its dtype or layout cannot be
multiplied as it is. Exactness is the business of `topk_ortho.selection`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from topk_ortho.backends.base import MaxCosine, WeightedPairs
from topk_ortho.backends.moments import Moments
from topk_ortho.backends.norms import column_norms, in_range, inverse_norms
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.backends.survivors import Survivors
from topk_ortho.definitions import EPS, Precision, Query, accumulation_dtype, floor_of, n_pairs, similarity_of
from topk_ortho.selection import Selection, finish
from topk_ortho.warm_start import GUESS, SampleSizes, guess_from_sample, next_state


class TileShape(NamedTuple):
    """Size of a tile of the gram."""

    rows: int
    cols: int
    """Not fewer than rows, so that only the first tile of a panel meets the diagonal."""


# CPU: a tile of 5 MB stays in the last-level cache between the product and the comparison, and is large enough for full
# GEMM speed; measured from (512, 1024) to (2048, 2048).
# Accelerators: large enough to hide the launches of the comparison; not yet measured.
_CPU_TILE, _ACCELERATOR_TILE = TileShape(768, 1536), TileShape(4096, 8192)


@dataclass(frozen=True, kw_only=True)
class TiledBackend:
    """Streams the gram in plain torch."""

    tile: TileShape | None = None
    """Size of a tile; None is the best known for the device."""
    capacity: int | None = None
    """Records that a pass holds, at least k; None is the default of `Survivors`."""
    sample: SampleSizes = field(default_factory=SampleSizes)
    """Pairs that a first guess is made from."""
    slab_bytes: int = 2**21
    """The gradient gathers from feature-major slabs [N, rows] of about this size, which stay in cache."""
    least_slab_rows: int = 16
    """A slab has at least so many rows, so that a gathered line fills a cache line."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """None: plain torch runs everywhere."""
        return None

    def topk_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """One pass from a guess; a second, from the floor, only if the first cannot be certified."""
        norms = column_norms(x)
        x, scaled_norms, _ = in_range(x, norms)
        x = _multipliable(x)
        with matmul_precision(x.device, query.precision):
            guess = self._guess(x, scaled_norms, query, state)
            floor, tau = floor_of(query), query.tau
            survivors, moments = self._stream(x, scaled_norms, query, max(guess, floor))
            n_passes = 1
            if query.n_std is not None:
                tau = moments.adaptive_tau(query.n_std)
                floor = floor_of(query, tau)
            cosines, index = survivors.first_in_order(2 * query.k)
            if index.numel() < query.k and guess > floor:
                survivors, _ = self._stream(x, scaled_norms, query._replace(n_std=None), floor)  # tau is known
                cosines, index = survivors.first_in_order(2 * query.k)
                n_passes = 2
        if state is not None:
            state = next_state(state, similarity_of(cosines, query.similarity), query.k, n_passes)
        return finish(cosines, index, query, tau=tau, norms=norms, state=state)

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> MaxCosine:
        """Running maxima over the tiles, for the columns of a tile and for its rows."""
        norms = column_norms(x)
        x, scaled_norms, _ = in_range(x, norms)
        x = _multipliable(x)
        with matmul_precision(x.device, precision):
            if chunks is None:
                return MaxCosine(*self._max_cosine_of_all(x, scaled_norms), norms)
            cosines, partners = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.int64)
            for chunk in chunks:
                members = chunk.sort().values
                chunk_norms = scaled_norms[members]
                cosines[members], local_partners = self._max_cosine_of_all(x.index_select(1, members), chunk_norms)
                partners[members] = members[local_partners]
        return MaxCosine(cosines, partners, norms)

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gather in CSR order, one slab of rows of x at a time; the order of every sum is fixed by a stable sort.

        With the weights of the pairs in a sparse S [N, N], d x_hat = x_hat @ S. The Jacobian of the normalisation
        removes from column j its own share s_j = sum_p weight_p * cosine_p over its pairs, so that
        d x = (x_hat @ S - x_hat * s) / norm.
        """
        n_features = x.shape[1]
        targets, order = torch.cat([pairs.rows, pairs.cols]).sort(stable=True)
        sources = torch.cat([pairs.cols, pairs.rows])[order]
        weights = torch.cat([pairs.row_weights, pairs.col_weights])[order]
        offsets = torch.searchsorted(targets, torch.arange(n_features, device=x.device))
        products = weights * torch.cat([cosines, cosines])[order]
        own = embedding_bag(
            torch.zeros_like(sources), weights.new_ones(1, 1), offsets, mode="sum", per_sample_weights=products
        )
        own *= (norms > EPS).unsqueeze(1)
        grad = torch.empty_like(x)
        x, norms, factor = in_range(x, norms)
        inverse = inverse_norms(norms).unsqueeze(1)
        slab_rows = max(self.least_slab_rows, self.slab_bytes // (n_features * weights.element_size()))
        for x_slab, grad_slab in zip(x.split(slab_rows), grad.split(slab_rows), strict=True):
            x_hat = x_slab.T.to(weights.dtype) * inverse  # [N, slab]
            x_hat = x_hat.contiguous()
            gathered = embedding_bag(sources, x_hat, offsets, mode="sum", per_sample_weights=weights)
            grad_slab.copy_(gathered.sub_(x_hat.mul_(own)).mul_(inverse).T)
        return grad if factor is None else grad.mul_(factor)

    def tile_shape(self, x: Tensor) -> TileShape:
        """Size of the tiles for an x on its device, none larger than the gram."""
        rows, cols = self.tile or (_CPU_TILE if x.device.type == "cpu" else _ACCELERATOR_TILE)
        return TileShape(min(rows, x.shape[1]), min(cols, x.shape[1]))

    def _guess(self, x: Tensor, norms: Tensor, query: Query, state: Tensor | None) -> float:
        """Lower estimate of the k-th similarity: from the last call, else from a sample of columns, else none (-1)."""
        if state is not None and state[GUESS] > -1:
            return state[GUESS].item()
        n_features = x.shape[1]
        n_rows, n_cols = self.sample.shape(n_features)
        if n_rows == 0:
            return -1.0
        sample = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))[: n_rows + n_cols].to(x.device)
        x_hat = x.index_select(1, sample) * inverse_norms(norms)[sample]
        cosines = x_hat[:, :n_rows].T @ x_hat[:, n_rows:]
        return guess_from_sample(similarity_of(cosines, query.similarity), query.k, n_pairs(n_features))

    def _stream(self, x: Tensor, norms: Tensor, query: Query, guess: float) -> tuple[Survivors, Moments]:
        """Survivors of one pass, and the moments of |cosine| over all pairs, empty unless tau is adaptive."""
        n_features = x.shape[1]
        survivors = Survivors(query, guess, self.capacity)
        column_scale = norms.clamp_min(EPS)
        inverse = inverse_norms(norms)
        shape = self.tile_shape(x)
        scan, lower = _Scan(x, shape), _LowerTriangle(x, shape)
        moments = Moments()
        for row, col, products in upper_tiles(x, norms, shape):
            cols = slice(col, col + products.shape[1])
            scores = scan.load(products, absolute=query.similarity == "abs" or query.n_std is not None)
            if query.n_std is not None:
                magnitudes = scores.mul_(inverse[cols])
                if row == col:
                    moments.add(magnitudes, lower.n_pairs_in(magnitudes), partial(lower.fill, value=0.0))
                else:
                    moments.add(magnitudes, magnitudes.numel())
                scores = scan.load(products, absolute=query.similarity == "abs")
            if row == col:
                lower.fill(scores, -torch.inf)
            bound = survivors.screening_bound(row * n_features + col)
            local_row, local_col = scan.above(column_scale[cols] * bound)
            cosines = products[local_row, local_col].mul_(inverse[cols][local_col]).clamp_(-1, 1)
            survivors.add(cosines, (local_row + row) * n_features + (local_col + col))
        return survivors, moments

    def _max_cosine_of_all(self, x: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, partners) [N]. A partner is looked for only where the running maximum rises, which is soon rare."""
        inverse = inverse_norms(norms)
        shape = self.tile_shape(x)
        lower = _LowerTriangle(x, shape)
        best = torch.full_like(norms, -torch.inf)
        partners = torch.zeros_like(norms, dtype=torch.int64)
        for row, col, products in upper_tiles(x, norms, shape):
            rows, cols = slice(row, row + products.shape[0]), slice(col, col + products.shape[1])
            cosines = products.mul_(inverse[cols]).clamp_(-1, 1)
            if row == col:
                lower.fill(cosines, -torch.inf)
            # partners ascend for every column: earlier panels came first, then the column side, then the row side
            for span, dim, first_partner in ((cols, 0, row), (rows, 1, col)):
                highest = cosines.amax(dim=dim)
                improved = (highest > best[span]).nonzero().squeeze(1)
                lines = cosines.index_select(1 - dim, improved)
                partners[span][improved] = lines.argmax(dim=dim) + first_partner
                best[span][improved] = highest[improved]
        return best, partners


class Tile(NamedTuple):
    """Products of a block of the upper triangle."""

    row: int
    """First column of x on the tile's row side"""
    col: int
    """First column of x on the tile's column side, col >= row"""
    products: Tensor
    """[rows, cols] x_hat.T @ x, overwritten by the next tile"""


def upper_tiles(x: Tensor, norms: Tensor, shape: TileShape) -> Iterator[Tile]:
    """Tiles that cover the upper triangle, panel by panel, so that every pair of a later panel has a higher index."""
    n_features = x.shape[1]
    inverse = inverse_norms(norms)
    buffer = x.new_empty(shape.rows * shape.cols)
    for row in range(0, n_features, shape.rows):
        panel = (x[:, row : row + shape.rows] * inverse[row : row + shape.rows]).T
        for col in range(row, n_features, shape.cols):
            columns = x[:, col : col + shape.cols]
            size = (panel.shape[0], columns.shape[1])
            yield Tile(row, col, torch.mm(panel, columns, out=buffer[: size[0] * size[1]].view(size)))


class _LowerTriangle:
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


class _Scan:
    """Finds the rare scores of a tile that exceed their column's bound, in memory that every tile reuses.

    A score is a cosine, or its magnitude, times the norm of the column.

    A vectorised maximum over groups of eight rows leaves an eighth to compare, and the flags are searched eight at a
    time as int64: a third of the time of comparing and searching every score (2 cores, AVX-512).
    """

    _GROUP = 8

    def __init__(self, x: Tensor, shape: TileShape):
        n_groups = -(-shape.rows // self._GROUP)
        self._scores = x.new_empty(n_groups * self._GROUP * shape.cols)
        self._highest = x.new_empty(n_groups * shape.cols)
        self._flags = torch.zeros(n_groups * shape.cols + 7 & ~7, dtype=torch.bool, device=x.device)

    def load(self, products: Tensor, absolute: bool) -> Tensor:
        """Scores of a tile, [rows, cols], for the caller to change before `above`."""
        n_rows, n_cols = products.shape
        self._grouped = self._scores[: -(-n_rows // self._GROUP) * self._GROUP * n_cols].view(-1, self._GROUP, n_cols)
        rows = self._grouped.view(-1, n_cols)
        rows[n_rows:] = -torch.inf
        return torch.abs(products, out=rows[:n_rows]) if absolute else rows[:n_rows].copy_(products)

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
        return group[flagged] * self._GROUP + offset, col[flagged]


def _multipliable(x: Tensor) -> Tensor:
    """x itself if a matrix product takes it without a copy, else one copy in the accumulation dtype."""
    x = x.to(accumulation_dtype(x))
    return x if 1 in x.stride() else x.contiguous()
