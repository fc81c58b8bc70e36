"""How kernels over gram tiles are launched: block sizes by architecture, the device, and the arguments they share.

A kernel over gram tiles is persistent: as many programs are launched as run at once, and each takes every n-th tile. So
a launch that has nothing to do ends at once, and what a program sums up does not depend on timing.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether TRITON_INTERPRET=1 was set when the kernels were imported: then they run on the CPU, in NumPy."""

DESCRIPTOR_BYTES = 16
"""Lines that a tensor descriptor addresses begin at multiples of so many bytes."""

LINE_STEP = 16
"""Through pointers, kernels load several entries at once if lines begin and masks end at multiples of so many: Triton
knows of an integer argument whether 16 divides it."""

NEVER, ALWAYS, IF_FLAGGED = (tl.constexpr(choice) for choice in range(3))
"""Values of SCALED, which tells a kernel whether to multiply x by the scale of its operand: not at all, always, or only
if the flags of the operand are set, see `Operand.scaled`."""

RESTART_ROWS = 2048
"""Rows of x in each of the partial sums of an operand that `restarts`."""

Kind = Literal["half", "tf32", "ieee"]
"""What is multiplied: bf16 or fp16 numbers; float32 numbers truncated to tf32; float32 numbers as they are."""


_only_compiles = ContextVar("_only_compiles", default=False)
"""Whether `launch` compiles kernels without launching them, as it does within `compiling_ahead`"""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch the programs of a kernel; within `compiling_ahead` compile it and launch nothing.

    Every kernel must be launched by this function: while others are only compiled, one that is launched otherwise would
    read memory that nobody has written.
    """
    if _only_compiles.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile what is launched here by `launch`, several kernels at a time; at the end all of it is ready.

    Otherwise Triton compiles each kernel at its first launch, one after another.
    """
    with ThreadPoolExecutor(thread_name_prefix="topk_ortho") as pool, triton.AsyncCompileMode(pool):
        token = _only_compiles.set(True)
        try:
            yield
        finally:
            _only_compiles.reset(token)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Block sizes and launch options of a kernel over gram tiles."""

    block: int
    """Side of the square tile of the gram; where the tile is not square, its rows."""
    block_m: int
    """Rows of x that are multiplied at a step."""
    group: int
    """Tile rows that form a band; a program goes through the tiles band by band, see `tiles.triangle_tile`."""
    num_warps: int
    num_stages: int
    programs_per_sm: int
    """Programs that a multiprocessor is meant to hold at once; registers and shared memory must allow it."""
    max_registers: int | None = None
    """Registers that a thread may use, None to leave it to the compiler; on AMD the programs decide it."""
    block_col: int | None = None
    """Columns of the tile; None where it is square."""

    def options(self, architecture: str) -> dict[str, Any]:
        """Options of Triton at a launch."""
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # Triton 3.10 changes the default
        }
        if architecture.startswith("gfx"):
            options["waves_per_eu"] = max(1, self.programs_per_sm * self.num_warps // 4)  # 4 SIMD units share the waves
        elif architecture.startswith("sm_") and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


# The entries were chosen by the registers and shared memory that `python -m bench.compile_report` shows (Triton 3.9);
# of these only `DESCRIBED_CONFIGS` was timed against others on its hardware. Tiles of 128 x 128 are the largest that
# leave room for more than their sums.
TILE_CONFIGS: dict[tuple[str, Kind], TileConfig] = {
    # A multiprocessor holds one program of 8 warps, because scaling, moments and maxima take up to 255 registers a
    # thread. The limit is named because ptxas, left alone, spills on sm_100 rather than exceed 128. The entries of
    # sm_80 use 32 to 48 KB of shared memory, so that consumer chips of compute capability 8.6, 8.9 and 12.0, which have
    # 99 KB, can use them.
    ("sm_80", "half"): TileConfig(
        block=128, block_m=32, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
    ("sm_80", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
    ("sm_90", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=1, max_registers=255
    ),
    # 16 rows a step: 32 take all registers, because tf32 is transposed on its way into shared memory
    ("sm_90", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
    # the sums are in tensor memory
    ("sm_100", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=1, max_registers=255
    ),
    ("sm_100", "tf32"): TileConfig(
        block=128, block_m=32, group=8, num_warps=8, num_stages=3, programs_per_sm=1, max_registers=255
    ),
    # A compute unit has 64 KB of LDS, which the sums pass through: room for one program. Its 8 waves may use 256
    # registers each, and scaled bf16 spills with 64 rows a step. There is a matrix unit for "ieee" too.
    ("gfx942", "half"): TileConfig(block=128, block_m=32, group=8, num_warps=8, num_stages=2, programs_per_sm=1),
    ("gfx942", "tf32"): TileConfig(block=128, block_m=32, group=8, num_warps=8, num_stages=2, programs_per_sm=1),
    ("gfx942", "ieee"): TileConfig(block=128, block_m=16, group=8, num_warps=8, num_stages=2, programs_per_sm=1),
    # In NumPy a step costs its dispatch, so the steps are few and large. With two programs their order cannot matter
    # unnoticed.
    ("interpreter", "half"): TileConfig(block=64, block_m=256, group=2, num_warps=1, num_stages=1, programs_per_sm=2),
}
for _architecture in ("sm_80", "sm_90", "sm_100"):
    # Without a matrix unit 1024 of the 1143 to 1245 instructions of a step multiply and add; with tiles of 64 it would
    # be 512 of 620. These kernels take up to 255 registers too, but ptxas spills in max_cosine if that limit is named.
    TILE_CONFIGS[_architecture, "ieee"] = TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=2, programs_per_sm=1
    )
for _kind in ("tf32", "ieee"):
    TILE_CONFIGS["interpreter", _kind] = TILE_CONFIGS["interpreter", "half"]

# For a first pass that neither scales nor takes moments: a multiprocessor holds two programs, so that one multiplies
# while the other looks for survivors. Where there is no entry here, `TILE_CONFIGS` holds for this pass too.
LEAN_CONFIGS: dict[tuple[str, Kind], TileConfig] = {
    # 4 warps with up to 255 registers, because 8 warps with 128 spill; so do 4 warps with 32 rows a step
    ("sm_80", "half"): TileConfig(
        block=128, block_m=16, group=8, num_warps=4, num_stages=5, programs_per_sm=2, max_registers=255
    ),
    ("sm_80", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=4, num_stages=4, programs_per_sm=2, max_registers=255
    ),
    # 65,536 / (2 * 256) = 128 registers a thread. The epilogue keeps to them without a spill because it goes through
    # the tile by quarters. A program has 64 KB of shared memory (sm_100, half: 96). For half operands on sm_90 see
    # `DESCRIBED_CONFIGS`.
    ("sm_90", "tf32"): TileConfig(
        block=128, block_m=16, group=8, num_warps=8, num_stages=4, programs_per_sm=2, max_registers=128
    ),
    ("sm_100", "half"): TileConfig(
        block=128, block_m=64, group=8, num_warps=8, num_stages=3, programs_per_sm=2, max_registers=128
    ),
    ("sm_100", "tf32"): TileConfig(
        block=128, block_m=32, group=8, num_warps=8, num_stages=3, programs_per_sm=2, max_registers=128
    ),
    # 4 waves a program, with up to 256 registers and 32 KB of LDS, half of what there is
    ("gfx942", "half"): TileConfig(block=128, block_m=32, group=8, num_warps=4, num_stages=2, programs_per_sm=2),
    ("gfx942", "tf32"): TileConfig(block=128, block_m=16, group=8, num_warps=4, num_stages=2, programs_per_sm=2),
    ("gfx942", "ieee"): TileConfig(block=128, block_m=16, group=8, num_warps=4, num_stages=2, programs_per_sm=2),
}

# For the same pass where a tensor memory accelerator copies the tiles: it needs no registers for addresses, so that a
# program holds the sums of a larger tile, of which each copied number is used more often. Of 256 x 128 and 128 x 256 in
# bands of 4, 8 and 16 this was the fastest on an H200, or within 2% of it, see bench/results/h200.md.
DESCRIBED_CONFIGS: dict[tuple[str, Kind], TileConfig] = {
    ("sm_90", "half"): TileConfig(
        block=256, block_col=128, block_m=64, group=4, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
}

# For a first pass by descriptors with blocked summation: a program holds the total beside the current partial sum, so
# that its tile is half as large.
RESTARTED_CONFIGS: dict[tuple[str, Kind], TileConfig] = {
    ("sm_90", "half"): TileConfig(
        block=128, block_col=128, block_m=64, group=8, num_warps=8, num_stages=4, programs_per_sm=1, max_registers=255
    ),
}

# A product of two tiles needs the first one transposed. For a row-major x this is done by the order in which addresses
# are loaded; for the entries below it is done after loading. The first way lets half operands of sm_80 be copied into
# shared memory without registers, and saves instructions on sm_90 and gfx942. But tf32 would spill on sm_80. That is
# what the compiled code says (`python -m bench.compile_report`); none of it was timed.
TRANSPOSED_AFTER_LOADING: set[tuple[str, Kind]] = {("sm_80", "tf32")}


def _sum_error(n_products: int, fraction_bits: int) -> float:
    """How far off a sum of products of fp16 numbers in float32 may be, for each product.

    It is relative to the largest magnitude of a partial sum. A matrix unit adds `n_products` of them to the accumulator
    at once. It aligns these numbers to the largest one, drops what is beyond so many bits of its fraction, adds them
    exactly, and drops what float32 cannot hold.
    """
    return float(((n_products + 1) * 2.0**-fraction_bits + 2.0**-23) / n_products)


# By compute capability or name: Ampere, Ada, Hopper, Blackwell, and CDNA 3, which rounds where the others drop and errs
# less. No maker promises these numbers. They are those of tests in the literature: arXiv 2511.10909, which models each
# of the units bit by bit, PeerJ Computer Science 7:e330 and arXiv 2510.15884 for Ampere, arXiv 2403.00232 for Hopper.
_SUM_ERRORS: dict[int | str, float] = {
    80: _sum_error(8, 24),
    86: _sum_error(8, 24),
    89: _sum_error(8, 24),
    90: _sum_error(16, 25),
    100: _sum_error(16, 25),
    120: _sum_error(16, 25),
    "gfx942": _sum_error(8, 24),
}


class Device(NamedTuple):
    """What a launch depends on."""

    architecture: str
    """Key of `TILE_CONFIGS`: the device's own architecture, or the nearest that has an entry"""
    n_multiprocessors: int
    """Multiprocessors (NVIDIA) or compute units (AMD)"""
    has_tf32: bool
    """Whether the device has matrix instructions for tf32, which is float32 with a mantissa of 10 bits. NVIDIA GPUs
    from sm_80 on have them, and so has AMD's gfx942"""
    sum_error: float | None
    """Bound on the rounding error of its sums of fp16 products, see `_sum_error`; None where no bound is known"""


