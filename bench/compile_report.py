"""What the compilers make of every kernel, and whether it keeps what its config promises; needs no GPU.

    python -m bench.compile_report [--json]

The launchers are called with tensors that have no memory, on a device that is not there: Triton compiles for it what it
would compile at such a launch, and then launches nothing. So what is reported is what ships, block sizes and options
included. The exit status is 1 if something does not compile or breaks a promise, see `violations`. The report takes
about 10 minutes of processor time, which two processes share, and 2 if Triton has all of it in its cache.

x is [4096, 65536], row-major unless said otherwise. Kernels over gram tiles are compiled for each kind of operand
(bf16, float32 as tf32, float32 as it is) as the backend launches them: the first pass not scaled, the passes of a
repair scaled where flags ask for it, both with moments. Only the first pass is also compiled for fp16, for
feature-major x and for a ragged N of 65,535 (and `max_cosine` for the last). The passes of a screen are compiled for
fp16 too, and with blocked summation. Similarities are absolute, tensors are aligned to 16 bytes, and, for AMD, below
2 GB.
"""

import argparse
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
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.races import races
from topk_ortho.kernels import radix_select
from topk_ortho.kernels.coactivation import (
    coactivation_long_sums,
    coactivation_products,
    coactivation_spread,
    coactivation_sums,
)
from topk_ortho.kernels.gram_histogram import gram_histogram, gram_row_ties
from topk_ortho.kernels.gram_sample import gram_sample
from topk_ortho.kernels.gram_survivors import Moments, gram_survivors
from topk_ortho.kernels.launch import INTERPRETED, Kind, Operand, aligned
from topk_ortho.kernels.max_cosine import max_cosine
from topk_ortho.kernels.norms import column_norms
from topk_ortho.kernels.ordered import sort_keys, take_ordered
from topk_ortho.kernels.pair_gradient import LINE_BYTES, SEGMENT, SegmentSums, pair_gradient, segment_sums
from topk_ortho.kernels.pair_lists import pair_lists, pair_targets
from topk_ortho.kernels.rescore import rescore
from topk_ortho.kernels.round_columns import round_columns
from topk_ortho.kernels.transpose import transpose

MAIN_LOOP_KERNELS = {"gram_survivors", "described_survivors", "gram_histogram", "gram_row_ties", "max_cosine"}
"""The kernels over gram tiles, where the time goes."""
SPARSE_KERNELS = {"coactivation_products", "coactivation_sums", "coactivation_long_sums", "coactivation_spread"}
"""The kernels over the products of sparse features."""
GATHER_KERNELS = {"pair_gradient", "segment_sums", "rescore"}
"""The kernels that gather the columns of selected pairs."""
_PERSISTENT_KERNELS = MAIN_LOOP_KERNELS | {"rescore"}

_M, _N, _CAPACITY = 4096, 65536, 3_286_826  # a capacity that 16 does not divide, as most
_META = torch.device("meta")
_empty = partial(torch.empty, dtype=torch.float32, device=_META)
LOCAL_MEMORY = r"LDL|STL"
MATRIX = r"HMMA|HGMMA|UTC\w*MMA|v_mfma"
_MULTIPLY_ADD = r"FFMA|v_(pk_)?fmac?_f32"
ASYNC_COPY = r"LDGSTS|UTMALDG|global_load_lds"
"""From global into shared memory, while the program goes on. Triton does not use those that gfx942 has."""
GLOBAL_LOAD = r"LDG?\b|(global|buffer)_load_(?!lds)"
SHARED_STORE = r"STSM?\b|ds_write"
BARRIER = r"BAR\b|s_barrier"
MOST_BARRIERS = {
    ("sm_80", "half", "all pairs"): 3,
    ("sm_80", "half", "scaled"): 3,
    ("sm_90", "half", "first pass"): 4,
    ("sm_90", "tf32", "scaled"): 3,
    ("sm_100", "half", "first pass"): 3,
    ("sm_100", "half", "all pairs"): 3,
    ("sm_100", "half", "scaled"): 3,
    ("sm_100", "tf32", "first pass"): 3,
    ("sm_100", "tf32", "all pairs"): 3,
}
"""Barriers in the main loop of the kernels over gram tiles where they are more than two, by architecture, kind and
`_pass_of`: as many as there are with Triton 3.9, so that one more is noticed."""
# lines of `cuobjdump -sass`, whose label is the address, and of the assembly that the AMD backend of LLVM writes
SASS = r"^\s* /\*0*([0-9a-f]+)\*/ \s+ (?:@!?U?P\w+\s+)? ([A-Z][\w.]*) ([^;]*);"
AMDGCN = r"^(?: (\.L\w+): | \s+ ((?:s|v|ds|buffer|global|flat|scratch)_\w+) ([^;\n]*) )"


