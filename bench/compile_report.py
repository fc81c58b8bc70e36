"""What the compilers make of every kernel, and whether it keeps what its config promises; needs no GPU.

    python -m topk_ortho.kernels.compile_report [--json]

Launchers are called with tensors that have no memory; their launches are recorded instead of made, and compiled for
each architecture as Triton would compile them there. So it is what ships that is reported, block sizes and options
included. The exit status is 1 if something does not compile or a gate fails, see `violations`. Two processes take about
3 minutes, or 1 if Triton has all of it in its cache.

x is [4096, 65536], row-major unless said otherwise. Kernels over gram tiles are compiled for each kind of operand
(bf16, float32 as tf32, float32 as it is) as the backend launches them: the first pass not scaled, the passes of a
repair scaled, both with moments. Only the first pass is also compiled for fp16 and for feature-major x. Similarities
are absolute, tensors are aligned to 16 bytes, and, for AMD, below 2 GB.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import platform
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import topk_ortho.kernels
from topk_ortho.kernels import radix_select
from topk_ortho.kernels import tiles
from topk_ortho.kernels.coactivation import coactivation_products, coactivation_spread, coactivation_sums
from topk_ortho.kernels.gram_histogram import gram_histogram, gram_row_ties
from topk_ortho.kernels.max_cosine import max_cosine
from topk_ortho.kernels.gram_sample import gram_sample
from topk_ortho.kernels.gram_survivors import gram_survivors
from topk_ortho.kernels.norms import column_norms
from topk_ortho.kernels.pair_gradient import pair_gradient
from topk_ortho.kernels.rescore import rescore
from topk_ortho.kernels.round_columns import round_columns

MAIN_LOOP_KERNELS = {"gram_survivors", "gram_histogram", "gram_row_ties", "max_cosine"}
"""Those over gram tiles: where the time goes."""
SPARSE_KERNELS = {"coactivation_products", "coactivation_sums", "coactivation_spread"}
"""Those over the products of sparse features."""
_PERSISTENT_KERNELS = MAIN_LOOP_KERNELS | {"rescore"}

_M, _N, _CAPACITY = 4096, 65536, 3_286_826  # a capacity that 16 does not divide, as most
_META = torch.device("meta")
_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
_LOCAL_MEMORY = re.compile(r"LDL|STL")
_MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
_MULTIPLY_ADD = re.compile(r"FFMA|v_(pk_)?fmac?_f32")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Architecture:
    """Limits that its maker documents."""

    target: Any
    matrix_instruction: str
    """How the names of its matrix instructions begin"""
    shared_bytes: int
    """Shared memory that a program may have"""
    shared_bytes_per_sm: int
    shared_bytes_reserved: int
    """Of a multiprocessor, by the system for each program"""
    registers: int
    """In a quarter of a multiprocessor, which runs a quarter of its warps: 32-bit registers of a lane"""
    max_warps: int
    """In such a quarter"""


# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability. AMD: CDNA 3 ISA, occupancy.
ARCHITECTURES: dict[str, _Architecture] = {
    # also the table entry of compute capability 8.6, 8.9 and 12.0, so their 99 KB, not the 163 KB of 8.0, are its limit
    "sm_80": _Architecture(
        target=GPUTarget("cuda", 80, 32), matrix_instruction="HMMA", shared_bytes=99 * 1024,
        shared_bytes_per_sm=164 * 1024, shared_bytes_reserved=1024, registers=512, max_warps=16,
    ),
    "sm_90": _Architecture(
        target=GPUTarget("cuda", 90, 32), matrix_instruction="HGMMA", shared_bytes=227 * 1024,
        shared_bytes_per_sm=228 * 1024, shared_bytes_reserved=1024, registers=512, max_warps=16,
    ),
    "sm_100": _Architecture(
        target=GPUTarget("cuda", 100, 32), matrix_instruction="UTCHMMA", shared_bytes=227 * 1024,
        shared_bytes_per_sm=228 * 1024, shared_bytes_reserved=1024, registers=512, max_warps=16,
    ),
    "gfx942": _Architecture(
        target=GPUTarget("hip", "gfx942", 64), matrix_instruction="v_mfma", shared_bytes=64 * 1024,
        shared_bytes_per_sm=64 * 1024, shared_bytes_reserved=0, registers=512, max_warps=8,
    ),
}  # fmt: skip
_TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor of sm_100


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One variant of a kernel, compiled for one architecture."""

    kernel: str
    variant: str
    architecture: str
    kind: Literal["half", "tf32", "ieee"] | None
    """Of its product, None if it has no tile config"""
    num_warps: int
    programs_per_sm: int | None
    """As launched, None if the grid follows the size of x"""
    max_registers: int | None
    registers: int
    """Of a thread; on AMD vector registers, accumulators included"""
    stack_bytes: int
    """Of a thread"""
    n_spills: int
    """Instructions that go to the stack; on AMD spilled vector registers"""
    shared_bytes: int
    tensor_memory_columns: int
    """0 but on sm_100"""
    matrix_instructions: dict[str, int]
    main_loop_instructions: int | None
    """None if there is no loop"""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.kernel} ({self.variant}) on {self.architecture}"


