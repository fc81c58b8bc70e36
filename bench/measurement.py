"""Time and memory of cases that are compared with each other.

They are called in turns, one call of each in every round, so that all see the same machine. Times are those of the wall
clock on a CPU and of CUDA events around a call on a GPU, given as median and quartiles. Memory is the peak of another
call beyond what was held before it, x included; on a CPU that call has a process of its own.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.cases import Benchmark, Call, Case

_ROOT = Path(__file__).resolve().parent.parent
_LONG_S = 10.0  # a call that takes longer is timed once: neither noise nor the first call's overhead matters
# Python and CUDA; torch on a CPU; C++, as in torch.topk; cuBLAS
_OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "std::bad_alloc", "ALLOC_FAILED")


class Measurement(NamedTuple):
    """What was seen of a case; all that could not be seen is None."""

    status: str
    """"ok", "out of memory" or "error"; where it is not "ok" there is a note, and there are no numbers"""
    note: str | None = None
    """What went wrong"""
    time_s: float | None = None
    """The median of the rounds"""
    time_q1_s: float | None = None
    """Their first quartile"""
    time_q3_s: float | None = None
    """Their third quartile"""
    rounds: int | None = None
    """How often the case was timed"""
    peak_extra_bytes: int | None = None
    """The highest memory during a call beyond what was held before it; a gradient that the call returns counts"""


def measure(benchmark: Benchmark, cases: list[Case], device: torch.device) -> dict[Case, Measurement]:
    """Measurements of cases of one benchmark that take turns. A case that cannot run does not stop the others."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    done: dict[Case, Measurement] = {}
    ready: dict[Case, tuple[Call, int | None]] = {}
    for case in cases:
        try:
            ready[case] = _prepare(benchmark, case, device)
        except Exception as error:
            done[case] = failure(error)
    times = {case: [timed(call, device)] for case, (call, _) in ready.items()}
    rounds = {case: benchmark.rounds or rounds_of(first()) for case, (first,) in times.items()}
    for number in range(1, max(rounds.values(), default=0)):
        for case, (call, _) in ready.items():
            if number < rounds[case]:
                times[case].append(timed(call, device))
    for case, (_, peak) in ready.items():
        low, median, high = np.quantile([read() for read in times[case]], (0.25, 0.5, 0.75)).tolist()
        done[case] = Measurement(
            "ok", time_s=median, time_q1_s=low, time_q3_s=high, rounds=rounds[case], peak_extra_bytes=peak
        )
    return {case: done[case] for case in cases}


def _prepare(benchmark: Benchmark, case: Case, device: torch.device) -> tuple[Call, int | None]:
    """The call of a case, warmed up, and its peak memory."""
    peak = _peak_in_own_process(case) if device.type == "cpu" and case.mode != "step" else None
    call = benchmark.make_call(case, device)
    for _ in range(benchmark.n_warmup):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return call, peak


def rounds_of(seconds: float) -> int:
    """Timed calls of what takes so long: for a second, 5 to 30 of them; 1 of what is long."""
    return 1 if seconds > _LONG_S else max(5, min(30, int(1 / seconds)))


def timed(call: Call, device: torch.device) -> Callable[[], float]:
    """Run a call once. The result tells its seconds; on a GPU it waits for the device, the call does not.

    So the device is still busy with the calls before when a call is launched, and launches count only where it waits.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()

        def seconds_on_gpu() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return seconds_on_gpu
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return lambda: seconds


def failure(error: Exception) -> Measurement:
    """The measurement of a case that could not run."""
    text = f"{type(error).__name__}: {error}"
    is_memory = any(words in text for words in _OUT_OF_MEMORY)
    return Measurement("out of memory" if is_memory else "error", note=repr(error)[-500:])


def _peak_in_own_process(case: Case) -> int:
    """Peak memory of a case on the CPU; an error if it cannot run, whose text names the reason."""
    command = [sys.executable, "-m", "bench", "--peak-memory-of", json.dumps(case)]
    process = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if process.returncode == -9:
        raise MemoryError("the process was killed")
    if process.returncode:
        raise RuntimeError(process.stderr)
    return int(process.stdout)


def print_peak_memory(benchmark: Benchmark, case: Case) -> None:
    """Print the bytes of a case's peak memory on the CPU, in a process that does nothing else. Linux only."""
    # what exceeds memory fails here by itself, instead of being killed; torch itself maps about 2 GB without using them
    limit = _bytes_of(Path("/proc/meminfo"), "MemAvailable") + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    device = torch.device("cpu")
    benchmark.make_call(case._replace(**benchmark.small), device)()  # loads libraries and starts threads
    print(peak_extra_bytes(benchmark.make_call(case, device)))


def peak_extra_bytes(call: Call) -> int:
    """Highest resident size of this process during a call, less the resident size before it."""
    status = Path("/proc/self/status")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the call would reuse what earlier calls have freed, compilation among them
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _bytes_of(status, "VmRSS")
    call()
    return _bytes_of(status, "VmHWM") - before


def _bytes_of(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def groups_of(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that differ by the provider alone, together, in the order of the first of each group."""
    groups: dict[Case, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case._replace(provider="")].append(case)
    return list(groups.values())
