"""Gradient of a weighted sum of cosines: gather the partners of each column, then apply the normalisation's Jacobian.

    grad_hat[:, j] = sum_p weight[p] * x_hat[:, partner[p]],    own[j] = sum_p weight[p] * value[p],    p of column j
    grad[:, j] = (grad_hat[:, j] - x_hat[:, j] * own[j]) / max(norm[j], EPS),    without `own` where norm[j] <= EPS

The pairs of a column are consecutive (CSR). One program owns a column and a block of its entries, so there are no
atomics and every sum has a fixed order. The programs of a block of entries run for all columns before those of the next
block, so that the N * BLOCK_M entries that they gather stay in L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.tiles import round_to

BLOCK_M = 256
"""Entries of a column that a program owns; it gathers them in lines of 512 to 1,024 bytes."""
_BLOCK_PAIR = 4
MOST_ROWS = 65535 * BLOCK_M
"""Most rows of a slab: the second axis of a grid holds no more programs."""
# A program is one warp, so that very many run at once and hide each other's waits for what they gather. Of blocks from
# 64 to 512 entries, 4 to 16 pairs and 1 to 4 warps these were the fastest on an H200, or within 8% of it, for bf16 and
# float32.


@triton.jit
def _pair_gradient_kernel(
    x_ptr, stride_xn, stride_xm,                        # [N, slab], features in rows
    norm_ptr, inverse_ptr,                              # [N] float32 x 2
    offsets_ptr, partners_ptr, weights_ptr, values_ptr, # [N + 1] int64, [p] int32, [p] float32 x 2
    grad_ptr, stride_gn, stride_gm,                     # [N, slab]
    M, eps,
    BLOCK_M: tl.constexpr, BLOCK_PAIR: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    first = tl.load(offsets_ptr + col)
    n_partners = (tl.load(offsets_ptr + col + 1) - first).to(tl.int32)
    line = x_ptr + offs_m.to(tl.int64) * stride_xm
    offs_pair = tl.arange(0, BLOCK_PAIR)
    gathered = tl.zeros((BLOCK_PAIR, BLOCK_M), tl.float32)
    own = tl.zeros((BLOCK_PAIR,), tl.float32)
    for start in range(0, n_partners, BLOCK_PAIR):
        mask = offs_pair < n_partners - start
        pair = first + start + offs_pair
        partner = tl.load(partners_ptr + pair, mask=mask, other=0)
        weight = tl.load(weights_ptr + pair, mask=mask, other=0.0)
        own += weight * tl.load(values_ptr + pair, mask=mask, other=0.0)
        x = tl.load(
            line[None, :] + partner[:, None].to(tl.int64) * stride_xn, mask=mask[:, None] & mask_m[None, :], other=0.0
        )
        factor = weight * tl.load(inverse_ptr + partner, mask=mask, other=0.0)
        gathered += x.to(tl.float32) * factor[:, None]
    inverse = tl.load(inverse_ptr + col)
    x_hat = tl.load(line + col.to(tl.int64) * stride_xn, mask=mask_m, other=0.0).to(tl.float32) * inverse
    own_sum = tl.where(tl.load(norm_ptr + col) > eps, tl.sum(own, axis=0), 0.0)
    grad = (tl.sum(gathered, axis=0) - x_hat * own_sum) * inverse
    grad_ptrs = grad_ptr + col.to(tl.int64) * stride_gn + offs_m.to(tl.int64) * stride_gm
    tl.store(grad_ptrs, round_to(grad, grad_ptr.dtype.element_ty), mask=mask_m)


def pair_gradient(
    x_slab: Tensor, norms: Tensor, inverse: Tensor, offsets: Tensor, partners: Tensor, weights: Tensor, values: Tensor,
    grad_slab: Tensor, eps: float,
) -> None:  # fmt: skip
    """Write grad_slab for x_slab, both [N, at most MOST_ROWS] slabs of transposed matrices, with any strides."""
    n_features, n_rows = x_slab.shape
    _pair_gradient_kernel[(n_features, triton.cdiv(n_rows, BLOCK_M))](
        x_slab, x_slab.stride(0), x_slab.stride(1), norms, inverse, offsets, partners, weights, values,
        grad_slab, grad_slab.stride(0), grad_slab.stride(1), n_rows, eps,
        BLOCK_M=BLOCK_M, BLOCK_PAIR=_BLOCK_PAIR, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
