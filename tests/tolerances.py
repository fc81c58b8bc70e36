"""The tolerance policy, written once.

1. Integers, counts, order, and two runs of one backend: equal (`torch.equal`).
2. Values and gradients: within a bound against float64 that follows from dtype and M, and
   (`test_as_accurate_as_plain_torch`) within PLAIN_FACTOR times the error of plain torch in the same dtype.
3. Selections: the two-sided inequality of the definition of exact, `assert_selection`; index equality only where every
   cosine is exact (`tests.inputs.dyadic`).

**Basis.** Largest error of a cosine against long double, in unit roundoffs u, over Gaussian, half-normal and sparse
columns (N = 150, 6 seeds each; torch 2.13 for CPU, AMD EPYC), float32 / float64:

    M                1      2      8      64     512    4096
    plain torch    0/0    4/3    4/4     8/8   11/20   31/54
    tiled          2/2    5/5    5/5     7/9    7/16    5/44

`cosine_bound` = 2 u (4 + sqrt(M)): four roundings of norms and scales and a random walk of M, doubled; 2 to 5 times the
above.
"""

import numpy as np
import torch
from torch import Tensor

from tests import oracle
from topk_ortho import TopKPairs

PLAIN_FACTOR = 1.5
"""Ours to plain torch: 4.9 u to 3.7 u at M = 2 is the worst measured."""
PLAIN_FLOOR = 4.0
"""In unit roundoffs, beside it: at M = 1 plain torch is exact."""

PRODUCT_ROUNDING = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}
"""Both factors cut off to tf32, as tensor cores do (2**-10), or rounded to bf16 (2**-8); by Cauchy-Schwarz the sum of
\\|products\\| is at most 1."""


def float64(x: Tensor) -> np.ndarray:
    """The numbers of a tensor, wherever it is, as the float64 array that the oracle takes."""
    return x.detach().double().cpu().numpy()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, every other dtype accumulates in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def cosine_bound(x: Tensor, precision: str = "highest") -> float:
    """e of the definition of exact: bound on the error of a cosine of x [M, N]."""
    low = 0.0 if x.dtype == torch.float64 else PRODUCT_ROUNDING[precision]
    return low + 2 * unit_roundoff(accumulation_dtype(x)) * (4 + x.shape[0] ** 0.5)


def loss_bound(x: Tensor, n_terms: int, reduction: str = "mean", precision: str = "highest") -> float:
    """cos**2 moves by at most 2 e + e**2; the sum of n_terms of them rounds once more."""
    return 3 * cosine_bound(x, precision) * (max(1, n_terms) if reduction == "sum" else 1)


def gradient_bound(x: Tensor, rows: np.ndarray, cols: np.ndarray, scale: float) -> np.ndarray:
    """Bound [N] for each entry of a column of d/dx scale * sum cos**2.

    A pair adds 2 scale cos (x_hat_b - cos x_hat_a) / norm_a to column a: errors of e in cos, in the direction and in
    its length each move that by at most 2 scale e / norm_a. The result is then rounded to the dtype of x.
    """
    largest = np.abs(float64(x)).max(axis=0)
    safe = np.where(largest > 0, largest, 1)
    norms = np.maximum(safe * np.sqrt(((float64(x) / safe) ** 2).sum(axis=0)), oracle.EPS)
    n_pairs_of_column = np.bincount(np.concatenate([rows, cols]), minlength=x.shape[1])
    return 6 * cosine_bound(x) * scale * n_pairs_of_column / norms


def assert_within(
    *, actual: Tensor | np.ndarray | float, expected: np.ndarray | float, bound: np.ndarray | float
) -> None:
    """Every \\|actual - expected\\| <= bound, which broadcasts; a failure prints the worst element."""
    actual = float64(actual) if isinstance(actual, Tensor) else np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    excess = np.abs(actual - expected) - np.broadcast_to(bound, expected.shape)
    if excess.size and not (excess <= 0).all():
        worst = np.unravel_index(np.nan_to_num(excess, nan=np.inf).argmax(), excess.shape)
        at = tuple(map(int, worst))
        raise AssertionError(
            f"{(~(excess <= 0)).sum()} of {excess.size} elements are off; worst at {at}: "
            f"actual {actual[worst]!r}, expected {expected[worst]!r}, off by {excess[worst]!r} more than the bound"
        )


