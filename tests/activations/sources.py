"""Sources of activations for tests, in memory."""

import hashlib

import torch


class MemorySource:
    """Shards [n_tokens, d_in] that are there; remembers which were asked for."""

    name = "memory"
    tokens_per_second = None

    def __init__(self, shards):
        self.shards = shards
        self.d_in = shards[0].shape[1]
        self.shard_sizes = [len(shard) for shard in shards]
        self.left_out = {}
        self.asked = []
        digests = [hashlib.sha256(shard.numpy().tobytes()).hexdigest() for shard in shards]
        self.identity = {"source": "memory", "d_in": self.d_in, "shards": digests}

    def shard(self, number):
        self.asked.append(number)
        return self.shards[number]


def numbered(sizes):
    """Tokens of width 1 that tell themselves apart: 0, 1, 2, ..."""
    return MemorySource(list(torch.arange(float(sum(sizes)))[:, None].split(sizes)))


def sparse_mixtures(n_shards=20, size=100, d_in=16, n_true=24):
    """Sparse combinations of directions, off-centre, in float16."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=generator), dim=1)
    n = n_shards * size
    coefficients = torch.rand(n, n_true, generator=generator) * (torch.rand(n, n_true, generator=generator) < 0.1)
    noise = 0.01 * torch.randn(n, d_in, generator=generator)
    return MemorySource(list((coefficients @ directions + noise + 0.5).half().split(size)))
