"""The standard sparse autoencoder: ReLU features, made sparse by an L1 term."""

import math

import torch
from torch import Tensor

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae.active import ActiveFeatures
from topk_ortho.sae.base import SAEOutput, SparseAutoencoder


class StandardSAE(SparseAutoencoder):
    """``relu(pre_activations)``; the sparsity term is the mean of ``sum_i features_i ||W_dec_i||``, relative to x.

    Parameters
    ----------
    d_in, n_features, generator, parallel
        As in `SparseAutoencoder`. The encoder starts as the decoder times d_in / n_features, so that the first
        reconstruction is about as large as its input.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        generator: torch.Generator | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__(d_in, n_features, encoder_scale=d_in / n_features, generator=generator, parallel=parallel)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [batch, n_features] of x [batch, d_in]."""
        return torch.relu(self.pre_activations(x))

    def sparsity(self, output: SAEOutput, variance: float) -> Tensor:
        """Mean L1 norm of the features, each weighted by the length of its direction, relative to sqrt(variance)."""
        assert not isinstance(output.features, ActiveFeatures)
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        norm = (output.features * norms).sum(dim=1).sum() / self.parallel.n_rows(output.features)
        return self.parallel.sum_batch(self.parallel.sum_features(norm)) / math.sqrt(variance)
