"""What the compilers make of every kernel, and whether it keeps what its config promises; needs no GPU.

    python -m bench.compile_report [--json]

The launchers are called with tensors that have no memory, on a device that is not there: Triton compiles for it what it
would compile at such a launch, and then launches nothing. So what is reported is what ships, block sizes and options
included. The exit status is 1 if something does not compile or breaks a promise, see `violations`. The report takes
about 9 minutes of processor time, which two processes share, and 2 if Triton has all of it in its cache.

x is [4096, 65536], row-major unless said otherwise. Kernels over gram tiles are compiled for each kind of operand
(bf16, float32 as tf32, float32 as it is) as the backend launches them: the first pass not scaled, the passes of a
repair scaled, both with moments. Only the first pass is also compiled for fp16 and for feature-major x. Similarities
are absolute, tensors are aligned to 16 bytes, and, for AMD, below 2 GB.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from topk_ortho.kernels import radix_select
from topk_ortho.kernels.coactivation import coactivation_products, coactivation_spread, coactivation_sums
from topk_ortho.kernels.gram_histogram import gram_histogram, gram_row_ties
from topk_ortho.kernels.gram_sample import gram_sample
from topk_ortho.kernels.gram_survivors import gram_survivors
from topk_ortho.kernels.launch import INTERPRETED, Kind, Operand
from topk_ortho.kernels.max_cosine import max_cosine
from topk_ortho.kernels.norms import column_norms
from topk_ortho.kernels.pair_gradient import pair_gradient
from topk_ortho.kernels.rescore import rescore
from topk_ortho.kernels.round_columns import round_columns

MAIN_LOOP_KERNELS = {"gram_survivors", "gram_histogram", "gram_row_ties", "max_cosine"}
"""The kernels over gram tiles, where the time goes."""
SPARSE_KERNELS = {"coactivation_products", "coactivation_sums", "coactivation_spread"}
"""The kernels over the products of sparse features."""
_PERSISTENT_KERNELS = MAIN_LOOP_KERNELS | {"rescore"}

_M, _N, _CAPACITY = 4096, 65536, 3_286_826  # a capacity that 16 does not divide, as most
_META = torch.device("meta")
_LOCAL_MEMORY = re.compile(r"LDL|STL")
_MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
_MULTIPLY_ADD = re.compile(r"FFMA|v_(pk_)?fmac?_f32")


class _Architecture(NamedTuple):
    """Limits that its maker documents."""

    target: GPUTarget
    matrix_instruction: str
    """How the names of its matrix instructions begin"""
    shared_bytes: int
    """Shared memory that a program may have"""
    shared_bytes_per_sm: int
    shared_bytes_reserved: int
    """Shared memory of a multiprocessor that the system takes for each program"""
    max_warps: int
    """Warps in a quarter of a multiprocessor"""


# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability. AMD: CDNA 3 ISA, occupancy.
# The entry sm_80 of the tables serves compute capability 8.6, 8.9 and 12.0 too, so its limit is their 99 KB.
ARCHITECTURES = {
    "sm_80": _Architecture(GPUTarget("cuda", 80, 32), "HMMA", 99 * 1024, 164 * 1024, 1024, 16),
    "sm_90": _Architecture(GPUTarget("cuda", 90, 32), "HGMMA", 227 * 1024, 228 * 1024, 1024, 16),
    "sm_100": _Architecture(GPUTarget("cuda", 100, 32), "UTCHMMA", 227 * 1024, 228 * 1024, 1024, 16),
    "gfx942": _Architecture(GPUTarget("hip", "gfx942", 64), "v_mfma", 64 * 1024, 64 * 1024, 0, 8),
}
_REGISTERS = 512
"""32-bit registers of a lane in a quarter of a multiprocessor, which runs a quarter of its warps"""
_TENSOR_MEMORY_COLUMNS = 512
"""Tensor memory of a multiprocessor of sm_100"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One variant of a kernel, compiled for one architecture."""

    kernel: str
    variant: str
    architecture: str
    kind: Kind | None
    """Kind of its operand, None if it is not over gram tiles"""
    num_warps: int
    programs_per_sm: int | None
    """Programs that are launched for a multiprocessor, None if their number follows the size of x"""
    max_registers: int | None
    registers: int
    """Registers of a thread; on AMD vector registers, accumulators included"""
    stack_bytes: int
    """Stack of a thread"""
    n_spills: int
    """Instructions that access the stack; on AMD spilled vector registers"""
    shared_bytes: int
    tensor_memory_columns: int
    """0 but on sm_100"""
    matrix_instructions: dict[str, int]
    main_loop_instructions: int | None
    """None if there is no loop"""

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.kernel} ({self.variant}) on {self.architecture}"


