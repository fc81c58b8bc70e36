"""Pairs of features that are active together: the cost follows the non-zeros of x, whatever N is.

    cosine[i, j] = sum_m x_hat[m, i] * x_hat[m, j]    over the samples m in which both are active

A pair that never meets has cosine 0. All pairs that do meet are computed, one slab of products after the other (see
`topk_ortho.backends.coactivation`), so the selection needs no guess and takes one pass. With L0 active features in each
of M samples there are M L0 (L0 - 1) / 2 products.

Besides the functions of every backend, which take a dense x and list pairs of cosine 0 like the others, this one has
functions of `Coordinates`, which do not list them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_ortho.backends import tiled, triton
from topk_ortho.backends.base import EPS, Backend, Precision, Query, RowMax, Selection
from topk_ortho.backends.coactivation import Grouped, Sums, slabs
from topk_ortho.backends.entries import Coordinates, Entries, coordinates_of_dense, entries_of, sum_by
from topk_ortho.backends.norms import inverse_norms
from topk_ortho.selection import Moments, Survivors, first_of, floor_of, n_pairs, next_state, similarity_of

# The cost model of `is_cheaper`, in multiply-adds of the dense route for each thread, which shares those out and not
# these. Measured by `python -m bench.sparse`, see bench/results/sparse.json.
_PER_PRODUCT, _PER_CELL, _PER_CALL = 1500, 1, 1e8
_SAMPLED_ROWS = 64
_LEAST_DIFFERENCE = 1e-3  # of two float64 sums, which leaves 1e-13 of its digits right


class SparseSelection(NamedTuple):
    """As `Selection`, of a sparse x: pairs of cosine 0 are counted and not listed; neither norms nor a state."""

    values: Tensor
    """[size] signed cosines, none 0 but for the padding"""
    rows: Tensor
    """int64 [size]"""
    cols: Tensor
    """int64 [size], rows < cols"""
    n_listed: Tensor
    """int64 [], how many of them are pairs and not padding"""
    n_selected: Tensor
    """int64 [], how many pairs are selected, those of cosine 0 among them"""
    threshold: Tensor
    tau: Tensor


def unavailable_reason(device: torch.device) -> str | None:
    """None on the CPU; elsewhere it is made of the kernels of "triton"."""
    return None if device.type == "cpu" else triton.unavailable_reason(device)


def is_cheaper(x: Tensor) -> bool:
    """Whether this backend is expected to take less time for a dense x [M, N] on a CPU than "tiled".

    ::

        tiled    M N**2 / 2 multiply-adds
        sparse   a * products + b * M N (to find the non-zeros) + c (a call's overhead), in multiply-adds

    Products are counted in a sample of the rows, and, if it says that they are few, in all.
    """
    n_rows, n_features = x.shape
    affordable = n_rows * n_features**2 / 2 / torch.get_num_threads()
    affordable -= _PER_CALL + _PER_CELL * n_rows * n_features
    if affordable <= 0:
        return False
    # multiples of the golden ratio: everywhere in x, and in step with no period that its rows may have
    sample = (torch.arange(min(n_rows, _SAMPLED_ROWS), dtype=torch.float64) * 0.6180339887498949 % 1 * n_rows).long()
    if _PER_PRODUCT * n_rows / sample.numel() * _n_products(x[sample.to(x.device)]) > affordable:
        return False
    return _PER_PRODUCT * sum(_n_products(rows) for rows in x.split(_SAMPLED_ROWS)) < affordable


def _n_products(x: Tensor) -> int:
    n_active = (x != 0).sum(dim=1)
    return int((n_active * (n_active - 1) // 2).sum())


def select_pairs(x: Tensor, query: Query, state: Tensor | None) -> Selection:
    """Pairs that meet, then, if the definition selects more, pairs of cosine 0 in (row, col) order."""
    n_features = x.shape[1]
    entries = entries_of(coordinates_of_dense(x))
    found = _find(entries, query)
    values, pairs = found.survivors.first(2 * query.k)
    following = entries.norms.new_empty(0)
    if state is not None:
        following = next_state(state, similarity_of(values, query.similarity), query.k, n_passes=1)
    values, pairs = found.above_floor(values[: query.k], pairs[: query.k])
    n_selected = found.n_selected(pairs.numel())
    index = torch.cat([pairs, _first_others(pairs, n_selected - pairs.numel(), n_features)])
    rows = index.div(n_features, rounding_mode="floor")
    return Selection(
        values=pad(values, (0, query.k - values.numel())),
        rows=pad(rows, (0, query.k - n_selected)),
        cols=pad(index - rows * n_features, (0, query.k - n_selected)),
        n_selected=torch.tensor(n_selected, device=x.device),
        threshold=found.threshold(values),
        tau=values.new_tensor(-1.0 if found.tau is None else found.tau),
        norms=entries.norms,
        state=following,
    )


def row_max(x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> RowMax:
    """Maxima over the pairs that meet, and 0 for a column that has no positive one and does not meet all others."""
    return sparse_row_max(coordinates_of_dense(x), chunks)


def pair_gradient(
    x: Tensor, norms: Tensor, rows: Tensor, cols: Tensor, values: Tensor, grad_rows: Tensor, grad_cols: Tensor
) -> Tensor:
    """As the dense backend of the device has it: zeros of x get gradient too, so it is dense like x."""
    dense: Backend = tiled if x.device.type == "cpu" else triton
    return dense.pair_gradient(x, norms, rows, cols, values, grad_rows, grad_cols)


def structural_gradient(x: Tensor, rows: Tensor, cols: Tensor, grad_rows: Tensor, grad_cols: Tensor) -> Tensor:
    """`pair_gradient` where x is not 0, and 0 elsewhere."""
    coordinates = coordinates_of_dense(x)
    grad = torch.zeros_like(x)
    grad[coordinates.samples, coordinates.features] = sparse_pair_gradient(
        coordinates, rows, cols, grad_rows, grad_cols
    )
    return grad


def select_sparse_pairs(x: Coordinates, size: int, query: Query, is_ordered: bool) -> SparseSelection:
    """Select as everywhere, list up to `size` of the pairs whose cosine is not 0; there must not be more selected.

    They are in the total order, or else, which takes less time, by (row, col).
    """
    entries = entries_of(x)
    found = _find(entries, query)
    values, pairs = found.above_floor(*found.survivors.first_set(query.k))
    if is_ordered:
        values, pairs = first_of(values, pairs, query.similarity, query.k)
    n_listed = pairs.numel()
    rows = pairs.div(x.n_features, rounding_mode="floor")
    device = x.values.device
    return SparseSelection(
        values=pad(values, (0, size - n_listed)),
        rows=pad(rows, (0, size - n_listed)),
        cols=pad(pairs - rows * x.n_features, (0, size - n_listed)),
        n_listed=torch.tensor(n_listed, device=device),
        n_selected=torch.tensor(found.n_selected(n_listed), device=device),
        threshold=found.threshold(values),
        tau=values.new_tensor(-1.0 if found.tau is None else found.tau),
    )


def sparse_row_max(x: Coordinates, chunks: tuple[Tensor, ...] | None) -> RowMax:
    """As `row_max`. Features are numbered by chunk, so that only those of one chunk meet."""
    entries = entries_of(x)
    device = x.values.device
    chunks = chunks or (torch.arange(x.n_features, device=device),)
    members = torch.cat([chunk.sort().values for chunk in chunks])
    sizes = torch.tensor([chunk.numel() for chunk in chunks], device=device)
    chunk = torch.repeat_interleave(sizes)
    number = torch.empty_like(members)
    number[members] = torch.arange(x.n_features, device=device)
    numbers = number[entries.features]
    # below 2**63: there are no more chunks than half the features, nor more samples than non-zeros that fit memory
    groups, order = ((entries.samples * len(chunks) + chunk[numbers]) * x.n_features + numbers).sort()
    grouped = entries.by_sample()._replace(
        groups=groups.div(x.n_features, rounding_mode="floor"), members=numbers[order], values=entries.x_hat[order]
    )
    best = _Best(sizes.cumsum(0)[chunk] - sizes[chunk], sizes[chunk], entries.norms.dtype)
    for slab in slabs(grouped):
        pairs, values = _not_zero(slab.sums())
        best.add(pairs.div(x.n_features, rounding_mode="floor"), pairs % x.n_features, values)
    best_values, best_partners = best.with_zeros()
    values, partners = torch.empty_like(best_values), torch.empty_like(best_partners)
    values[members], partners[members] = best_values, members[best_partners]
    return RowMax(values, partners, entries.norms)


def sparse_pair_gradient(x: Coordinates, rows: Tensor, cols: Tensor, grad_rows: Tensor, grad_cols: Tensor) -> Tensor:
    """Gradient in the values of x of sum_p weight_p * cosine_p, as `Backend.pair_gradient`; padding gets 0."""
    entries = entries_of(x)
    pairs, weights = _ordered_pairs(rows, cols, grad_rows, grad_cols, x.n_features)
    needed, grouped = _entries_of_pairs(entries, pairs)
    gathered = torch.zeros(needed.numel(), dtype=torch.float64, device=pairs.device)
    for slab in slabs(grouped):
        bounds = torch.tensor([slab.first_member, slab.last_member + 1], device=pairs.device) * x.n_features
        first, stop = torch.searchsorted(pairs, bounds).tolist()
        if first == stop:
            continue
        sums = slab.sums()
        place = torch.searchsorted(sums.pairs, pairs[first:stop]).clamp_max_(sums.pairs.numel() - 1)
        meets = sums.pairs[place] == pairs[first:stop]
        of_rows, of_cols = weights.new_zeros(2, sums.pairs.numel())
        of_rows[place[meets]], of_cols[place[meets]] = weights[:, first:stop][:, meets]
        sums.spread(of_rows, of_cols, gathered)
    grad = torch.zeros_like(entries.x_hat, dtype=torch.float64)
    grad[needed] = gathered
    return _to_values(x, entries, grad)


def sum_of_squares(x: Coordinates) -> Tensor:
    """Sum of cosine**2 over all pairs, [] in the accumulation dtype.

    With the gram of the samples, G = x_hat @ x_hat.T, it is (||G||_F**2 - sum_j gram[j, j]**2) / 2: samples that share
    features take the place of features that share samples, if that makes fewer products and the difference is not so
    small that it would be rounding.
    """
    entries = entries_of(x)
    total, _ = _sum_of_squares(entries, with_gradient=False)
    return total.to(entries.norms.dtype)


def sum_of_squares_gradient(x: Coordinates, weight: Tensor) -> Tensor:
    """Gradient of weight [] * `sum_of_squares` in the values of x."""
    entries = entries_of(x)
    _, grad = _sum_of_squares(entries, with_gradient=True)
    return _to_values(x, entries, grad * weight)


def _sum_of_squares(entries: Entries, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Both, float64; the gradient in x_hat, if it is wanted."""
    by_sample, (by_feature, order) = entries.by_sample(), entries.by_feature()
    if by_feature.n_products() < by_sample.n_products():
        # what is subtracted below leaves little: float64 throughout
        total, grad = _sum_over_slabs(by_feature._replace(values=by_feature.values.double()), with_gradient)
        of_samples, of_features = _diagonals(entries)
        to_subtract = of_features.square().sum()
        total += (of_samples.square().sum() - to_subtract) / 2
        if total > _LEAST_DIFFERENCE * to_subtract:
            if with_gradient:
                grad = torch.empty_like(grad).index_put_((order,), grad)
                diagonals = of_samples[entries.samples] - of_features[entries.features]
                grad += 2 * entries.x_hat.double() * diagonals
            return total, grad
    return _sum_over_slabs(by_sample, with_gradient)


def _sum_over_slabs(grouped: Grouped, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum of squares over all pairs of members that meet, and its gradient in the values."""
    total = torch.zeros((), dtype=torch.float64, device=grouped.values.device)
    grad = torch.zeros_like(grouped.values, dtype=torch.float64)
    for slab in slabs(grouped):
        sums = slab.sums()
        total += sums.sums.double().square().sum()
        if with_gradient:
            weights = 2 * sums.sums
            sums.spread(weights, weights, grad)
    return total, grad


class _Found(NamedTuple):
    """What one pass over the pairs that meet has found."""

    query: Query
    survivors: Survivors
    """Of the pairs whose cosine is not 0, in (row, col) order"""
    tau: float | None
    floor: float
    n_apart: int
    """Pairs of cosine 0"""

    def above_floor(self, values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Those that pass tau, which an adaptive one tells only at the end."""
        passes = similarity_of(values, self.query.similarity) > self.floor
        return values[passes], pairs[passes]

    def n_selected(self, n_listed: int) -> int:
        """Pairs that are selected with these, those of cosine 0 among them."""
        return min(self.query.k, n_listed + (self.n_apart if self.floor < 0 else 0))

    def threshold(self, values: Tensor) -> Tensor:
        """The k-th similarity, if so many were selected, else the floor."""
        if values.numel() == self.query.k:
            return similarity_of(values, self.query.similarity).min()
        return values.new_tensor(max(self.floor, 0.0))


def _find(entries: Entries, query: Query) -> _Found:
    survivors, moments = Survivors(query, floor_of(query)), Moments()
    survivors.add(entries.x_hat.new_empty(0), entries.features.new_empty(0))
    n_apart = n_pairs(entries.n_features)
    for slab in slabs(entries.by_sample()):
        pairs, values = _not_zero(slab.sums())
        n_apart -= pairs.numel()
        if query.n_std is not None:
            _add_moments(moments, values)
        survivors.add(values, pairs)
    if query.n_std is None:
        return _Found(query, survivors, query.tau, floor_of(query), n_apart)
    moments.add_zeros(n_apart)
    tau = moments.adaptive_tau(query.n_std)
    return _Found(query, survivors, tau, floor_of(query, tau), n_apart)


def _not_zero(sums: Sums) -> tuple[Tensor, Tensor]:
    """Pairs whose cosine is not 0, and it; products may cancel."""
    pairs, values = sums.pairs, sums.sums.clamp(-1, 1)
    is_not_zero = values != 0
    return (pairs, values) if is_not_zero.all() else (pairs[is_not_zero], values[is_not_zero])


def _add_moments(moments: Moments, values: Tensor) -> None:
    if values.numel() == 0:
        return
    magnitude = values.double().abs().unsqueeze(0)
    if moments.count == 0:
        moments.mean = magnitude.mean().item()
    moments.add(magnitude - moments.mean, values.numel())


def _first_others(index: Tensor, count: int, n_features: int) -> Tensor:
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


class _Best:
    """Running maximum of each feature over the pairs that meet, added slab by slab, in ascending order of rows.

    Features are numbered such that those of a chunk follow each other.
    """

    def __init__(self, chunk_starts: Tensor, chunk_sizes: Tensor, dtype: torch.dtype):
        self._chunk_starts = chunk_starts
        self._chunk_sizes = chunk_sizes
        self._values = torch.full_like(chunk_starts, -torch.inf, dtype=dtype)
        self._partners = torch.zeros_like(chunk_starts)
        self._n_leading = torch.zeros_like(chunk_starts)
        """The first so many others of the chunk all meet the feature."""

    def add(self, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        """Pairs ordered by (row, col); the partners of a feature come in ascending order, those below it first."""
        if rows.numel() == 0:
            return
        by_col = cols.argsort(stable=True)
        self._add(cols[by_col], rows[by_col], values[by_col])
        self._add(rows, cols, values)

    def _add(self, features: Tensor, partners: Tensor, values: Tensor) -> None:
        owners, run, lengths = features.unique_consecutive(return_inverse=True, return_counts=True)
        places = torch.arange(features.numel(), device=features.device)
        highest = torch.segment_reduce(values, "max", lengths=lengths)
        place = torch.where(values == highest[run], places, places.numel())
        lowest_place = torch.full_like(owners, places.numel()).scatter_reduce_(0, run, place, "amin")
        improved = highest > self._values[owners]
        self._values[owners[improved]] = highest[improved]
        self._partners[owners[improved]] = partners[lowest_place[improved]]

        rank = partners - self._chunk_starts[features] - (partners > features).long()  # among the others of its chunk
        in_run = places - (lengths.cumsum(0) - lengths)[run]
        is_leading = rank == self._n_leading[features] + in_run
        self._n_leading.index_add_(0, features, is_leading.long())

    def with_zeros(self) -> tuple[Tensor, Tensor]:
        """(values, partners): 0 and the first that is not met, where that is better."""
        numbers = torch.arange(self._values.numel(), device=self._values.device)
        meets_all = self._n_leading == self._chunk_sizes - 1
        is_zero = (self._values < 0) & ~meets_all
        first_apart = self._chunk_starts + self._n_leading
        first_apart += first_apart >= numbers
        return torch.where(is_zero, 0.0, self._values), torch.where(is_zero, first_apart, self._partners)


def _ordered_pairs(
    rows: Tensor, cols: Tensor, grad_rows: Tensor, grad_cols: Tensor, n_features: int
) -> tuple[Tensor, Tensor]:
    """Pairs, lower feature first, each once, ascending, that have a weight; and both weights [2, p], float64."""
    is_weighted = ((grad_rows != 0) | (grad_cols != 0)).nonzero().squeeze(1)
    rows, cols = rows[is_weighted], cols[is_weighted]
    weights = torch.stack([grad_rows[is_weighted], grad_cols[is_weighted]]).double()
    weights = torch.where(rows < cols, weights, weights.flip(0))
    pairs = torch.minimum(rows, cols) * n_features + torch.maximum(rows, cols)
    if (pairs[1:] > pairs[:-1]).all():
        return pairs, weights
    pairs, order = pairs.sort(stable=True)
    weights = weights[:, order]
    pairs, lengths = pairs.unique_consecutive(return_counts=True)
    return pairs, torch.stack([torch.segment_reduce(weight, "sum", lengths=lengths) for weight in weights])


def _entries_of_pairs(entries: Entries, pairs: Tensor) -> tuple[Tensor, Grouped]:
    """Where entries are whose feature is in a pair, and they by sample; all, if the pairs are too many to look."""
    if pairs.numel() > entries.features.numel():
        return torch.arange(entries.features.numel(), device=pairs.device), entries.by_sample()
    is_needed = torch.zeros(entries.n_features, dtype=torch.bool, device=pairs.device)
    is_needed[pairs.div(entries.n_features, rounding_mode="floor")] = True
    is_needed[pairs % entries.n_features] = True
    needed = is_needed[entries.features].nonzero().squeeze(1)
    grouped = Grouped(entries.samples[needed], entries.features[needed], entries.x_hat[needed], entries.n_features)
    return needed, grouped


def _diagonals(entries: Entries) -> tuple[Tensor, Tensor]:
    """Diagonals of x_hat @ x_hat.T and of x_hat.T @ x_hat, float64 [n_samples] and [N]."""
    squares = entries.x_hat.double().square()
    of_samples = sum_by(entries.samples, squares, entries.n_samples)
    return of_samples, sum_by(entries.features, squares, entries.n_features)


def _to_values(x: Coordinates, entries: Entries, grad_x_hat: Tensor) -> Tensor:
    """Jacobian of the normalisation, and back to the order of the coordinates."""
    inner = sum_by(entries.features, grad_x_hat * entries.x_hat, entries.n_features)
    inner *= entries.norms > EPS
    inverse = inverse_norms(entries.norms.double())
    features = entries.features
    grad = torch.zeros_like(x.values)
    grad[entries.positions] = ((grad_x_hat - entries.x_hat * inner[features]) * inverse[features]).to(grad.dtype)
    return grad
