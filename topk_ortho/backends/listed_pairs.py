"""Cosines of pairs that are known already."""

import warnings

import torch
from torch import Tensor

_GATHERED_ELEMENTS = 2**25
"""Elements of x that are gathered at a time"""


def cosines_of(x_hat: Tensor, index: Tensor) -> Tensor:
    """Cosines of pairs of columns, whose directions are given.

    Parameters
    ----------
    x_hat : Tensor, shape [N, M], float32 or float64
        The columns divided by their lengths, as rows; contiguous.
    index : Tensor, shape [p], int64
        ``row * N + col`` of each pair, ascending.
    """
    n_features, n_rows = x_hat.shape
    rows = index.div(n_features, rounding_mode="floor")
    cols = index - rows * n_features
    if x_hat.device.type == "cpu" and torch.backends.mkl.is_available():  # four times as fast as gathering
        starts, size = torch.searchsorted(rows, torch.arange(n_features + 1)), (n_features, n_features)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks)")
            pattern = torch.sparse_csr_tensor(
                starts, cols, x_hat.new_zeros(index.numel()), size, check_invariants=False
            )
        sampled: Tensor = torch.sparse.sampled_addmm(pattern, x_hat, x_hat.T, beta=0.0)
        return sampled.values().clamp(-1, 1)  # torch.compile fails at what clamp_ leaves, a view of a sparse tensor
    cosines = x_hat.new_empty(index.numel())
    n_gathered = max(1, _GATHERED_ELEMENTS // n_rows)
    parts = (rows.split(n_gathered), cols.split(n_gathered), cosines.split(n_gathered))
    for row, col, out in zip(*parts, strict=True):
        torch.sum(x_hat.index_select(0, row).mul_(x_hat.index_select(0, col)), dim=1, out=out)
    return cosines.clamp_(-1, 1)
