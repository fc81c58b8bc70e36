"""Synthetic activations, of which the true features are known."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from topk_ortho.activations.config import SyntheticConfig
from topk_ortho.activations.hierarchy import hierarchical_features
from topk_ortho.activations.source import generator_of

_FORMAT = 1
"""To be raised when other samples are drawn for the same settings."""


class SyntheticActivations:
    """Sums of true features in a known hierarchy, see `HierarchicalFeatures`.

    Parameters
    ----------
    config : SyntheticConfig
        Numbers of dimensions, features and samples.
    seed : int
        Decides the true directions and, together with a shard's number, the samples of that shard.
    """

    name = "the synthetic features"
    tokens_per_second: float | None = None

    def __init__(self, config: SyntheticConfig, seed: int):
        self.d_in = config.d_in
        self.identity: dict[str, Any] = {"source": "synthetic", **asdict(config), "seed": seed, "format": _FORMAT}
        self._seed = seed
        settings = asdict(config)
        del settings["n_tokens"]  # all others decide the true features
        self.truth = hierarchical_features(**settings, generator=generator_of("true features", seed))
        size = max(1, min(16_384, config.n_tokens // 2))
        self.shard_sizes = [size] * (config.n_tokens // size)

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, float32."""
        return self.sample(number)[0]

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Activations of a shard, and the coefficients [n_tokens, n_true] of the true features in them."""
        return self.truth.sample(self.shard_sizes[number], generator_of("shard", self._seed, number))