class Code(NamedTuple):
    """Instructions and loops of an assembly."""

    opcodes: list[str]
    loops: list[range]
    """Places in `opcodes` from the target of a backward jump to the jump"""

    @property
    def main_loop(self) -> range | None:
        """The innermost loop with a matrix instruction; without one, that with most multiply-adds, or the largest."""
        innermost = [loop for loop in self.loops if not any(_is_inside(other, loop) for other in self.loops)]
        with_matrix = [loop for loop in self.loops if any(_MATRIX.match(self.opcodes[place]) for place in loop)]
        if with_matrix:
            return min(with_matrix, key=len)
        return max(innermost, key=lambda loop: (self.count(_MULTIPLY_ADD, loop), len(loop)), default=None)

    def count(self, pattern: re.Pattern[str], places: range | None = None) -> int:
        """Number of opcodes that begin with the pattern."""
        places = range(len(self.opcodes)) if places is None else places
        return sum(pattern.match(self.opcodes[place]) is not None for place in places)

    def matrix_instructions(self) -> dict[str, int]:
        """How often each matrix instruction occurs."""
        return dict(Counter(opcode for opcode in self.opcodes if _MATRIX.match(opcode)))


def _is_inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def parse_sass(text: str) -> Code:
    """Code from the output of `cuobjdump -sass`."""
    opcodes: list[str] = []
    jumps, place_of = [], {}
    for address, opcode, operands in re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text, re.M
    ):
        place_of[int(address, 16)] = len(opcodes)
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if opcode.startswith("BRA") and target:
            jumps.append((len(opcodes), int(target[1], 16)))
        opcodes.append(opcode)
    return Code(opcodes, list(_loops(jumps, place_of)))


def parse_amdgcn(text: str) -> Code:
    """Code from the assembly that the AMD backend of LLVM writes."""
    opcodes: list[str] = []
    jumps, place_of = [], {}
    for line in text.split(".amdgpu_metadata")[0].splitlines():
        code = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.L\w+):", code):
            place_of[label[1]] = len(opcodes)
        elif instruction := re.fullmatch(r"((?:s|v|ds|buffer|global|flat|scratch)_\w+)\s*(.*)", code):
            opcode, operands = instruction.groups()
            if opcode == "s_branch" or opcode.startswith("s_cbranch"):
                jumps.append((len(opcodes), operands))
            opcodes.append(opcode)
    return Code(opcodes, list(_loops(jumps, place_of)))


def _loops(jumps: Iterable[tuple[int, Any]], place_of: dict[Any, int]) -> Iterator[range]:
    for place, target in jumps:
        if place_of.get(target, place) < place:  # a jump to itself is the padding after the end
            yield range(place_of[target], place + 1)


def parse_resource_usage(text: str) -> tuple[int, int]:
    """(registers, stack bytes) from the output of `cuobjdump -res-usage`."""
    return _number(r"\bREG:(\d+)", text), _number(r"\bSTACK:(\d+)", text)


def parse_metadata(text: str) -> tuple[int, int, int]:
    """(vector registers, stack bytes, spilled vector registers) from the metadata in an AMD assembly."""
    fields = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    registers, stack_bytes, n_spills = (_number(rf"\.{field}:\s+(\d+)", text) for field in fields)
    return registers, stack_bytes, n_spills


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler wrote"
    return int(match[1])


