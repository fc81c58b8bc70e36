"""Column norms of x [M, N] in one pass, and all that follows from them.

    norm[j] = sqrt(sum_m x[m, j]**2),    x_hat[:, j] = x[:, j] / max(norm[j], EPS)

Sums are float32. The squares of x * 2**-70 are summed at the same time and take over where those of x overflow, so that
every norm that float32 can hold is right. `scale` and `factor` are two factors of 1 / max(norm, EPS). The scale is 1,
or, for a norm above 2**60, a power of two that brings it into [2, 4). Multiplying x by it is exact. Columns of fp16 are
never scaled, as their norm cannot exceed 2**60 with fewer than 2**88 rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch

OUT_OF_RANGE, NOT_FINITE = tl.constexpr(1), tl.constexpr(2)
_BLOCK_COL, _BLOCK_M = 32, 128


class Norms(NamedTuple):
    """Norms of the columns, and what follows from them."""

    norms: Tensor
    """float32 [N]; Inf or NaN where x is not finite, Inf where float32 cannot hold the norm"""
    inverse: Tensor
    """float32 [N], 1 / max(norm, EPS), 0 for a dead column"""
    scale: Tensor
    """float32 [N], 1, or for a norm above 2**60 the power of two for which norm * scale is in [2, 4)"""
    factor: Tensor
    """float32 [N], inverse / scale"""
    flags: Tensor
    """int32 [1], two bits: OUT_OF_RANGE if a norm is above 2**60, so that products may overflow; NOT_FINITE if one is
    Inf or NaN"""


@triton.jit
def _column_norms_kernel(
    x_ptr, stride_xm, stride_xn,                              # [M, N]
    norm_ptr, inverse_ptr, scale_ptr, factor_ptr, flags_ptr,  # [N] float32 x 4, [1] int32
    M, N, eps,
    BLOCK_COL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs_col = tl.program_id(0) * BLOCK_COL + tl.arange(0, BLOCK_COL)
    offs_m = tl.arange(0, BLOCK_M)
    mask_col = offs_col < N
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_col[None, :].to(tl.int64) * stride_xn
    step = tl.cast(BLOCK_M, tl.int64) * stride_xm
    squares = tl.zeros((BLOCK_M, BLOCK_COL), tl.float32)
    small_squares = tl.zeros((BLOCK_M, BLOCK_COL), tl.float32)
    for m in tl.range(0, M, BLOCK_M, num_stages=4):  # loads run three steps ahead
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M - m) & mask_col[None, :], other=0.0).to(tl.float32)
        small = x * 2.0**-70
        squares += x * x
        small_squares += small * small
        x_ptrs += step
    sum_squares = tl.sum(squares, axis=0)
    rescaled = tl.sqrt_rn(tl.sum(small_squares, axis=0)) * 2.0**70
    norm = tl.where(sum_squares < float("inf"), tl.sqrt_rn(sum_squares), rescaled)

    floored = tl.maximum(norm, eps)
    is_in_range = norm <= 2.0**60  # false for NaN
    exponent = floored.to(tl.int32, bitcast=True) & 0x7F800000
    to_two = (0x7F800000 - exponent).to(tl.float32, bitcast=True)  # 2**(1 - e) for a norm in [2**e, 2**(e + 1))
    scale = tl.where(is_in_range, 1.0, to_two)
    is_live = norm > 0.0
    tl.store(norm_ptr + offs_col, norm, mask=mask_col)
    tl.store(inverse_ptr + offs_col, tl.where(is_live, tl.div_rn(1.0, floored), 0.0), mask=mask_col)
    tl.store(scale_ptr + offs_col, scale, mask=mask_col)
    tl.store(factor_ptr + offs_col, tl.where(is_live, tl.div_rn(1.0, floored * scale), 0.0), mask=mask_col)
    flags = tl.where(is_in_range, 0, OUT_OF_RANGE) | tl.where(norm < float("inf"), 0, NOT_FINITE)
    flags = tl.max(tl.where(mask_col, flags, 0), axis=0)  # NOT_FINITE comes with OUT_OF_RANGE
    if flags > 0:
        tl.atomic_or(flags_ptr, flags)


def column_norms(x: Tensor, eps: float) -> Norms:
    """Norms of the columns of x, which is float32, bfloat16 or float16 with any strides."""
    n_features = x.shape[1]
    norms, inverse, scale, factor = (x.new_empty(n_features, dtype=torch.float32) for _ in range(4))
    flags = x.new_zeros(1, dtype=torch.int32)
    launch(
        _column_norms_kernel, (triton.cdiv(n_features, _BLOCK_COL),),
        x, x.stride(0), x.stride(1), norms, inverse, scale, factor, flags, x.shape[0], n_features, eps,
        BLOCK_COL=_BLOCK_COL, BLOCK_M=_BLOCK_M, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return Norms(norms, inverse, scale, factor, flags)
