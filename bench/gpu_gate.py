"""Are the results right? `bench.gpu` measures no speed until every check here has passed.

Selection, loss and gradient against float64 on the same device, by code that shares nothing with the package. A
selection may differ from that of float64 by what the error of a cosine allows: with t_k the k-th |cosine| and e a bound
on that error, nothing below t_k - e is selected and nothing above t_k + e is left out.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bench.providers import FRACTION
from topk_ortho import TopKPairs, initial_state, topk_ortho_loss, topk_pairs
from topk_ortho.definitions import k_from_fraction


class Check(NamedTuple):
    """A call that is checked."""

    name: str
    dtype: torch.dtype
    m: int
    n: int
    precision: Literal["highest", "high", "medium"] = "highest"
    is_tied: bool = False
    """Every cosine is a multiple of 1/4, exact in any precision: the first k of the order have to be selected."""


# Small, but large enough for every route: N = 8,192 screens float32, and 4,096 columns have more ties than records.
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


def faults_of(check: Check, device: torch.device, backend: str) -> list[str]:
    """What is wrong, empty if nothing is: without a state, in the first call of one, in the next, in the gradient."""
    options: dict[str, Any] = {"precision": check.precision, "backend": backend}
    faults = []
    try:
        x = _input_of(check).to(device)
        x_hat = torch.nn.functional.normalize(x.double(), dim=0)
        cosine = x_hat.T @ x_hat
        state = initial_state(device)
        for call, call_state in (("no state", None), ("first of a state", state), ("warm", state)):
            pairs = topk_pairs(x, FRACTION, state=call_state, **options)
            faults += [f"{call}: {fault}" for fault in _faults_of_selection(pairs, cosine, check)]
        if not faults:
            x.requires_grad_()
            loss = topk_ortho_loss(x, FRACTION, **options)
            (gradient,) = torch.autograd.grad(loss, x)
            faults += _faults_of_loss(loss.item(), gradient, x.detach(), pairs, _cosine_bound(check))
    except Exception as error:  # of the compiler or the driver too: all that fails is to be seen at once
        faults.append(repr(error)[:300])
    return [f"{check.name}: {fault}" for fault in faults]


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


def _cosine_bound(check: Check) -> float:
    """Bound on the error of a cosine against float64.

    Factors rounded to bf16 (2**-8 each) or cut off to tf32 (2**-10 each); a float32 sum of M products as it comes out,
    or, on the matrix units, which cut off what they add, a bound for any order.
    """
    if check.precision == "highest" and check.dtype == torch.float32:
        return 2.0**-23 * (4 + math.sqrt(check.m))
    rounding = 0.0 if check.dtype != torch.float32 else 2.0**-9 if check.precision == "high" else 2.0**-7
    return rounding + 2.0**-23 * (check.m + 16)  # as in `topk_ortho.kernels.search`


def _faults_of_selection(pairs: TopKPairs, cosine: Tensor, check: Check) -> Iterator[str]:
    """By the definition of exact; on ties by the order itself."""
    rows, cols, values, n, e = pairs.rows, pairs.cols, pairs.values, check.n, _cosine_bound(check)
    k = k_from_fraction(n, FRACTION)
    if len(rows) != k:
        yield f"{len(rows)} pairs selected, expected {k}"
        return
    if not ((rows >= 0) & (rows < cols) & (cols < n)).all():
        yield "not all pairs have 0 <= row < col < N"
        return
    index = rows * n + cols
    if len(index.unique()) != k:
        yield "a pair is listed twice"
    worst = (values - cosine[rows, cols]).abs().max().item()
    if not worst <= e + 2.0**-24:
        yield f"a value is off by {worst:.2g}, the bound is {e:.2g}"

    is_pair = torch.ones_like(cosine, dtype=torch.bool).triu_(1)
    magnitude = cosine.abs().masked_fill_(~is_pair, -1).flatten()
    t_k = magnitude.topk(k).values[-1].item()
    lowest, left_out = magnitude[index].min().item(), magnitude.index_fill(0, index, -1).max().item()
    if lowest < t_k - e:
        yield f"a selected pair has {lowest:.9f}, the k-th {t_k:.9f}"
    if left_out > t_k + e:
        yield f"a pair of {left_out:.9f} is left out, the k-th has {t_k:.9f}"

    listed = values.abs()
    if (listed[1:] > listed[:-1]).any():
        yield "values are not in order"
    if not (index[1:] > index[:-1])[listed[1:] == listed[:-1]].all():
        yield "equal values are not in the order of (row, col)"
    if check.is_tied and not torch.equal(index, magnitude.sort(descending=True, stable=True).indices[:k]):
        yield "of equal pairs not the first are selected"
    if pairs.threshold != listed[-1]:
        yield f"the threshold is {pairs.threshold.item():.9f}, the last pair has {listed[-1].item():.9f}"


def _faults_of_loss(loss: float, gradient: Tensor, x: Tensor, pairs: TopKPairs, e: float) -> Iterator[str]:
    """Against those of the selected pairs, by autograd in float64."""
    x64 = x.double().requires_grad_()
    norms = x64.norm(dim=0).clamp_min(1e-12)
    x_hat = x64 / norms
    loss64 = (x_hat[:, pairs.rows] * x_hat[:, pairs.cols]).sum(dim=0).square().mean()
    (gradient64,) = torch.autograd.grad(loss64, x64)

    if not abs(loss - loss64.item()) <= 3 * e:
        yield f"loss {loss:.9f}, expected {loss64.item():.9f}"
    if gradient.dtype != x.dtype:
        yield f"the gradient is {gradient.dtype}"
    # a pair adds 2 cos (x_hat_b - cos x_hat_a) / (p norm_a): e in cos, in direction and in length
    n_partners = torch.bincount(torch.cat([pairs.rows, pairs.cols]), minlength=x.shape[1])
    info = torch.finfo(x.dtype)
    bound = 6 * e * n_partners / (len(pairs.rows) * norms.detach())
    bound = bound + info.eps / 2 * gradient64.abs() + info.smallest_normal
    excess = ((gradient.double() - gradient64).abs() - bound).nan_to_num(nan=math.inf).max().item()
    if excess > 0:
        yield f"the gradient is off by {excess:.2g} more than its bound"