class Code(NamedTuple):
    """Assembly, as far as it matters here."""

    opcodes: list[str]
    loops: list[range]
    """Places in `opcodes` between the target of a backward jump and the jump"""

    @property
    def main_loop(self) -> range | None:
        """The innermost loop with a matrix instruction; else that with most multiply-adds, or just the largest."""
        innermost = [loop for loop in self.loops if not any(_is_inside(other, loop) for other in self.loops)]
        with_matrix = [loop for loop in self.loops if any(_MATRIX.match(self.opcodes[place]) for place in loop)]
        if with_matrix:
            return min(with_matrix, key=len)
        return max(innermost, key=lambda loop: (self.count(_MULTIPLY_ADD, loop), len(loop)), default=None)

    def count(self, pattern: re.Pattern[str], places: range | None = None) -> int:
        """Opcodes that begin with the pattern."""
        places = range(len(self.opcodes)) if places is None else places
        return sum(pattern.match(self.opcodes[place]) is not None for place in places)

    def matrix_instructions(self) -> dict[str, int]:
        """How many of each."""
        return dict(Counter(opcode for opcode in self.opcodes if _MATRIX.match(opcode)))


def _is_inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def parse_sass(text: str) -> Code:
    """Of `cuobjdump -sass`."""
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
    """Of the assembly of the AMD backend of LLVM."""
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
    """(registers, stack bytes) of `cuobjdump -res-usage`."""
    return _number(r"\bREG:(\d+)", text), _number(r"\bSTACK:(\d+)", text)


