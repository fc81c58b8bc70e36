"""Gradient of a weighted sum of cosines: gather the partners of each column, then apply the normalisation's Jacobian.

    grad_hat[:, j] = sum_p weight[p] * x_hat[:, partner[p]],    own[j] = sum_p weight[p] * value[p],    p of column j
    grad[:, j] = (grad_hat[:, j] - x_hat[:, j] * own[j]) / max(norm[j], EPS),    without `own` where norm[j] <= EPS

The pairs of a column are consecutive (CSR). In `pair_gradient` one program owns a column and a block of its entries. It
would be busy for long where a column is paired with very many others, so the list of all pairs is cut into segments of
SEGMENT pairs: before, `segment_sums` sums each segment that lies within one column, in a program of its own, and
`pair_gradient` adds these sums to what the column has before the first of them and behind the last. Most columns have
fewer pairs than that, and no such segment.

There are no atomics, and every sum has a fixed order. Both kernels take the blocks of entries one after the other, each
for all columns, so that the N lines of LINE_BYTES that they gather stay in L2.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import current_device, launch
from topk_ortho.kernels.tiles import round_to

LINE_BYTES = 512
"""Bytes of the entries of a column that a program owns, and of the lines that it gathers."""
MOST_BLOCKS = 65535
"""Most blocks of LINE_BYTES of a slab: the second axis of a grid holds no more programs."""
SEGMENT = 256
"""A column with 65,536 partners leaves fewer than 2 * 256 pairs to gather and 65,536 / 256 sums to add to its own
programs. Chosen by these numbers, not measured."""
_BLOCK_PAIR = 4
# A program is one warp, so that very many run at once and hide each other's waits for what they gather. Of blocks from
# 64 to 512 entries, 4 to 16 pairs and 1 to 4 warps these were the fastest on an H200, or within 8% of it, for bf16 and
# float32. That was measured for columns without segments of their own.
_PROGRAMS_PER_SM = 32  # of `segment_sums`: about as many as a multiprocessor holds


@triton.jit
def _gather(
    gathered, own,                                      # [BLOCK_PAIR, BLOCK_M], [BLOCK_PAIR] float32
    lines, stride_xn, mask_m,                           # pointers to a block of entries of column 0; which ones exist
    inverse_ptr, partners_ptr, weights_ptr, values_ptr,
    first, n_pairs,
    BLOCK_PAIR: tl.constexpr,
):  # fmt: skip
    """Add what the pairs from `first` on have of grad_hat and of own."""
    offs_pair = tl.arange(0, BLOCK_PAIR)
    for start in range(0, n_pairs, BLOCK_PAIR):
        mask = offs_pair < n_pairs - start
        pair = first + start + offs_pair
        partner = tl.load(partners_ptr + pair, mask=mask, other=0)
        weight = tl.load(weights_ptr + pair, mask=mask, other=0.0)
        own += weight * tl.load(values_ptr + pair, mask=mask, other=0.0)
        x = tl.load(
            lines[None, :] + partner[:, None].to(tl.int64) * stride_xn, mask=mask[:, None] & mask_m[None, :], other=0.0
        )
        factor = weight * tl.load(inverse_ptr + partner, mask=mask, other=0.0)
        gathered += x.to(tl.float32) * factor[:, None]
    return gathered, own


@triton.jit
def _segment_sums_kernel(
    x_ptr, stride_xn, stride_xm,                        # [N, slab], features in rows
    inverse_ptr,                                        # [N] float32
    targets_ptr, partners_ptr, weights_ptr, values_ptr, # [p] int32 x 2, float32 x 2
    lines_ptr, own_ptr,                                 # float32, as in `SegmentSums`
    M, N, n_segments,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_PAIR: tl.constexpr,
):  # fmt: skip
    for place in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * n_segments, tl.num_programs(0)):
        first = tl.cast(place % n_segments, tl.int64) * SEGMENT
        target = tl.load(targets_ptr + first)
        if (target < N) & (tl.load(targets_ptr + first + SEGMENT - 1) == target):
            offs = tl.arange(0, BLOCK_M)
            offs_m = place // n_segments * BLOCK_M + offs
            gathered, own = _gather(
                tl.zeros((BLOCK_PAIR, BLOCK_M), tl.float32), tl.zeros((BLOCK_PAIR,), tl.float32),
                x_ptr + offs_m.to(tl.int64) * stride_xm, stride_xn, offs_m < M,
                inverse_ptr, partners_ptr, weights_ptr, values_ptr, first, SEGMENT, BLOCK_PAIR,
            )  # fmt: skip
            tl.store(lines_ptr + tl.cast(place, tl.int64) * BLOCK_M + offs, tl.sum(gathered, axis=0))
            tl.store(own_ptr + place, tl.sum(own, axis=0))


@triton.jit
def _pair_gradient_kernel(
    x_ptr, stride_xn, stride_xm,                        # [N, slab], features in rows
    norm_ptr, inverse_ptr,                              # [N] float32 x 2
    offsets_ptr, partners_ptr, weights_ptr, values_ptr, # [N + 1] int64, [p] int32, [p] float32 x 2
    segment_lines_ptr, segment_own_ptr,                 # float32, as in `SegmentSums`
    grad_ptr, stride_gn, stride_gm,                     # [N, slab]
    M, n_segments, eps,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_PAIR: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0)
    offs = tl.arange(0, BLOCK_M)
    offs_m = tl.program_id(1) * BLOCK_M + offs
    mask_m = offs_m < M
    lines = x_ptr + offs_m.to(tl.int64) * stride_xm
    first = tl.load(offsets_ptr + col)
    end = tl.load(offsets_ptr + col + 1)
    first_segment = tl.cdiv(first, SEGMENT)
    end_segment = end // SEGMENT
    n_within = (end_segment - first_segment).to(tl.int32)
    before_end = tl.where(n_within > 0, first_segment * SEGMENT, end)
    gathered, own = _gather(
        tl.zeros((BLOCK_PAIR, BLOCK_M), tl.float32), tl.zeros((BLOCK_PAIR,), tl.float32),
        lines, stride_xn, mask_m, inverse_ptr, partners_ptr, weights_ptr, values_ptr,
        first, (before_end - first).to(tl.int32), BLOCK_PAIR,
    )  # fmt: skip
    if n_within > 0:
        offs_segment = tl.arange(0, BLOCK_PAIR)
        for start in range(0, n_within, BLOCK_PAIR):
            mask = offs_segment < n_within - start
            place = tl.program_id(1) * n_segments + first_segment + start + offs_segment
            segment_lines = segment_lines_ptr + place[:, None] * BLOCK_M + offs[None, :]
            gathered += tl.load(segment_lines, mask=mask[:, None], other=0.0)
            own += tl.load(segment_own_ptr + place, mask=mask, other=0.0)
        behind = end_segment * SEGMENT
        gathered, own = _gather(
            gathered, own, lines, stride_xn, mask_m, inverse_ptr, partners_ptr, weights_ptr, values_ptr,
            behind, (end - behind).to(tl.int32), BLOCK_PAIR,
        )  # fmt: skip
    inverse = tl.load(inverse_ptr + col)
    x_hat = tl.load(lines + col.to(tl.int64) * stride_xn, mask=mask_m, other=0.0).to(tl.float32) * inverse
    own_sum = tl.where(tl.load(norm_ptr + col) > eps, tl.sum(own, axis=0), 0.0)
    grad = (tl.sum(gathered, axis=0) - x_hat * own_sum) * inverse
    grad_ptrs = grad_ptr + col.to(tl.int64) * stride_gn + offs_m.to(tl.int64) * stride_gm
    tl.store(grad_ptrs, round_to(grad, grad_ptr.dtype.element_ty), mask=mask_m)


class SegmentSums(NamedTuple):
    """What the pairs of each segment that lies within one column have of grad_hat and of own; no other is written.

    There are p // SEGMENT segments of p pairs, as a shorter one at the end of the list has no sum.
    """

    lines: Tensor
    """float32 [n_blocks, n_segments, entries of a block]"""
    own: Tensor
    """float32 [n_blocks, n_segments]"""


def segment_sums(
    x_slab: Tensor, inverse: Tensor, targets: Tensor, partners: Tensor, weights: Tensor, values: Tensor
) -> SegmentSums:
    """Sum segments for x_slab [N, slab], a slab of a transposed matrix with any strides.

    `targets` int32 [p] are the columns that the pairs belong to, ascending; pairs whose target is N belong to none. The
    result must have fewer than 2**31 lines.
    """
    n_features, n_rows = x_slab.shape
    block_m, n_segments = LINE_BYTES // x_slab.element_size(), targets.numel() // SEGMENT
    lines = weights.new_empty(triton.cdiv(n_rows, block_m), n_segments, block_m)
    own = lines.new_empty(lines.shape[:2])
    if n_segments > 0:
        n_programs = min(own.numel(), current_device().n_multiprocessors * _PROGRAMS_PER_SM)
        launch(
            _segment_sums_kernel, (n_programs,),
            x_slab, x_slab.stride(0), x_slab.stride(1), inverse, targets, partners, weights, values, lines, own,
            n_rows, n_features, n_segments,
            SEGMENT=SEGMENT, BLOCK_M=block_m, BLOCK_PAIR=_BLOCK_PAIR, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return SegmentSums(lines, own)


def pair_gradient(
    x_slab: Tensor, norms: Tensor, inverse: Tensor, offsets: Tensor, partners: Tensor, weights: Tensor, values: Tensor,
    sums: SegmentSums, grad_slab: Tensor, eps: float,
) -> None:  # fmt: skip
    """Write grad_slab for x_slab, both [N, slab] of transposed matrices, with any strides; at most MOST_BLOCKS blocks.

    The pairs of column j are those from ``offsets[j]`` to ``offsets[j + 1]``; `sums` are theirs, for this slab.
    """
    n_features, _ = x_slab.shape
    n_blocks, n_segments, block_m = sums.lines.shape
    launch(
        _pair_gradient_kernel, (n_features, n_blocks),
        x_slab, x_slab.stride(0), x_slab.stride(1), norms, inverse, offsets, partners, weights, values, *sums,
        grad_slab, grad_slab.stride(0), grad_slab.stride(1), x_slab.shape[1], n_segments, eps,
        SEGMENT=SEGMENT, BLOCK_M=block_m, BLOCK_PAIR=_BLOCK_PAIR, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
