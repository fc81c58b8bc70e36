"""Triton kernels on CUDA and ROCm devices; on CPU tensors too under TRITON_INTERPRET=1, for tests.

The kernels are `topk_ortho.kernels`; here they are put in order. Nothing is read on the host once a warm-start state is
given: every call enqueues the same kernels, and those of a repair return at once unless the first pass failed (see
`topk_ortho.kernels.radix_select`). Without a state the host looks whether it failed, and compiles and launches a repair
only then. float32 columns in "highest" or "high" precision are first screened in fp16, whose rounding is bounded, and
what may be selected is computed again in float32. If the guess failed, the screen finds a better one and passes once
more; float32 products of all pairs are for what it leaves undecided. float64 has no kernels, so it goes to
`tiled`.

Extra memory: O(k) records, for row-major x a slab of its transpose, for float32 columns that are screened or in
"medium" precision an fp16 copy. bf16 and fp16 columns, and those multiplied as tf32, are copied if the lines of x are
not multiples of 16 entries, as those of a row-major x whose N is not. A gradient has sums of columns with many
partners, see `TritonBackend.sums_bytes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.base import Backend, MaxCosine, WeightedPairs
from topk_ortho.backends.device import IMPORT_ERROR, device_guard, kernels_unavailable_reason, may_synchronize
from topk_ortho.backends.norms import column_norms as column_norms_in_torch
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.definitions import EPS, Precision, Query, floor_of, n_pairs, similarity_of
from topk_ortho.selection import Selection
from topk_ortho.warm_start import MARGIN_LEAST, MARGIN_START, SampleSizes, sample_rank

if IMPORT_ERROR is None:
    from topk_ortho.kernels import radix_select
    from topk_ortho.kernels.gram_histogram import gram_histogram, gram_row_ties
    from topk_ortho.kernels.gram_sample import gram_sample
    from topk_ortho.kernels.gram_survivors import Moments, gram_survivors
    from topk_ortho.kernels.launch import (
        INTERPRETED,
        Kind,
        Operand,
        aligned,
        compiling_ahead,
        current_device,
        sum_error,
    )
    from topk_ortho.kernels.max_cosine import max_cosine
    from topk_ortho.kernels.norms import NOT_FINITE, Norms, column_norms
    from topk_ortho.kernels.ordered import sort_keys, take_ordered
    from topk_ortho.kernels.pair_gradient import LINE_BYTES, MOST_BLOCKS, SEGMENT, segment_sums
    from topk_ortho.kernels.pair_gradient import pair_gradient as gather_gradient
    from topk_ortho.kernels.pair_lists import pair_lists, pair_targets
    from topk_ortho.kernels.rescore import LINE_BYTES as RESCORE_LINE_BYTES
    from topk_ortho.kernels.rescore import rescore
    from topk_ortho.kernels.round_columns import SCALE, round_columns
    from topk_ortho.kernels.transpose import transpose


_COMPILED: set[tuple[object, ...]] = set()
"""Kinds of calls whose kernels were compiled ahead."""
_COMPILING = Lock()
"""Held by the thread that compiles ahead."""
MOST_FEATURES_OF_ONE_KEY = 2**17
"""Features up to which one key of 64 bits holds a similarity and the number of a pair, so that one sort orders both"""


@dataclass(frozen=True, kw_only=True)
class TritonBackend:
    """Streams the gram through Triton's kernels."""

    sample: SampleSizes = field(default_factory=SampleSizes)
    """Pairs that a first guess is made from."""
    spare_records: int = 2**16
    """Records beyond 1.5 k: a small k is guessed from few sampled pairs."""
    most_records: int = 2**31 - 2**16
    """Records are numbered in int32."""
    least_screened_features: int = 1024
    """Features from which float32 columns are screened. On an H200, where the launches are captured in a graph, the
    screen takes 0.84 of the time without at N = 1,024 and 0.32 at N = 4,096 (M = 1,024 and 4,096)."""
    least_aligned_features: int = 1024
    """Features from which x is copied if its lines are not aligned, unless float32 is multiplied as it is, which takes
    far longer than its loads. The pass loads every entry of 1,024 features 8 times. Without a copy it loads them one by
    one: of bf16 and fp16 by 32 instructions a step in place of 4 on sm_80, none asynchronous. Not measured."""
    most_screened_rows: int = 2**17
    """Rows up to which float32 columns are screened. With more rows the cosines of independent columns lie closer
    together, until more of them are within the rounding of the k-th than fit into the records. The limit is calculated,
    not measured."""
    most_sum_error: float = 3.4e-4
    """Largest bound on the rounding of its sums for which a screen adds up all rows of x at once, which it does in
    larger tiles. That is up to 8,600 rows on Hopper and Blackwell, and 4,100 on Ampere, Ada and CDNA 3. With more rows
    summation is blocked, see `launch.Operand`: its bound is smaller, so that fewer pairs are left undecided. On an H200
    a screen of 16,384 rows took the same time either way."""
    slab_bytes: int = 2**25
    """Size of a slab of x that stays in L2 while lines of it are gathered: an A100 has 40 MB, an H200 has 60 MB. Both
    have it in two halves, but on an H200 the gradient gathers as fast from 2**25 bytes, more than a half, as from
    2**24, at 8 TB/s. An A100 was not measured."""
    sums_bytes: int = 2**26
    """Size of the sums that a gradient makes of columns with many partners. Where a single block of entries has more of
    them, which begins at 8 million pairs, they have 8 bytes a pair, 4 for float32."""
    chunk_copy_elements: int = 2**26
    """Elements of x that `max_cosine` copies at once, if columns are compared within chunks."""
    most_margin: float = 0.4
    """Largest margin of the warm-start guess, as a share of k: the records hold 1.5 k."""
    float64: Backend = field(default_factory=TiledBackend)
    """Backend for float64, for which there are no kernels."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """No Triton, no GPU that it supports, or a tensor elsewhere."""
        return kernels_unavailable_reason(device)

    def topk_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """One pass from a guess; then, if that pass could not be certified, a better guess or a radix select."""
        if x.dtype == torch.float64:
            return self.float64.topk_pairs(x, query, state)
        _refuse_too_large(x)
        with device_guard(x.device):
            self._compile_ahead(x, query, state)
            return self._select(x, query, state)

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> MaxCosine:
        """Maxima of tiles for their rows and their columns, joined by atomic maxima of (cosine, partner)."""
        if x.dtype == torch.float64:
            return self.float64.max_cosine(x, chunks, precision)
        _refuse_too_large(x)
        with device_guard(x.device):
            norms = column_norms(x, EPS)
            _refuse_not_finite(x, norms)
            if chunks is None:
                cosines, partners = _max_cosine_of_chunks(
                    self._loadable(x, _kind(x, precision)), norms, precision, n_chunks=1, largest=x.shape[1], n_larger=1
                )
                return MaxCosine(cosines, partners, norms.norms)
            cosines, partners = torch.empty_like(norms.norms), torch.empty_like(norms.norms, dtype=torch.int64)
            at_once = self.chunk_copy_elements // (x.shape[0] * _chunk_stride(chunks[0]))
            at_once = min(max(1, at_once), 2**16 - 1)  # of the second axis of a grid
            for first in range(0, len(chunks), at_once):
                group = [chunk.sort().values for chunk in chunks[first : first + at_once]]
                _max_cosine_of_group(x, norms, group, precision, cosines, partners)
        return MaxCosine(cosines, partners, norms.norms)

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gather in CSR order; pairs of weight 0 are left out. The order of every sum is fixed by a stable sort."""
        if x.dtype == torch.float64:
            return self.float64.pair_gradient(x, norms, cosines, pairs)
        _refuse_too_large(x)
        rows, cols, row_weights, col_weights, cosines = (part.contiguous() for part in (*pairs, cosines))
        listed = rows, cols, row_weights, col_weights
        grad = torch.empty_like(x)
        n_rows = self._gradient_rows(x, 2 * rows.numel())
        with device_guard(x.device):
            targets, order = pair_targets(*listed, x.shape[1]).sort(stable=True)
            inverse, offsets, *ordered = pair_lists(targets, order, *listed, cosines, norms, EPS)
            for x_slab, grad_slab in zip(_feature_major(x, n_rows), grad.split(n_rows), strict=True):
                is_direct = grad_slab.stride(0) == 1
                lines = grad_slab.T if is_direct else torch.empty_like(x_slab, memory_format=torch.contiguous_format)
                sums = segment_sums(x_slab, inverse, targets, *ordered)
                gather_gradient(x_slab, norms, inverse, offsets, *ordered, sums, lines, EPS)
                del sums  # before the next slab has its own
                if not is_direct:
                    transpose(lines, grad_slab)
        return grad

    def _select(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        norms = column_norms(x, EPS)
        if may_synchronize(x.device, state):
            _refuse_not_finite(x, norms)
        call = self._begin(x, norms, query, state)
        self._pass(call)
        if not (may_synchronize(x.device, state) and _is_certified(call)):
            if call.operands.deviation is not None:
                _guess_again(call)
                self._pass(call)
            _repair(call)
        return _finish(call, self.most_margin)

    def _compile_ahead(self, x: Tensor, query: Query, state: Tensor | None) -> None:
        """Compile the kernels of a call before the first one of its kind that always launches a repair.

        Triton compiles a kernel again where other integer arguments are 1 or multiples of 16. Those that the kind does
        not tell, such as k, may have such variants, which are compiled at their first launch.
        """
        if INTERPRETED or may_synchronize(x.device, state):
            return
        kind = (
            x.device, x.dtype, x.stride(0) == 1, *(size % 16 == 0 for size in x.shape),
            query.similarity, query.precision, query.n_std is None,
            self._is_screened(x, query), self._restarts(x), x.shape[1] > MOST_FEATURES_OF_ONE_KEY,
        )  # fmt: skip
        if kind in _COMPILED:
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # the operators of torch between the kernels would become a part of the graph
        with _COMPILING:
            if kind not in _COMPILED:  # by another thread, which this one has waited for
                with compiling_ahead():
                    self._select(x, query, state)
                _COMPILED.add(kind)

    def _begin(self, x: Tensor, norms: "Norms", query: Query, state: Tensor | None) -> "_Call":
        """Allocate what the kernels of a call share, and choose the bound of the first pass."""
        n_features, k = x.shape[1], query.k
        operands = self._operands(x, norms, query)
        # a screen keeps all that its error leaves undecided
        capacity = k + k // 2 + max(self.spare_records, n_features) + (0 if operands.deviation is None else k + k // 2)
        capacity = min(capacity, n_pairs(n_features))
        if capacity > self.most_records:
            raise ValueError(
                f"k must be at most about {self.most_records // 3:,} on the triton backend, which numbers its records "
                f"in int32; got {k:,}"
            )
        rows, cols = (torch.empty(capacity, dtype=torch.int32, device=x.device) for _ in range(2))
        moments = None
        if query.n_std is not None:
            lines = torch.empty(operands.first.n_programs, 3, dtype=torch.float64, device=x.device)
            moments = Moments(lines, norms.norms.new_empty(1), query.n_std)
        call = _Call(
            x=x,
            query=query,
            state=state,
            norms=norms,
            operands=operands,
            radix=radix_select.new_radix_select(x.device, n_features),
            cosines=torch.empty(capacity, dtype=torch.float32, device=x.device),
            rows=rows,
            cols=cols,
            moments=moments,
        )
        can_overflow = capacity < n_pairs(n_features)
        # where all pairs fit, no guess can help
        guess = _as_kernels_read(state) if can_overflow and state is not None else None
        n_rows, n_cols = self.sample.shape(n_features)
        rank = sample_rank(n_rows * n_cols, k, n_pairs(n_features)) if can_overflow and n_rows else 0
        if rank > 0:
            gram_sample(x, norms.inverse, call.radix, guess, n_rows, n_cols, is_abs=call.is_abs)
        radix_select.begin(
            call.radix, operands.flags, guess, operands.deviation, rank, x.shape[0], operands.sum_error, can_overflow
        )
        return call

    def _pass(self, call: "_Call") -> None:
        """Record what exceeds the bound; of a screened operand, compute it again in float32; then certify the pass.

        The kernels return at once if the stage is not PASS.
        """
        operands, records = call.operands, (call.cosines, call.rows, call.cols)
        floor = floor_of(call.query)
        k, is_rescored = call.query.k, operands.deviation is not None
        gram_survivors(
            operands.first, call.radix, *records, call.moments, k, floor, is_abs=call.is_abs, is_first=True,
            certifies=not is_rescored,
        )  # fmt: skip
        if is_rescored:
            n_rows = self._rows_in_l2(call.x, RESCORE_LINE_BYTES)
            n_slabs = -(-call.x.shape[0] // n_rows)
            for i, x_slab in enumerate(_feature_major(call.x, n_rows, call.radix.plan)):
                rescore(
                    x_slab, call.norms.inverse, call.radix, *records, k, floor,
                    is_first=i == 0, is_last=i == n_slabs - 1, is_abs=call.is_abs,
                )  # fmt: skip

    def _operands(self, x: Tensor, norms: "Norms", query: Query) -> "_Operands":
        if self._is_screened(x, query):
            rounded, deviation = _rounded(x, norms)
            restarts = self._restarts(x)
            # in float32 for "high" too, so that the selection does not depend on whether a repair is needed
            _, scaled = _plain_and_scaled(x, norms, "ieee")
            rounded, error = replace(rounded, restarts=restarts), sum_error(x.shape[0], restarts=restarts)
            return _Operands(rounded, scaled, norms.flags, deviation, error)
        if x.dtype == torch.float32 and query.precision == "medium":
            rounded, _ = _rounded(x, norms)
            return _Operands(rounded, rounded, torch.zeros_like(norms.flags), None)
        kind = _kind(x, query.precision)
        plain, scaled = _plain_and_scaled(self._loadable(x, kind), norms, kind)
        return _Operands(plain, scaled, norms.flags, None)

    def _is_screened(self, x: Tensor, query: Query) -> bool:
        """Whether x [M, N] is multiplied in fp16 first: if this pays, and its rounding is known."""
        is_wanted = x.dtype == torch.float32 and query.precision != "medium"
        n_rows, n_features = x.shape
        pays = n_features >= self.least_screened_features and n_rows <= self.most_screened_rows
        # an adaptive tau needs every cosine in full precision
        return is_wanted and pays and query.n_std is None and current_device().sum_error is not None

    def _restarts(self, x: Tensor) -> bool:
        """Whether summation over the rows of x is blocked where it is screened."""
        error = sum_error(x.shape[0], restarts=False)
        return error is not None and error > self.most_sum_error

    def _loadable(self, x: Tensor, kind: "Kind") -> Tensor:
        """x; an aligned copy where loads of single entries would cost more."""
        return aligned(x) if kind != "ieee" and x.shape[1] >= self.least_aligned_features else x

    def _rows_in_l2(self, x: Tensor, line_bytes: int) -> int:
        """Rows of a slab of x that stays in L2; in each column it has one line of so many bytes, or several."""
        n_lines = max(1, self.slab_bytes // (x.shape[1] * line_bytes))
        return n_lines * (line_bytes // x.element_size())

    def _gradient_rows(self, x: Tensor, n_pairs: int) -> int:
        """Rows of a slab of x for the gradient of so many pairs, each counted for both of its columns.

        The kernels go through a slab by blocks that stay in L2, so that only slabs which are copies need to be small.
        """
        block = LINE_BYTES // x.element_size()
        bytes_of_block = 4 * block * max(1, n_pairs // SEGMENT)
        n_rows: int = block * max(1, min(MOST_BLOCKS, self.sums_bytes // bytes_of_block))
        return n_rows if x.stride(0) == 1 else min(n_rows, self._rows_in_l2(x, LINE_BYTES))


class _Operands(NamedTuple):
    """The operands of the passes over one x."""

    first: "Operand"
    repair: "Operand"
    """Exact in the precision asked for, and safe for columns of any norm"""
    flags: Tensor
    """int32 [1], not 0 if the first pass cannot be used"""
    deviation: Tensor | None
    """float32 [2] of `round_columns`: how far the first operand is from the precision asked for, and whether it has
    negative entries; None if it has that precision"""
    sum_error: float | None = None
    """Bound on the rounding of the gram of the first operand, beyond that of its columns, which comes with it"""


class _Call(NamedTuple):
    """What the steps of one selection share."""

    x: Tensor
    query: Query
    state: Tensor | None
    norms: "Norms"
    operands: _Operands
    radix: "radix_select.RadixSelect"
    cosines: Tensor
    """float32 [capacity], of the records"""
    rows: Tensor
    """int32 [capacity]"""
    cols: Tensor
    """int32 [capacity]"""
    moments: "Moments | None"
    """Where tau is adaptive"""

    @property
    def capacity(self) -> int:
        """Records that fit."""
        return self.cosines.numel()

    @property
    def is_abs(self) -> bool:
        """Whether the order is by |cosine|."""
        return self.query.similarity == "abs"


def _guess_again(call: _Call) -> None:
    """Find a guess that k pairs reach, among the rounded similarities of a screen.

    The kernels return at once if the pass was certified.
    """
    k, floor = call.query.k, floor_of(call.query)
    for number in range(radix_select.MOST_SCREEN_DIGITS):
        gram_histogram(
            call.operands.first, call.radix, number, None, k, call.capacity, floor, is_abs=call.is_abs, is_screen=True
        )


def _is_certified(call: _Call) -> bool:
    """Whether the first pass needs no repair; waits for the device."""
    return bool(call.radix.plan[radix_select.STAGE.value] == radix_select.CERTIFIED.value)


def _repair(call: _Call) -> None:
    """Find the k-th similarity digit by digit, and record what is above it.

    The kernels return at once if a pass was certified. They scale columns only if the norm of one exceeds 2**60.
    """
    operand, radix, k, floor, is_abs = call.operands.repair, call.radix, call.query.k, floor_of(call.query), call.is_abs
    for number in range(radix_select.MOST_DIGITS):
        moments = call.moments if number == 0 else None
        gram_histogram(operand, radix, number, moments, k, call.capacity, floor, is_abs=is_abs, is_screen=False)
    gram_row_ties(operand, radix, k, is_abs=is_abs)
    records = (call.cosines, call.rows, call.cols)
    gram_survivors(operand, radix, *records, None, k, floor, is_abs=is_abs, is_first=False, certifies=False)


def _finish(call: _Call, most_margin: float) -> Selection:
    """Put the records in order and select; certify the last pass once more."""
    query, state, norms = call.query, call.state, call.norms
    fixed_tau = -1.0 if query.tau is None else query.tau
    listed = take_ordered(
        _order(call), call.cosines, call.rows, call.cols, call.radix, norms.flags,
        fixed_tau if call.moments is None else call.moments.tau, floor_of(query), query.k,
        None if state is None else _as_kernels_read(state), (MARGIN_START, MARGIN_LEAST, most_margin),
        is_abs=call.is_abs,
    )  # fmt: skip
    if may_synchronize(call.x.device, state) and listed.is_wrong.item():
        raise RuntimeError("the triton backend lost pairs; please report this with the shape and dtype of x")
    return Selection(
        cosines=listed.cosines,
        rows=listed.rows,
        cols=listed.cols,
        n_listed=listed.n_listed,
        n_selected=listed.n_selected,
        threshold=listed.threshold,
        tau=listed.tau,
        norms=norms.norms,
        state=norms.norms.new_empty(0) if state is None else listed.state.to(state.dtype),
    )


def _order(call: _Call) -> Tensor:
    """Which record is at each place of the total order, int64 [capacity]; places without a record come last.

    Records of a similarity below 0, which are never selected, may come with those of 0.
    """
    n_survivors, n_features = call.radix.n_survivors, call.x.shape[1]
    if n_features <= MOST_FEATURES_OF_ONE_KEY:
        keys: Tensor = sort_keys(n_survivors, call.cosines, call.rows, call.cols, n_features, is_abs=call.is_abs)
        return keys.argsort()
    is_record = torch.arange(call.capacity, device=call.x.device) < n_survivors
    similarity = torch.where(is_record, similarity_of(call.cosines, call.query.similarity), -2.0)
    by_index = torch.where(is_record, call.rows.long() * n_features + call.cols, 2**63 - 1).argsort()
    return by_index[similarity[by_index].argsort(descending=True, stable=True)]


def _as_kernels_read(state: Tensor) -> Tensor:
    """The warm-start state as float32 [3] without gaps."""
    return state.float().contiguous()


def _kind(x: Tensor, precision: Precision) -> "Kind":
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if precision == "high" and current_device().has_tf32 else "ieee"


def _rounded(x: Tensor, norms: "Norms") -> tuple["Operand", Tensor]:
    """Unit columns in fp16 as an operand, and the deviation of `round_columns`."""
    rounded, deviation = round_columns(x, norms.inverse)
    factor = torch.full_like(norms.inverse, 1 / SCALE.value)
    return Operand(x=rounded, factor=factor, scale=None, kind="half"), deviation


def _plain_and_scaled(x: Tensor, norms: "Norms", kind: "Kind") -> tuple["Operand", "Operand"]:
    """Operands that multiply x as it is, and by a power of two where that would overflow."""
    plain = Operand(x=x, factor=norms.inverse, scale=None, kind=kind)
    return plain, replace(plain, factor=norms.factor, scale=norms.scale, flags=norms.flags)


def _feature_major(x: Tensor, n_rows: int, plan: Tensor | None = None) -> Iterator[Tensor]:
    """Slabs [N, n_rows] of x, the last one of the rest, whose lines are contiguous: views if those of x are.

    With a plan they are copied only if the stage is PASS.
    """
    for slab in x.split(n_rows):
        lines = slab.T
        if slab.stride(0) != 1:
            lines = torch.empty_like(lines, memory_format=torch.contiguous_format)
            transpose(slab, lines, plan)
        yield lines


def _max_cosine_of_group(
    x: Tensor, norms: "Norms", chunks: list[Tensor], precision: Precision, cosines: Tensor, partners: Tensor
) -> None:
    """Write the results of some chunks, sorted, the larger ones first, through one copy of their columns."""
    largest = chunks[0].numel()
    n_larger = sum(chunk.numel() == largest for chunk in chunks)
    stride = _chunk_stride(chunks[0])
    members = torch.stack([torch.nn.functional.pad(chunk, (0, stride - chunk.numel())) for chunk in chunks]).flatten()
    group_norms = norms._replace(**{name: getattr(norms, name)[members] for name in ("inverse", "scale", "factor")})
    group_cosines, group_partners = _max_cosine_of_chunks(
        x.index_select(1, members), group_norms, precision, n_chunks=len(chunks), largest=largest, n_larger=n_larger
    )
    for i, chunk in enumerate(chunks):
        part = slice(i * stride, i * stride + chunk.numel())
        cosines[chunk] = group_cosines[part]
        partners[chunk] = chunk[group_partners[part]]


def _chunk_stride(chunk: Tensor) -> int:
    """Columns of a copied chunk: the next one starts where a vector load can."""
    return -(-chunk.numel() // 16) * 16


def _max_cosine_of_chunks(
    x: Tensor, norms: "Norms", precision: Precision, *, n_chunks: int, largest: int, n_larger: int
) -> tuple[Tensor, Tensor]:
    """(cosines, partners) of n_chunks equal parts of the columns of x, partners counted from the start of their part.

    The first `n_larger` parts begin with `largest` columns that count, the others with one less.
    """
    n_columns = x.shape[1]
    best = torch.full((n_columns,), -(2**63), dtype=torch.int64, device=x.device)
    if x.dtype == torch.float32 and precision == "medium":
        operand, _ = _rounded(x, norms)
    else:
        plain, scaled = _plain_and_scaled(x, norms, _kind(x, precision))
        operand = scaled if norms.flags.item() else plain
    max_cosine(operand, best, n_chunks, n_columns // n_chunks, largest, n_larger)
    ordered = (best >> 32).int()
    cosines = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return cosines, 2**32 - 1 - (best & (2**32 - 1))


def _refuse_too_large(x: Tensor) -> None:
    """Kernels number rows and columns in int32, and go beyond the last one by less than the 2**10 of a block."""
    most = 2**31 - 2**10
    for name, size in zip(("rows", "columns"), x.shape, strict=True):
        if size > most:
            raise ValueError(f"x must have at most {most:,} {name} on the triton backend; got {size:,}")


def _refuse_not_finite(x: Tensor, norms: "Norms") -> None:
    if norms.flags.item() & NOT_FINITE.value:
        column_norms_in_torch(x)  # raises the error that names the columns
