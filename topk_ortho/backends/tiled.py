"""Plain torch, on any device: stream the upper triangle of the gram in tiles, keep what survives, certify.

    tile[r, c] = sum_m x_hat[m, r] * x[m, c],    cosine = tile[r, c] / norm[c],    survives if similarity > cut

Only one panel of x_hat exists at a time; the other side of the product is x itself, whose norms go into the comparison.
Extra memory: one tile with its magnitudes, O(k) survivors, and a copy of x only if its dtype or layout cannot be
multiplied as it is. Exactness is the business of `topk_ortho.selection`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from topk_ortho.backends.base import EPS, Precision, Query, RowMax, Selection, accumulation_dtype
from topk_ortho.backends.norms import column_norms, inverse_norms
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.selection import (
    Moments,
    Survivors,
    floor_of,
    guess_from_sample,
    n_pairs,
    next_state,
    similarity_of,
)

_SAMPLE_ROWS, _SAMPLE_COLS = 256, 1024  # 2**18 sampled pairs: 262 of them above the threshold at fraction 1e-3
_SMALLEST_SAMPLED = 128  # features; below, the whole gram is smaller than a useful sample
# Of the gradient's feature-major slab [N, slab rows]: it stays in cache, yet a gathered line fills a cache line.
_SLAB_BYTES, _SLAB_ROWS_LEAST = 2**21, 16


class _TileShape(NamedTuple):
    rows: int
    cols: int
    """Not fewer than rows, so that only the first tile of a panel meets the diagonal."""


# CPU: a tile of 5 MB stays in the last-level cache between the product and the comparison, and is large enough for full
# GEMM speed; measured from (512, 1024) to (2048, 2048).
# Accelerators: large enough to hide the launches of the comparison; not yet measured.
_CPU_TILE, _ACCELERATOR_TILE = _TileShape(768, 1536), _TileShape(4096, 8192)


def unavailable_reason(device: torch.device) -> str | None:
    """None: plain torch runs everywhere."""
    return None


def select_pairs(x: Tensor, query: Query, state: Tensor | None) -> Selection:
    """One pass from a guess; a second, from the floor, only if the first cannot be certified."""
    norms = column_norms(x)
    x = _multipliable(x)
    with matmul_precision(x.device, query.precision):
        guess = _guess(x, norms, query, state)
        floor = floor_of(query)
        survivors, moments = _stream(x, norms, query, max(guess, floor))
        n_passes = 1

        tau = query.tau
        if query.n_std is not None:
            tau = moments.adaptive_tau(query.n_std)
            floor = floor_of(query, tau)
        values, index = survivors.first(2 * query.k)
        if index.numel() < query.k and guess > floor:
            survivors, _ = _stream(x, norms, replace(query, n_std=None), floor)  # tau is known
            values, index = survivors.first(2 * query.k)
            n_passes = 2

    similarity = similarity_of(values, query.similarity)
    n_selected = min(query.k, int((similarity > floor).sum()))
    padding = (0, query.k - n_selected)
    rows = index[:n_selected].div(x.shape[1], rounding_mode="floor")
    cols = index[:n_selected] - rows * x.shape[1]
    return Selection(
        values=pad(values[:n_selected], padding),
        rows=pad(rows, padding),
        cols=pad(cols, padding),
        n_selected=torch.tensor(n_selected, device=x.device),
        threshold=similarity[query.k - 1].clone() if n_selected == query.k else values.new_tensor(max(floor, 0.0)),
        tau=values.new_tensor(-1.0 if tau is None else tau),
        norms=norms,
        state=norms.new_empty(0) if state is None else next_state(state, similarity, query.k, n_passes),
    )


def row_max(x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> RowMax:
    """Running maxima over the tiles, for the columns of a tile and for its rows."""
    norms = column_norms(x)
    x = _multipliable(x)
    with matmul_precision(x.device, precision):
        if chunks is None:
            return RowMax(*_row_max_of_all(x, norms), norms)
        values, partners = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.int64)
        for chunk in chunks:
            members = chunk.sort().values
            values[members], chunk_partners = _row_max_of_all(x.index_select(1, members), norms[members])
            partners[members] = members[chunk_partners]
    return RowMax(values, partners, norms)


def pair_gradient(
    x: Tensor, norms: Tensor, rows: Tensor, cols: Tensor, values: Tensor, grad_rows: Tensor, grad_cols: Tensor
) -> Tensor:
    """Gather in CSR order, one slab of rows of x at a time; the order of every sum is fixed by a stable sort.

    With the weights of a pair in a sparse S [N, N], d x_hat = x_hat @ S and the Jacobian of the normalisation removes
    from column j its own share s_j = sum_p weight_p * value_p over its pairs: d x = (x_hat @ S - x_hat * s) / norm.
    """
    n_features = x.shape[1]
    targets, order = torch.cat([rows, cols]).sort(stable=True)
    sources = torch.cat([cols, rows])[order]
    weights = torch.cat([grad_rows, grad_cols])[order]
    offsets = torch.searchsorted(targets, torch.arange(n_features, device=x.device))
    products = weights * torch.cat([values, values])[order]
    own = embedding_bag(
        torch.zeros_like(sources), weights.new_ones(1, 1), offsets, mode="sum", per_sample_weights=products
    )
    own *= (norms > EPS).unsqueeze(1)
    inverse = inverse_norms(norms).unsqueeze(1)

    grad = torch.empty_like(x)
    slab_rows = max(_SLAB_ROWS_LEAST, _SLAB_BYTES // (n_features * weights.element_size()))
    for x_slab, grad_slab in zip(x.split(slab_rows), grad.split(slab_rows), strict=True):
        x_hat = x_slab.T.to(weights.dtype) * inverse  # [N, slab]
        x_hat = x_hat.contiguous()
        gathered = embedding_bag(sources, x_hat, offsets, mode="sum", per_sample_weights=weights)
        grad_slab.copy_(gathered.sub_(x_hat.mul_(own)).mul_(inverse).T)
    return grad


class _Tile(NamedTuple):
    row: int
    """First column of x on the tile's row side."""
    col: int
    """First column of x on the tile's column side, col >= row."""
    products: Tensor
    """[rows, cols] x_hat.T @ x, overwritten by the next tile"""


