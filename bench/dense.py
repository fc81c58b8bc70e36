"""The benchmark of a dense x: the loss and its gradient against N and M, by every provider of `bench.providers`.

On a GPU float32 is in "highest" precision, so the products alone run on the FMA units, which topk_ortho avoids by a
screen in float16.
"""

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.cases import FRACTION, Benchmark, Call, Case
from bench.providers import loss_of

_FORWARD, _BOTH = "forward", "forward_backward"
_ROTATED_BYTES = 2**28  # larger than any L2
_CUBLAS_N = 16384  # side of the square product whose rate is taken for that of cuBLAS


def cases(device_type: str, smoke: bool) -> list[Case]:
    """On a CPU in the order of N; on a GPU the goals first, then N, M, and large N."""
    if smoke:
        return _smoke_cases(device_type)
    if device_type == "cpu":
        planned = []
        for n in (2048, 4096, 8192, 16384, 32768):
            forward = ["half_gemm", "topk_ortho", "chunked", "naive", "naive_compiled"]
            both = ["topk_ortho", "chunked", "naive", "naive_autograd", "naive_compiled"]
            planned += _cases(_FORWARD, "float32", 1024, [n], forward) + _cases(_BOTH, "float32", 1024, [n], both)
        return planned
    return _gpu_cases()


def _gpu_cases() -> list[Case]:
    # torch.topk of 2**31 elements or more is wrong or slow (pytorch issue 173622): the naive ways end at N = 32,768
    large = ["topk_ortho_warm", "half_gemm", "topk_ortho", "chunked", "tiled"]
    naive = ["naive", "naive_compiled"]
    sweep, sweep_of_both = [*large, *naive], ["topk_ortho_warm", "chunked", *naive]
    dtypes = ["bfloat16", "float32"]
    planned = []
    for dtype in dtypes:
        planned += _cases(_FORWARD, dtype, 4096, [_CUBLAS_N], ["cublas"])
        planned += _cases(_FORWARD, dtype, 4096, [65536], large)
        planned += _cases(_BOTH, dtype, 4096, [32768], [*sweep_of_both, "naive_autograd", "topk_ortho", "tiled"])
        planned += _cases("kernels", dtype, 4096, [65536], ["topk_ortho_warm"])
        planned += _cases(_FORWARD, dtype, 4096, [32768, 16384, 8192], sweep)
        planned += _cases(_BOTH, dtype, 4096, [65536], ["topk_ortho_warm", "chunked"])
        planned += _cases(_BOTH, dtype, 4096, [16384, 8192], sweep_of_both)
    for dtype, m in itertools.product(dtypes, (1024, 16384)):
        planned += _cases(_FORWARD, dtype, m, [_CUBLAS_N], ["cublas"])
        planned += _cases(_FORWARD, dtype, m, [32768], sweep)
        planned += _cases(_BOTH, dtype, m, [32768], sweep_of_both)
    for dtype in dtypes:
        planned += _cases(_FORWARD, dtype, 4096, [131072, 262144], ["topk_ortho_warm", "half_gemm"])
        planned += _cases(_BOTH, dtype, 4096, [131072, 262144], ["topk_ortho_warm"])
    planned += _cases(_FORWARD, "bfloat16", 1024, [65536, 131072, 262144], ["topk_ortho_warm", "half_gemm"])
    return planned + _cases(_FORWARD, "bfloat16", 4096, [131072, 262144], ["chunked", "tiled"])


def _smoke_cases(device_type: str) -> list[Case]:
    """Every provider and mode of the device, in seconds."""
    return list(dict.fromkeys(case._replace(M=64, N=256) for case in cases(device_type, smoke=False)))


def _cases(mode: str, dtype: str, m: int, ns: Iterable[int], providers: Iterable[str]) -> list[Case]:
    return [Case("dense", provider, mode, dtype, m, n) for n in ns for provider in providers]


@functools.lru_cache(maxsize=1)
def _matrices(m: int, n: int, dtype: str, device: torch.device) -> list[Tensor]:
    """Matrices [m, n] of independent Gaussian entries that calls take in turns: one on a CPU, several on a GPU.

    Together they do not fit an L2 cache, and each has 1/64 of its columns drawn anew from the one before, as training
    moves x: a warm-start state never meets the x of the call before.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(m, n, generator=generator, dtype=getattr(torch, dtype), device=device)
    matrices = [x]
    if device.type == "cuda":
        width = max(1, n // 64)
        for number in range(1, min(16, max(2, _ROTATED_BYTES // x.nbytes + 1))):
            x = x.clone()
            x[:, number * width : (number + 1) * width].normal_(generator=generator)
            matrices.append(x)
    return matrices


def inputs(case: Case, device: torch.device) -> tuple[Tensor, None]:
    """The x of the first call."""
    return _matrices(case.M, case.N, case.dtype, device)[0], None


def make_call(case: Case, device: torch.device) -> Call:
    """A call that computes the loss, and in every mode but "forward" its gradient."""
    loss = loss_of(case.provider, device)
    matrices = _matrices(case.M, case.N, case.dtype, device)
    if case.mode != "forward":
        matrices = [x.detach().requires_grad_() for x in matrices]

    def run(x: Tensor) -> object:
        return loss(x) if case.mode == "forward" else torch.autograd.grad(loss(x), x)

    if case.provider == "naive_compiled":
        run(matrices[0])  # compiles for this shape
    turns = itertools.cycle(matrices)
    return lambda: run(next(turns))


DENSE = Benchmark(
    cases=cases,
    make_call=make_call,
    small=lambda case: case._replace(M=24, N=1100),  # two of the blocks of `chunked`
    inputs=inputs,
    setting={
        "fraction": FRACTION,
        "data": "Gaussian, independent entries, row-major; on a GPU several x in turns, 1/64 of the columns drawn anew",
    },
)
