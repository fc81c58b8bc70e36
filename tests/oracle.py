"""What the ops must compute, in float64 and the plainest code.

Imports nothing of topk_ortho and is checked by hand in test_oracle.py. A matrix x [M, N] is a NumPy array here; a pair
is (row, col) with row < col, and the list of all pairs is in (row, col) order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

EPS = 1e-12


class Selected(NamedTuple):
    """The selected pairs in the total order, and the numbers that made the choice."""

    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray
    threshold: float
    tau: float | None


def normalized(x: np.ndarray) -> np.ndarray:
    """Columns of x divided by max(norm, EPS); dividing by the largest entry first keeps the square in range."""
    x = np.asarray(x, dtype=np.float64)
    x_hat = np.zeros_like(x)
    for j in range(x.shape[1]):
        largest = np.abs(x[:, j]).max()
        if largest > 0:
            norm = largest * np.sqrt(np.sum((x[:, j] / largest) ** 2))
            x_hat[:, j] = x[:, j] / max(norm, EPS)
    return x_hat


def all_pairs(n_features: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cols) of all N(N-1)/2 pairs, in (row, col) order."""
    return np.triu_indices(n_features, 1)


def cosines(x: np.ndarray) -> np.ndarray:
    """Signed cosine of every pair, in (row, col) order."""
    x_hat = normalized(x)
    return (x_hat.T @ x_hat)[all_pairs(x.shape[1])]


def k_of(n_features: int, fraction: float) -> int:
    """Half of the ordered off-diagonal entries that the fraction covers, at least one."""
    return max(1, int(n_features * (n_features - 1) * fraction) // 2)


def tau_of(values: np.ndarray, tau: float | str | None, n_std: float = 1.0) -> float | None:
    """The floor in numbers: "adaptive" is mean + n_std * population std of |cosine|."""
    if tau == "adaptive":
        magnitude = np.abs(values)
        mean = magnitude.sum() / len(magnitude)
        variance = ((magnitude - mean) ** 2).sum() / len(magnitude)
        return float(mean + n_std * np.sqrt(variance))
    return tau


def select(
    x: np.ndarray, k: int, tau: float | str | None = None, n_std: float = 1.0, similarity: str = "abs"
) -> Selected:
    """Sort every pair by (similarity descending, row, col); drop what fails tau; keep the first k."""
    rows, cols = all_pairs(x.shape[1])
    values = cosines(x)
    tau = tau_of(values, tau, n_std)
    sortable = np.abs(values) if similarity == "abs" else values
    passes = np.full(len(values), True) if tau is None else np.abs(values) > tau
    if similarity == "positive":
        passes &= values > 0
    order = np.lexsort((cols, rows, -sortable))
    kept = order[passes[order]][:k]
    threshold = sortable[kept[-1]] if len(kept) == k else max(0.0, tau or 0.0)
    return Selected(rows[kept], cols[kept], values[kept], float(threshold), tau)


def loss_of(values: np.ndarray, reduction: str) -> float:
    """Mean (0 over nothing) or sum of the squared cosines."""
    total = float(np.sum(values**2))
    return total if reduction == "sum" else total / max(1, len(values))


def max_cosines(x: np.ndarray, chunks: Sequence[Sequence[int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For each column the largest signed cosine to another of its chunk, and the lowest column that has it."""
    x_hat = normalized(x)
    gram = x_hat.T @ x_hat
    values, partners = np.zeros(x.shape[1]), np.zeros(x.shape[1], dtype=np.int64)
    for chunk in chunks or [range(x.shape[1])]:
        for j in chunk:
            others = [int(i) for i in sorted(chunk) if i != j]
            partners[j] = max(others, key=lambda i: (gram[i, j], -i))
            values[j] = gram[partners[j], j]
    return values, partners


def pair_values(
    x: torch.Tensor, rows: np.ndarray, cols: np.ndarray, priority: np.ndarray | None = None
) -> torch.Tensor:
    """Signed cosines of the given pairs, differentiable in x; the column of higher priority is held constant."""
    x_hat = torch.nn.functional.normalize(x, dim=0, eps=EPS)
    a, b = x_hat[:, rows], x_hat[:, cols]
    if priority is not None:
        a = torch.where(torch.tensor(priority[rows] > priority[cols]), a.detach(), a)
        b = torch.where(torch.tensor(priority[cols] > priority[rows]), b.detach(), b)
    return (a * b).sum(dim=0)


def loss_gradient(
    x: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    reduction: str,
    priority: np.ndarray | None = None,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    """Gradient of the loss over the given pairs, by autograd through the naive expression in `dtype`."""
    x_torch = torch.tensor(np.asarray(x), dtype=dtype, requires_grad=True)
    squares = pair_values(x_torch, rows, cols, priority).square()
    (squares.sum() / (max(1, len(rows)) if reduction == "mean" else 1)).backward()
    return x_torch.grad.double().numpy()


def max_cosine_gradient(x: np.ndarray, partners: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """Gradient of mean_j cosine(j, partner_j) ** 2, by autograd through the naive expression in `dtype`."""
    x_torch = torch.tensor(np.asarray(x), dtype=dtype, requires_grad=True)
    pair_values(x_torch, np.arange(len(partners)), partners).square().mean().backward()
    return x_torch.grad.double().numpy()
