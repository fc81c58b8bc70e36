"""Training steps on synthetic mixtures, without a transformer: what the benchmarks of whole steps have in common."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.run_folder import Run
from topk_ortho.training.trainer import Trainer


class Size(NamedTuple):
    """What is trained."""

    n_features: int = 16_384
    d_in: int = 384
    batch_size: int = 1_024
    l0: int = 32


@functools.lru_cache(maxsize=1)
def mixtures(size: Size, n_batches: int) -> Tensor:
    """Sums [n_batches * batch_size, d_in] of l0 of 2 * n_features random directions, with weights between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(2 * size.n_features, size.d_in, generator=generator), dim=1)
    shape = (n_batches * size.batch_size, size.l0)
    chosen = torch.randint(0, len(directions), shape, generator=generator)
    coefficients = torch.rand(shape, generator=generator)
    return embedding_bag(chosen, directions, mode="sum", per_sample_weights=coefficients)


def make_trainer(
    x: Tensor,
    size: Size,
    penalty: PenaltyConfig,
    *,
    architecture: Any = "batchtopk",
    lr: float = 3e-4,
    device: str = "cpu",
    parallel: Parallel | None = None,
) -> Trainer:
    """A trainer that reads the batches of x [n_tokens, d_in] in random order, and whose learning rate is constant."""
    config = TrainConfig(
        sae=SAEConfig(architecture=architecture, n_features=size.n_features, l0=size.l0),
        penalty=penalty,
        steps=10**6,
        batch_size=size.batch_size,
        lr=lr,
        warmup_fraction=0.0,
        buffer_tokens=len(x),
        held_out_tokens=size.batch_size,
        device=device,
        out_dir=Path(tempfile.gettempdir()) / "topk_ortho_bench",  # a step writes nothing
    )
    source: Any = SimpleNamespace(
        name="synthetic mixtures",
        identity={"source": "mixtures", **size._asdict()},
        d_in=size.d_in,
        tokens_per_second=None,
        left_out={},
        shard_sizes=[size.batch_size] * (len(x) // size.batch_size),
        shard=x.split(size.batch_size).__getitem__,
    )
    return Trainer(config, source, Run(config.out_dir), parallel)
