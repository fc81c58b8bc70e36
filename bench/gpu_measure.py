"""Time and memory of one case of `bench.gpu`.

Times are CUDA events around one call, L2 overwritten before it: median and 20% and 80% quantiles. Between calls 1/64 of
the columns is drawn anew, as training moves x: a warm-start state meets no x that it has seen. Memory is the peak of
another call, beyond what was allocated before it. x is row-major, of independent Gaussian entries.
"""

import gc
import itertools
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.gpu_cases import Case
from bench.providers import FRACTION, call_of, chunked, gaussian, half_gemm, naive, naive_autograd
from topk_ortho import initial_state, topk_ortho_loss

_HALF_GEMM_TILE = (2048, 16384)  # 1,024 blocks of 128 x 256 a product; the diagonal wastes 3% at N = 65,536
_PROFILED_CALLS = 3


class Measurement(NamedTuple):
    """What a case gives."""

    time_ms: float
    time_q20_ms: float
    time_q80_ms: float
    rounds: int
    peak_extra_bytes: int
    kernels_ms: dict[str, float] | None = None
    """Of the provider "kernels", and `time_ms` is their sum; "other" are sorts, copies and fills."""


def measure(case: Case, device: torch.device) -> Measurement:
    """Two untimed calls, of which the second tells memory and how many rounds follow, then the timed ones."""
    gc.collect()
    torch.cuda.empty_cache()
    x = gaussian(case.M, case.N, dtype=getattr(torch, case.dtype), device=device)
    state = initial_state(device) if case.provider in ("triton", "kernels") else None
    call = call_of(_loss_of(case.provider, state), case.mode, x)
    redraw = _redraw_of(x)
    call()
    redraw()
    seconds, peak_extra_bytes = _seconds_and_peak(call)
    if case.provider == "kernels":
        kernels_ms = _kernel_times_ms(call)
        total_ms = sum(kernels_ms.values())
        return Measurement(total_ms, total_ms, total_ms, _PROFILED_CALLS, peak_extra_bytes, kernels_ms)
    rounds = rounds_of(seconds)
    q20, median, q80 = np.quantile(_event_times_ms(call, redraw, rounds), (0.2, 0.5, 0.8)).tolist()
    return Measurement(median, q20, q80, rounds, peak_extra_bytes)


def rounds_of(seconds: float) -> int:
    """Timed calls of what takes so long: for half a second, 3 to 30; 1 where noise cannot matter."""
    return 1 if seconds > 3 else max(3, min(30, int(0.5 / seconds)))


def _loss_of(provider: str, state: Tensor | None) -> Callable[[Tensor], Tensor]:
    if provider in ("triton", "kernels", "triton_cold"):
        return lambda x: topk_ortho_loss(x, FRACTION, backend="triton", state=state)
    if provider == "naive_compiled":
        return torch.compile(naive, dynamic=False)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "tiled": lambda x: topk_ortho_loss(x, FRACTION, backend="tiled"),
        "half_gemm": lambda x: half_gemm(x, _HALF_GEMM_TILE),
        "cublas": lambda x: x.T @ x,
        "chunked": chunked,
        "naive": naive,
        "naive_autograd": naive_autograd,
    }
    return losses[provider]


def _redraw_of(x: Tensor) -> Callable[[], None]:
    """A function that draws 1/64 of the columns anew, the next ones at each call."""
    width = max(1, x.shape[1] // 64)
    generator = torch.Generator(x.device).manual_seed(1)
    firsts = itertools.cycle(range(0, x.shape[1] - width + 1, width))

    def redraw() -> None:
        first = next(firsts)
        with torch.no_grad():
            x[:, first : first + width].normal_(generator=generator)

    return redraw


def _seconds_and_peak(call: Callable[[], object]) -> tuple[float, int]:
    """Of one call; the peak in bytes beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def _event_times_ms(call: Callable[[], object], before: Callable[[], None], rounds: int) -> list[float]:
    """Milliseconds of each round between events on the device; launches count only where the device waits."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # larger than any L2
    for _ in range(min(3, rounds)):  # clocks
        before()
        call()
    events = []
    for _ in range(rounds):
        before()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _kernel_times_ms(call: Callable[[], object]) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED_CALLS):
            call()
        torch.cuda.synchronize()
    return _by_kernel(profile.key_averages(), _PROFILED_CALLS)


def _by_kernel(events: Iterable[Any], n_calls: int) -> dict[str, float]:
    """Milliseconds a call, of events that have a key and self_device_time_total, in microseconds."""
    times: dict[str, float] = defaultdict(float)
    for event in events:
        ours = re.match(r"_(\w+)_kernel", event.key)
        times[ours[1] if ours else "other"] += event.self_device_time_total / 1e3 / n_calls
    return dict(times)
