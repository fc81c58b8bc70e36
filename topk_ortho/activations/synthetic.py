"""Synthetic activations, of which the true features are known."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

from torch import Tensor

from topk_ortho.activations.config import SyntheticConfig, SynthSAEBenchConfig
from topk_ortho.activations.hierarchy import HierarchicalFeatures, hierarchical_features
from topk_ortho.activations.source import generator_of
from topk_ortho.activations.true_features import TrueFeatures

_FORMAT = 1
"""To be raised when other samples are drawn for the same settings."""
_SHARD_TOKENS, _SHARD_COEFFICIENTS = 16_384, 2**24
"""Largest shard, in samples and, as memory also holds the coefficients while it is made, in coefficients."""
_KEPT_NUMBERS = 2**27
"""Numbers of the shards that stay in memory, half a GiB: to draw them anew in every epoch takes as long as training."""


class KnownActivations(ABC):
    """Activations that are sums of true features, drawn shard by shard; the base of every synthetic source.

    Parameters
    ----------
    kind : str
        Name of the source among the settings.
    config : SyntheticConfig or SynthSAEBenchConfig
        Numbers of dimensions, features and samples.
    seed : int
        Decides the true features and, together with a shard's number, the samples of that shard.
    """

    name = "the synthetic features"
    tokens_per_second: float | None = None
    truth: TrueFeatures
    """The features that the activations are sums of"""

    def __init__(self, kind: str, config: SyntheticConfig | SynthSAEBenchConfig, seed: int):
        self.d_in = config.d_in
        self.identity: dict[str, Any] = {"source": kind, **asdict(config), "seed": seed, "format": _FORMAT}
        self._seed = seed
        size = max(1, min(_SHARD_TOKENS, config.n_tokens // 2, _SHARD_COEFFICIENTS // config.n_true))
        self.shard_sizes = [size] * (config.n_tokens // size)
        self.left_out: dict[str, int] = {}
        self._kept: dict[int, Tensor] = {}

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, float32. They are kept: write to none of them."""
        shard = self._kept.get(number)
        if shard is None:
            shard = self.sample(number)[0]
            if (len(self._kept) + 1) * shard.numel() <= _KEPT_NUMBERS:
                self._kept[number] = shard
        return shard

    @abstractmethod
    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Activations of a shard, and the coefficients [n_tokens, n_true] of the true features in them."""


class SyntheticActivations(KnownActivations):
    """Sums of true features in a known hierarchy, see `HierarchicalFeatures`.

    Parameters
    ----------
    config : SyntheticConfig
        Numbers of dimensions, features and samples, and how hard the data is.
    seed : int
        Decides the true directions and, together with a shard's number, the samples of that shard.
    """

    truth: HierarchicalFeatures

    def __init__(self, config: SyntheticConfig, seed: int):
        super().__init__("synthetic", config, seed)
        settings = asdict(config)
        del settings["n_tokens"]  # all others decide the true features
        self.truth = hierarchical_features(**settings, generator=generator_of("true features", seed))

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Activations of a shard, and the coefficients [n_tokens, n_true] of the true features in them."""
        return self.truth.sample(self.shard_sizes[number], generator_of("shard", self._seed, number))
