"""Unit columns rounded to fp16, and how far the rounding moved them at most.

    rounded[:, j] = fp16(2**15 * x_hat[:, j]),    x_hat[:, j] = x[:, j] * inverse[j]
    deviation = max_j ||2**-15 * rounded[:, j] - x_hat[:, j]||_2

For unit columns a, b and their rounded forms a', b', |a'.b' - a.b| <= |a'-a||b| + |b'-b||a| + |a'-a||b'-b| by
Cauchy-Schwarz, so that rounding changes no cosine by more than 2 deviation + deviation**2. fp16 rounds to 11 bits and
bf16 to 8, at the same speed. The factor 2**15 keeps entries from 2**-29 on out of the subnormal numbers of fp16, and
1.0 below its largest number. Smaller entries become +-2**-29, never 0. So if no entry is negative, the rounded product
of two columns is 0 only where their cosine is: no sum of products > 0 is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import empty_aligned, launch

SCALE = tl.constexpr(2.0**15)
_LEAST = tl.constexpr(2.0**-14)  # the smallest normal number of fp16; some matrix units take subnormal ones for 0
_BLOCK_COL, _BLOCK_M = 32, 128


@triton.jit
def _round_columns_kernel(
    x_ptr, stride_xm, stride_xn,        # [M, N] float32
    inverse_ptr,                        # [N] float32
    rounded_ptr, stride_rm, stride_rn,  # [M, N] float16
    deviation_ptr,                      # [2] float32, >= 0
    M, N,
    BLOCK_COL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs_col = tl.program_id(0) * BLOCK_COL + tl.arange(0, BLOCK_COL)
    offs_m = tl.arange(0, BLOCK_M)
    mask_col = offs_col < N
    inverse = tl.load(inverse_ptr + offs_col, mask=mask_col, other=0.0)
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_col[None, :].to(tl.int64) * stride_xn
    rounded_ptrs = rounded_ptr + offs_m[:, None].to(tl.int64) * stride_rm + offs_col[None, :].to(tl.int64) * stride_rn
    squares = tl.zeros((BLOCK_M, BLOCK_COL), tl.float32)
    lowest = tl.zeros((BLOCK_M, BLOCK_COL), tl.float32)
    for m in range(0, M, BLOCK_M):
        mask = (offs_m[:, None] < M - m) & mask_col[None, :]
        x_hat = tl.load(x_ptrs, mask=mask, other=0.0) * inverse[None, :]
        lowest = tl.minimum(lowest, x_hat)
        scaled = x_hat * SCALE
        scaled = tl.where(scaled > 0, tl.maximum(scaled, _LEAST), scaled)
        scaled = tl.where(scaled < 0, tl.minimum(scaled, -_LEAST), scaled)
        rounded = scaled.to(tl.float16)
        tl.store(rounded_ptrs, rounded, mask=mask)
        moved = rounded.to(tl.float32) * (1.0 / SCALE) - x_hat
        squares += moved * moved
        x_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_xm
        rounded_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_rm
    deviation = tl.max(tl.sqrt_rn(tl.sum(squares, axis=0)), axis=0)
    most_negative = tl.max(tl.max(-lowest, axis=0), axis=0)
    # non-negative floats order as their bits
    bits_ptr = deviation_ptr.to(tl.pointer_type(tl.int32))
    tl.atomic_max(bits_ptr, deviation.to(tl.int32, bitcast=True))
    tl.atomic_max(bits_ptr + 1, most_negative.to(tl.int32, bitcast=True))


def round_columns(x: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(rounded columns, float16 [M, N] in the layout of x; float32 [2]) of a float32 x.

    The two numbers are the deviation and the largest magnitude of a negative entry of x_hat, 0 if there is none.
    """
    n_rows, n_features = x.shape
    rounded = empty_aligned(x, torch.float16)
    deviation = x.new_zeros(2)
    launch(
        _round_columns_kernel, (triton.cdiv(n_features, _BLOCK_COL),),
        x, x.stride(0), x.stride(1), inverse, rounded, rounded.stride(0), rounded.stride(1), deviation,
        n_rows, n_features,
        BLOCK_COL=_BLOCK_COL, BLOCK_M=_BLOCK_M, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return rounded, deviation
