"""Are the results right? No speed is measured until every check here has passed.

Each provider that will be timed first runs at a small size, and topk_ortho also on inputs made to be difficult. All are
compared with float64 on the same device, by code that shares nothing with the package. A selection may differ from that
of float64 by what the error of a cosine allows: with t_k the k-th |cosine| and e a bound on that error, no pair below
t_k - e is selected and none above t_k + e is left out.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bench.cases import FRACTION, Benchmark, Case
from topk_ortho import TopKPairs, initial_state, topk_ortho_loss, topk_pairs
from topk_ortho.definitions import k_from_fraction

_PEER_TOLERANCE = {  # relative error of a loss, and of a gradient in its norm
    "float32": (1e-5, 1e-4),
    "bfloat16": (2e-2, 0.3),  # the peers select by 8 bits, so that near the k-th |cosine| they take other pairs
}


class Check(NamedTuple):
    """A call of topk_ortho that is compared with the definition of exact."""

    name: str
    dtype: torch.dtype
    m: int
    n: int
    precision: Literal["highest", "high", "medium"] = "highest"
    is_tied: bool = False
    """Every cosine is a multiple of 1/4, exact in any precision: the first k of the order have to be selected."""


# small, but large enough for every route of a GPU: 8,192 columns screen float32, 4,096 have more ties than records
CHECKS = [
    Check("bf16", torch.bfloat16, 256, 4096),
    Check("bf16_ragged", torch.bfloat16, 203, 1037),
    Check("bf16_ties", torch.bfloat16, 32, 4096, is_tied=True),
    Check("fp16", torch.float16, 256, 2048),
    Check("fp32_highest", torch.float32, 256, 2048),
    Check("fp32_highest_large", torch.float32, 256, 8192),
    Check("fp32_high", torch.float32, 256, 2048, precision="high"),
    Check("fp32_medium", torch.float32, 256, 2048, precision="medium"),
    Check("fp32_ties", torch.float32, 32, 4096, is_tied=True),
]


def faults_of(benchmarks: Iterable[Benchmark], device: torch.device, exact: Iterable[Check] = CHECKS) -> list[str]:
    """All that is wrong with what these benchmarks time on a device; prints the checks as they go."""
    checks: dict[str, Callable[[], Iterator[str]]] = {}
    for benchmark in benchmarks:
        for case in benchmark.cases(device.type, True) if benchmark.inputs else []:
            if case.provider not in ("half_gemm", "cublas"):  # products alone, which are no answer
                small = benchmark.small(case)
                checks[str(small)] = partial(faults_of_provider, benchmark, small, device)
    for check in exact:
        n = check.n if device.type == "cuda" else min(check.n, 1100)
        checks[f"exact, {check.name}"] = partial(faults_of_check, check._replace(n=n), device)
    faults = []
    for name, run in checks.items():
        try:
            found = [f"{name}: {fault}" for fault in run()]
        except Exception as error:  # of a compiler or driver too: all that fails is to be seen at once
            found = [f"{name}: {error!r:.300}"]
        print(f"check {name}: {'wrong' if found else 'right'}", flush=True)
        faults += found
    return faults


def faults_of_provider(benchmark: Benchmark, case: Case, device: torch.device) -> Iterator[str]:
    """What is wrong with the first result of a case, which has to be small; nothing if it is right."""
    assert benchmark.inputs is not None
    answer = benchmark.make_call(case, device)()
    x, indices = benchmark.inputs(case, device)
    cosine, k = _cosines(x), benchmark.k_of(case)
    if case.mode.startswith("pairs"):
        assert isinstance(answer, tuple)
        yield from _faults_of_selection(*answer[:3], cosine=cosine, k=k, e=_cosine_bound(x, "highest"))
        return
    best = cosine.triu(1).abs().flatten().topk(k).indices
    expected = _loss_and_gradient(x, best // case.N, best % case.N, k)
    gradient = answer[0] if isinstance(answer, tuple) else None
    if indices is not None and gradient is not None and gradient.shape == indices.shape:
        expected = (expected[0], expected[1].gather(1, indices))
    loss = answer if isinstance(answer, Tensor) else None
    yield from _faults_of_values(loss, gradient, expected, *_PEER_TOLERANCE[case.dtype])


def faults_of_check(
    check: Check,
    device: torch.device,
    select: Callable[..., TopKPairs] = topk_pairs,
    loss_of: Callable[..., Tensor] = topk_ortho_loss,
) -> Iterator[str]:
    """What is wrong: without a state, in the first call of one, in the next, in the loss or its gradient."""
    x = _input_of(check).to(device)
    cosine, k, e = _cosines(x), k_from_fraction(check.n, FRACTION), _cosine_bound(x, check.precision)
    state = initial_state(device)
    for call, call_state in (("no state", None), ("first of a state", state), ("warm", state)):
        pairs = select(x, FRACTION, state=call_state, precision=check.precision)
        faults = [*_faults_of_selection(pairs.rows, pairs.cols, pairs.values, cosine=cosine, k=k, e=e)]
        faults = faults or [*_faults_of_order(pairs, cosine if check.is_tied else None)]
        yield from (f"{call}: {fault}" for fault in faults)
    if not faults:
        x.requires_grad_()
        loss = loss_of(x, FRACTION, precision=check.precision)
        (gradient,) = torch.autograd.grad(loss, x)
        expected = _loss_and_gradient(x.detach(), pairs.rows, pairs.cols, k)
        # each cosine and each direction is off by e at most, and cosines are far from 0; then x's dtype rounds
        tolerance = 3 * e / pairs.threshold.item() + torch.finfo(x.dtype).eps
        yield from _faults_of_values(loss, gradient, expected, tolerance, tolerance)


def _faults_of_selection(
    rows: Tensor, cols: Tensor, values: Tensor, *, cosine: Tensor, k: int, e: float
) -> Iterator[str]:
    """By the definition of exact. Pairs of cosine 0, which a sparse route does not list, need not be there."""
    n = cosine.shape[1]
    rows, cols, magnitude = rows.long(), cols.long(), cosine.abs().triu(1)
    expected = min(k, int((magnitude > 0).sum()))
    if len(rows) != expected:
        yield f"{len(rows)} pairs selected, expected {expected}"
        return
    if not ((rows >= 0) & (rows < cols) & (cols < n)).all():
        yield "not all pairs have 0 <= row < col < N"
        return
    index, magnitude = rows * n + cols, magnitude.flatten()
    if len(index.unique()) != len(index):
        yield "a pair is listed twice"
    worst = (values - cosine[rows, cols]).abs().max().item()
    if not worst <= e + 2.0**-24:
        yield f"a value is off by {worst:.2g}, the bound is {e:.2g}"
    t_k = magnitude.topk(len(rows)).values[-1].item()
    lowest, left_out = magnitude[index].min().item(), magnitude.index_fill(0, index, -1).max().item()
    if lowest < t_k - e:
        yield f"a selected pair has {lowest:.9f}, the k-th {t_k:.9f}"
    if left_out > t_k + e:
        yield f"a pair of {left_out:.9f} is left out, the k-th has {t_k:.9f}"


def _faults_of_order(pairs: TopKPairs, tied_cosine: Tensor | None) -> Iterator[str]:
    """The order of what was selected; of tied cosines the first pairs of the order have to be selected."""
    index, listed = pairs.rows * pairs.n_features + pairs.cols, pairs.values.abs()
    if (listed[1:] > listed[:-1]).any():
        yield "values are not in order"
    if not (index[1:] > index[:-1])[listed[1:] == listed[:-1]].all():
        yield "equal values are not in the order of (row, col)"
    if pairs.threshold != listed[-1]:
        yield f"the threshold is {pairs.threshold.item():.9f}, the last pair has {listed[-1].item():.9f}"
    if tied_cosine is not None:
        magnitude = tied_cosine.abs().triu(1).flatten()
        if not torch.equal(index, magnitude.sort(descending=True, stable=True).indices[: len(index)]):
            yield "of equal pairs not the first are selected"


def _faults_of_values(
    loss: Tensor | None,
    gradient: Tensor | None,
    expected: tuple[float, Tensor],
    loss_tolerance: float,
    gradient_tolerance: float,
) -> Iterator[str]:
    loss64, gradient64 = expected
    if loss is not None and not abs(loss.item() / loss64 - 1) <= loss_tolerance:
        yield f"the loss is {loss.item():.9f}, expected {loss64:.9f}"
    if gradient is not None:
        info = torch.finfo(gradient.dtype)
        rounding = info.smallest_normal * info.eps * math.sqrt(gradient.numel())  # of float16's subnormal numbers
        error = (((gradient.double() - gradient64).norm() - rounding) / gradient64.norm()).item()
        if not error <= gradient_tolerance:
            yield f"the gradient is off by {error:.2g} of its norm"


def _input_of(check: Check) -> Tensor:
    """Gaussian, some columns correlated, dead, parallel or opposite; or for ties four entries of one size a column."""
    generator = torch.Generator().manual_seed(0)
    if check.is_tied:
        rows = torch.rand(check.m, check.n, generator=generator).topk(4, dim=0).indices
        signs = torch.randint(0, 2, rows.shape, generator=generator) * 2.0 - 1
        sizes = torch.randint(-3, 4, (1, check.n), generator=generator).float().exp2()
        return torch.zeros(check.m, check.n).scatter_(0, rows, signs * sizes).to(check.dtype)
    x = torch.randn(check.m, check.n, generator=generator)
    x[:, 1::16] += 0.8 * x[:, ::16][:, : x[:, 1::16].shape[1]]
    x[:, 3] = 0
    x[:, 5] = 3 * x[:, -1]
    x[:, 6] = -x[:, -2]
    return x.to(check.dtype)


def _cosines(x: Tensor) -> Tensor:
    x_hat = torch.nn.functional.normalize(x.double(), dim=0)
    return x_hat.T @ x_hat


def _cosine_bound(x: Tensor, precision: str) -> float:
    """Bound on the error of a cosine against float64.

    Factors are rounded to bf16 (2**-8 each) or cut off to tf32 (2**-10 each). The error of a float32 sum of M products
    is about sqrt(M) roundings, or on the matrix units, which cut off what they add, at most M of them.
    """
    if precision == "highest" and x.dtype == torch.float32:
        return 2.0**-23 * (4 + math.sqrt(x.shape[0]))
    rounding = 0.0 if x.dtype != torch.float32 else 2.0**-9 if precision == "high" else 2.0**-7
    return rounding + 2.0**-23 * (x.shape[0] + 16)


def _loss_and_gradient(x: Tensor, rows: Tensor, cols: Tensor, k: int) -> tuple[float, Tensor]:
    """The loss of given pairs and its gradient, by autograd in float64."""
    x64 = x.double().requires_grad_()
    x_hat = x64 / x64.norm(dim=0).clamp_min(1e-12)
    loss = (x_hat[:, rows] * x_hat[:, cols]).sum(dim=0).square().sum() / k
    (gradient,) = torch.autograd.grad(loss, x64)
    return loss.item(), gradient