class _Architecture(NamedTuple):
    """Limits that the maker of an architecture documents."""

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
Record = dict[str, Any]
"""One variant of a kernel, compiled for one architecture; `compiled` says what is in it."""


class Code(NamedTuple):
    """Instructions and loops of an assembly."""

    opcodes: list[str]
    loops: list[range]
    """Places in `opcodes` from the target of a backward jump to the jump"""

    @property
    def main_loop(self) -> range | None:
        """The innermost loop with a matrix instruction; without one, that with most multiply-adds, or the largest."""
        if with_matrix := [loop for loop in self.loops if self.count(MATRIX, loop)]:
            return min(with_matrix, key=len)
        innermost = [  # those that hold no loop but themselves
            loop for loop in self.loops if sum(other[0] in loop and other[-1] in loop for other in self.loops) == 1
        ]
        return max(innermost, key=lambda loop: (self.count(_MULTIPLY_ADD, loop), len(loop)), default=None)

    def count(self, pattern: str, places: Iterable[int] | None = None) -> int:
        """Number of opcodes that begin with the pattern."""
        places = range(len(self.opcodes)) if places is None else places
        return sum(re.match(pattern, self.opcodes[place]) is not None for place in places)


def parse(text: str, pattern: str) -> Code:
    """Instructions and loops of an assembly, by the pattern of a line: a label, an opcode and operands."""
    opcodes: list[str] = []
    jumps, place_of = [], {}
    for label, opcode, operands in re.findall(pattern, text, re.M | re.X):
        if label:
            place_of[label] = len(opcodes)
        if re.match(r"BRA|s_c?branch", opcode):
            jumps.append((len(opcodes), operands.split()[-1].removeprefix("0x")))
        if opcode:
            opcodes.append(opcode)
    # a jump to itself is the padding after the end
    loops = [range(place_of[to], place + 1) for place, to in jumps if place_of.get(to, place) < place]
    return Code(opcodes, loops)


def number_of(field: str, text: str) -> int:
    """The number that stands after the name of a field and a colon."""
    match = re.search(rf"\b{field}:\s*(\d+)", text)
    assert match is not None, f"no {field} in what the compiler wrote"
    return int(match[1])


