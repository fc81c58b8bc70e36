"""When a dense x takes less time by its non-zeros than as tiles."""

import torch
from torch import Tensor

from topk_ortho.backends.screen import is_faster

# The unit is a multiply-add of the dense route on one thread. Threads share the work of the dense route, not of this
# one. Measured by `python -m bench sparse`, see bench/results/cpu.jsonl.
_PER_PRODUCT, _PER_CELL, _PER_CALL = 1500, 1, 1e8
_SCREENED = 0.55
"""Time of the dense route where it is screened, as a share of what it takes without."""
_SAMPLED_ROWS = 64


def is_cheaper(x: Tensor, *, is_selection: bool = False) -> bool:
    """Whether the sparse backend is expected to take less time for a dense x [M, N] on a CPU than "tiled".

    ::

        tiled    M N**2 / 2 / threads, times 0.55 for a selection that is screened in bfloat16
        sparse   a * products + b * M N (to find the non-zeros) + c (a call's overhead)

    Products are counted in a sample of the rows, and, if it says that they are few, in all.
    """
    n_rows, n_features = x.shape
    affordable = n_rows * n_features**2 / 2 / torch.get_num_threads()
    if is_selection and is_faster(n_rows, n_features, x.device):
        affordable *= _SCREENED
    affordable -= _PER_CALL + _PER_CELL * n_rows * n_features
    if affordable <= 0:
        return False
    # multiples of the golden ratio: everywhere in x, and in step with no period that its rows may have
    sample = (torch.arange(min(n_rows, _SAMPLED_ROWS), dtype=torch.float64) * 0.6180339887498949 % 1 * n_rows).long()
    if _PER_PRODUCT * n_rows / sample.numel() * _n_products(x[sample.to(x.device)]) > affordable:
        return False
    return _PER_PRODUCT * sum(_n_products(rows) for rows in x.split(_SAMPLED_ROWS)) < affordable


def _n_products(x: Tensor) -> int:
    n_active = (x != 0).sum(dim=1)
    return int((n_active * (n_active - 1) // 2).sum())
