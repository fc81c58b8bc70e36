"""What the ops that list columns return, and how much two selections share."""

from typing import NamedTuple

import torch
from torch import Tensor


class TopKPairs(NamedTuple):
    """The k most similar pairs of columns, most similar first; pairs of equal similarity are ordered by (row, col).

    For a sparse x, pairs of cosine 0 are selected like others, but not listed.
    """

    rows: Tensor
    """int64 [p], p <= k"""
    cols: Tensor
    """int64 [p], rows < cols"""
    values: Tensor
    """float32 [p], signed cosines; differentiable in x"""
    threshold: Tensor
    """[] the k-th similarity; the floor in force (tau, or 0) if fewer than k pairs passed it"""
    tau: float | None
    """The tau in force, given or adaptive; None if there was none"""
    n_features: int
    """N"""
    k: int
    """Number of pairs asked for"""


class NearestColumns(NamedTuple):
    """The most similar other column of every column."""

    cosines: Tensor
    """[N], float32, float64 for float64 input: the largest signed cosine to another column; differentiable in x"""
    partners: Tensor
    """int64 [N], that other column, the lowest among equals"""


def pair_jaccard(a: TopKPairs, b: TopKPairs) -> float:
    """Share of pairs that two selections have in common: |A and B| / |A or B|.

    Parameters
    ----------
    a, b : TopKPairs
        Selections among the same number of features, on one device. Only pairs that are listed count, so two of a
        sparse x, or two of a dense one, compare best.

    Returns
    -------
    float
        In [0, 1]; 1 for equal selections, two empty ones included.

    Raises
    ------
    TypeError
        If an argument is not a `TopKPairs`.
    ValueError
        If the two differ in ``n_features``.

    Examples
    --------
    >>> x = torch.eye(4)[:, [0, 0, 1, 1]]
    >>> pair_jaccard(topk_pairs(x, k=2), topk_pairs(x, k=3))
    0.6666666666666666
    """
    for name, pairs in (("a", a), ("b", b)):
        if not isinstance(pairs, TopKPairs):
            raise TypeError(f"{name} must be a TopKPairs, got {type(pairs).__name__}")
    if a.n_features != b.n_features:
        raise ValueError(f"a and b must have the same n_features, got {a.n_features} and {b.n_features}")
    index_a, index_b = (pairs.rows * pairs.n_features + pairs.cols for pairs in (a, b))
    n_union = torch.cat([index_a, index_b]).unique().numel()
    n_common = index_a.numel() + index_b.numel() - n_union
    return n_common / n_union if n_union else 1.0