def sum_error(n_rows: int, *, restarts: bool) -> float | None:
    """Bound on the rounding of the gram of unit columns in fp16 with so many rows, None where no bound is known.

    By Cauchy-Schwarz no partial sum exceeds 1. With `restarts` those of RESTART_ROWS rows each are added in float32.
    """
    of_a_product = current_device().sum_error
    if of_a_product is None or not restarts:
        return None if of_a_product is None else n_rows * of_a_product
    return min(n_rows, RESTART_ROWS) * of_a_product + -(-n_rows // RESTART_ROWS) * 2.0**-24


def current_device() -> Device:
    """The device that Triton launches on, which the caller has made the current one."""
    if INTERPRETED.value:
        # NumPy rounds every addition to nearest
        return Device("interpreter", n_multiprocessors=1, has_tf32=True, sum_error=2.0**-24)
    driver = triton.runtime.driver.active
    return _device(driver, driver.get_current_device())


@functools.cache
def _device(driver: Any, number: int) -> Device:
    target = driver.get_current_target()
    n_multiprocessors = driver.utils.get_device_properties(number)["multiprocessor_count"]
    sum_error = _SUM_ERRORS.get(target.arch)
    if target.backend == "hip":
        return Device("gfx942", n_multiprocessors, has_tf32=target.arch == "gfx942", sum_error=sum_error)
    architecture = {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")
    return Device(architecture, n_multiprocessors, has_tf32=True, sum_error=sum_error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """What the kernels multiply: gram = (x * scale).T @ (x * scale), cosine = gram * factor[row] * factor[col]."""

    x: Tensor
    """[M, N] float32, bfloat16 or float16, any strides"""
    factor: Tensor
    """float32 [N]"""
    scale: Tensor | None
    """float32 [N], powers of two, all 1 unless `flags` are set; None multiplies x as it is"""
    kind: Kind
    flags: Tensor | None = None
    """int32 [1], not 0 if x must be multiplied by `scale`, with which it comes"""
    restarts: bool = False
    """Whether a kernel sums RESTART_ROWS rows of x at a time, starting from 0 each time, and adds up these partial sums
    in float32. The rounding of such a blocked summation has a smaller bound, see `sum_error`. Not with a scale"""
    is_lean: bool = False
    """Whether these operands are for a first pass over the gram in which x is not scaled and no moments are taken. The
    kernel of such a pass needs fewer registers, so its block sizes are others: `DESCRIBED_CONFIGS`, `LEAN_CONFIGS`"""

    @property
    def config(self) -> TileConfig:
        """Its entry of the tables for the current device."""
        key = current_device().architecture, self.kind
        if self.is_lean and self.is_described:
            return (RESTARTED_CONFIGS if self.restarts else DESCRIBED_CONFIGS)[key]
        if self.is_lean and not self.restarts and key in LEAN_CONFIGS:
            return LEAN_CONFIGS[key]
        return TILE_CONFIGS[key]

    @property
    def is_described(self) -> bool:
        """Whether the kernel loads tiles of x through a tensor descriptor, so that the hardware copies whole tiles.

        It does where `DESCRIBED_CONFIGS` has an entry for the device and x `is_describable`.
        """
        return (current_device().architecture, self.kind) in DESCRIBED_CONFIGS and is_describable(self.x)

    @property
    def n_tiles(self) -> int:
        """Tiles in the upper triangle of the gram; where they are not square, all tiles of the squares there."""
        config = self.config
        sides = config.block, config.block_col or config.block
        n_square_rows = -(-self.x.shape[1] // max(sides))
        return n_square_rows * (n_square_rows + 1) // 2 * (max(sides) // min(sides))

    @property
    def n_resident(self) -> int:
        """Programs that the device runs at once."""
        n_programs: int = current_device().n_multiprocessors * self.config.programs_per_sm
        return n_programs

    @property
    def n_programs(self) -> int:
        """Programs of a launch."""
        return min(self.n_tiles, self.n_resident)

    @property
    def transposes_addresses(self) -> bool:
        """Whether the kernel reads a tile of x.T directly, by pointers in the order of the transpose.

        Otherwise it reads the tile of x as it lies in memory, and transposes it in registers.
        `TRANSPOSED_AFTER_LOADING` lists the devices and kinds for which that is faster, if x is row-major.
        """
        return self.x.stride(1) == 1 and (current_device().architecture, self.kind) not in TRANSPOSED_AFTER_LOADING

    @property
    def scaled(self) -> tl.constexpr:
        """What SCALED is in kernels that multiply these operands: NEVER, ALWAYS or IF_FLAGGED.

        Matrix units of NVIDIA read operands from shared memory, into which they are copied without registers if they
        need not be scaled. So there the kernels have two loops, and `flags` choose. On gfx942, which has no room for
        the buffers of both loops, and for products without a matrix unit, x is always multiplied by `scale`, which is
        mostly 1.
        """
        if self.scale is None:
            return NEVER
        has_two_loops = self.kind != "ieee" and not current_device().architecture.startswith("gfx")
        return IF_FLAGGED if has_two_loops else ALWAYS

    def arguments(self) -> dict[str, Any]:
        """Arguments and options that every kernel over gram tiles takes."""
        config = self.config
        return {
            "x_ptr": self.x,
            "stride_xm": self.x.stride(0),
            "stride_xn": self.x.stride(1),
            "factor_ptr": self.factor,
            "scale_ptr": self.factor if self.scale is None else self.scale,
            "flags_ptr": self.factor if self.flags is None else self.flags,
            "M": self.x.shape[0],
            "N": self.x.shape[1],
            "n_loaded": n_loaded(self.x),
            "BLOCK": config.block,
            "BLOCK_M": config.block_m,
            "GROUP": config.group,
            "RESTART": RESTART_ROWS if self.restarts else 0,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            "SCALED": self.scaled.value,
            "TRANSPOSED": self.transposes_addresses,
            **config.options(current_device().architecture),
        }

    def described_arguments(self) -> dict[str, Any]:
        """Arguments and options of a kernel that reads x by tensor descriptors."""
        config = self.config
        is_feature_major = self.x.stride(1) != 1
        lines = self.x.T if is_feature_major else self.x
        block_col = config.block_col or config.block

        def boxes(width: int) -> TensorDescriptor:
            box = [width, config.block_m] if is_feature_major else [config.block_m, width]
            return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), box)

        return {
            "row_boxes": boxes(config.block),
            "col_boxes": boxes(block_col),
            "factor_ptr": self.factor,
            "M": self.x.shape[0],
            "N": self.x.shape[1],
            "IS_FEATURE_MAJOR": is_feature_major,
            "BLOCK_ROW": config.block,
            "BLOCK_COL": block_col,
            "BLOCK_M": config.block_m,
            "GROUP": config.group,
            "PARTS": 4 if block_col > 128 else 2,
            "RESTART": RESTART_ROWS if self.restarts else 0,
            **config.options(current_device().architecture),
        }


def is_describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can be made for x [M, N].

    A tensor descriptor tells the GPU's copy engine where x lies, in which shape and with which strides. The rows of x,
    or its columns, have to be contiguous, and to begin at multiples of DESCRIPTOR_BYTES.
    """
    lines = x if x.stride(1) == 1 else x.T
    line, entry = lines.stride()
    is_aligned = x.data_ptr() % DESCRIPTOR_BYTES == 0 and line * x.element_size() % DESCRIPTOR_BYTES == 0
    return entry == 1 and line >= lines.shape[1] and is_aligned


def n_loaded(x: Tensor) -> int:
    """Columns of x [M, N] that kernels load: N, rounded up to a multiple of 16 if a row-major x has room for that.

    A mask that ends at such a multiple leaves loads wide. What is in the columns beyond N reaches no result, see
    `tiles.gram_tile`.
    """
    n_features = x.shape[1]
    rounded_up = _rounded_up(n_features)
    end = x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + rounded_up
    has_room = x.stride(1) == 1 and end * x.element_size() <= x.untyped_storage().nbytes()
    return rounded_up if has_room else n_features


def is_aligned(x: Tensor) -> bool:
    """Whether a thread can load several neighbouring entries of x [M, N] by one instruction.

    The rows of x, or its columns, have to be contiguous, and begin and end at multiples of LINE_STEP entries. A row may
    end there beyond the last column, if x has room for that.
    """
    is_row_major = x.stride(1) == 1
    line, entry = x.stride() if is_row_major else x.T.stride()
    length = n_loaded(x) if is_row_major else x.shape[0]
    is_multiple = line % LINE_STEP == 0 and length % LINE_STEP == 0
    return entry == 1 and is_multiple and x.data_ptr() % DESCRIPTOR_BYTES == 0


def aligned(x: Tensor) -> Tensor:
    """x [M, N], or a copy that is aligned. A copy of a feature-major x ends with rows of zeros, which add nothing."""
    if is_aligned(x):
        return x
    is_feature_major = _is_feature_major(x)
    lines = x.T if is_feature_major else x
    n_lines, n_entries = lines.shape
    copy = lines.new_zeros(n_lines, _rounded_up(n_entries))
    copy[:, :n_entries] = lines
    return copy.T if is_feature_major else copy[:, :n_entries]


def empty_aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor [M, N] in the layout of x, whose lines begin at multiples of 16 entries."""
    is_feature_major = _is_feature_major(x)
    n_lines, n_entries = x.T.shape if is_feature_major else x.shape
    lines = x.new_empty(n_lines, _rounded_up(n_entries), dtype=dtype)[:, :n_entries]
    return lines.T if is_feature_major else lines


def _is_feature_major(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) != 1


def _rounded_up(n: int) -> int:
    return -(-n // LINE_STEP) * LINE_STEP