def _upper_tiles(x: Tensor, norms: Tensor) -> Iterator[_Tile]:
    """Tiles that cover the upper triangle, panel by panel, so that every pair of a later panel has a higher index."""
    n_features = x.shape[1]
    shape = _tile_shape(x)
    inverse = inverse_norms(norms)
    buffer = x.new_empty(min(shape.rows, n_features) * min(shape.cols, n_features))
    for row in range(0, n_features, shape.rows):
        panel = (x[:, row : row + shape.rows] * inverse[row : row + shape.rows]).T
        for col in range(row, n_features, shape.cols):
            columns = x[:, col : col + shape.cols]
            size = (panel.shape[0], columns.shape[1])
            yield _Tile(row, col, torch.mm(panel, columns, out=buffer[: size[0] * size[1]].view(size)))


def _stream(x: Tensor, norms: Tensor, query: Query, guess: float) -> tuple[Survivors, Moments]:
    """Survivors of one pass, and the moments of |cosine| over all pairs, empty unless tau is adaptive."""
    n_features = x.shape[1]
    survivors = Survivors(query, guess)
    column_scale = norms.clamp_min(EPS)
    inverse = inverse_norms(norms)
    scan, lower = _Scan(x), _LowerTriangle(x)
    moments = Moments()
    for row, col, products in _upper_tiles(x, norms):
        cols = slice(col, col + products.shape[1])
        scores = scan.load(products, absolute=query.similarity == "abs" or query.n_std is not None)
        if query.n_std is not None:
            _add_moments(moments, scores.mul_(inverse[cols]), lower if row == col else None)
            scores = scan.load(products, absolute=query.similarity == "abs")
        if row == col:
            lower.fill(scores, -torch.inf)
        local_row, local_col = scan.above(column_scale[cols] * survivors.screen(row * n_features + col))
        values = products[local_row, local_col].mul_(inverse[cols][local_col]).clamp_(-1, 1)
        survivors.add(values, (local_row + row) * n_features + (local_col + col))
    return survivors, moments


