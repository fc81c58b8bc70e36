"""Histogram of the similarities of a sample of pairs, for a first guess.

Columns of x are drawn without a random generator: number i of the sample is column i * step mod N. The step is near the
golden section of N and has no divisor in common with N, so that the columns are all different and evenly spread. The
first of them are the rows of a small gram, the next ones its columns. It is computed from columns rounded to bf16,
which is good enough for a guess.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch
from topk_ortho.kernels.radix_select import GUESS, SAMPLE_DIGIT, RadixSelect
from topk_ortho.kernels.tiles import product

_BLOCK, _BLOCK_M = 64, 64


@triton.jit
def _gram_sample_kernel(
    x_ptr, stride_xm, stride_xn,                 # [M, N]
    inverse_ptr, state_ptr,                      # [N] float32, [3] float32
    histogram_ptr,                               # [4096] int64
    M, N, step, n_rows, n_cols,
    HAS_STATE: tl.constexpr, IS_ABS: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    if HAS_STATE:  # noqa: SIM102 -- the compiler decides the outer condition
        if tl.load(state_ptr + GUESS) > -1.0:
            return
    offs_m = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_row = row < n_rows
    mask_col = col < n_cols
    row = row.to(tl.int64) * step % N
    col = (n_rows + col).to(tl.int64) * step % N
    inverse_row = tl.load(inverse_ptr + row, mask=mask_row, other=0.0)
    inverse_col = tl.load(inverse_ptr + col, mask=mask_col, other=0.0)
    row_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + row[None, :] * stride_xn
    col_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + col[None, :] * stride_xn
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    for m in range(0, M, BLOCK_M):
        mask_m = offs_m[:, None] < M - m
        a = tl.load(row_ptrs, mask=mask_m & mask_row[None, :], other=0.0).to(tl.float32) * inverse_row[None, :]
        b = tl.load(col_ptrs, mask=mask_m & mask_col[None, :], other=0.0).to(tl.float32) * inverse_col[None, :]
        accumulator = product(tl.trans(a.to(tl.bfloat16)), b.to(tl.bfloat16), accumulator, "ieee")
        row_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_xm
        col_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_xm
    cosine = tl.minimum(tl.maximum(accumulator, -1.0), 1.0)
    similarity = tl.abs(cosine) if IS_ABS else cosine
    is_counted = mask_row[:, None] & mask_col[None, :] & (similarity >= 0.0)
    digit = tl.where(is_counted, similarity, 0.0).to(tl.int32, bitcast=True) >> SHIFT
    one = tl.full((BLOCK, BLOCK), 1, tl.int64)
    tl.atomic_add(histogram_ptr + digit, one, mask=is_counted, sem="relaxed")


def gram_sample(
    x: Tensor, inverse: Tensor, radix: RadixSelect, state: Tensor | None, n_rows: int, n_cols: int, *, is_abs: bool
) -> None:
    """Add n_rows * n_cols pairs to `radix.sample_histogram`, unless `state` holds a guess; n_rows + n_cols <= N."""
    n_features = x.shape[1]
    step = max(1, round(n_features * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, n_features) > 1:
        step += 1
    shift, _ = SAMPLE_DIGIT
    launch(
        _gram_sample_kernel, (triton.cdiv(n_rows, _BLOCK), triton.cdiv(n_cols, _BLOCK)),
        x, x.stride(0), x.stride(1), inverse, inverse if state is None else state, radix.sample_histogram,
        x.shape[0], n_features, step, n_rows, n_cols,
        HAS_STATE=state is not None, IS_ABS=is_abs, SHIFT=shift, BLOCK=_BLOCK, BLOCK_M=_BLOCK_M,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
