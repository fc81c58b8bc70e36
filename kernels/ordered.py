"""What follows the passes over the gram: the keys that order the records, and what a call returns of them.

    key[p]    = (2**29 - 1 - bits(similarity[p])) * 2**34 + rows[p] * N + cols[p]
    listed[i] = record[order[i]] if similarity[order[i]] > floor else padding,    i < k

The order is that of the keys: by similarity descending, then by (row, col). Floats >= 0 order as their bits do. -0.0
and similarities below 0, which are never listed, get the key of 0.0. Floats from 0 to 1 have 30 bits; less 2**29 they
are signed, so that they fit above the 34 bits of the pair. Places without a record come last.

The listed pairs are the beginning of the order. So the threshold is the similarity at place k - 1, if that is listed,
and the program whose places hold the last listed pair knows how many there are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch
from topk_ortho.kernels.norms import NOT_FINITE
from topk_ortho.kernels.radix_select import (
    BOUND,
    CERTIFIED,
    FAILURE,
    GUESS,
    MARGIN,
    N_PASSES,
    OVERFLOW,
    PASSES_SO_FAR,
    SHORTFALL,
    RadixSelect,
    stage_of,
)

_BLOCK = 1024


class Listed(NamedTuple):
    """What a call returns. No two of these tensors share memory."""

    cosines: Tensor
    """float32 [k], with sign; 0 for padding; all of them NaN if `is_wrong`"""
    rows: Tensor
    """int64 [k], 0 for padding"""
    cols: Tensor
    """int64 [k], 0 for padding"""
    n_listed: Tensor
    """int64 [], how many of these are pairs"""
    n_selected: Tensor
    """int64 [], the same number"""
    threshold: Tensor
    """float32 [], the k-th similarity; the floor, at least 0, if fewer are listed; NaN if `is_wrong`"""
    tau: Tensor
    """float32 []"""
    is_wrong: Tensor
    """int32 [], 1 if the certificate does not hold or a norm is not finite, else 0"""
    state: Tensor | None
    """float32 [3], warm-start state for the next call; None if none came in"""


@triton.jit
def _sort_keys_kernel(
    keys_ptr,                       # [capacity] int64
    values_ptr, rows_ptr, cols_ptr, # [capacity] float32, int32 x 2
    n_survivors_ptr,                # [1] int64
    n_features, capacity,
    IS_ABS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_record = place < tl.minimum(tl.load(n_survivors_ptr), capacity).to(tl.int32)
    value = tl.load(values_ptr + place, mask=is_record, other=0.0)
    similarity = tl.abs(value) if IS_ABS else value
    similarity = tl.where(similarity <= 0, 0.0, similarity)  # -0.0 too
    descending = 2**29 - 1 - similarity.to(tl.int32, bitcast=True).to(tl.int64)
    row = tl.load(rows_ptr + place, mask=is_record, other=0).to(tl.int64)
    index = row * n_features + tl.load(cols_ptr + place, mask=is_record, other=0)
    tl.store(keys_ptr + place, tl.where(is_record, (descending << 34) | index, 2**63 - 1), mask=place < capacity)


@triton.jit
def _similarity_at(place, mask, order_ptr, values_ptr, IS_ABS: tl.constexpr):
    """Similarity of the record at a place of the order; 0 where the mask is false."""
    value = tl.load(values_ptr + tl.load(order_ptr + place, mask=mask, other=0), mask=mask, other=0.0)
    return tl.abs(value) if IS_ABS else value


@triton.jit
def _store_next_state(
    next_state_ptr, state_ptr, plan_ptr, order_ptr, values_ptr, n_records, k, margin_start, margin_least, margin_most,
    IS_ABS: tl.constexpr,
):  # fmt: skip
    """Store the warm start of the next call.

    The margin doubles after a shortfall (the guess was too high), is halved after an overflow (the guess was too low),
    and shrinks slowly after a success. The next guess is the similarity at rank (1 + margin) k, or what a straight line
    through the ranks (1 - margin) k and k says of that rank if fewer pairs are known. Where the line falls below 0, the
    guess is 0: below it a pass would record every pair.
    """
    is_repaired = stage_of(plan_ptr) != CERTIFIED
    failure = tl.load(plan_ptr + FAILURE)
    margin = tl.load(state_ptr + MARGIN)
    margin = tl.where((margin >= margin_least) & (margin <= margin_most), margin, margin_start)
    factor = tl.where(failure == SHORTFALL, 2.0, tl.where(failure == OVERFLOW, 0.5, 0.98))
    margin = tl.minimum(margin_most, tl.maximum(margin_least, factor * margin))
    rank = tl.ceil((1 + margin) * tl.cast(k, tl.float32)).to(tl.int64)
    inner_rank = tl.maximum(tl.floor((1 - margin) * tl.cast(k, tl.float32)).to(tl.int64), 1)
    inner_rank = tl.minimum(inner_rank, k)
    guess = -1.0
    if n_records >= rank:
        guess = _similarity_at(rank - 1, True, order_ptr, values_ptr, IS_ABS)
    elif n_records >= k:
        least = _similarity_at(k - 1, True, order_ptr, values_ptr, IS_ABS)
        guess = 2 * least - _similarity_at(inner_rank - 1, True, order_ptr, values_ptr, IS_ABS)
        guess = tl.where(least > 0, tl.maximum(guess, 0.0), guess)  # where the k-th is 0, zeros are needed
    n_passes = tl.load(plan_ptr + PASSES_SO_FAR) + tl.where(is_repaired, 1, 0)
    tl.store(next_state_ptr + GUESS, guess)
    tl.store(next_state_ptr + MARGIN, margin)
    tl.store(next_state_ptr + N_PASSES, n_passes.to(tl.float32))


@triton.jit
def _take_ordered_kernel(
    cosines_out_ptr, rows_out_ptr, cols_out_ptr,                  # [k] float32, int64 x 2
    n_listed_ptr, n_selected_ptr,                                 # [] int64 x 2
    threshold_ptr, tau_out_ptr, is_wrong_ptr, next_state_ptr,     # [] float32 x 2, [] int32, [3] float32
    order_ptr, values_ptr, rows_ptr, cols_ptr,                    # [capacity] int64, float32, int32 x 2
    plan_ptr, bounds_ptr, n_survivors_ptr, flags_ptr,             # [7] int64, [3] float32, [1] int64, [1] int32
    state_ptr, tau_ptr,                                           # [3] float32, [1] float32
    tau, floor, k, capacity, margin_start, margin_least, margin_most,
    IS_ADAPTIVE: tl.constexpr, HAS_STATE: tl.constexpr, IS_ABS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if IS_ADAPTIVE:
        tau = tl.load(tau_ptr)
    floor = tl.where(tau < floor, floor, tau)  # NaN if tau is: then nothing is listed
    n_survivors = tl.load(n_survivors_ptr)
    # the certificate once more, for the last pass: this reveals a kernel that counts other pairs than it records
    is_lost = (n_survivors < k) & (tl.load(bounds_ptr + BOUND) > floor)
    is_wrong = is_lost | (n_survivors > capacity) | ((tl.load(flags_ptr) & NOT_FINITE) > 0)

    first = tl.program_id(0) * BLOCK
    place = first + tl.arange(0, BLOCK)
    n_places = tl.minimum(n_survivors, k).to(tl.int32)  # that hold a record and may be listed
    is_record = place < n_places
    record = tl.load(order_ptr + place, mask=is_record, other=0)
    cosine = tl.load(values_ptr + record, mask=is_record, other=0.0)
    similarity = tl.abs(cosine) if IS_ABS else cosine
    is_listed = is_record & (similarity > floor)
    row = tl.load(rows_ptr + record, mask=is_listed, other=0)
    col = tl.load(cols_ptr + record, mask=is_listed, other=0)
    cosine = tl.where(is_wrong, float("nan"), tl.where(is_listed, cosine, 0.0))
    tl.store(cosines_out_ptr + place, cosine, mask=place < k)
    tl.store(rows_out_ptr + place, row.to(tl.int64), mask=place < k)
    tl.store(cols_out_ptr + place, col.to(tl.int64), mask=place < k)

    n_here = tl.sum(is_listed.to(tl.int32), axis=0)
    has_next = first + BLOCK < n_places
    goes_on = has_next & (_similarity_at(first + BLOCK, has_next, order_ptr, values_ptr, IS_ABS) > floor)
    if ((n_here > 0) | (first == 0)) & (goes_on == 0):
        n_listed = (first + n_here).to(tl.int64)
        tl.store(n_listed_ptr, n_listed)
        tl.store(n_selected_ptr, n_listed)
    if first == 0:
        least = _similarity_at(k - 1, n_places == k, order_ptr, values_ptr, IS_ABS)  # 0 if there is none
        tl.store(threshold_ptr, tl.where(is_wrong, float("nan"), tl.where(least > floor, least, floor)))
        tl.store(tau_out_ptr, tau)
        tl.store(is_wrong_ptr, is_wrong.to(tl.int32))
        if HAS_STATE:
            _store_next_state(
                next_state_ptr, state_ptr, plan_ptr, order_ptr, values_ptr, tl.minimum(n_survivors, capacity), k,
                margin_start, margin_least, margin_most, IS_ABS,
            )  # fmt: skip


def sort_keys(
    n_survivors: Tensor, values: Tensor, rows: Tensor, cols: Tensor, n_features: int, *, is_abs: bool
) -> Tensor:  # fmt: skip
    """Keys int64 [capacity] that order the records, of which there are `n_survivors` [1] or as many as fit.

    The pairs of `n_features` columns must have 34 bits: there are at most 2**17 columns.
    """
    capacity = values.numel()
    keys = torch.empty_like(values, dtype=torch.int64)
    launch(
        _sort_keys_kernel, (triton.cdiv(capacity, _BLOCK),),
        keys, values, rows, cols, n_survivors, n_features, capacity, IS_ABS=is_abs, BLOCK=_BLOCK, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return keys


def take_ordered(
    order: Tensor, values: Tensor, rows: Tensor, cols: Tensor, radix: RadixSelect, flags: Tensor,
    tau: float | Tensor, floor: float, k: int, state: Tensor | None, margins: tuple[float, float, float],
    *, is_abs: bool,
) -> Listed:  # fmt: skip
    """List the first k pairs of the order that are above `floor` and `tau`, and make the state for the next call.

    `order` int64 [capacity] says which record is at each place of the order; k is at most the capacity. `tau` is the
    one in force, float32 [1] if it is adaptive and -1 if there is none. `floor` is at least 0 if the order is not by
    |cosine|. `flags` are those of the norms, and `margins` of the state are the initial, the smallest and the largest.
    """
    is_adaptive = isinstance(tau, Tensor)
    listed = Listed(
        cosines=values.new_empty(k),
        rows=order.new_empty(k),
        cols=order.new_empty(k),
        n_listed=order.new_empty(()),
        n_selected=order.new_empty(()),
        threshold=values.new_empty(()),
        tau=values.new_empty(()),
        is_wrong=rows.new_empty(()),
        state=None if state is None else torch.empty_like(state),
    )
    launch(
        _take_ordered_kernel, (triton.cdiv(k, _BLOCK),),
        *listed[:-1], values if state is None else listed.state, order, values, rows, cols,
        radix.plan, radix.bounds, radix.n_survivors, flags, values if state is None else state,
        tau if is_adaptive else values, -1.0 if is_adaptive else tau, floor, k, values.numel(), *margins,
        IS_ADAPTIVE=is_adaptive, HAS_STATE=state is not None, IS_ABS=is_abs, BLOCK=_BLOCK, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return listed