def max_programs(record: Record) -> int:
    """Programs that fit on a multiprocessor at once."""
    limits = ARCHITECTURES[record["architecture"]]
    allocated = -(-record["registers"] // 8) * 8
    warps = 4 * min(limits.max_warps, _REGISTERS // allocated)
    by_shared = limits.shared_bytes_per_sm // max(1, record["shared_bytes"] + limits.shared_bytes_reserved)
    by_tensor_memory = _TENSOR_MEMORY_COLUMNS // max(1, record["tensor_memory_columns"])
    return int(min(warps // record["num_warps"], by_shared, by_tensor_memory))


def _pass_of(record: SimpleNamespace) -> str:
    """What a kernel over gram tiles is launched for: with scaled operands, as a plain first pass, or neither."""
    if "scaled" in record.variant:
        return "scaled"
    is_lean = "moments" not in record.variant and "restarted" not in record.variant
    is_first = record.kernel == "described_survivors" or (record.kernel == "gram_survivors" and is_lean)
    return "first pass" if is_first else "all pairs"


def violations(records: Iterable[Record]) -> list[str]:
    """Broken promises, a line each."""
    found = []
    for record in records:
        r, limits = SimpleNamespace(**record), ARCHITECTURES[record["architecture"]]
        is_sparse, fitting = r.kernel in SPARSE_KERNELS, max_programs(record)
        has_matrix = any(name.startswith(limits.matrix_instruction) for name in r.matrix_instructions)
        pass_name = _pass_of(r)
        most_barriers = MOST_BARRIERS.get((r.architecture, r.kind, pass_name), 2)
        # where x may be scaled, the shorter loop is that which does not scale
        is_direct = r.kernel in MAIN_LOOP_KERNELS and limits.target.backend == "cuda"
        is_direct = is_direct and (r.kind == "half" or pass_name != "scaled")
        broken = [
            # the kernels over gram tiles, over sparse features and over selected pairs neither have a stack nor spill
            ((is_sparse or r.kernel in MAIN_LOOP_KERNELS | GATHER_KERNELS) and r.stack_bytes + r.n_spills > 0,
             f"has {r.stack_bytes} bytes of stack, {r.n_spills} spills"),
            # few registers let many programs run, which hide each other's waits
            (is_sparse and r.registers > 64, f"has {r.registers} registers, more than 64"),
            (r.max_registers is not None and r.registers > r.max_registers,
             f"has {r.registers} registers, more than {r.max_registers}"),
            (r.kind in ("half", "tf32") and not has_matrix, f"has no {limits.matrix_instruction}"),
            (r.shared_bytes > limits.shared_bytes,
             f"has {r.shared_bytes} bytes of shared memory, more than {limits.shared_bytes}"),
            # the programs that a persistent launch means to run at once fit on a multiprocessor
            ((r.programs_per_sm or 0) > fitting,
             f"is launched with {r.programs_per_sm} programs per multiprocessor, which holds {fitting}"),
            # on NVIDIA operands go into shared memory without registers, but for some that may be scaled on the way
            (is_direct and r.loop_async_copies == 0, "has no asynchronous copy in its main loop"),
            (is_direct and r.loop_loads + r.loop_stores > 0,
             f"has {r.loop_loads} loads and {r.loop_stores} stores in its main loop that are not asynchronous"),
            (r.kernel in MAIN_LOOP_KERNELS and r.loop_barriers > most_barriers,
             f"has {r.loop_barriers} barriers in its main loop, more than {most_barriers}"),
            # no thread loads what another one of its program has stored, see `races`
            (len(r.races) > 0, f"loads and later stores through {', '.join(r.races)} without a barrier in between"),
        ]  # fmt: skip
        found += [f"{r.kernel} ({r.variant}) on {r.architecture} {text}" for is_broken, text in broken if is_broken]
    return found


class Variant(NamedTuple):
    """A launch to report."""

    label: str
    launch: Callable[[], object]
    kind: Kind | None = None


@cache
def variants() -> list[Variant]:
    """All launches of the report."""
    return [*_gram_variants(), *_other_variants(), *_sparse_variants()]


def _gram_variants() -> Iterator[Variant]:
    radix, moments = (
        radix_select.new_radix_select(_META, _N),
        Moments(_empty(1, 3, dtype=torch.float64), _empty(1), 3.0),
    )
    flags, best = _empty(1, dtype=torch.int32), _empty(_N, dtype=torch.int64)
    records = _empty(_CAPACITY), *(_empty(_CAPACITY, dtype=torch.int32) for _ in range(2))

    k = _CAPACITY // 2

    def survivors(operand: Operand, moments: Moments | None = None, is_first: bool = True) -> None:
        certifies = is_first and operand.x.dtype != torch.float16  # what a screen has recorded is computed again
        gram_survivors(operand, radix, *records, moments, k, 0.0, is_abs=True, is_first=is_first, certifies=certifies)

    def histogram(operand: Operand, moments: Moments | None, is_screen: bool = False) -> None:
        gram_histogram(operand, radix, 0, moments, k, _CAPACITY, 0.0, is_abs=True, is_screen=is_screen)

    kinds: list[tuple[Kind, torch.dtype]] = [("half", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32)]
    for kind, dtype in kinds:
        plain = Operand(x=_empty(_M, _N, dtype=dtype), factor=_empty(_N), scale=None, kind=kind)
        scaled = replace(plain, scale=_empty(_N), flags=flags)
        for label, launch in (
            ("", partial(survivors, plain)),
            (", feature-major", partial(survivors, replace(plain, x=_empty(_N, _M, dtype=dtype).T))),
            (", moments", partial(survivors, plain, moments)),
            (", scaled", partial(survivors, scaled, is_first=False)),
            (", scaled, digit", partial(histogram, scaled, None)),
            (", scaled, digit, moments", partial(histogram, scaled, moments)),
            (", scaled", partial(gram_row_ties, scaled, radix, k, is_abs=True)),
            ("", partial(max_cosine, plain, best, 1, _N, _N, 1)),
            (", scaled", partial(max_cosine, scaled, best, 1, _N, _N, 1)),
        ):
            yield Variant(kind + label, launch, kind)
        x = _empty(_M, _N - 1, dtype=dtype)
        ragged = replace(plain, x=x if kind == "ieee" else aligned(x))
        yield Variant(f"{kind}, ragged", partial(survivors, ragged), kind)
        yield Variant(f"{kind}, ragged", partial(max_cosine, ragged, best, 1, _N - 1, _N - 1, 1), kind)
    fp16 = replace(plain, x=_empty(_M, _N, dtype=torch.float16), kind="half")
    yield Variant("half, fp16", partial(survivors, fp16), "half")
    yield Variant("half, fp16, digit", partial(histogram, fp16, None, is_screen=True), "half")
    restarted = replace(fp16, restarts=True)
    yield Variant("half, restarted", partial(survivors, restarted), "half")
    yield Variant("half, restarted, digit", partial(histogram, restarted, None, is_screen=True), "half")


def _other_variants() -> Iterator[Variant]:
    radix, one, state = radix_select.new_radix_select(_META, _N), _empty(1), _empty(3)
    per_feature, values, k = _empty(_N), _empty(_CAPACITY), _CAPACITY // 2
    flags = _empty(1, dtype=torch.int32)
    rows, cols = (_empty(_CAPACITY, dtype=torch.int32) for _ in range(2))
    offsets, partners = _empty(_N + 1, dtype=torch.int64), _empty(2 * _CAPACITY, dtype=torch.int32)
    weights = _empty(2 * _CAPACITY)
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        block_m = LINE_BYTES // dtype.itemsize
        x, slab = _empty(_M, _N, dtype=dtype), _empty(_N, block_m, dtype=dtype)
        pairs, n_segments = (partners, weights, weights), 2 * _CAPACITY // SEGMENT
        sums = SegmentSums(_empty(1, n_segments, block_m), _empty(1, n_segments))
        yield Variant(label, partial(column_norms, x, 1e-12))
        yield Variant(label, partial(gram_sample, x, per_feature, radix, state, 256, 1024, is_abs=True))
        yield Variant(label, partial(segment_sums, slab, per_feature, partners, *pairs))
        yield Variant(label, partial(pair_gradient, slab, per_feature, per_feature, offsets, *pairs, sums, slab, 1e-12))
        yield Variant(label, partial(transpose, slab.T, slab))
    arguments = _empty(_N, 256), per_feature, radix, values, rows, cols, k, 0.0
    order, of_rows = (_empty(n, dtype=torch.int64) for n in (2 * _CAPACITY, _CAPACITY))
    listed = of_rows, of_rows, values, values
    records = _empty(_CAPACITY, dtype=torch.int64), values, rows, cols, radix, flags
    rest = 0.0, k, state, (0.1, 0.01, 0.4)
    yield from (
        Variant("", partial(pair_targets, *listed, _N)),
        Variant("", partial(pair_lists, partners, order, *listed, values, per_feature, 1e-12)),
        Variant("fp32", partial(round_columns, _empty(_M, _N), per_feature)),
        Variant("fp32", partial(rescore, *arguments, is_first=False, is_last=True, is_abs=True)),
        Variant("cold", partial(radix_select.begin, radix, flags, None, None, 262, _M, 0.0, True)),
        Variant("warm, rounded", partial(radix_select.begin, radix, flags, state, one, 262, _M, 1e-4, True)),
        Variant("", partial(sort_keys, radix.n_survivors, values, rows, cols, _N, is_abs=True)),
        Variant("", partial(take_ordered, *records, 0.0, *rest, is_abs=True)),
        Variant("adaptive tau", partial(take_ordered, *records, one, *rest, is_abs=True)),
    )


def _sparse_variants() -> Iterator[Variant]:
    """2**18 entries of which every one meets 32 others that follow it, in float32 and float64."""
    n_entries, n_products = 2**18, 2**23
    places, starts = _empty(n_entries, dtype=torch.int64), _empty(n_entries + 1, dtype=torch.int64)
    out, leading = (_empty(n, dtype=torch.float64) for n in (n_entries, 2**16))
    for dtype, label in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        values, products = _empty(n_entries, dtype=dtype), _empty(n_products, dtype=dtype)
        for key_dtype in (torch.int32, torch.int64):
            keys, keyed = _empty(n_products, dtype=key_dtype), f"{label}, {str(key_dtype).removeprefix('torch.')} keys"
            yield Variant(keyed, partial(coactivation_products, places, starts, places, values, 7, _N, keys, products))
            yield Variant(keyed, partial(coactivation_sums, keys, products, products))
            yield Variant(keyed, partial(coactivation_long_sums, keys, products, leading, products))
        spread = places, products, products, places, places, places, values, out
        yield Variant(label, partial(coactivation_spread, *spread))


class AbsentDevice:
    """In place of the driver of a GPU of one multiprocessor: launches compile as they would there, and run nothing."""

    kernel: JITFunction[Any] | None = None
    """What was launched last"""
    arguments: dict[str, Any]
    """Its arguments as Triton sees them: their types by name, and the values of constants by place"""
    binary: Any = None
    """What it was compiled to"""
    n_programs = 0
    """Programs on the first axis of its grid"""

    def __init__(self, architecture: str, *, compiles: bool = True) -> None:
        self.compiles = compiles
        # what Triton asks of a driver; no other device has its number, by which Triton keeps what it compiled
        self.get_current_target = lambda: ARCHITECTURES[architecture].target
        self.get_current_device = lambda: id(self)
        self.get_current_stream = lambda device: 0
        self.launcher_cls = lambda source, metadata: self._launch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"multiprocessor_count": 1, "max_shared_mem": 2**31 - 1},
            load_binary=lambda *_: (None, None, 0, 0, 1024),  # module, function, registers, spills, most threads
        )
        triton.runtime.driver.set_active(self)
        triton.knobs.runtime.jit_cache_hook = self._before_compiling
        triton.knobs.runtime.jit_post_compile_hook = self._after_compiling

    def _before_compiling(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        self.kernel, self.arguments = fn.jit_function, compile
        return not self.compiles

    def _after_compiling(self, *, key: str, fn: Any, **_: Any) -> None:
        self.binary = fn.jit_function.device_caches[id(self)][0][key]

    def _launch(self, grid_0: int, *_: object) -> None:
        self.n_programs = grid_0

    @property
    def kernel_name(self) -> str:
        """Name of what was launched last, as its launcher is called."""
        return "" if self.kernel is None else self.kernel.__name__.removeprefix("_").removesuffix("_kernel")


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
    is_amd = "amdgcn" in binary.asm
    text = binary.asm["amdgcn"] if is_amd else _disassembled(binary.asm["cubin"])
    code = parse(text, AMDGCN if is_amd else SASS)
    main_loop = code.main_loop or range(0)
    return {
        "kernel": device.kernel_name,
        "variant": variant.label,
        "architecture": architecture,
        "kind": variant.kind,  # of its operand, None if it is not over gram tiles
        "num_warps": metadata.num_warps,
        # programs that are launched for a multiprocessor, None if their number follows the size of x
        "programs_per_sm": device.n_programs if device.kernel_name in _PERSISTENT_KERNELS else None,
        "max_registers": getattr(metadata, "maxnreg", None),
        # of a thread; on AMD vector registers, accumulators included
        "registers": number_of("vgpr_count" if is_amd else "REG", text),
        "stack_bytes": number_of("private_segment_fixed_size" if is_amd else "STACK", text),  # of a thread
        # instructions that access the stack; on AMD spilled vector registers
        "n_spills": number_of("vgpr_spill_count", text) if is_amd else code.count(LOCAL_MEMORY),
        "shared_bytes": metadata.shared,
        "tensor_memory_columns": getattr(metadata, "tmem_size", None) or 0,  # 0 but on sm_100
        "matrix_instructions": dict(Counter(opcode for opcode in code.opcodes if re.match(MATRIX, opcode))),
        # of the main loop; 0 if there is no loop
        "loop_instructions": len(main_loop),
        "loop_async_copies": code.count(ASYNC_COPY, main_loop),
        "loop_loads": code.count(GLOBAL_LOAD, main_loop),
        "loop_stores": code.count(SHARED_STORE, main_loop),
        "loop_barriers": code.count(BARRIER, main_loop),
        "races": races(binary.asm["ttir"]),  # names of the arguments concerned
    }


def _disassembled(cubin: bytes) -> str:
    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _table(records: list[Record]) -> str:
    """Text with a line for each record."""
    columns = {
        "kernel": "kernel", "variant": "variant", "architecture": "architecture", "num_warps": "warps",
        "programs_per_sm": "programs", "registers": "registers", "stack_bytes": "stack", "n_spills": "spills",
        "shared_bytes": "shared", "loop_instructions": "loop", "loop_async_copies": "copies", "loop_loads": "loads",
        "loop_stores": "stores", "loop_barriers": "barriers", "matrix_instructions": "matrix instructions",
    }  # fmt: skip
    table = pd.DataFrame(records, columns=list(columns), dtype=object)
    matrix = table["matrix_instructions"].map(lambda counts: ", ".join(f"{n} {name}" for name, n in counts.items()))
    table = table.assign(matrix_instructions=matrix).rename(columns=columns)
    return str(table.fillna("").to_string(index=False))


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
    records = sorted((r for r in results if isinstance(r, dict)), key=lambda r: r["kernel"])
    failed = [r for r in results if isinstance(r, str)] + violations(records)
    versions = {"triton": triton.__version__, "python": platform.python_version()}
    if options.json:
        print(json.dumps(versions | {"records": records, "violations": failed}))
    else:
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        print(_table(records))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
