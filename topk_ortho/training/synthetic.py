"""Activations whose true features are known."""

import torch
from torch import Tensor

from topk_ortho.evaluation import ground_truth_metrics, hierarchical_features
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder
from topk_ortho.training.activations import generator_of
from topk_ortho.training.config import SyntheticConfig


class SyntheticActivations:
    """Sums of true features in a known hierarchy, see `HierarchicalFeatures`.

    Parameters
    ----------
    config : SyntheticConfig
        Sizes.
    seed : int
        Draws the true directions and, with the shard's number, each shard.
    """

    tokens_per_second: float | None = None

    def __init__(self, config: SyntheticConfig, seed: int):
        self.name = "the synthetic features"
        self.d_in = config.d_in
        self._seed = seed
        self.truth = hierarchical_features(
            config.d_in,
            config.n_parents,
            config.n_children,
            config.n_independent,
            generator=generator_of("true features", seed),
        )
        size = max(1, min(16_384, config.n_tokens // 2))
        self.shard_sizes = [size] * (config.n_tokens // size)

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, float32."""
        return self._sample(number)[0]

    def measure(self, sae: SparseAutoencoder, held_out: list[int]) -> dict[str, float]:
        """Absorption, recall and agreement with the true features, see `ground_truth_metrics`."""
        x, coefficients = (torch.cat(parts) for parts in zip(*map(self._sample, held_out), strict=True))
        features = sae.encode(x.to(sae.W_dec.device))
        dense = features.to_dense() if isinstance(features, ActiveFeatures) else features
        return ground_truth_metrics(sae.W_dec.detach().cpu(), dense.cpu(), self.truth, coefficients)

    def _sample(self, number: int) -> tuple[Tensor, Tensor]:
        return self.truth.sample(self.shard_sizes[number], generator_of("shard", self._seed, number))
