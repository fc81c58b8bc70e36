"""Cosines of the recorded pairs in float32, from columns whose entries are contiguous.

    value[p] += sum_m x_hat[m, rows[p]] * x_hat[m, cols[p]],    x_hat[:, j] = x[:, j] * inverse[j]

It replaces the values that a pass over rounded columns recorded. x may come in slabs of its rows; the values add up.
After the last slab, the pairs that reach the bound are counted. Thanks to the slack of that pass, no pair that reaches
the bound is missing from the records, see `topk_ortho.kernels.radix_select`.
"""

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import current_device, launch
from topk_ortho.kernels.radix_select import BOUND, PASS, RadixSelect, certify, is_last_program, stage_of

LINE_BYTES = 256
"""Bytes of a column that a program reads at a step."""
_BLOCK_PAIR = 32
# In 16 slabs of 256 rows of x [4096, 32768] an H200 read lines at about 7 TB/s, near what its L2 gives. The loop over a
# line has no barrier and uses no shared memory. Slabs of fewer rows, as for more columns, were not measured.
_PROGRAMS_PER_SM = {"sm_80": 5}  # 6 elsewhere: what registers allow


@triton.jit
def _rescore_kernel(
    x_ptr, stride_xn, stride_xm,                          # [N, slab] float32, features in rows
    inverse_ptr,                                          # [N] float32
    plan_ptr, bounds_ptr,                                 # [7] int64, [3] float32
    values_ptr, rows_ptr, cols_ptr,                       # [capacity] float32, int32, int32
    n_survivors_ptr, n_certified_ptr, arrived_ptr,        # [1] int64 x 3
    M, k, capacity, floor, is_first, is_last,
    IS_ABS: tl.constexpr, BLOCK_PAIR: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    if stage_of(plan_ptr) != PASS:
        return
    n_records = tl.minimum(tl.load(n_survivors_ptr), capacity).to(tl.int32)
    bound = tl.load(bounds_ptr + BOUND)
    beyond = tl.where(bound == 0.0, 0.0, -2.0)  # a bound of 0 has not let all zeros pass, so they do not count
    offs_m = tl.arange(0, BLOCK_M)
    n_certified = tl.zeros((), tl.int32)
    for first in range(tl.program_id(0) * BLOCK_PAIR, n_records, tl.num_programs(0) * BLOCK_PAIR):
        pair = first + tl.arange(0, BLOCK_PAIR)
        mask = pair < n_records
        row = tl.load(rows_ptr + pair, mask=mask, other=0)
        col = tl.load(cols_ptr + pair, mask=mask, other=0)
        inverse_row = tl.load(inverse_ptr + row)
        inverse_col = tl.load(inverse_ptr + col)
        row_ptrs = x_ptr + row[:, None].to(tl.int64) * stride_xn + offs_m[None, :] * stride_xm
        col_ptrs = x_ptr + col[:, None].to(tl.int64) * stride_xn + offs_m[None, :] * stride_xm
        products = tl.zeros((BLOCK_PAIR, BLOCK_M), tl.float32)
        for m in range(0, M, BLOCK_M):
            mask_m = mask[:, None] & (offs_m[None, :] < M - m)
            a = tl.load(row_ptrs + m * stride_xm, mask=mask_m, other=0.0) * inverse_row[:, None]
            b = tl.load(col_ptrs + m * stride_xm, mask=mask_m, other=0.0) * inverse_col[:, None]
            products += a * b
        value = tl.sum(products, axis=1)
        if is_first == 0:
            value += tl.load(values_ptr + pair, mask=mask, other=0.0)
        if is_last > 0:
            value = tl.minimum(tl.maximum(value, -1.0), 1.0)
            similarity = tl.abs(value) if IS_ABS else value
            reaches = (similarity >= bound) & (similarity > beyond)
            n_certified += tl.sum((mask & reaches).to(tl.int32), axis=0)
        tl.debug_barrier()  # several threads load a value, and one of them stores it
        tl.store(values_ptr + pair, value, mask=mask)
    if is_last > 0:
        tl.atomic_add(n_certified_ptr, n_certified.to(tl.int64))
        if is_last_program(arrived_ptr):
            certify(plan_ptr, bounds_ptr, n_survivors_ptr, n_certified_ptr, k, capacity, floor, True)


def rescore(
    x_slab: Tensor, inverse: Tensor, radix: RadixSelect, values: Tensor, rows: Tensor, cols: Tensor,
    k: int, floor: float, *, is_first: bool, is_last: bool, is_abs: bool,
) -> None:  # fmt: skip
    """Add the products of a slab [N, rows of the slab] of x.T to the values [capacity] of the records.

    After the last slab the pass is certified, or a repair begins.
    """
    capacity = values.numel()
    device = current_device()
    n_resident = device.n_multiprocessors * _PROGRAMS_PER_SM.get(device.architecture, 6)
    n_programs = min(triton.cdiv(capacity, _BLOCK_PAIR), n_resident)
    launch(
        _rescore_kernel, (n_programs,),
        x_slab, x_slab.stride(0), x_slab.stride(1), inverse, radix.plan, radix.bounds, values, rows, cols,
        radix.n_survivors, radix.n_certified, radix.arrived, x_slab.shape[1], k, capacity, floor, int(is_first),
        int(is_last),
        IS_ABS=is_abs, BLOCK_PAIR=_BLOCK_PAIR, BLOCK_M=LINE_BYTES // x_slab.element_size(), num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
