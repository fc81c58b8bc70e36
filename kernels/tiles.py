"""The gram in tiles: which tile a program computes, the product of one, and how each architecture is best cut.

    gram[i, j] = sum_m x[m, i] * x[m, j],    tile (row, col) holds i in row * BLOCK + [0, BLOCK), j likewise

Only tiles with row <= col are computed. Their order goes down bands of GROUP tile rows, column by column, so that the
tiles in flight share columns of x in L2.

Every kernel that computes tiles is persistent: a fixed number of programs, each taking every n-th tile. So a launch
that has nothing to do ends at once, and what a program sums up does not depend on timing.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, in NumPy."""

Kind = Literal["half", "tf32", "ieee"]
"""Of the product: bf16 or fp16 operands; fp32 operands cut off to tf32; fp32 operands on the plain FMA units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """How a kernel that computes gram tiles is cut and launched."""

    block: int
    """Side of the square tile of the gram."""
    block_m: int
    """Rows of x at a step of the reduction."""
    group: int
    """Tile rows of a band of the order."""
    num_warps: int
    num_stages: int
    programs_per_sm: int
    """Programs that fit on a multiprocessor at once, by registers and shared memory."""
    max_registers: int | None = None
    """Registers a thread may use, None for what the compiler likes; for AMD they follow from the programs."""

    def options(self, architecture: str) -> dict[str, Any]:
        """Launch options of Triton."""
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # a default that Triton 3.10 changes
        }
        if architecture.startswith("gfx"):
            options["waves_per_eu"] = max(1, self.programs_per_sm * self.num_warps // 4)  # 4 units share the waves
        elif architecture.startswith("sm_") and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


# Chosen by the registers and shared memory that `python -m topk_ortho.kernels.compile_report` tells (Triton 3.9); none
# was timed on its hardware yet. Tiles of 128 x 128: the largest that leave room for more than their sums.
TILE_CONFIGS: dict[tuple[str, Kind], TileConfig] = {
    # One program of 8 warps on a multiprocessor: scaling, moments and row maxima take up to 255 registers a thread. The
    # limit is named because ptxas, left alone, spills on sm_100 rather than exceed 128. sm_80: 32 to 48 KB of shared
    # memory, so that consumer chips of compute capability 8.6, 8.9 and 12.0 (99 KB) can use its entries.
    ("sm_80", "half"): TileConfig(
        block=128, block_m=32, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
    ("sm_80", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
    ("sm_90", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=1, max_registers=255
    ),
    # 16 rows a step: 32 take all registers, for tf32 is transposed on its way into shared memory
    ("sm_90", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
    # sums are in tensor memory
    ("sm_100", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=1, max_registers=255
    ),
    ("sm_100", "tf32"): TileConfig(
        block=128, block_m=32, group=8, num_warps=8, num_stages=3, programs_per_sm=1, max_registers=255
    ),
    # 64 KB of LDS, which the sums pass through: one program. Its 8 waves may have 256 registers, and scaled bf16 spills
    # with 64 rows a step. Here "ieee" has a matrix unit too.
    ("gfx942", "half"): TileConfig(block=128, block_m=32, group=8, num_warps=8, num_stages=2, programs_per_sm=1),
    ("gfx942", "tf32"): TileConfig(block=128, block_m=32, group=8, num_warps=8, num_stages=2, programs_per_sm=1),
    ("gfx942", "ieee"): TileConfig(block=128, block_m=16, group=8, num_warps=8, num_stages=2, programs_per_sm=1),
    # In NumPy a step costs its dispatch: few, large ones. Two programs, so that their order cannot matter unnoticed.
    ("interpreter", "half"): TileConfig(block=64, block_m=256, group=2, num_warps=1, num_stages=1, programs_per_sm=2),
}
for _architecture in ("sm_80", "sm_90", "sm_100"):
    # No matrix unit: 1024 of the 1143 to 1245 instructions of a step multiply and add; with tiles of 64, 512 of 620. Up
    # to 255 registers too, but told so ptxas spills in gram_row_max, which it does not left alone.
    TILE_CONFIGS[_architecture, "ieee"] = TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=2, programs_per_sm=1
    )
for _kind in ("tf32", "ieee"):
    TILE_CONFIGS["interpreter", _kind] = TILE_CONFIGS["interpreter", "half"]

# For the first pass, which neither scales nor takes moments: two programs on a multiprocessor, so that one multiplies
# while the other looks for survivors. Where none is named, it does as the others.
LEAN_CONFIGS: dict[tuple[str, Kind], TileConfig] = {
    # 4 warps of up to 255 registers: 8 of 128 spill. With 32 rows a step, 4 warps spill too.
    ("sm_80", "half"): TileConfig(
        block=128, block_m=16, group=8, num_warps=4, num_stages=5, programs_per_sm=2, max_registers=255
    ),
    ("sm_80", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=4, num_stages=4, programs_per_sm=2, max_registers=255
    ),
    # 65,536 / (2 * 256) = 128 registers a thread, which the epilogue keeps to without a spill because it goes through
    # the tile by quarters; 96 KB (tf32: 64) of shared memory a program
    ("sm_90", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=2, max_registers=128
    ),
    ("sm_90", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=4, programs_per_sm=2, max_registers=128
    ),
    ("sm_100", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=2, max_registers=128
    ),
    ("sm_100", "tf32"): TileConfig(
        block=128, block_m=32, group=8, num_warps=8, num_stages=3, programs_per_sm=2, max_registers=128
    ),
    # 4 waves each: up to 256 registers and 32 KB of LDS, half of what there is
    ("gfx942", "half"): TileConfig(block=128, block_m=32, group=8, num_warps=4, num_stages=2, programs_per_sm=2),
    ("gfx942", "tf32"): TileConfig(block=128, block_m=16, group=8, num_warps=4, num_stages=2, programs_per_sm=2),
    ("gfx942", "ieee"): TileConfig(block=128, block_m=16, group=8, num_warps=4, num_stages=2, programs_per_sm=2),
}


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Key of `TILE_CONFIGS` for a device: its own architecture, or the nearest with a table entry."""
    if INTERPRETED.value:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def has_tf32(device: torch.device) -> bool:
    """Whether the matrix unit takes tf32: every NVIDIA architecture here, of AMD's only gfx942."""
    return torch.version.hip is None or torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def tile_config(device: torch.device, kind: Kind) -> TileConfig:
    """The entry of `TILE_CONFIGS` for a device."""
    return TILE_CONFIGS[architecture_of(device), kind]


