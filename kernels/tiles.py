"""Device code that the kernels over gram tiles share.

    gram[i, j] = sum_m x[m, i] * x[m, j],    tile (row, col) holds i in row * BLOCK + [0, BLOCK), j likewise

Only tiles with row <= col are computed. Every kernel has the same two loops: over the tiles of its program, and over
the four quarters of a tile, left to right. They are written out in each kernel, because a function of Triton cannot be
handed the body of a loop; what they call is here. The quarters are there for the registers: what a kernel does with a
whole tile at once would not fit them.
"""

import triton
import triton.language as tl

from topk_ortho.kernels.launch import ALWAYS, IF_FLAGGED, INTERPRETED, NEVER


@triton.jit
def n_tiles_of(n_tile_rows):
    """Number of tiles, int64: it passes 2**31 at N = 8.4 million with tiles of 128."""
    n_tile_rows = tl.cast(n_tile_rows, tl.int64)
    return n_tile_rows * (n_tile_rows + 1) // 2


@triton.jit
def triangle_tile(tile, n_tile_rows, GROUP: tl.constexpr):
    """(row, col) of the tile with the given number, row <= col < n_tile_rows.

    Tiles are numbered band by band, a band being GROUP tile rows, so that the tiles in flight share columns of x in L2.
    A band is a triangle at the diagonal and a rectangle to the right of it; both are numbered column by column. Square
    roots give the place to within one, and integer comparisons settle it. The root over all tile rows is float64, so
    that this holds for every N that int32 can hold, see tests/kernels/test_tiles.py.
    """
    tile = tl.cast(tile, tl.int64)
    side = 2 * tl.cast(n_tile_rows, tl.int64) + 1
    root = tl.sqrt((side * side - 8 * tile).to(tl.float64))
    row = ((side - root) * 0.5).to(tl.int64)
    row = tl.where(row * n_tile_rows - row * (row - 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * n_tile_rows - (row + 1) * row // 2 <= tile, row + 1, row)

    first = row // GROUP * GROUP
    local = (tile - (first * n_tile_rows - first * (first - 1) // 2)).to(tl.int32)
    first = first.to(tl.int32)
    height = tl.minimum(GROUP, n_tile_rows - first)
    in_triangle = height * (height + 1) // 2
    column = ((tl.sqrt((8 * local + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > local, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= local, column + 1, column)
    rest = local - in_triangle
    is_triangle = local < in_triangle
    row = first + tl.where(is_triangle, local - column * (column + 1) // 2, rest % height)
    col = first + tl.where(is_triangle, column, height + rest // height)
    return row, col


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b for a [rows, BLOCK_M], b [BLOCK_M, cols], accumulated in float32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x rounded to another floating dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter drops the lower bits
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _sum_of_rows(
    x_ptr, stride_xm, stride_xn,  # [M, N], from its first row that is added up
    scale_ptr,                    # [N] float32
    M, N, n_loaded, first_row, first_col,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What M rows of x add to a tile [BLOCK, BLOCK] of the gram."""
    M_AXIS: tl.constexpr = 1 if TRANSPOSED else 0  # of a tile of rows as it is loaded
    offs_m = tl.arange(0, BLOCK_M)
    offs_row = first_row + tl.arange(0, BLOCK)
    offs_col = first_col + tl.arange(0, BLOCK)
    row_m, row_n = tl.expand_dims(offs_m, 1 - M_AXIS), tl.expand_dims(offs_row, M_AXIS)
    col_m, col_n = offs_m[:, None], offs_col[None, :]
    # int64: m * stride_xm passes 2**31 at M = 32,768, N = 65,536
    row_ptrs = x_ptr + row_m.to(tl.int64) * stride_xm + row_n.to(tl.int64) * stride_xn
    col_ptrs = x_ptr + col_m.to(tl.int64) * stride_xm + col_n.to(tl.int64) * stride_xn
    step = tl.cast(BLOCK_M, tl.int64) * stride_xm
    if SCALED == ALWAYS:
        scale_row = tl.load(scale_ptr + row_n, mask=row_n < N, other=0.0)
        scale_col = tl.load(scale_ptr + col_n, mask=col_n < N, other=0.0)
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    for m in range(0, M, BLOCK_M):
        a = tl.load(row_ptrs, mask=(row_m < M - m) & (row_n < n_loaded), other=0.0)
        b = tl.load(col_ptrs, mask=(col_m < M - m) & (col_n < n_loaded), other=0.0)
        if SCALED == ALWAYS:
            a = (a.to(tl.float32) * scale_row).to(a.dtype)
            b = (b.to(tl.float32) * scale_col).to(b.dtype)
        if not TRANSPOSED:
            a = tl.trans(a)
        accumulator = product(a, b, accumulator, PRECISION)
        row_ptrs += step
        col_ptrs += step
    return accumulator


@triton.jit
def gram_tile(
    x_ptr, stride_xm, stride_xn,  # [M, N]
    scale_ptr, flags_ptr,         # [N] float32, [1] int32
    M, N, n_loaded, first_row, first_col,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK, BLOCK] of the gram with its corner at (first_row, first_col); 0 beyond column n_loaded >= N.

    A column reaches only its own row and column of the tile, so that what x holds beyond N, NaN even, reaches nothing
    else. SCALED says whether x is multiplied by `scale`: NEVER, ALWAYS, or IF_FLAGGED, that is, if `flags` are set.
    Where they are not, every scale is 1, and x goes into the product as it was loaded. If RESTART is not 0, RESTART
    rows at a time are summed, and these partial sums are added. TRANSPOSED transposes addresses of x instead of what is
    loaded from them, see `launch.Operand`.
    """
    if SCALED == IF_FLAGGED:
        if tl.load(flags_ptr) > 0:
            gram = _sum_of_rows(
                x_ptr, stride_xm, stride_xn, scale_ptr, M, N, n_loaded, first_row, first_col,
                BLOCK, BLOCK_M, PRECISION, ALWAYS, TRANSPOSED,
            )  # fmt: skip
        else:
            gram = _sum_of_rows(
                x_ptr, stride_xm, stride_xn, scale_ptr, M, N, n_loaded, first_row, first_col,
                BLOCK, BLOCK_M, PRECISION, NEVER, TRANSPOSED,
            )  # fmt: skip
    elif RESTART == 0:
        gram = _sum_of_rows(
            x_ptr, stride_xm, stride_xn, scale_ptr, M, N, n_loaded, first_row, first_col,
            BLOCK, BLOCK_M, PRECISION, SCALED, TRANSPOSED,
        )  # fmt: skip
    else:
        gram = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in range(0, M, RESTART):
            gram += _sum_of_rows(
                x_ptr + tl.cast(first, tl.int64) * stride_xm, stride_xm, stride_xn, scale_ptr,
                tl.minimum(M - first, RESTART), N, n_loaded, first_row, first_col,
                BLOCK, BLOCK_M, PRECISION, SCALED, TRANSPOSED,
            )  # fmt: skip
    return gram


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def parts_of(tile, PARTS: tl.constexpr):
    """The columns of a tile in 2 or 4 equal parts, left to right."""
    parts = _halves(tile)
    if PARTS == 4:
        first, second = _halves(parts[0])
        third, fourth = _halves(parts[1])
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def quartered_tile(
    tile, n_tile_rows,
    x_ptr, stride_xm, stride_xn,  # [M, N]
    scale_ptr, flags_ptr,         # [N] float32, [1] int32
    M, N, n_loaded,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(quarters of the tile with the given number, its rows [BLOCK], its first column)."""
    tile_row, tile_col = triangle_tile(tile, n_tile_rows, GROUP)
    first_row, first_col = tile_row * BLOCK, tile_col * BLOCK
    gram = gram_tile(
        x_ptr, stride_xm, stride_xn, scale_ptr, flags_ptr, M, N, n_loaded, first_row, first_col,
        BLOCK, BLOCK_M, RESTART, PRECISION, SCALED, TRANSPOSED,
    )  # fmt: skip
    return parts_of(gram, 4), first_row + tl.arange(0, BLOCK), first_col


@triton.jit
def cosines(gram, factor_ptr, offs_row, offs_col, N, NO_PAIR: tl.constexpr):
    """Cosines of a part of a tile, within [-1, 1]; NO_PAIR where row < col < N does not hold."""
    factor_row = tl.load(factor_ptr + offs_row, mask=offs_row < N, other=0.0)
    factor_col = tl.load(factor_ptr + offs_col, mask=offs_col < N, other=0.0)
    cosine = gram * factor_row[:, None] * factor_col[None, :]
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    is_pair = (offs_row[:, None] < offs_col[None, :]) & (offs_col < N)[None, :]
    return tl.where(is_pair, cosine, NO_PAIR)
