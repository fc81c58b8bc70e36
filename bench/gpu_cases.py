"""What `bench.gpu` measures: providers, passes and shapes, the most important first.

A provider is a way to compute the loss of `bench.providers`, or the products that all of them need.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from topk_ortho.definitions import n_pairs

LABELS = {
    "triton": "topk_ortho, warm",
    "triton_cold": "topk_ortho, no state",
    "tiled": "topk_ortho, plain torch",
    "half_gemm": "the products alone",
    "chunked": "row blocks, merged torch.topk",
    "naive": "matmul + torch.topk",
    "naive_autograd": "matmul + torch.topk, all by autograd",
    "naive_compiled": "matmul + torch.topk, torch.compile",
    "cublas": "a full square product",
    "kernels": "each kernel of topk_ortho, warm",
}
"""Of every provider."""
_CUBLAS_N = 16384
"""Side of the square product whose rate is taken for that of cuBLAS."""


class Case(NamedTuple):
    """One line of the results."""

    provider: str
    mode: str
    """ "forward" or "forward_backward" """
    dtype: str
    M: int
    N: int

    def __str__(self) -> str:
        return f"{self.provider}, {self.mode}, {self.dtype}, M = {self.M:,}, N = {self.N:,}"

    @property
    def operations(self) -> int:
        """N(N-1)/2 pairs of M multiply-adds, an add and a multiply as two; the full square for cublas."""
        return 2 * self.M * (self.N**2 if self.provider == "cublas" else n_pairs(self.N))


def plan() -> list[Case]:
    """All cases, the most important first: the goals, N, M, large N."""
    forward, both = "forward", "forward_backward"
    sweep, sweep_of_both = ["triton", "half_gemm", "chunked", "naive", "tiled"], ["triton", "chunked", "naive"]
    goal = ["triton", "half_gemm", "triton_cold", "chunked", "tiled", "naive"]
    goal_of_both = ["triton", "naive_autograd", "chunked", "naive", "triton_cold", "tiled"]
    dtypes = ["bfloat16", "float32"]
    cases: list[Case] = []
    for dtype in dtypes:
        cases += _cases(forward, dtype, 4096, [_CUBLAS_N], ["cublas"])
        cases += _cases(forward, dtype, 4096, [65536], goal)
        cases += _cases(both, dtype, 4096, [32768], goal_of_both)
        cases += _cases(both, dtype, 4096, [65536], ["kernels"])
        cases += _cases(forward, dtype, 4096, [32768, 16384, 8192], sweep)
        cases += _cases(both, dtype, 4096, [65536, 16384, 8192], sweep_of_both)
    for mode in (forward, both):
        cases += _cases(mode, "bfloat16", 4096, [32768], ["naive_compiled"])
    for dtype in dtypes:
        for m in (1024, 16384):
            cases += _cases(forward, dtype, m, [_CUBLAS_N], ["cublas"])
            cases += _cases(forward, dtype, m, [32768], sweep)
            cases += _cases(both, dtype, m, [32768], sweep_of_both)
    for dtype in dtypes:
        cases += _cases(forward, dtype, 4096, [131072, 262144], ["triton", "half_gemm"])
        cases += _cases(both, dtype, 4096, [131072, 262144], ["triton"])
    cases += _cases(forward, "bfloat16", 1024, [65536, 131072, 262144], ["triton", "half_gemm"])
    cases += _cases(forward, "bfloat16", 4096, [131072, 262144], ["chunked", "tiled"])
    return cases


def smoke_plan() -> list[Case]:
    """Every provider, in seconds."""
    forward = [provider for provider in LABELS if provider not in ("naive_autograd", "kernels")]
    both = [provider for provider in LABELS if provider not in ("half_gemm", "cublas")]
    cases: list[Case] = []
    for dtype in ("bfloat16", "float32"):
        cases += _cases("forward", dtype, 64, [256, 1024], forward)
        cases += _cases("forward_backward", dtype, 64, [256, 1024], both)
    return cases


def _cases(mode: str, dtype: str, m: int, ns: Iterable[int], providers: Iterable[str]) -> Iterator[Case]:
    return (Case(provider, mode, dtype, m, n) for n in ns for provider in providers)
