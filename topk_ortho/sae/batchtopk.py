"""The BatchTopK sparse autoencoder: the k largest pre-activations a token, on average over a batch [1].

In training the batch * k largest are kept, wherever they are. At inference, where a token should not depend on its
neighbours, those above a threshold are: the average over training steps of the smallest value that was kept.

[1] Bussmann, Leask and Nanda, "BatchTopK sparse autoencoders", arXiv:2412.06410.
"""

import torch
from torch import Tensor

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae.active import ActiveFeatures, encode_selected
from topk_ortho.sae.base import SparseAutoencoder

# per step; a short average, as the smallest value that a batch keeps has little noise and moves with the weights
_THRESHOLD_DECAY = 0.95
_GUESS = 0.9  # times the threshold: a little below the smallest value that the next batch keeps


class BatchTopKSAE(SparseAutoencoder):
    """The ``batch * l0`` largest pre-activations of a batch in training mode, those above `threshold` in eval mode.

    Parameters
    ----------
    d_in, n_features, generator, parallel
        As in `SparseAutoencoder`.
    l0 : int
        Active features of a token, on average.

    Attributes
    ----------
    threshold : Tensor, float32 []
        What a pre-activation must exceed at inference; 0 before the first training step.
    """

    threshold: Tensor

    def __init__(
        self,
        d_in: int,
        n_features: int,
        l0: int,
        *,
        generator: torch.Generator | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__(d_in, n_features, generator=generator, parallel=parallel)
        self.l0 = l0
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Tensor) -> ActiveFeatures:
        """Feature activations [batch, n_features] of x [batch, d_in], by their active entries."""
        select = self._select_largest if self.training else self._select_above
        features: ActiveFeatures = encode_selected(self.centred(x), self.W_enc, self.b_enc, select)
        return features

    @torch.no_grad()
    def observe(self, features: Tensor | ActiveFeatures) -> None:
        """Move the threshold towards the smallest value that was kept in a training step."""
        assert isinstance(features, ActiveFeatures)
        active = features.values[features.values > 0]
        if self.parallel.count_of_all(active):
            smallest = active.min() if active.numel() else active.new_tensor(torch.inf)
            smallest = self.parallel.world.min(smallest)
            self.threshold.lerp_(smallest, torch.where(self.threshold == 0, 1.0, 1 - _THRESHOLD_DECAY))

    @torch.no_grad()
    def divide_scale(self, factor: float) -> None:
        """Turn an SAE of activations times `factor` into the same SAE of the activations, in place."""
        super().divide_scale(factor)
        self.threshold.div_(factor)

    def _select_above(self, pre_activations: Tensor) -> Tensor:
        return (pre_activations.flatten() > self.threshold).nonzero().squeeze(1)

    def _select_largest(self, pre_activations: Tensor) -> Tensor:
        """Positions of the batch * l0 largest values, or of all above 0 if these are fewer.

        To sort a whole batch costs more than to encode it. So the largest are sought among the few values above a
        guess, where all of them are unless fewer than batch * l0 values exceed it.
        """
        flat = pre_activations.flatten()
        n_kept = self.parallel.n_rows(pre_activations) * self.l0
        positions = (flat > _GUESS * self.threshold).nonzero().squeeze(1)
        if self.parallel.count_of_all(positions) < n_kept:
            positions = (flat > 0).nonzero().squeeze(1)
        return self.parallel.largest_of_batch(pre_activations, positions, n_kept)
