"""Where activations come from: shards of tokens, each of which can be had again at any time.

A run's data is a numbered row of shards [n_tokens, d_in]. That any shard can be asked for again, in any order, is what
shuffling, resuming and prefetching are built on (`batches.py`). A transformer's are in `harvest.py`, made-up ones in
`synthetic.py`.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from topk_ortho.sae import SparseAutoencoder
from topk_ortho.training.config import TrainConfig


class ActivationSource(Protocol):
    """Activations in shards."""

    name: str
    """For errors"""
    d_in: int
    """Width of the activations"""
    shard_sizes: list[int]
    """Tokens in each shard"""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed at which the transformer made activations, None if it did not run."""

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, float16, bfloat16 or float32, on the CPU."""

    def measure(self, sae: SparseAutoencoder, held_out: list[int]) -> dict[str, float]:
        """What only this source can say about an SAE of its activations, on the shards held out."""


def open_source(config: TrainConfig, device: torch.device) -> ActivationSource:
    """The source that a configuration names."""
    if config.source == "synthetic":
        from topk_ortho.training.synthetic import SyntheticActivations

        return SyntheticActivations(config.synthetic, config.seed)
    from topk_ortho.training.harvest import TransformerActivations  # transformers and datasets take a second to import

    return TransformerActivations(config, device)


def generator_of(purpose: str, *numbers: int) -> torch.Generator:
    """A random generator that these decide; another purpose gets other random numbers."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