def lean_config(device: torch.device, kind: Kind) -> TileConfig:
    """The entry of `LEAN_CONFIGS` for a device, or what it does as the others."""
    return LEAN_CONFIGS.get((architecture_of(device), kind)) or tile_config(device, kind)


@functools.cache
def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors (NVIDIA) or compute units (AMD) of a device; 1 under the interpreter."""
    return 1 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """What is multiplied: gram = (x * scale).T @ (x * scale), cosine = gram * factor[row] * factor[col]."""

    x: Tensor
    """[M, N] float32, bfloat16 or float16, any strides"""
    factor: Tensor
    """float32 [N]"""
    scale: Tensor | None
    """float32 [N] powers of two; None multiplies x as it is"""
    kind: Kind
    is_lean: bool = False
    """`LEAN_CONFIGS` instead of `TILE_CONFIGS`"""

    @property
    def config(self) -> TileConfig:
        """Its entry of the table."""
        return (lean_config if self.is_lean else tile_config)(self.x.device, self.kind)

    @property
    def n_tiles(self) -> int:
        """Tiles of the upper triangle."""
        n_tile_rows = -(-self.x.shape[1] // self.config.block)
        return n_tile_rows * (n_tile_rows + 1) // 2

    @property
    def n_programs(self) -> int:
        """Programs of a launch."""
        return min(self.n_tiles, n_multiprocessors(self.x.device) * self.config.programs_per_sm)

    def arguments(self) -> dict[str, Any]:
        """Arguments that every kernel over gram tiles takes."""
        config = self.config
        return {
            "x_ptr": self.x,
            "stride_xm": self.x.stride(0),
            "stride_xn": self.x.stride(1),
            "factor_ptr": self.factor,
            "scale_ptr": self.scale if self.scale is not None else self.factor,
            "M": self.x.shape[0],
            "N": self.x.shape[1],
            "BLOCK": config.block,
            "BLOCK_M": config.block_m,
            "GROUP": config.group,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            "SCALED": self.scale is not None,
            **config.options(architecture_of(self.x.device)),
        }


@triton.jit
def triangle_tile(tile, n_tile_rows, GROUP: tl.constexpr):
    """(row, col) of the tile with a given number, row <= col < n_tile_rows.

    Bands of GROUP rows follow each other. A band is a triangle at the diagonal and a rectangle right of it; both are
    numbered column by column. Square roots give the place to within one, integers settle it: exact for every tile of
    N = 2**20, see tests/kernels/test_tiles.py.
    """
    tile = tl.cast(tile, tl.int64)
    side = 2 * n_tile_rows + 1
    root = tl.sqrt((side * side - 8 * tile).to(tl.float32))
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
    """accumulator + a.T @ b for a [BLOCK_M, rows], b [BLOCK_M, cols], accumulated in float32."""
    if INTERPRETED:  # it multiplies the bits of bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(tl.trans(a), b, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x in another floating dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # it cuts the bits off
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def gram_tile(
    x_ptr, stride_xm, stride_xn,  # [M, N]
    scale_ptr,                    # [N] float32
    M, N, first_row, first_col,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK, BLOCK] of the gram whose corner is (first_row, first_col); 0 outside N."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_row = first_row + tl.arange(0, BLOCK)
    offs_col = first_col + tl.arange(0, BLOCK)
    mask_row = offs_row < N
    mask_col = offs_col < N
    # int64: m * stride_xm passes 2**31 at M = 32,768, N = 65,536
    row_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_row[None, :].to(tl.int64) * stride_xn
    col_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_col[None, :].to(tl.int64) * stride_xn
    step = tl.cast(BLOCK_M, tl.int64) * stride_xm
    if SCALED:
        scale_row = tl.load(scale_ptr + offs_row, mask=mask_row, other=0.0)
        scale_col = tl.load(scale_ptr + offs_col, mask=mask_col, other=0.0)
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    for m in range(0, M, BLOCK_M):
        mask_m = offs_m[:, None] < M - m
        a = tl.load(row_ptrs, mask=mask_m & mask_row[None, :], other=0.0)
        b = tl.load(col_ptrs, mask=mask_m & mask_col[None, :], other=0.0)
        if SCALED:
            a = (a.to(tl.float32) * scale_row[None, :]).to(a.dtype)
            b = (b.to(tl.float32) * scale_col[None, :]).to(b.dtype)
        accumulator = product(a, b, accumulator, PRECISION)
        row_ptrs += step
        col_ptrs += step
    return accumulator


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """The four column quarters of a tile, left to right: epilogues go through them one by one, to live in registers."""
    left, right = _halves(tile)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def cosines(gram, factor_ptr, offs_row, offs_col, N):
    """Cosines of a part of a tile; NaN, which every comparison refuses, where there is no pair row < col < N."""
    factor_row = tl.load(factor_ptr + offs_row, mask=offs_row < N, other=0.0)
    factor_col = tl.load(factor_ptr + offs_col, mask=offs_col < N, other=0.0)
    cosine = gram * factor_row[:, None] * factor_col[None, :]
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    is_pair = (offs_row[:, None] < offs_col[None, :]) & (offs_col < N)[None, :]
    return tl.where(is_pair, cosine, float("nan"))
