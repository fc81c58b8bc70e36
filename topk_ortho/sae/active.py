"""Features of a TopK-family SAE, kept by their active entries: encoding, decoding and gradients cost those alone.

A dense SAE multiplies [batch, n_features] matrices five times a step: once to encode, four times to decode and to go
back. Here only the first product is left; the rest are sums over the active entries, made by `embedding_bag`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class ActiveFeatures(NamedTuple):
    """Entries of a matrix of features [batch, n_features] that may be above 0; all others are 0."""

    positions: Tensor
    """[n_active] int64, ascending and distinct: sample * n_features + feature"""
    values: Tensor
    """[n_active], none below 0; gradients go here"""
    batch: int
    """Number of samples"""
    n_features: int
    """Size of the dictionary"""

    @property
    def features(self) -> Tensor:
        """Feature of each entry, int64 [n_active]."""
        return self.positions % self.n_features

    @property
    def samples(self) -> Tensor:
        """Sample of each entry, int64 [n_active]."""
        return self.positions // self.n_features

    def to_dense(self) -> Tensor:
        """The matrix [batch, n_features], differentiable in the values."""
        flat = self.values.new_zeros(self.batch * self.n_features).index_put((self.positions,), self.values)
        return flat.view(self.batch, self.n_features)

    def to_sparse(self) -> Tensor:
        """The matrix as a coalesced sparse_coo tensor, which the public ops take; differentiable in the values."""
        indices = torch.stack([self.samples, self.features])
        # coalesced, as positions ascend: without the flag the op would sort the entries
        shape = (self.batch, self.n_features)
        return torch.sparse_coo_tensor(indices, self.values, shape, check_invariants=False, is_coalesced=True)


def firing_counts(features: Tensor | ActiveFeatures) -> Tensor:
    """Number of samples of the batch in which each feature is above 0, int64 [n_features]."""
    if isinstance(features, ActiveFeatures):
        return torch.bincount(features.features[features.values > 0], minlength=features.n_features)
    return (features > 0).sum(dim=0)


def activation_norms(features: Tensor | ActiveFeatures) -> Tensor:
    """L2 norm of every feature over the batch, [n_features]; differentiable, with gradient 0 where it is 0."""
    if not isinstance(features, ActiveFeatures):
        norms: Tensor = torch.linalg.vector_norm(features, dim=0)
        return norms
    squares = features.values.new_zeros(features.n_features).index_add(0, features.features, features.values.square())
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt() * (squares > 0)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # how much is selected depends on the data
def encode_selected(x: Tensor, W_enc: Tensor, b_enc: Tensor, select: Callable[[Tensor], Tensor]) -> ActiveFeatures:
    """Features relu(x @ W_enc.T + b_enc) at the entries that `select` picks from the pre-activations.

    `select` maps pre-activations [batch, n_features] to ascending positions; the choice is not differentiated through.
    """
    with torch.no_grad():
        pre_activations = torch.nn.functional.linear(x, W_enc, b_enc)
        positions = select(pre_activations)
    values = _SelectedPreActivations.apply(x, W_enc, b_enc, pre_activations, positions)
    return ActiveFeatures(positions, torch.relu(values), *pre_activations.shape)


def decode_active(features: ActiveFeatures, W_dec: Tensor) -> Tensor:
    """features @ W_dec, [batch, d_in], without b_dec."""
    starts = _bag_starts(features.positions, features.batch, features.n_features)
    return _sum_rows(W_dec, features.features, features.values, starts)


def decode_nested(features: ActiveFeatures, W_dec: Tensor, widths: tuple[int, ...]) -> Tensor:
    """features[:, :w] @ W_dec[:w] for every w of ascending widths, [batch, n_widths, d_in], without b_dec."""
    # entries ascend, so those of one sample between two widths lie together: one bag for each such group
    samples = torch.arange(features.batch, device=W_dec.device)[:, None] * features.n_features
    firsts = samples + torch.tensor([0, *widths[:-1]], device=W_dec.device)
    starts = torch.searchsorted(features.positions, firsts.flatten())
    groups = _sum_rows(W_dec, features.features, features.values, starts)
    return groups.view(features.batch, len(widths), -1).cumsum(dim=1)


def _bag_starts(positions: Tensor, batch: int, n_features: int) -> Tensor:
    """Where the entries of each sample start, int64 [batch]."""
    return torch.searchsorted(positions, torch.arange(batch, device=positions.device) * n_features)


def _sum_rows(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Weighted sum of rows of a table for each bag, [n_bags, width]."""
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights.to(table.dtype))


class _SelectedPreActivations(torch.autograd.Function):
    """The entries of x @ W_enc.T + b_enc at some positions; gradients are sums over these entries alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, pre_activations: Tensor, positions: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, positions)
        return pre_activations.reshape(-1)[positions].to(W_enc.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, positions = ctx.saved_tensors
        n_features = W_enc.shape[0]
        features, samples = positions % n_features, positions // n_features
        by_feature = torch.argsort(features, stable=True)
        starts = torch.searchsorted(features[by_feature], torch.arange(n_features, device=x.device))
        grad_W_enc = _sum_rows(x, samples[by_feature], grad[by_feature], starts)
        grad_b_enc = torch.zeros_like(W_enc[:, 0]).index_add_(0, features, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _sum_rows(W_enc, features, grad, _bag_starts(positions, x.shape[0], n_features))
        return grad_x, grad_W_enc, grad_b_enc, None, None
