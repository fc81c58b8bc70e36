"""What every source of activations offers: numbered shards, each of which can be had again at any time.

A data set is a numbered row of shards [n_tokens, d_in]. Shuffling, resuming and prefetching (`batches.py`) rely on
being able to ask for any shard again, in any order.
"""

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor

from topk_ortho.distributed.ranks import Ranks


class ActivationSource(Protocol):
    """Activations in shards."""

    name: str
    """What error messages call the source"""
    d_in: int
    """Width of the activations"""
    shard_sizes: list[int]
    """Number of tokens in each shard"""
    left_out: dict[str, int]
    """Numbers of tokens that are in no shard, by the reason why they are left out"""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the activations, by names that a person understands, in values that JSON has.

        Sources with equal identities have equal activations, apart from the rounding of different devices. Contents are
        in it by their hashes, so that neither the name of a file nor its place matters.
        """

    @property
    def tokens_per_second(self) -> float | None:
        """Speed at which the transformer made activations; None if it did not run."""

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, in float16, bfloat16 or float32, on any device."""


def generator_of(purpose: str, *numbers: int) -> torch.Generator:
    """A random generator seeded by a purpose and numbers: another purpose gets other random numbers."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def split_shards(source: ActivationSource, held_out_tokens: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the shards that are held out, and of those to train on, chosen at random.

    As many shards are held out as it takes to hold `held_out_tokens`, but at most half of all.

    Raises
    ------
    ValueError
        If there are fewer than two shards.
    """
    order = torch.randperm(len(source.shard_sizes), generator=generator_of("held out", seed)).tolist()
    if len(order) < 2:
        raise ValueError(f"{source.name} fill one shard; there must be two, to hold one out")
    n_held_out = n_tokens = 0
    while n_tokens < held_out_tokens and n_held_out < len(order) // 2:
        n_tokens += source.shard_sizes[order[n_held_out]]
        n_held_out += 1
    return sorted(order[:n_held_out]), sorted(order[n_held_out:])


def mean_and_variance(tokens: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, float]:
    """Mean [d_in] and total variance of activations [n, d_in], in float64, at least one of all ranks together.

    The variance is 0 also if the activations differ by rounding alone: in every dimension by less than their dtype
    resolves, or by less than float32 arithmetic with vectors of their length does.
    """
    # a few at a time: all of them in float64 can be larger than memory
    parts, ranks = tokens.split(8_192), Ranks.alone() if ranks is None else ranks
    n_tokens = int(ranks.sum(torch.tensor(len(tokens))))
    mean = ranks.sum(torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0)) / n_tokens
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(dim=0)
    variance = ranks.sum(squares) / n_tokens
    square = variance + mean.square()
    of_dtype = torch.finfo(tokens.dtype).eps ** 2 * square
    of_arithmetic = (8 * torch.finfo(torch.float32).eps) ** 2 * square.mean()
    if (variance <= of_dtype + of_arithmetic).all():
        return mean, 0.0
    return mean, variance.sum().item()
