"""What the words of a call mean. Everything may import this module, and it imports nothing of the package.

A matrix x [M, N] holds N features in its columns; ``x_hat[:, j] = x[:, j] / max(||x[:, j]||, EPS)``, and the cosine of
a pair of columns (row, col), row < col, is an entry of ``gram = x_hat.T @ x_hat``.

**Order.** Pairs are ordered by similarity descending, then by (row, col) ascending. The similarity is |cosine|, or the
signed cosine. A pair is carried as its signed cosine and one int64, its *index* ``row * N + col``, so that the second
half of the order is an integer comparison.

**Floor.** A pair counts only if its similarity exceeds the floor: tau, at least 0 where the order is by signed cosine.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Similarity = Literal["abs", "positive"]
Precision = Literal["highest", "high", "medium"]
Reduction = Literal["mean", "sum"]
BackendName = Literal["auto", "naive", "tiled", "triton", "sparse"]
Tau = float | Literal["adaptive"] | None

EPS = 1e-12
"""Least norm that a column is divided by, as in `torch.nn.functional.normalize`."""


class Query(NamedTuple):
    """Which pairs a call asks for; every field is already checked."""

    k: int
    """Number of pairs, 1 <= k <= N(N-1)/2."""
    tau: float | None = None
    """Fixed tau: a pair counts only if its |cosine| is above it. None if there is no fixed tau."""
    n_std: float | None = None
    """Adaptive tau: mean + n_std * std of |cosine| over all pairs. None unless tau is adaptive."""
    similarity: Similarity = "abs"
    """Order by |cosine|, or by the signed cosine with those <= 0 dropped."""
    precision: Precision = "highest"
    """Least precision of the products, in the words of `torch.set_float32_matmul_precision`."""


def n_pairs(n_features: int) -> int:
    """Number of unordered pairs of distinct columns."""
    return n_features * (n_features - 1) // 2


def k_from_fraction(n_features: int, fraction: float) -> int:
    """Number of unordered pairs in a share of the ordered ones: k = max(1, int(N (N-1) fraction) // 2)."""
    return max(1, int(n_features * (n_features - 1) * fraction) // 2)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Dtype of norms, products and cosines: float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def similarity_of(cosines: Tensor, similarity: Similarity) -> Tensor:
    """What the order compares: |cosine|, or the signed cosine."""
    return cosines.abs() if similarity == "abs" else cosines


def floor_of(query: Query, tau: float | None = None) -> float:
    """The similarity that a pair must exceed to count.

    `tau` is the one in force, if it is known; by default the query's. The floor is -1, which excludes nothing, if none
    was asked for or an adaptive tau is not known yet.
    """
    tau = query.tau if tau is None else tau
    if query.similarity == "positive":
        return max(0.0, tau or 0.0)
    return -1.0 if tau is None else tau


def first_in_order(cosines: Tensor, index: Tensor, similarity: Similarity, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` pairs of the order, sorted by it."""
    cosines, index = first_unsorted(cosines, index, similarity, count)
    if not (index[1:] > index[:-1]).all():
        by_index = index.argsort()
        cosines, index = cosines[by_index], index[by_index]
    rank = integers_in_order(similarity_of(cosines, similarity))
    order = rank.bitwise_not().argsort(stable=True)  # ~rank descends and cannot overflow
    return cosines.index_select(0, order), index.index_select(0, order)


def first_unsorted(cosines: Tensor, index: Tensor, similarity: Similarity, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` pairs of the order, in the sequence in which they came.

    Only pairs tied at the last similarity are sorted, to choose among them.
    """
    if index.numel() <= count:
        return cosines, index
    similarities = similarity_of(cosines, similarity)
    least = similarities.topk(count, sorted=False).values.min()
    is_first = similarities > least
    n_ties = count - int(is_first.sum())
    ties = (similarities == least).nonzero().squeeze(1)
    if ties.numel() > n_ties:
        ties = ties[index[ties].argsort()[:n_ties]]
    is_first[ties] = True
    first = is_first.nonzero().squeeze(1)
    return cosines.index_select(0, first), index.index_select(0, first)


def integers_in_order(numbers: Tensor) -> Tensor:
    """Integers that compare as the floating `numbers` do: they sort by radix, ten times faster on a CPU."""
    integer = torch.int64 if numbers.dtype == torch.float64 else torch.int32
    return _reordered((numbers + 0.0).view(integer))  # + 0.0 turns -0.0 into 0.0


def numbers_in_order(integers: Tensor) -> Tensor:
    """The numbers that `integers_in_order` made int32 or int64 integers of."""
    return _reordered(integers).view(torch.float64 if integers.dtype == torch.int64 else torch.float32)


def _reordered(bits: Tensor) -> Tensor:
    """Bits of floats, which order as these do but backwards below zero, in the order of integers; or the reverse."""
    sign_bit = 8 * bits.element_size() - 1
    ordered: Tensor = bits ^ ((bits >> sign_bit) & (2**sign_bit - 1))
    return ordered