def max_programs(record: Record) -> int:
    """Programs that fit on a multiprocessor at once."""
    limits = ARCHITECTURES[record.architecture]
    allocated = -(-record.registers // 8) * 8
    warps = 4 * min(limits.max_warps, _REGISTERS // allocated)
    by_shared = limits.shared_bytes_per_sm // max(1, record.shared_bytes + limits.shared_bytes_reserved)
    by_tensor_memory = _TENSOR_MEMORY_COLUMNS // max(1, record.tensor_memory_columns)
    return min(warps // record.num_warps, by_shared, by_tensor_memory)


def violations(records: Iterable[Record]) -> list[str]:
    """Broken promises, a line each.

    - Kernels over gram tiles and over sparse features have no stack and do not spill.
    - Kernels over sparse features use at most 64 registers, so that many programs hide each other's waits.
    - Kinds "half" and "tf32" use the matrix unit.
    - A program has no more shared memory and registers than allowed.
    - The programs of a persistent launch that a multiprocessor is meant to hold at once fit on it.
    """
    found = []
    for record in records:
        limits = ARCHITECTURES[record.architecture]
        if record.kernel in MAIN_LOOP_KERNELS | SPARSE_KERNELS and (record.stack_bytes > 0 or record.n_spills > 0):
            found.append(f"{record.name} has {record.stack_bytes} bytes of stack, {record.n_spills} spills")
        if record.kernel in SPARSE_KERNELS and record.registers > 64:
            found.append(f"{record.name} has {record.registers} registers, more than 64")
        is_found = any(name.startswith(limits.matrix_instruction) for name in record.matrix_instructions)
        if record.kind in ("half", "tf32") and not is_found:
            found.append(f"{record.name} has no {limits.matrix_instruction}")
        if record.shared_bytes > limits.shared_bytes:
            found.append(
                f"{record.name} has {record.shared_bytes} bytes of shared memory, more than {limits.shared_bytes}"
            )
        if record.max_registers is not None and record.registers > record.max_registers:
            found.append(f"{record.name} has {record.registers} registers, more than {record.max_registers}")
        if record.programs_per_sm is not None and record.programs_per_sm > max_programs(record):
            found.append(
                f"{record.name} is launched with {record.programs_per_sm} programs per multiprocessor, "
                f"which holds {max_programs(record)}"
            )
    return found


class Variant(NamedTuple):
    """A launch to report."""

    label: str
    launch: Callable[[], object]
    kind: Kind | None = None


def _operand(dtype: torch.dtype, kind: Kind, *, is_scaled: bool = False, is_feature_major: bool = False) -> Operand:
    x = _empty(_N, _M, dtype=dtype).T if is_feature_major else _empty(_M, _N, dtype=dtype)
    return Operand(x=x, factor=_empty(_N), scale=_empty(_N) if is_scaled else None, kind=kind)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


@cache
def variants() -> list[Variant]:
    """All launches of the report."""
    return [*_gram_variants(), *_other_variants(), *_sparse_variants()]


def _gram_variants() -> Iterator[Variant]:
    radix = radix_select.new_radix_select(_META, _N)
    values, rows, cols = _empty(_CAPACITY), *(_empty(_CAPACITY, dtype=torch.int32) for _ in range(2))
    moments = _empty(1, 3, dtype=torch.float64)
    flags, best = _empty(1, dtype=torch.int32), _empty(_N, dtype=torch.int64)

    def survivors(operand: Operand, moments: torch.Tensor | None = None, is_first: bool = True) -> None:
        gram_survivors(operand, radix, values, rows, cols, moments, 0.0, is_abs=True, is_first=is_first)

    def histogram(operand: Operand, moments: torch.Tensor | None, digit: int) -> None:
        gram_histogram(operand, radix, moments, 0.0, *radix_select.DIGITS_OF_SIMILARITY[digit], is_abs=True)

    kinds: tuple[tuple[Kind, torch.dtype], ...] = (
        ("half", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32),
    )  # fmt: skip
    for kind, dtype in kinds:
        plain, scaled = _operand(dtype, kind), _operand(dtype, kind, is_scaled=True)
        feature_major = _operand(dtype, kind, is_feature_major=True)
        for label, launch in (
            ("", partial(survivors, plain)),
            (", feature-major", partial(survivors, feature_major)),
            (", moments", partial(survivors, plain, moments)),
            (", scaled", partial(survivors, scaled, None, False)),
            (", scaled, first digit", partial(histogram, scaled, None, 0)),
            (", scaled, first digit, moments", partial(histogram, scaled, moments, 0)),
            (", scaled, last digit", partial(histogram, scaled, None, -1)),
            (", scaled", partial(gram_row_ties, scaled, radix, is_abs=True)),
            ("", partial(max_cosine, plain, flags, best, 1, _N, _N, 1)),
            (", scaled", partial(max_cosine, scaled, flags, best, 1, _N, _N, 1)),
        ):
            yield Variant(kind + label, launch, kind)
    yield Variant("half, fp16", partial(survivors, _operand(torch.float16, "half")), "half")


def _other_variants() -> Iterator[Variant]:
    radix = radix_select.new_radix_select(_META, _N)
    per_feature, one, state = _empty(_N), _empty(1), _empty(3)
    flags, count = _empty(1, dtype=torch.int32), _empty(1, dtype=torch.int64)
    rows, cols = (_empty(_CAPACITY, dtype=torch.int32) for _ in range(2))
    values = _empty(_CAPACITY)
    offsets, partners = _empty(_N + 1, dtype=torch.int64), _empty(2 * _CAPACITY, dtype=torch.int32)
    weights = _empty(2 * _CAPACITY)
    k = _CAPACITY // 2
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x, x_slab = _empty(_M, _N, dtype=dtype), _empty(_N, 256, dtype=dtype)
        yield Variant(label, partial(column_norms, x, 1e-12))
        yield Variant(label, partial(gram_sample, x, per_feature, radix, state, 256, 1024, is_abs=True))
        columns = x_slab, per_feature, per_feature, offsets, partners, weights, weights, x_slab
        yield Variant(label, partial(pair_gradient, *columns, 1e-12))
    yield Variant("fp32", partial(round_columns, _empty(_M, _N), per_feature))
    slab = _empty(_N, 256), per_feature, radix, values, rows, cols
    yield Variant("fp32", partial(rescore, *slab, is_first=False, is_last=True, is_abs=True))
    yield Variant("cold", partial(radix_select.begin, radix, flags, None, None, 262, _M, True))
    yield Variant("warm, rounded", partial(radix_select.begin, radix, flags, state, one, 262, _M, True))
    yield Variant("", partial(radix_select.certify, radix, k, _CAPACITY, 0.0, None))
    yield Variant("adaptive tau", partial(radix_select.certify, radix, k, _CAPACITY, 0.0, one))
    for shift, bits in radix_select.DIGITS_OF_SIMILARITY:
        yield Variant(f"{bits} bits from {shift}", partial(radix_select.next_digit, radix, shift, bits, k, _CAPACITY))
    yield Variant("", partial(radix_select.tie_row, radix, k))
    yield Variant("", partial(radix_select.next_state, radix, state, values, count, k, (0.1, 0.01, 0.4)))


def _sparse_variants() -> Iterator[Variant]:
    """2**18 entries of which every one meets 32 others that follow it, in float32 and float64."""
    n_entries, n_products = 2**18, 2**23
    places, starts = _empty(n_entries, dtype=torch.int64), _empty(n_entries + 1, dtype=torch.int64)
    out = _empty(n_entries, dtype=torch.float64)
    for dtype, label in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        values, products = _empty(n_entries, dtype=dtype), _empty(n_products, dtype=dtype)
        for key_dtype in (torch.int32, torch.int64):
            keys, keyed = _empty(n_products, dtype=key_dtype), f"{label}, {str(key_dtype).removeprefix('torch.')} keys"
            yield Variant(keyed, partial(coactivation_products, places, starts, places, values, 7, _N, keys, products))
            yield Variant(keyed, partial(coactivation_sums, keys, products, products))
        spread = places, products, products, places, places, places, values, out
        yield Variant(label, partial(coactivation_spread, *spread))


class AbsentDevice(DriverBase):  # type: ignore[misc]
    """In place of the driver of a GPU of one multiprocessor: launches compile as they would there, and run nothing."""

    def __init__(self, architecture: str, *, compiles: bool = True) -> None:
        self.utils = self
        self.compiles = compiles
        self.kernel: JITFunction[Any] | None = None
        """What was launched last"""
        self.arguments: dict[str, Any] = {}
        """Its arguments as Triton sees them: their types by name, and the values of constants by place"""
        self.binary: Any = None
        """What it was compiled to"""
        self.n_programs = 0
        """Programs on the first axis of its grid"""
        self._target = ARCHITECTURES[architecture].target
        triton.runtime.driver.set_active(self)
        triton.knobs.runtime.jit_cache_hook = self._before_compiling
        triton.knobs.runtime.jit_post_compile_hook = self._after_compiling

    def _before_compiling(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        self.kernel, self.arguments = fn.jit_function, compile
        return not self.compiles

    def _after_compiling(self, *, key: str, fn: Any, **_: Any) -> None:
        self.binary = fn.jit_function.device_caches[self.get_current_device()][0][key]

    @property
    def kernel_name(self) -> str:
        """Name of what was launched last, as its launcher is called."""
        return "" if self.kernel is None else self.kernel.__name__.removeprefix("_").removesuffix("_kernel")

    # From here on, what Triton asks of a driver.

    def get_current_target(self) -> GPUTarget:  # noqa: D102
        return self._target

    def get_current_device(self) -> int:  # noqa: D102
        return id(self)  # no other device has this number, by which Triton keeps what it compiled

    def get_current_stream(self, device: int) -> int:  # noqa: D102
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:  # noqa: D102
        return {"multiprocessor_count": 1, "max_shared_mem": 2**31 - 1}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, ...]:  # noqa: D102
        return None, None, 0, 0, 1024  # module, function, registers, spills, most threads of a program

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:  # noqa: D102
        def launch(grid_0: int, *_: object) -> None:
            self.n_programs = grid_0

        return launch

    is_active = map_python_to_cpp_type = get_active_torch_device = get_benchmarker = None


def compiled(task: tuple[str, int]) -> Record | str:
    """The record of (architecture, number of the variant), or why there is none."""
    architecture, number = task
    variant = variants()[number]
    device = AbsentDevice(architecture)
    try:
        variant.launch()
    except Exception as error:  # of many types; Triton prints the details itself
        reason = " ".join(str(error).split())[:200]
        return f"{device.kernel_name} ({variant.label}) on {architecture} does not compile: {reason}"
    binary, metadata = device.binary, device.binary.metadata
    if "amdgcn" in binary.asm:
        code = parse_amdgcn(binary.asm["amdgcn"])
        registers, stack_bytes, n_spills = parse_metadata(binary.asm["amdgcn"])
    else:
        text = _disassembled(binary.asm["cubin"])
        code = parse_sass(text)
        registers, stack_bytes = parse_resource_usage(text)
        n_spills = code.count(_LOCAL_MEMORY)
    main_loop = code.main_loop
    return Record(
        kernel=device.kernel_name,
        variant=variant.label,
        architecture=architecture,
        kind=variant.kind,
        num_warps=metadata.num_warps,
        programs_per_sm=device.n_programs if device.kernel_name in _PERSISTENT_KERNELS else None,
        max_registers=getattr(metadata, "maxnreg", None),
        registers=registers,
        stack_bytes=stack_bytes,
        n_spills=n_spills,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        matrix_instructions=code.matrix_instructions(),
        main_loop_instructions=None if main_loop is None else len(main_loop),
    )


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def _table(records: list[Record]) -> str:
    header = ("kernel", "variant", "architecture", "warps", "programs", "registers", "stack", "spills", "shared",
              "loop", "matrix instructions")  # fmt: skip
    lines = [
        (
            r.kernel, r.variant, r.architecture, r.num_warps, "" if r.programs_per_sm is None else r.programs_per_sm,
            r.registers, r.stack_bytes, r.n_spills, r.shared_bytes,
            "" if r.main_loop_instructions is None else r.main_loop_instructions,
            ", ".join(f"{count} {name}" for name, count in r.matrix_instructions.items()),
        )
        for r in records
    ]  # fmt: skip
    cells = [header, *(tuple(str(cell) for cell in line) for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    is_text = [column < 3 or column == len(header) - 1 for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    options = parser.parse_args(arguments)
    if INTERPRETED.value:
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled, unset it")

    tasks = [(architecture, number) for number in range(len(variants())) for architecture in ARCHITECTURES]
    context = multiprocessing.get_context("spawn")  # torch has threads
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        results = list(pool.map(compiled, tasks))
    records = sorted((r for r in results if isinstance(r, Record)), key=lambda r: r.kernel)
    failed = [r for r in results if isinstance(r, str)] + violations(records)
    versions = {"triton": triton.__version__, "python": platform.python_version()}
    if options.json:
        print(json.dumps(versions | {"records": [dataclasses.asdict(r) for r in records], "violations": failed}))
    else:
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        print(_table(records))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
