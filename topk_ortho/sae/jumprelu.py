"""The JumpReLU sparse autoencoder: every feature has a threshold of its own, learned [1].

    features = z * (z > threshold),    z the pre-activations

Neither this nor the count of active features has a useful derivative in the threshold; both get one by a rectangular
window of `bandwidth` around it (equations 11 and 12 of [1]). The threshold itself is learned, not its logarithm as in
[1], so that a step moves it by about the learning rate however small it is, and is kept at 0 or above.

[1] Rajamanoharan et al., "Jumping ahead", arXiv:2407.14435.
"""

from typing import Any

import torch
from torch import Tensor, nn

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae.base import SAEOutput, SparseAutoencoder


class JumpReLUSAE(SparseAutoencoder):
    """Pre-activations above a learned threshold; the sparsity term is ``(L0 / l0 - 1) ** 2``.

    Parameters
    ----------
    d_in, n_features, generator, parallel
        As in `SparseAutoencoder`.
    l0 : int
        Active features of a token, on average, that the sparsity term pulls to (section 4.2 of [1] names this form).
    initial_threshold : float
        In units of the activations.
    bandwidth : float
        Width of the window in which a pre-activation moves its threshold, in the same units.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        l0: int,
        *,
        initial_threshold: float,
        bandwidth: float,
        generator: torch.Generator | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__(d_in, n_features, generator=generator, parallel=parallel)
        self.l0 = l0
        self.bandwidth = bandwidth
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, initial_threshold))

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [batch, n_features] of x [batch, d_in]."""
        return self._activate(self.pre_activations(x))

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode x [batch, d_in], with the pre-activations."""
        pre_activations = self.pre_activations(x)
        features = self._activate(pre_activations)
        return SAEOutput(self.decode(features), features, pre_activations, ())

    def sparsity(self, output: SAEOutput, variance: float) -> Tensor:
        """Squared relative distance of the mean number of active features from `l0`."""
        assert output.pre_activations is not None
        count: Tensor = _Step.apply(output.pre_activations, self.threshold, self.bandwidth)
        count = count.sum(dim=1).sum() / self.parallel.n_rows(count)
        return (self.parallel.sum_batch(self.parallel.sum_features(count)) / self.l0 - 1).square()

    @torch.no_grad()
    def divide_scale(self, factor: float) -> None:
        """Turn an SAE of activations times `factor` into the same SAE of the activations, in place."""
        super().divide_scale(factor)
        self.threshold.div_(factor)
        self.bandwidth /= factor

    @torch.no_grad()
    def project(self) -> None:
        """Keep the thresholds at 0 or above."""
        self.threshold.clamp_(min=0.0)

    def _activate(self, pre_activations: Tensor) -> Tensor:
        result: Tensor = _JumpReLU.apply(pre_activations, self.threshold, self.bandwidth)
        return result


def _sum_in_window(values: Tensor, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Sum over the batch of values [batch, n_features] whose z lies within half a bandwidth of its threshold."""
    return (((z - threshold).abs() < bandwidth / 2) * values).sum(dim=0, dtype=threshold.dtype)


class _JumpReLU(torch.autograd.Function):
    """The function z * (z > threshold), whose derivative in the threshold is that of the window."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        grad_threshold = -threshold / ctx.bandwidth * _sum_in_window(grad, z, threshold, ctx.bandwidth)
        return grad * (z > threshold), grad_threshold, None


class _Step(torch.autograd.Function):
    """The function that is 1 where z > threshold and else 0; its derivative in the threshold is that of the window."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        return None, -_sum_in_window(grad, z, threshold, ctx.bandwidth) / ctx.bandwidth, None
