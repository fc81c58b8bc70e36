"""Triton kernels on CUDA and ROCm devices; on CPU tensors too under TRITON_INTERPRET=1, for tests.

The kernels are `topk_ortho.kernels`; here they are put in order. Nothing is read on the host once a warm-start state is
given: every call enqueues the same kernels, and those of a repair return at once unless the first pass failed (see
`topk_ortho.kernels.radix_select`). float32 columns in "highest" precision are first screened in fp16, whose rounding is
bounded, and what may be selected is computed again in float32. float64 has no kernels: it goes to `tiled`.

Extra memory: O(k) records, for row-major x a slab of its transpose, and for float32 columns in "highest" or "medium"
precision an fp16 copy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends import tiled
from topk_ortho.backends.base import EPS, Precision, Query, RowMax, Selection, current, may_wait
from topk_ortho.backends.norms import column_norms as refuse_what_is_not_finite
from topk_ortho.selection import (
    MARGIN_LEAST,
    MARGIN_START,
    first_rank_of_sample,
    floor_of,
    n_pairs,
    similarity_of,
)

try:
    from topk_ortho.kernels import radix_select
    from topk_ortho.kernels.gram_histogram import gram_histogram, gram_row_ties
    from topk_ortho.kernels.gram_sample import gram_sample
    from topk_ortho.kernels.gram_survivors import gram_survivors
    from topk_ortho.kernels.launch import INTERPRETED, TRITON_VERSION, Kind, Operand, current_device
    from topk_ortho.kernels.max_cosine import max_cosine
    from topk_ortho.kernels.norms import NOT_FINITE, Norms, column_norms
    from topk_ortho.kernels.pair_gradient import BLOCK_M
    from topk_ortho.kernels.pair_gradient import pair_gradient as gather_gradient
    from topk_ortho.kernels.rescore import rescore
    from topk_ortho.kernels.round_columns import SCALE, round_columns

    IMPORT_ERROR = None
except (ImportError, AttributeError) as error:  # none installed, or one that is too old
    IMPORT_ERROR = f"Triton 3.6 or later could not be imported ({error}); `pip install triton` (Linux)"

_TRITON_FOR_SM_100 = (3, 9)  # seen compiling with it and failing with 3.6, not tried with those between
_SAMPLE_ROWS, _SAMPLE_COLS = 256, 1024  # 2**18 sampled pairs: 262 of them above the threshold at fraction 1e-3
_SMALLEST_SAMPLED = 128  # features; below, all pairs fit the records
_SLACK = 2**16  # records beyond a share of k: a small k is guessed from few sampled pairs
_MARGIN_MOST = 0.4  # of the warm-start guess, as a share of k: the records hold 1.5 k
# Features from which columns are screened: below, products take less time than the launches it adds. Not measured yet.
_SMALLEST_SCREENED = 8192
# Rows up to which they are: beyond, the bound on the rounding of a sum of M terms lets more pass than the records hold.
_MOST_ROWS_SCREENED = 8192
_SLAB_BYTES = 2**25  # of the transposed slab of x: it stays in the L2 of an A100 (40 MB) and of what came after
_MOST_RECORDS = 2**31 - 2**16
_CHUNK_COPY_ELEMENTS = 2**26  # of the columns of x that row_max copies at once


def unavailable_reason(device: torch.device) -> str | None:
    """No Triton, no GPU that it supports, or a tensor elsewhere."""
    if IMPORT_ERROR is not None:
        return IMPORT_ERROR
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET is set, which runs kernels on CPU tensors only"
    if device.type != "cuda":
        return f"it needs a CUDA or ROCm device, not {device.type!r}; TRITON_INTERPRET=1 runs it on the CPU, slowly"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    if capability[0] == 10 and TRITON_VERSION < _TRITON_FOR_SM_100:
        return "it needs Triton 3.9 for compute capability 10.0; the compiler of Triton 3.6 fails on its kernels there"
    return None


def select_pairs(x: Tensor, query: Query, state: Tensor | None) -> Selection:
    """One pass from a guess, then an exact search for the bound that returns at once if the pass was certified."""
    if x.dtype == torch.float64:
        return tiled.select_pairs(x, query, state)
    with current(x.device):
        return _select_pairs(x, query, state)


def row_max(x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> RowMax:
    """Maxima of tiles for their rows and their columns, joined by atomic maxima of (value, partner)."""
    if x.dtype == torch.float64:
        return tiled.row_max(x, chunks, precision)
    with current(x.device):
        norms = column_norms(x, EPS)
        _check_finite(x, norms)
        if chunks is None:
            values, partners = _row_max_of_chunks(x, norms, precision, n_chunks=1, largest=x.shape[1], n_larger=1)
            return RowMax(values, partners, norms.norms)
        values, partners = torch.empty_like(norms.norms), torch.empty_like(norms.norms, dtype=torch.int64)
        at_once = _CHUNK_COPY_ELEMENTS // (x.shape[0] * _chunk_stride(chunks[0]))
        at_once = min(max(1, at_once), 2**16 - 1)  # of the second axis of a grid
        for first in range(0, len(chunks), at_once):
            group = [chunk.sort().values for chunk in chunks[first : first + at_once]]
            _row_max_of_group(x, norms, group, precision, values, partners)
    return RowMax(values, partners, norms.norms)


def pair_gradient(
    x: Tensor, norms: Tensor, rows: Tensor, cols: Tensor, values: Tensor, grad_rows: Tensor, grad_cols: Tensor
) -> Tensor:
    """Gather in CSR order; pairs of weight 0 are left out of it. The order of every sum is fixed by a stable sort."""
    if x.dtype == torch.float64:
        return tiled.pair_gradient(x, norms, rows, cols, values, grad_rows, grad_cols)
    n_features = x.shape[1]
    weights = torch.cat([grad_rows, grad_cols])
    targets = torch.where(weights != 0, torch.cat([rows, cols]), n_features).int()
    targets, order = targets.sort(stable=True)
    offsets = torch.searchsorted(targets, torch.arange(n_features + 1, dtype=torch.int32, device=x.device))
    partners = torch.cat([cols, rows])[order].int()
    weights, values = weights[order], torch.cat([values, values])[order]
    inverse = torch.where(norms > 0, 1.0 / norms.clamp_min(EPS), 0.0)
    grad = torch.empty_like(x)
    with current(x.device):
        for x_slab, grad_slab in zip(_feature_major(x), grad.split(_slab_rows(x)), strict=True):
            is_direct = grad_slab.stride(0) == 1
            lines = grad_slab.T if is_direct else torch.empty_like(x_slab, memory_format=torch.contiguous_format)
            gather_gradient(x_slab, norms, inverse, offsets, partners, weights, values, lines, EPS)
            if not is_direct:
                grad_slab.copy_(lines.T)
    return grad


class _Passes(NamedTuple):
    """What is multiplied."""

    first: "Operand"
    repair: "Operand"
    """Exact in the precision asked for, and safe for columns of any norm"""
    flags: Tensor
    """int32 [1], not 0 if the first pass cannot be used"""
    deviation: Tensor | None
    """float32 [1], of the first operand from the precision asked for; None if it has that precision"""


def _passes(x: Tensor, norms: "Norms", query: Query) -> _Passes:
    is_large = x.shape[1] >= _SMALLEST_SCREENED and x.shape[0] <= _MOST_ROWS_SCREENED
    # an adaptive tau needs every cosine in full precision
    is_screened = query.precision == "highest" and is_large and query.n_std is None
    if x.dtype != torch.float32 or not (is_screened or query.precision == "medium"):
        return _plain_and_scaled(x, norms, _kind(x, query.precision))
    rounded, deviation = _rounded(x, norms)
    if query.precision == "medium":
        return _Passes(rounded, rounded, torch.zeros_like(norms.flags), None)
    return _Passes(rounded, _plain_and_scaled(x, norms, "ieee").repair, norms.flags, deviation)


def _kind(x: Tensor, precision: Precision) -> "Kind":
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if precision == "high" and current_device().has_tf32 else "ieee"


def _rounded(x: Tensor, norms: "Norms") -> tuple["Operand", Tensor]:
    """Unit columns in fp16 as an operand, and the deviation of `round_columns`."""
    rounded, deviation = round_columns(x, norms.inverse)
    factor = torch.full_like(norms.inverse, 1 / SCALE.value)
    return Operand(x=rounded, factor=factor, scale=None, kind="half"), deviation


def _plain_and_scaled(x: Tensor, norms: "Norms", kind: "Kind") -> _Passes:
    return _Passes(
        first=Operand(x=x, factor=norms.inverse, scale=None, kind=kind),
        repair=Operand(x=x, factor=norms.factor, scale=norms.scale, kind=kind),
        flags=norms.flags,
        deviation=None,
    )


def _select_pairs(x: Tensor, query: Query, state: Tensor | None) -> Selection:
    n_features, k = x.shape[1], query.k
    is_abs, floor = query.similarity == "abs", floor_of(query)
    norms = column_norms(x, EPS)
    waits = may_wait(x.device, state)
    if waits:
        _check_finite(x, norms)
    passes = _passes(x, norms, query)
    # a screen keeps all that its error leaves undecided
    capacity = k + k // 2 + max(_SLACK, n_features) + (0 if passes.deviation is None else k + k // 2)
    capacity = min(capacity, n_pairs(n_features))
    if capacity > _MOST_RECORDS:
        raise ValueError(
            f"k must be at most about {_MOST_RECORDS // 3:,} on the triton backend, which numbers its records "
            f"in int32; got {k:,}"
        )
    values = torch.empty(capacity, dtype=torch.float32, device=x.device)
    rows, cols = (torch.empty(capacity, dtype=torch.int32, device=x.device) for _ in range(2))
    moments = None
    if query.n_std is not None:
        moments = torch.zeros(passes.first.n_programs, 3, dtype=torch.float64, device=x.device)

    radix = radix_select.new_radix_select(x.device, n_features)
    n_rows, n_cols = min(_SAMPLE_ROWS, n_features // 8), min(_SAMPLE_COLS, n_features // 2)
    can_overflow = capacity < n_pairs(n_features)
    warm = None if state is None else state.float().contiguous()
    guess = warm if can_overflow else None  # where all pairs fit, no guess can help
    rank = 0
    if can_overflow and n_features >= _SMALLEST_SAMPLED:
        rank = first_rank_of_sample(n_rows * n_cols, k, n_pairs(n_features))
    if rank > 0:
        gram_sample(x, norms.inverse, radix, guess, n_rows, n_cols, is_abs=is_abs)
    radix_select.begin(radix, passes.flags, guess, passes.deviation, rank, x.shape[0], can_overflow)
    gram_survivors(passes.first, radix, values, rows, cols, moments, floor, is_abs=is_abs, is_first=True)
    certified = radix._replace(n_certified=radix.n_survivors)
    if passes.deviation is not None:
        n_slabs = -(-x.shape[0] // _slab_rows(x))
        for i, x_slab in enumerate(_feature_major(x)):
            rescore(
                x_slab, norms.inverse, radix, values, rows, cols,
                is_first=i == 0, is_last=i == n_slabs - 1, is_abs=is_abs,
            )  # fmt: skip
        certified = radix
    radix_select.certify(certified, k, capacity, floor, _adaptive_tau(moments, query.n_std))

    for i, (shift, bits) in enumerate(radix_select.DIGITS_OF_SIMILARITY):
        gram_histogram(passes.repair, radix, moments if i == 0 else None, floor, shift, bits, is_abs=is_abs)
        radix_select.next_digit(radix, shift, bits, k, capacity)
    gram_row_ties(passes.repair, radix, is_abs=is_abs)
    radix_select.tie_row(radix, k)
    gram_survivors(passes.repair, radix, values, rows, cols, None, floor, is_abs=is_abs, is_first=False)

    n_records = radix.n_survivors.clamp_max(capacity)
    similarity, index, values = _in_order(values, rows, cols, n_records, n_features, query)
    tau = _adaptive_tau(moments, query.n_std)
    if tau is None:
        tau = torch.full((1,), -1.0 if query.tau is None else query.tau, dtype=torch.float32, device=x.device)
    lowest = tau.clamp_min(floor)
    n_selected = (similarity > lowest).sum().clamp_max(k)
    is_selected = torch.arange(k, device=x.device) < n_selected
    index = torch.where(is_selected, index[:k], 0)
    values = torch.where(is_selected, values[:k], 0.0)
    threshold = torch.where(n_selected == k, similarity[k - 1], lowest.clamp_min(0.0).squeeze(0))
    # what certified the selection, once more over the last pass; a kernel that counts unlike it collects shows here
    is_short = (radix.n_survivors < k) & (radix.bounds[:1] > lowest)
    is_wrong = is_short | (radix.n_survivors > capacity)
    if waits:
        if is_wrong.item():
            raise RuntimeError("the triton backend lost pairs; please report this with the shape and dtype of x")
    else:
        is_wrong |= (norms.flags & NOT_FINITE.value) > 0
        values = values.masked_fill(is_wrong, torch.nan)
        threshold = threshold.masked_fill(is_wrong.squeeze(0), torch.nan)
    margins = (MARGIN_START, MARGIN_LEAST, _MARGIN_MOST)
    following = norms.norms.new_empty(0)
    if state is not None and warm is not None:
        following = radix_select.next_state(radix, warm, similarity, n_records, k, margins).to(state.dtype)
    selected_rows = index.div(n_features, rounding_mode="floor")
    return Selection(
        values=values,
        rows=selected_rows,
        cols=index - selected_rows * n_features,
        n_selected=n_selected,
        threshold=threshold,
        tau=tau.squeeze(0).clone(),
        norms=norms.norms,
        state=following,
    )


def _in_order(
    values: Tensor, rows: Tensor, cols: Tensor, n_records: Tensor, n_features: int, query: Query
) -> tuple[Tensor, Tensor, Tensor]:
    """(similarity, row * N + col, value) of the records in the total order; what holds no record comes last, at -2."""
    is_record = torch.arange(values.numel(), device=values.device) < n_records
    similarity = torch.where(is_record, similarity_of(values, query.similarity), -2.0)
    index = torch.where(is_record, rows.long() * n_features + cols, 2**63 - 1)
    index, by_index = index.sort()
    similarity, order = similarity[by_index].sort(descending=True, stable=True)
    return similarity, index[order], values[by_index[order]]


def _adaptive_tau(moments: Tensor | None, n_std: float | None) -> Tensor | None:
    """mean + n_std * std, float32 [1], from (count, mean, sum of squared deviations) of each program."""
    if moments is None or n_std is None:
        return None
    count, mean, squares = moments.unbind(1)
    n_all = count.sum()
    mean_of_all = (count * mean).sum() / n_all
    variance = (squares.sum() + (count * (mean - mean_of_all).square()).sum()) / n_all
    return (mean_of_all + n_std * variance.sqrt()).float().view(1)


def _row_max_of_group(
    x: Tensor, norms: "Norms", chunks: list[Tensor], precision: Precision, values: Tensor, partners: Tensor
) -> None:
    """Write the results of some chunks, sorted, the larger ones first, through one copy of their columns."""
    largest = chunks[0].numel()
    n_larger = sum(chunk.numel() == largest for chunk in chunks)
    stride = _chunk_stride(chunks[0])
    members = torch.stack([torch.nn.functional.pad(chunk, (0, stride - chunk.numel())) for chunk in chunks]).flatten()
    group_norms = norms._replace(**{name: getattr(norms, name)[members] for name in ("inverse", "scale", "factor")})
    group_values, group_partners = _row_max_of_chunks(
        x.index_select(1, members), group_norms, precision, n_chunks=len(chunks), largest=largest, n_larger=n_larger
    )
    for i, chunk in enumerate(chunks):
        part = slice(i * stride, i * stride + chunk.numel())
        values[chunk] = group_values[part]
        partners[chunk] = chunk[group_partners[part]]


def _chunk_stride(chunk: Tensor) -> int:
    """Columns of a copied chunk: the next one starts where a vector load can."""
    return -(-chunk.numel() // 16) * 16


def _row_max_of_chunks(
    x: Tensor, norms: "Norms", precision: Precision, *, n_chunks: int, largest: int, n_larger: int
) -> tuple[Tensor, Tensor]:
    """(values, partners) of n_chunks equal parts of the columns of x, partners counted from the start of their part.

    The first `n_larger` parts begin with `largest` columns that count, the others with one less.
    """
    n_columns = x.shape[1]
    best = torch.full((n_columns,), -(2**63), dtype=torch.int64, device=x.device)
    if x.dtype == torch.float32 and precision == "medium":
        rounded, _ = _rounded(x, norms)
        operands, flags = [rounded], torch.zeros_like(norms.flags)
    else:
        passes = _plain_and_scaled(x, norms, _kind(x, precision))
        operands, flags = [passes.first, passes.repair], passes.flags
    for operand in operands:
        max_cosine(operand, flags, best, n_chunks, n_columns // n_chunks, largest, n_larger)
    ordered = (best >> 32).int()
    values = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return values, 2**32 - 1 - (best & (2**32 - 1))


def _slab_rows(x: Tensor) -> int:
    """Rows of a slab of x: all if its columns are contiguous, else as many as stay in L2."""
    if x.stride(0) == 1:
        return x.shape[0]
    rows: int = max(1, _SLAB_BYTES // (x.shape[1] * x.element_size() * BLOCK_M)) * BLOCK_M
    return rows


def _feature_major(x: Tensor) -> Iterator[Tensor]:
    """Slabs [N, rows] of x, each line contiguous."""
    for slab in x.split(_slab_rows(x)):
        yield slab.T if slab.stride(0) == 1 else slab.T.contiguous()


def _check_finite(x: Tensor, norms: "Norms") -> None:
    if norms.flags.item() & NOT_FINITE.value:
        refuse_what_is_not_finite(x)
