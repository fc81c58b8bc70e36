"""Transpose of a matrix, by tiles that pass through shared memory.

    out[n, m] = x[m, n]

Reads and writes are both of whole lines. torch's copy of a transposed view reads or writes single entries a line apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch
from topk_ortho.kernels.radix_select import PASS, stage_of

_BLOCK_M, _BLOCK_N = 64, 64


@triton.jit
def _transpose_kernel(
    x_ptr, stride_xm, stride_xn,        # [M, N]
    out_ptr, stride_on, stride_om,      # [N, M]
    plan_ptr,                           # [7] int64
    M, N,
    HAS_PLAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if HAS_PLAN and stage_of(plan_ptr) != PASS:
        return
    n_blocks = tl.cdiv(N, BLOCK_N)
    offs_n = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_n[None, :].to(tl.int64) * stride_xn
    out_ptrs = out_ptr + offs_n[:, None].to(tl.int64) * stride_on + offs_m[None, :].to(tl.int64) * stride_om
    tl.store(out_ptrs, tl.trans(tl.load(x_ptrs, mask=mask)), mask=tl.trans(mask))


def transpose(x: Tensor, out: Tensor, plan: Tensor | None = None) -> None:
    """Write the transpose of x [M, N] into out [N, M]; both have the same dtype, and any strides.

    With the plan of a radix select it returns at once unless the stage is PASS.
    """
    n_rows, n_columns = x.shape
    n_programs = triton.cdiv(n_rows, _BLOCK_M) * triton.cdiv(n_columns, _BLOCK_N)
    launch(
        _transpose_kernel, (n_programs,),
        x, x.stride(0), x.stride(1), out, out.stride(0), out.stride(1), x if plan is None else plan, n_rows, n_columns,
        HAS_PLAN=plan is not None, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
