"""For every column its largest signed cosine to another column of its chunk, and which column that is.

    best[i] = max_{j != i} cosine[i, j],    packed as (order-preserving bits of the value) << 32 | 2**32 - 1 - j

The packing lets an atomic maximum of int64 keep the largest value, and of equal values the lowest partner j, in
whatever order tiles finish. A chunk is a run of columns; chunks start `chunk_stride` columns apart. The first
`n_larger` chunks have N columns, the others N - 1.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import Operand, launch, n_loaded
from topk_ortho.kernels.tiles import cosines, n_tiles_of, quartered_tile


@triton.jit
def _packed(value, partner):
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 would be ordered below 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (4294967295 - partner.to(tl.int64))


@triton.jit
def _max_cosine_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr,  # [M, n_chunks * chunk_stride], [same] float32 x 2
    flags_ptr, best_ptr,                                 # [1] int32, [n_chunks * chunk_stride] int64
    M, N, n_loaded, chunk_stride, n_larger,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    first = chunk * chunk_stride
    x_ptr += first.to(tl.int64) * stride_xn
    factor_ptr += first
    scale_ptr += first
    best_ptr += first
    n_cols = tl.where(chunk < n_larger, N, N - 1)
    n_tile_rows = tl.cdiv(N, BLOCK)
    for tile in range(tl.program_id(0), n_tiles_of(n_tile_rows), tl.num_programs(0)):
        parts, offs_row, first_col = quartered_tile(
            tile, n_tile_rows, x_ptr, stride_xm, stride_xn, scale_ptr, flags_ptr, M, N, n_loaded,
            BLOCK, BLOCK_M, GROUP, RESTART, PRECISION, SCALED, TRANSPOSED,
        )  # fmt: skip
        row_best = tl.full((BLOCK,), -2.0, tl.float32)
        row_partner = tl.zeros((BLOCK,), tl.int32)
        for part in tl.static_range(4):
            offs_col = first_col + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            cosine = cosines(parts[part], factor_ptr, offs_row, offs_col, n_cols, -2.0)
            highest = tl.max(cosine, axis=1)
            partner = tl.min(tl.where(cosine == highest[:, None], offs_col[None, :], 2147483647), axis=1)
            is_higher = highest > row_best  # of equal values the first one stays, which is the lowest column
            row_partner = tl.where(is_higher, partner, row_partner)
            row_best = tl.where(is_higher, highest, row_best)

            highest = tl.max(cosine, axis=0)
            partner = tl.min(tl.where(cosine == highest[None, :], offs_row[:, None], 2147483647), axis=0)
            tl.atomic_max(best_ptr + offs_col, _packed(highest, partner), mask=highest > -2.0, sem="relaxed")
        tl.atomic_max(best_ptr + offs_row, _packed(row_best, row_partner), mask=row_best > -2.0, sem="relaxed")


def max_cosine(operand: Operand, best: Tensor, n_chunks: int, chunk_stride: int, largest: int, n_larger: int) -> None:
    """Raise `best` int64 [n_chunks * chunk_stride]; partners are counted from the start of their chunk."""
    first_chunk = replace(operand, x=operand.x[:, :largest])
    last_chunk = operand.x[:, (n_chunks - 1) * chunk_stride :]
    n_programs = min(first_chunk.n_tiles, triton.cdiv(operand.n_resident, n_chunks))
    launch(
        _max_cosine_kernel, (n_programs, n_chunks),
        best_ptr=best, n_larger=n_larger,
        chunk_stride=chunk_stride if n_chunks > 1 else 0,  # N would be taken for one, which 16 need not divide
        **first_chunk.arguments() | {"n_loaded": n_loaded(last_chunk)},
    )  # fmt: skip
