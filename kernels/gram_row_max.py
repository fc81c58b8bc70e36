"""For every column its largest signed cosine to another one of its chunk, and the lowest column that has it.

    best[i] = max_{j != i} cosine[i, j],    packed as (order-preserving bits of the value) << 32 | 2**32 - 1 - j

so that an atomic maximum of int64 keeps the largest value, and the lowest partner among equals, in whatever order tiles
end. A chunk is a run of columns, `chunk_stride` apart; the first `n_larger` chunks hold `N` columns, the others N - 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.tiles import Operand, gram_tile, n_multiprocessors, quarters, triangle_tile


@triton.jit
def _packed(value, partner):
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 would order below 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (4294967295 - partner.to(tl.int64))


@triton.jit
def _gram_row_max_kernel(
    x_ptr, stride_xm, stride_xn, factor_ptr, scale_ptr,  # [M, n_chunks * chunk_stride], [same] float32 x 2
    flags_ptr, best_ptr,                                 # [1] int32, [n_chunks * chunk_stride] int64
    M, N, chunk_stride, n_larger,
    WANTED_FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    if tl.minimum(tl.load(flags_ptr), 1) != WANTED_FLAGS:
        return
    chunk = tl.program_id(1)
    first = chunk * chunk_stride
    x_ptr += first.to(tl.int64) * stride_xn
    factor_ptr += first
    scale_ptr += first
    best_ptr += first
    n_cols = tl.where(chunk < n_larger, N, N - 1)
    n_tile_rows = tl.cdiv(N, BLOCK)
    for tile in range(tl.program_id(0), n_tile_rows * (n_tile_rows + 1) // 2, tl.num_programs(0)):
        tile_row, tile_col = triangle_tile(tile, n_tile_rows, GROUP)
        gram = gram_tile(
            # up to the next chunk, which starts at a multiple of 16; n_cols need not be one, and loads would be narrow
            x_ptr, stride_xm, stride_xn, scale_ptr, M, chunk_stride, tile_row * BLOCK, tile_col * BLOCK,
            BLOCK, BLOCK_M, PRECISION, SCALED,
        )  # fmt: skip
        offs_row = tile_row * BLOCK + tl.arange(0, BLOCK)
        factor_row = tl.load(factor_ptr + offs_row, mask=offs_row < n_cols, other=0.0)
        row_best = tl.full((BLOCK,), -2.0, tl.float32)
        row_partner = tl.zeros((BLOCK,), tl.int32)
        parts = quarters(gram)
        for part in tl.static_range(4):
            offs_col = tile_col * BLOCK + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            factor_col = tl.load(factor_ptr + offs_col, mask=offs_col < n_cols, other=0.0)
            cosine = parts[part] * factor_row[:, None] * factor_col[None, :]
            cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
            is_pair = (offs_row[:, None] < offs_col[None, :]) & (offs_col < n_cols)[None, :]
            cosine = tl.where(is_pair, cosine, -2.0)

            highest = tl.max(cosine, axis=1)
            partner = tl.min(tl.where(cosine == highest[:, None], offs_col[None, :], 2147483647), axis=1)
            is_higher = highest > row_best  # parts ascend: of equals the first stays
            row_partner = tl.where(is_higher, partner, row_partner)
            row_best = tl.where(is_higher, highest, row_best)

            highest = tl.max(cosine, axis=0)
            partner = tl.min(tl.where(cosine == highest[None, :], offs_row[:, None], 2147483647), axis=0)
            tl.atomic_max(best_ptr + offs_col, _packed(highest, partner), mask=highest > -2.0, sem="relaxed")
        tl.atomic_max(best_ptr + offs_row, _packed(row_best, row_partner), mask=row_best > -2.0, sem="relaxed")


def gram_row_max(
    operand: Operand, flags: Tensor, best: Tensor, n_chunks: int, chunk_stride: int, largest: int, n_larger: int
) -> None:
    """Raise `best` int64 [n_chunks * chunk_stride]; partners count from the start of their chunk.

    Runs if `flags` [1] of the norms are clear and the operand is not scaled, or if they are set and it is.
    """
    config = operand.config
    n_tile_rows = triton.cdiv(largest, config.block)
    n_tiles = n_tile_rows * (n_tile_rows + 1) // 2
    resident = n_multiprocessors(operand.x.device) * config.programs_per_sm
    arguments = operand.arguments() | {"N": largest}
    _gram_row_max_kernel[(min(n_tiles, max(1, triton.cdiv(resident, n_chunks))), n_chunks)](
        flags_ptr=flags, best_ptr=best, chunk_stride=chunk_stride, n_larger=n_larger,
        WANTED_FLAGS=int(operand.scale is not None), **arguments,
    )  # fmt: skip