def parse_metadata(text: str) -> tuple[int, int, int]:
    """(vector registers, stack bytes, spilled vector registers) of the metadata of amdgcn."""
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
    warps = 4 * min(limits.max_warps, limits.registers // allocated)
    by_shared = limits.shared_bytes_per_sm // max(1, record.shared_bytes + limits.shared_bytes_reserved)
    by_tensor_memory = _TENSOR_MEMORY_COLUMNS // max(1, record.tensor_memory_columns)
    return min(warps // record.num_warps, by_shared, by_tensor_memory)


def violations(records: Iterable[Record], kernels: Iterable[str]) -> list[str]:
    """What is promised and not kept, a line each.

    - Every kernel has a record for every architecture.
    - Kernels over gram tiles and over sparse features have no stack and do not spill.
    - Kinds "half" and "tf32" use the matrix unit.
    - A program has no more shared memory and registers than allowed.
    - The programs of a persistent launch that a multiprocessor is meant to hold at once fit on it.
    """
    records = list(records)
    covered = {(record.kernel, record.architecture) for record in records}
    found = [
        f"{kernel} has no variant for {architecture}"
        for kernel in kernels
        for architecture in ARCHITECTURES
        if (kernel, architecture) not in covered
    ]
    for record in records:
        limits = ARCHITECTURES[record.architecture]
        if record.kernel in MAIN_LOOP_KERNELS | SPARSE_KERNELS and (record.stack_bytes > 0 or record.n_spills > 0):
            found.append(f"{record.name} has {record.stack_bytes} bytes of stack, {record.n_spills} spills")
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


class _Variant(NamedTuple):
    label: str
    launch: Callable[[], object]


def _operand(dtype: torch.dtype, kind: str, *, is_scaled: bool = False, is_feature_major: bool = False) -> Any:
    x = _empty(_N, _M, dtype=dtype).T if is_feature_major else _empty(_M, _N, dtype=dtype)
    return tiles.Operand(x=x, factor=_empty(_N), scale=_empty(_N) if is_scaled else None, kind=kind)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


@functools.cache
def _variants() -> list[_Variant]:
    """One launch each."""
    return [*_gram_variants(), *_other_variants(), *_sparse_variants()]


def _gram_variants() -> Iterator[_Variant]:
    radix = radix_select.new_radix_select(_META, _N)
    values, rows, cols = _empty(_CAPACITY), *(_empty(_CAPACITY, dtype=torch.int32) for _ in range(2))
    moments = _empty(1, 3, dtype=torch.float64)
    flags, best = _empty(1, dtype=torch.int32), _empty(_N, dtype=torch.int64)

    def select(operand: Any, moments: torch.Tensor | None = None, is_first: bool = True) -> None:
        gram_survivors(operand, radix, values, rows, cols, moments, 0.0, is_abs=True, is_first=is_first)

    def histogram(operand: Any, moments: torch.Tensor | None, digit: int) -> None:
        gram_histogram(operand, radix, moments, 0.0, *radix_select.DIGITS_OF_SIMILARITY[digit], is_abs=True)

    bind = functools.partial
    for kind, dtype in (("half", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32)):
        plain, scaled = _operand(dtype, kind), _operand(dtype, kind, is_scaled=True)
        yield _Variant(kind, bind(select, plain))
        yield _Variant(f"{kind}, feature-major", bind(select, _operand(dtype, kind, is_feature_major=True)))
        yield _Variant(f"{kind}, moments", bind(select, plain, moments))
        yield _Variant(f"{kind}, scaled", bind(select, scaled, None, False))
        yield _Variant(f"{kind}, scaled, first digit", bind(histogram, scaled, None, 0))
        yield _Variant(f"{kind}, scaled, first digit, moments", bind(histogram, scaled, moments, 0))
        yield _Variant(f"{kind}, scaled, last digit", bind(histogram, scaled, None, -1))
        yield _Variant(f"{kind}, scaled", bind(gram_row_ties, scaled, radix, is_abs=True))
        yield _Variant(kind, bind(max_cosine, plain, flags, best, 1, _N, _N, 1))
        yield _Variant(f"{kind}, scaled", bind(max_cosine, scaled, flags, best, 1, _N, _N, 1))
    yield _Variant("half, fp16", bind(select, _operand(torch.float16, "half")))


def _other_variants() -> Iterator[_Variant]:
    radix = radix_select.new_radix_select(_META, _N)
    per_feature, one, state = _empty(_N), _empty(1), _empty(3)
    flags, count = _empty(1, dtype=torch.int32), _empty(1, dtype=torch.int64)
    rows, cols = (_empty(_CAPACITY, dtype=torch.int32) for _ in range(2))
    values = _empty(_CAPACITY)
    offsets, partners = _empty(_N + 1, dtype=torch.int64), _empty(2 * _CAPACITY, dtype=torch.int32)
    weights = _empty(2 * _CAPACITY)
    k = _CAPACITY // 2
    bind = functools.partial
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x, x_slab = _empty(_M, _N, dtype=dtype), _empty(_N, 256, dtype=dtype)
        yield _Variant(label, bind(column_norms, x, 1e-12))
        yield _Variant(label, bind(gram_sample, x, per_feature, radix, state, 256, 1024, is_abs=True))
        yield _Variant(
            label,
            bind(pair_gradient, x_slab, per_feature, per_feature, offsets, partners, weights, weights, x_slab, 1e-12),
        )
    yield _Variant("fp32", bind(round_columns, _empty(_M, _N), per_feature))
    yield _Variant(
        "fp32",
        bind(
            rescore, _empty(_N, 256), per_feature, radix, values, rows, cols,
            is_first=False, is_last=True, is_abs=True,
        ),
    )  # fmt: skip
    yield _Variant("cold", bind(radix_select.begin, radix, flags, None, None, 262, _M, True))
    yield _Variant("warm, rounded", bind(radix_select.begin, radix, flags, state, one, 262, _M, True))
    yield _Variant("", bind(radix_select.certify, radix, k, _CAPACITY, 0.0, None))
    yield _Variant("adaptive tau", bind(radix_select.certify, radix, k, _CAPACITY, 0.0, one))
    for shift, bits in radix_select.DIGITS_OF_SIMILARITY:
        yield _Variant(f"{bits} bits from {shift}", bind(radix_select.next_digit, radix, shift, bits, k, _CAPACITY))
    yield _Variant("", bind(radix_select.tie_row, radix, k))
    yield _Variant("", bind(radix_select.next_state, radix, state, values, count, k, (0.1, 0.01, 0.4)))


def _sparse_variants() -> Iterator[_Variant]:
    """2**18 entries of which every one meets 32 others that follow it, in float32 and float64."""
    n_entries, n_products = 2**18, 2**23
    places, starts = _empty(n_entries, dtype=torch.int64), _empty(n_entries + 1, dtype=torch.int64)
    out = _empty(n_entries, dtype=torch.float64)
    bind = functools.partial
    for dtype, label in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        values, products = _empty(n_entries, dtype=dtype), _empty(n_products, dtype=dtype)
        for key_dtype in (torch.int32, torch.int64):
            keys, keyed = _empty(n_products, dtype=key_dtype), f"{label}, {str(key_dtype).removeprefix('torch.')} keys"
            yield _Variant(keyed, bind(coactivation_products, places, starts, places, values, 7, _N, keys, products))
            yield _Variant(keyed, bind(coactivation_sums, keys, products, products))
        yield _Variant(
            label, bind(coactivation_spread, places, products, products, places, places, places, values, out)
        )


@functools.cache
def shipped_kernels() -> dict[str, Any]:
    """Every `_<name>_kernel` of the package by its name."""
    modules = [
        importlib.import_module(f"topk_ortho.kernels.{module.name}")
        for module in pkgutil.iter_modules(topk_ortho.kernels.__path__)
        if module.name != Path(__file__).stem
    ]
    return {
        match[1]: value
        for module in modules
        for name, value in vars(module).items()
        if (match := re.fullmatch(r"_(\w+)_kernel", name)) and value.__module__ == module.__name__
    }


class _Launch(NamedTuple):
    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def _recorded(launch: Callable[[], object], architecture: str) -> _Launch:
    """The launch that a launcher would make on a device of one multiprocessor."""
    launches: list[_Launch] = []

    def instead(name: str, kernel: Any) -> Callable[..., None]:
        def run(*args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
            given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            arguments = {argument: given.pop(argument) for argument in kernel.arg_names}
            launches.append(_Launch(name, kernel, grid, arguments, given))

        return run

    properties = types.SimpleNamespace(multi_processor_count=1)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(tiles, "architecture_of", return_value=architecture))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
        for name, kernel in shipped_kernels().items():
            patches.enter_context(mock.patch.object(kernel, "run", instead(name, kernel)))
        launch()
    (recorded,) = launches
    return recorded


def _source(launch: _Launch, is_amd: bool) -> Any:
    """A kernel with its arguments specialised as Triton does at a launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in launch.kernel.params:
        value, place = launch.arguments[parameter.name], (parameter.num,)
        is_special = not parameter.do_not_specialize
        is_aligned = False
        attributes[place] = []
        if parameter.is_constexpr or (type(value) is int and value == 1 and is_special):
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            is_aligned = value.storage_offset() * value.element_size() % 16 == 0
            if is_amd and value.untyped_storage().nbytes() < 2**31:
                attributes[place].append(["tt.pointer_range", 32])
        elif type(value) is int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = value % 16 == 0
        else:
            assert type(value) is float, f"{launch.name}: {parameter.name} is {value!r}"
            signature[parameter.name] = "fp32"
        if is_aligned and is_special and not parameter.do_not_specialize_on_alignment:
            attributes[place].insert(0, ["tt.divisibility", 16])
    return ASTSource(
        launch.kernel, signature, constants, {place: value for place, value in attributes.items() if value}
    )


def _kind_of(launch: _Launch) -> Literal["half", "tf32", "ieee"] | None:
    if launch.name not in MAIN_LOOP_KERNELS:
        return None
    if launch.arguments["x_ptr"].dtype != torch.float32:
        return "half"
    return "tf32" if launch.arguments["PRECISION"] == "tf32" else "ieee"


def compiled(task: tuple[str, int]) -> Record | str:
    """The record of (architecture, number of the variant), or why there is none."""
    architecture, number = task
    target = ARCHITECTURES[architecture].target
    variant = _variants()[number]
    launch = _recorded(variant.launch, architecture)
    is_amd = target.backend == "hip"
    try:
        binary = triton.compile(_source(launch, is_amd), target=target, options=launch.options)
    except Exception as error:  # of many types; Triton prints the details itself
        reason = " ".join(str(error).split())[:200]
        return f"{launch.name} ({variant.label}) on {architecture} does not compile: {reason}"
    if is_amd:
        code = parse_amdgcn(binary.asm["amdgcn"])
        registers, stack_bytes, n_spills = parse_metadata(binary.asm["amdgcn"])
    else:
        text = _disassembled(binary.asm["cubin"])
        code = parse_sass(text)
        registers, stack_bytes = parse_resource_usage(text)
        n_spills = code.count(_LOCAL_MEMORY)
    main_loop = code.main_loop
    return Record(
        kernel=launch.name,
        variant=variant.label,
        architecture=architecture,
        kind=_kind_of(launch),
        num_warps=binary.metadata.num_warps,
        programs_per_sm=launch.grid[0] if launch.name in _PERSISTENT_KERNELS else None,
        max_registers=launch.options.get("maxnreg"),
        registers=registers,
        stack_bytes=stack_bytes,
        n_spills=n_spills,
        shared_bytes=binary.metadata.shared,
        tensor_memory_columns=getattr(binary.metadata, "tmem_size", None) or 0,
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
    """Print the report; 1 if a gate fails."""
    parser = argparse.ArgumentParser(
        prog="python -m topk_ortho.kernels.compile_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    options = parser.parse_args(arguments)
    if tiles.INTERPRETED.value or not all(isinstance(kernel, JITFunction) for kernel in shipped_kernels().values()):
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled, unset it")

    tasks = [(architecture, number) for number in range(len(_variants())) for architecture in ARCHITECTURES]
    context = multiprocessing.get_context("spawn")  # torch has threads
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        results = list(pool.map(compiled, tasks))
    records = sorted((r for r in results if isinstance(r, Record)), key=lambda r: r.kernel)
    failed = [r for r in results if isinstance(r, str)] + violations(records, shipped_kernels())
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