def _add_moments(moments: Moments, magnitude: Tensor, lower: "_LowerTriangle | None") -> None:
    """Add a tile of |cosine|, overwriting it; `lower` if the tile meets the diagonal, as the first one does."""
    count = magnitude.numel()
    if lower is not None:
        n_rows = magnitude.shape[0]
        count -= n_rows * (n_rows + 1) // 2
        lower.fill(magnitude, 0.0)
    if moments.count == 0:
        moments.mean = magnitude.sum().item() / count
    magnitude.sub_(moments.mean)
    if lower is not None:
        lower.fill(magnitude, 0.0)
    moments.add(magnitude, count)


class _LowerTriangle:
    """The diagonal and all below it, in the first tile of a panel: no pairs of their own."""

    def __init__(self, x: Tensor):
        n_rows = min(_tile_shape(x).rows, x.shape[1])
        self._mask = torch.ones(n_rows, n_rows, dtype=torch.bool, device=x.device).tril_()

    def fill(self, tile: Tensor, value: float) -> None:
        """Overwrite it in a tile [rows, cols >= rows]."""
        n_rows = tile.shape[0]
        tile[:, :n_rows].masked_fill_(self._mask[:n_rows, :n_rows], value)


class _Scan:
    """Finds the rare scores of a tile that exceed their column's bound, in memory that every tile reuses.

    A vectorised maximum over groups of eight rows leaves an eighth to compare, and the flags are searched eight at a
    time as int64: a third of the time of comparing and searching every score (2 cores, AVX-512).
    """

    _GROUP = 8

    def __init__(self, x: Tensor):
        shape = _tile_shape(x)
        n_groups = -(-min(shape.rows, x.shape[1]) // self._GROUP)
        n_cols = min(shape.cols, x.shape[1])
        self._scores = x.new_empty(n_groups * self._GROUP * n_cols)
        self._highest = x.new_empty(n_groups * n_cols)
        self._flags = torch.zeros(n_groups * n_cols + 7 & ~7, dtype=torch.bool, device=x.device)

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
        scores = self._grouped[group, :, col]  # [flagged, group members]
        flagged, member = (scores > bound[col].unsqueeze(1)).nonzero().unbind(1)
        return group[flagged] * self._GROUP + member, col[flagged]


def _row_max_of_all(x: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """(values, partners) [N]. A partner is looked for only where the running maximum rises, which is soon rare."""
    inverse = inverse_norms(norms)
    lower = _LowerTriangle(x)
    best = torch.full_like(norms, -torch.inf)
    partners = torch.zeros_like(norms, dtype=torch.int64)
    for row, col, products in _upper_tiles(x, norms):
        rows, cols = slice(row, row + products.shape[0]), slice(col, col + products.shape[1])
        cosine = products.mul_(inverse[cols]).clamp_(-1, 1)
        if row == col:
            lower.fill(cosine, -torch.inf)
        # partners ascend for every column: earlier panels came first, then the column side, then the row side
        for span, dim, first_partner in ((cols, 0, row), (rows, 1, col)):
            highest = cosine.amax(dim=dim)
            improved = (highest > best[span]).nonzero().squeeze(1)
            lines = cosine.index_select(1 - dim, improved)
            partners[span][improved] = lines.argmax(dim=dim) + first_partner
            best[span][improved] = highest[improved]
    return best, partners


def _guess(x: Tensor, norms: Tensor, query: Query, state: Tensor | None) -> float:
    """Lower estimate of the k-th similarity: from the last call, else from a sample of columns, else none (-1)."""
    if state is not None and state[0] > -1:
        return state[0].item()
    n_features = x.shape[1]
    n_cols = min(_SAMPLE_COLS, n_features // 2)
    n_rows = min(_SAMPLE_ROWS, n_features // 8)
    if n_features < _SMALLEST_SAMPLED:
        return -1.0
    sample = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))[: n_rows + n_cols].to(x.device)
    x_hat = x.index_select(1, sample) * inverse_norms(norms)[sample]
    cosine = x_hat[:, :n_rows].T @ x_hat[:, n_rows:]
    return guess_from_sample(similarity_of(cosine, query.similarity), query.k, n_pairs(n_features))


def _multipliable(x: Tensor) -> Tensor:
    """x itself if a matrix product takes it without a copy, else one copy in the accumulation dtype."""
    x = x.to(accumulation_dtype(x))
    return x if 1 in x.stride() else x.contiguous()


def _tile_shape(x: Tensor) -> _TileShape:
    return _CPU_TILE if x.device.type == "cpu" else _ACCELERATOR_TILE
