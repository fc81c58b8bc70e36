"""Gradient of a weighted sum of cosines in the entries of a sparse x: the products are made once more and weighted."""

import torch
from torch import Tensor

from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.sparse.coordinates import Coordinates, gradient_in_values, unit_columns
from topk_ortho.backends.sparse.products import Slabs


def pair_gradient(x: Coordinates, pairs: WeightedPairs, slabs: Slabs) -> Tensor:
    """Gradient in the values of x of sum_p weight_p * cosine_p, as `Backend.pair_gradient`; padding gets 0."""
    unit = unit_columns(x)
    index, weights = _in_order(pairs, x.n_features)
    needed = _entries_of_pairs(unit.x_hat, index)
    of_needed = torch.zeros(needed.numel(), dtype=torch.float64, device=needed.device)
    for slab in slabs.of(unit.x_hat.take(needed)):
        ends = torch.tensor([slab.first_feature, slab.last_feature + 1], device=index.device) * x.n_features
        first, stop = torch.searchsorted(index, ends).tolist()
        if first < stop:
            slab.add_pair_gradient(index[first:stop], weights[:, first:stop], of_needed)
    gradient = torch.zeros_like(unit.x_hat.values, dtype=torch.float64)
    gradient[needed] = of_needed
    return gradient_in_values(x, unit, gradient)


def _in_order(pairs: WeightedPairs, n_features: int) -> tuple[Tensor, Tensor]:
    """The pairs that have a weight, each once, as ascending row * N + col; and their float64 weights [2, p]."""
    rows, cols, row_weights, col_weights = pairs
    is_weighted = ((row_weights != 0) | (col_weights != 0)).nonzero().squeeze(1)
    rows, cols = rows[is_weighted], cols[is_weighted]
    weights = torch.stack([row_weights[is_weighted], col_weights[is_weighted]]).double()
    weights = torch.where(rows < cols, weights, weights.flip(0))
    index = torch.minimum(rows, cols) * n_features + torch.maximum(rows, cols)
    if (index[1:] > index[:-1]).all():
        return index, weights
    index, order = index.sort(stable=True)
    weights = weights[:, order]
    index, lengths = index.unique_consecutive(return_counts=True)
    return index, torch.stack([torch.segment_reduce(weight, "sum", lengths=lengths) for weight in weights])


def _entries_of_pairs(x_hat: Coordinates, index: Tensor) -> Tensor:
    """Places of the entries whose feature is in a pair; of all entries, if there are more pairs than entries."""
    if index.numel() > x_hat.features.numel():
        return torch.arange(x_hat.features.numel(), device=index.device)
    is_needed = torch.zeros(x_hat.n_features, dtype=torch.bool, device=index.device)
    is_needed[index.div(x_hat.n_features, rounding_mode="floor")] = True
    is_needed[index % x_hat.n_features] = True
    return is_needed[x_hat.features].nonzero().squeeze(1)