def assert_gradient(*, actual: Tensor, expected: np.ndarray, bound: np.ndarray, dtype: torch.dtype) -> None:
    """`actual` [M, N] in dtype, every column within its bound plus the rounding of the result."""
    assert actual.dtype == dtype
    rounding = unit_roundoff(dtype) * np.abs(expected) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_within(actual=actual, expected=expected, bound=bound[None, :] + rounding)


def assert_selection(
    pairs: TopKPairs,
    x: Tensor,
    *,
    k: int,
    tau: float | str | None = None,
    n_std: float = 1.0,
    similarity: str = "abs",
    precision: str = "highest",
) -> None:
    """The definition of exact, and everything else that a `TopKPairs` promises."""
    n_features, e = x.shape[1], cosine_bound(x, precision)
    cosine = oracle.cosines(float64(x))
    all_rows, all_cols = oracle.all_pairs(n_features)
    index = all_rows * n_features + all_cols
    similarities = np.abs(cosine) if similarity == "abs" else cosine
    adaptive = tau == "adaptive"
    tau = oracle.tau_of(cosine, tau, n_std)
    floor = -np.inf if tau is None else tau
    if similarity == "positive":
        floor = max(floor, 0.0)
    # a mean and a population std move by no more than the numbers they are of
    e_floor = (1 + abs(n_std)) * e if adaptive else e

    assert (pairs.n_features, pairs.k) == (n_features, k)
    assert (pairs.rows.dtype, pairs.cols.dtype, pairs.values.dtype) == (torch.int64, torch.int64, torch.float32)
    p = pairs.rows.numel()
    assert pairs.rows.shape == pairs.cols.shape == pairs.values.shape == (p,)
    assert (pairs.rows >= 0).all()
    assert (pairs.rows < pairs.cols).all()
    assert (pairs.cols < n_features).all()
    selected_index = (pairs.rows * n_features + pairs.cols).numpy()
    assert len(set(selected_index.tolist())) == p, "a pair is listed twice"

    n_least, n_most = (min(k, int((similarities > floor + sign * e_floor).sum())) for sign in (1, -1))
    assert n_least <= p <= n_most, f"{p} pairs selected, expected {n_least} to {n_most}"

    position = np.searchsorted(index, selected_index)
    rounding = unit_roundoff(torch.float32)  # of the values, which are float32 for every x
    assert_within(actual=pairs.values, expected=cosine[position], bound=e + rounding)
    left_out = np.delete(similarities, position)
    t_k = np.sort(similarities)[-k]
    if p == k:
        assert similarities[position].min() >= t_k - e, "a selected pair is below the k-th value"
        assert left_out.size == 0 or left_out.max() <= t_k + e, "a pair above the k-th value is left out"
    else:
        assert left_out.size == 0 or left_out.max() <= floor + e_floor, "a pair above the floor is left out"

    listed = pairs.values.detach().abs() if similarity == "abs" else pairs.values.detach()
    assert (listed[1:] <= listed[:-1]).all(), "values are not in order"
    if x.dtype != torch.float64:  # values that differ in float64 may be equal in float32
        tied = listed[1:] == listed[:-1]
        assert (np.diff(selected_index)[tied.numpy()] > 0).all(), "equal values are not in the order of (row, col)"

    assert pairs.threshold.shape == ()
    assert pairs.threshold.dtype == torch.float32
    if p == k:
        assert torch.equal(pairs.threshold, listed[-1])
    else:
        assert_within(actual=pairs.threshold, expected=max(floor, 0.0), bound=e_floor + rounding)
    if tau is None:
        assert pairs.tau is None
    else:
        assert_within(actual=pairs.tau, expected=tau, bound=e_floor)
