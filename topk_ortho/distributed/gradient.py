"""Gradients of cosines that lie on other ranks than the columns they belong to.

Every selected pair is told to the ranks of its two columns. Then the shards go round once, past all ranks, and each
rank gathers the partners of its own columns as they come by.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.norms import inverse_norms
from topk_ortho.custom_ops import weighted_pairs
from topk_ortho.definitions import EPS
from topk_ortho.distributed.ranks import Ranks
from topk_ortho.distributed.shards import Dealt, Shards

_SLAB_BYTES, _LEAST_SLAB = 2**21, 16
"""Partners are gathered from slabs of the columns of about this size, which stay in cache, and of so many rows of x"""


def attach(
    leaf: Tensor,
    cosines: Tensor,
    gradient: Callable[[Tensor, Tensor, WeightedPairs], Tensor],
    rows: Tensor,
    cols: Tensor,
    priority: Tensor | None,
) -> Tensor:
    """The cosines [p] of pairs of columns, differentiable in the part of x here; all ranks run the backward pass.

    Parameters
    ----------
    leaf : Tensor
        x, or the values of a sparse x.
    cosines : Tensor, shape [p]
        Of the pairs that this rank has found.
    gradient : callable
        Takes the leaf, the cosines and the weighted pairs, and returns the gradient in the leaf.
    rows, cols : Tensor, shape [p], int64
        The columns of the pairs, in numbers that all ranks share.
    priority : Tensor, shape [N], optional
        By the same numbers.
    """
    result: Tensor = _Attach.apply(leaf, cosines, gradient, rows, cols, priority)
    return result


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, cosines: Tensor, gradient: Any, *pairs: Tensor | None) -> Tensor:
        ctx.save_for_backward(leaf, cosines, *pairs)
        ctx.gradient = gradient
        return cosines.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaf, cosines, rows, cols, priority = ctx.saved_tensors
        return ctx.gradient(leaf, cosines, weighted_pairs(rows, cols, grad, priority)), *[None] * 5


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(own.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _TakeToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, same: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return same.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grad.clone()), None


def sum_over_ranks(own: Tensor, ranks: Ranks) -> Tensor:
    """The sum of what every rank has. It is one number or tensor, so its gradient is not summed over ranks again."""
    if ranks.size == 1:
        return own
    total: Tensor = _SumOverRanks.apply(own.contiguous(), ranks)
    return total


def take_to_ranks(same: Tensor, ranks: Ranks) -> Tensor:
    """A tensor that is the same on all ranks, for a use that differs; its gradient is the sum over ranks."""
    if ranks.size == 1:
        return same
    taken: Tensor = _TakeToRanks.apply(same, ranks)
    return taken


def gradient_here(x: Dealt, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
    """Gradient [n, M] in the columns that this rank works on; see `TiledBackend.pair_gradient`."""
    shards, ranks = x.shards, x.shards.ranks
    here = shards.here
    targets, sources, weights, products = _told(pairs, cosines, shards)
    targets = targets - here.start
    inverse = inverse_norms(x.norms)
    gathered = torch.zeros(len(here), x.rows.shape[1], dtype=weights.dtype, device=x.rows.device)
    for owner, rows in shards.ring(x.rows, ranks.size - 1):
        visitors = shards.places(owner)
        met = ((sources >= visitors.start) & (sources < visitors.stop)).nonzero().squeeze(1)
        partners, offsets = sources[met] - visitors.start, _offsets(targets[met], len(here))
        scale, of_met = inverse[visitors.start : visitors.stop, None], weights[met]
        for slab in _slabs(rows) if len(met) else ():
            x_hat = (rows[:, slab].to(weights.dtype) * scale).contiguous()
            gathered[:, slab] += _sums(x_hat, partners, offsets, of_met)
    own = _sums(products[:, None], torch.arange(len(products), device=products.device), _offsets(targets, len(here)))
    own *= (x.norms[here.start : here.stop] > EPS)[:, None]
    scale = inverse[here.start : here.stop, None]
    return gathered.sub_(x.rows.to(weights.dtype) * scale * own).mul_(scale)


def _told(pairs: WeightedPairs, cosines: Tensor, shards: Shards) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(place here, place of its partner, weight, weight * cosine) of every pair with a column here, in order."""
    ranks = shards.ranks
    targets, sources = torch.cat([pairs.rows, pairs.cols]), torch.cat([pairs.cols, pairs.rows])
    weights = torch.cat([pairs.row_weights, pairs.col_weights])
    owners = shards.owners(targets)
    order = owners.argsort(stable=True)
    counts = torch.bincount(owners, minlength=ranks.size)
    n_sent: list[int] = counts.tolist()
    n_received = ranks.counts_for_me(counts)
    places = ranks.exchange(torch.stack([targets, sources], dim=1)[order], n_sent, n_received)
    numbers = torch.stack([weights, weights * torch.cat([cosines, cosines])], dim=1)
    numbers = ranks.exchange(numbers[order], n_sent, n_received)
    targets, sources = places.unbind(1)
    in_order = (targets * shards.n_features + sources).argsort(stable=True)
    weights, products = numbers[in_order].unbind(1)
    return targets[in_order], sources[in_order], weights.contiguous(), products.contiguous()


def _offsets(targets: Tensor, count: int) -> Tensor:
    """Where each of `count` targets begins in a sorted list of them."""
    return torch.searchsorted(targets.contiguous(), torch.arange(count, device=targets.device))


def _sums(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of the rows that are named from each offset to the next."""
    if index.numel() == 0:
        return rows.new_zeros(offsets.numel(), rows.shape[1])
    weights = rows.new_ones(index.numel()) if weights is None else weights
    return embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights)


def _slabs(rows: Tensor) -> list[slice]:
    """Parts of the second dimension of a shard [n, M]."""
    width = max(_LEAST_SLAB, _SLAB_BYTES // (4 * max(1, len(rows))))
    return [slice(start, start + width) for start in range(0, rows.shape[1], width)]
