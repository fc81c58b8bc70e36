"""Are the results right? No speed is measured until every check here has passed.

Each provider that will be timed first runs at a small size, and topk_ortho also on inputs made to be difficult. All are
compared with float64 and the whole matrix, the backend "naive", on the same device. A selection may differ by what the
error of a cosine allows: with t_k the k-th |cosine| and e a bound on that error, no pair below t_k - e is selected and
none above t_k + e is left out. Ties, orders and precisions that are not timed are left to the tests of the package.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.cases import FRACTION, Benchmark, Case
from topk_ortho import TopKPairs, initial_state, topk_ortho_loss, topk_pairs
from topk_ortho.definitions import EPS, k_from_fraction

_TOLERANCE = {  # of a provider at the small size: relative error of a loss, and of a gradient in its norm
    "float32": {"forward": 1e-5, "forward_backward": 1e-4},
    # the peers select by 8 bits, so that near the k-th |cosine| they take other pairs
    "bfloat16": {"forward": 2e-2, "forward_backward": 0.3},
}
# dtype, M, N: small, but large enough for every route of a GPU, which screens float32 from 8,192 columns
EXACT = [
    (torch.bfloat16, 256, 4096),
    (torch.bfloat16, 203, 1037),
    (torch.float32, 256, 2048),
    (torch.float32, 256, 8192),
]
_MOST_FEATURES_ON_CPU = 1100


def faults_of(benchmarks: Iterable[Benchmark], device: torch.device) -> list[str]:
    """All that is wrong with what these benchmarks time on a device; prints the checks as they go."""
    checks: dict[str, Callable[[], Iterator[str]]] = {}
    for benchmark in benchmarks:
        for case in benchmark.small_cases(device.type) if benchmark.inputs else []:
            if case.provider not in ("half_gemm", "cublas"):  # products alone, which are no answer
                checks[str(case)] = partial(faults_of_provider, benchmark, case, device)
    for dtype, m, n in EXACT:
        n = n if device.type == "cuda" else min(n, _MOST_FEATURES_ON_CPU)
        checks[f"exact, {dtype}, M = {m}, N = {n:,}"] = partial(faults_of_topk_ortho, difficult(dtype, m, n).to(device))
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
    x, active = benchmark.inputs(case, device)
    k = benchmark.k_of(case)
    if case.mode.startswith("pairs"):
        assert isinstance(answer, tuple)
        yield from _faults_of_selection(x, k, *answer[:3])
        return
    exact = topk_pairs(x.double(), k=k, backend="naive")
    loss, gradient = _loss_and_gradient(x, exact.rows, exact.cols, k)
    tolerance = _TOLERANCE[case.dtype][case.mode]
    if isinstance(answer, Tensor):
        yield from _faults_of_value(answer, loss, tolerance)
    else:
        assert isinstance(answer, tuple)
        if active is not None and answer[0].shape == active.shape:
            gradient = gradient.gather(1, active)
        yield from _faults_of_value(answer[0], gradient, tolerance)


def faults_of_topk_ortho(
    x: Tensor, select: Callable[..., TopKPairs] = topk_pairs, loss_of: Callable[..., Tensor] = topk_ortho_loss
) -> Iterator[str]:
    """What is wrong: without a state, in the first call of one, in the next, in the loss or its gradient."""
    k = k_from_fraction(x.shape[1], FRACTION)
    state = initial_state(x.device)
    for call, call_state in (("no state", None), ("first of a state", state), ("warm", state)):
        pairs = select(x, FRACTION, state=call_state)
        faults = list(_faults_of_selection(x, k, pairs.rows, pairs.cols, pairs.values))
        yield from (f"{call}: {fault}" for fault in faults)
    if not faults:
        leaf = x.detach().requires_grad_()
        loss = loss_of(leaf, FRACTION)
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected_loss, expected_gradient = _loss_and_gradient(x, pairs.rows, pairs.cols, k)
        # each cosine and each direction is off by the bound at most, and cosines are far from 0; then x's dtype rounds
        tolerance = 3 * _cosine_bound(x) / pairs.threshold.item() + torch.finfo(x.dtype).eps
        yield from _faults_of_value(loss, expected_loss, tolerance)
        yield from _faults_of_value(gradient, expected_gradient, tolerance)


def _faults_of_selection(x: Tensor, k: int, rows: Tensor, cols: Tensor, values: Tensor) -> Iterator[str]:
    """What the definition of exact forbids. A sparse route does not list pairs of cosine 0."""
    x64, n, e = x.double(), x.shape[1], _cosine_bound(x)
    exact = topk_pairs(x64, k=k, backend="naive")
    expected = int((exact.values != 0).sum())
    rows, cols = rows.long(), cols.long()
    if len(rows) != expected:
        yield f"{len(rows)} pairs selected, expected {expected}"
        return
    if not ((rows >= 0) & (rows < cols) & (cols < n)).all():
        yield "not all pairs have 0 <= row < col < N"
        return
    index, exact_index = rows * n + cols, exact.rows * n + exact.cols
    if len(index.unique()) != len(index):
        yield "a pair is listed twice"
    cosines, exact_cosines = _cosines(x64, rows, cols), _cosines(x64, exact.rows, exact.cols).abs()
    worst = (values - cosines).abs().max().item()
    if not worst <= e + 2.0**-24:
        yield f"a value is off by {worst:.2g}, the bound is {e:.2g}"
    t_k, lowest = exact_cosines[:expected].min().item(), cosines.abs().min().item()
    if lowest < t_k - e:
        yield f"a selected pair has {lowest:.9f}, the k-th {t_k:.9f}"
    left_out = exact_cosines[~torch.isin(exact_index, index)]
    if (left_out > t_k + e).any():
        yield f"a pair of {left_out.max().item():.9f} is left out, the k-th has {t_k:.9f}"


def _faults_of_value(value: Tensor, expected: Tensor, tolerance: float) -> Iterator[str]:
    error = ((value.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        yield f"the {'gradient' if value.ndim else 'loss'} is off by {error:.2g} of its norm"


def difficult(dtype: torch.dtype, m: int, n: int) -> Tensor:
    """Gaussian columns, of which some are correlated, dead, parallel or opposite."""
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    x[:, 1::16] += 0.8 * x[:, ::16][:, : x[:, 1::16].shape[1]]
    x[:, 3] = 0
    x[:, 5] = 3 * x[:, -1]
    x[:, 6] = -x[:, -2]
    return x.to(dtype)


def _cosine_bound(x: Tensor) -> float:
    """Bound on the error of a cosine against float64.

    The error of a float32 sum of M products is about sqrt(M) roundings, or on the matrix units, which multiply 16-bit
    operands and cut off what they add, at most M of them.
    """
    m = x.shape[0]
    return 2.0**-23 * (4 + math.sqrt(m) if x.dtype == torch.float32 else m + 16)


def _cosines(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    x_hat: Tensor = x / x.norm(dim=0).clamp_min(EPS)
    return (x_hat[:, rows] * x_hat[:, cols]).sum(dim=0)


def _loss_and_gradient(x: Tensor, rows: Tensor, cols: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The loss of given pairs and its gradient, by autograd in float64."""
    leaf = x.double().requires_grad_()
    loss = _cosines(leaf, rows, cols).square().sum() / k
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
