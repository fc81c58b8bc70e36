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


def cases(device_type: str) -> list[Case]:
    """On a CPU in the order of N; on a GPU the goals first, then N, M, large N, and the backend "tiled"."""
    planned: list[Case] = []

    def add(mode: str, dtype: str, m: int, ns: Iterable[int], providers: Iterable[str]) -> None:
        planned.extend(Case("dense", provider, mode, dtype, m, n) for n in ns for provider in providers)

    naive = ["naive", "naive_compiled"]
    if device_type == "cpu":
        for n in (2048, 4096, 8192, 16384, 32768):
            add(_FORWARD, "float32", 1024, [n], ["half_gemm", "topk_ortho", "chunked", *naive])
            add(_BOTH, "float32", 1024, [n], ["topk_ortho", "chunked", *naive, "naive_autograd"])
        return planned

    # torch.topk of 2**31 elements or more is wrong or slow (pytorch issue 173622): the naive ways end at N = 32,768
    large = ["topk_ortho_warm", "half_gemm", "topk_ortho", "topk_ortho_failed", "chunked"]
    sweep, sweep_of_both = [*large, *naive], ["topk_ortho_warm", "chunked", *naive]
    dtypes = ["bfloat16", "float32"]
    for dtype in dtypes:
        add(_FORWARD, dtype, 4096, [_CUBLAS_N], ["cublas"])
        add(_FORWARD, dtype, 4096, [65536], large)
        add(_BOTH, dtype, 4096, [32768], [*sweep_of_both, "naive_autograd", "topk_ortho"])
    for dtype in dtypes:
        add(_FORWARD, dtype, 4096, [32768], sweep)
        add(_BOTH, dtype, 4096, [65536], ["topk_ortho_warm", "chunked"])
        add(_FORWARD, dtype, 4096, [16384, 8192], sweep)
        add(_BOTH, dtype, 4096, [16384, 8192], sweep_of_both)
    add(_FORWARD, "float32", 32768, [_CUBLAS_N], ["cublas", "topk_ortho_warm", "half_gemm"])  # blocked summation
    for dtype, m in itertools.product(dtypes, (1024, 16384)):
        add(_FORWARD, dtype, m, [_CUBLAS_N], ["cublas"])
        add(_FORWARD, dtype, m, [32768], sweep)
        add(_BOTH, dtype, m, [32768], sweep_of_both)
    for dtype in dtypes:
        add(_FORWARD, dtype, 4096, [131072, 262144], ["topk_ortho_warm", "half_gemm"])
        add(_BOTH, dtype, 4096, [131072, 262144], ["topk_ortho_warm"])
    add(_FORWARD, "bfloat16", 1024, [65536, 131072, 262144], ["topk_ortho_warm", "half_gemm"])
    add(_FORWARD, "bfloat16", 4096, [131072, 262144], ["chunked"])
    add(_FORWARD, "bfloat16", 4096, [16384], ["tiled"])
    return planned


@functools.lru_cache(maxsize=1)
def _matrices(m: int, n: int, dtype: str, device: torch.device) -> list[Tensor]:
    """Matrices [m, n] of independent Gaussian entries that calls take in turns: one on a CPU, several on a GPU.

    Together they do not fit an L2 cache, and each has 1/64 of its columns drawn anew from the one before, as training
    moves x: a warm-start state never meets the x of the call before.
    """
    generator = torch.Generator(device).manual_seed(0)
    matrices = [torch.randn(m, n, generator=generator, dtype=getattr(torch, dtype), device=device)]
    if device.type == "cuda":
        width = max(1, n // 64)
        for number in range(1, min(16, max(2, _ROTATED_BYTES // matrices[0].nbytes + 1))):
            matrices.append(matrices[-1].clone())
            matrices[-1][:, number * width : (number + 1) * width].normal_(generator=generator)
    return matrices


def inputs(case: Case, device: torch.device) -> tuple[Tensor, None]:
    """The x of the first call."""
    return _matrices(case.M, case.N, case.dtype, device)[0], None


def make_call(case: Case, device: torch.device) -> Call:
    """A call that computes the loss, or its gradient."""
    loss = loss_of(case.provider, device)
    matrices = _matrices(case.M, case.N, case.dtype, device)
    if case.mode == _BOTH:
        matrices = [x.detach().requires_grad_() for x in matrices]

    def run(x: Tensor) -> object:
        return torch.autograd.grad(loss(x), x) if case.mode == _BOTH else loss(x)

    if case.provider == "naive_compiled":
        run(matrices[0])  # compiles for this shape
    turns = itertools.cycle(matrices)
    return lambda: run(next(turns))


DENSE = Benchmark(
    cases=cases,
    make_call=make_call,
    small={"M": 24, "N": 1100},  # two of the blocks of `chunked`
    inputs=inputs,
    setting={
        "fraction": FRACTION,
        "data": "Gaussian, independent entries, row-major; on a GPU several x in turns, 1/64 of the columns drawn anew",
    },
)
