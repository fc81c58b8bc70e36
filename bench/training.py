"""The benchmark of a training step, beside SAELens's, on the same activations.

Both trainers take whole steps as their users do: fetch a batch, forward, loss, backward, clip the gradient, Adam,
count what fires. Steps alternate, so that all see the same machine. SAELens is timed as it comes and in its fastest
setting, topk_ortho without and with the penalty.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from bench.cases import Benchmark, Call, Case

_D_IN, _LR, _N_SHARDS = 384, 3e-4, 40
_OURS: dict[str, tuple[Any, Any]] = {  # provider: architecture, target of the penalty
    "topk_ortho": ("batchtopk", "none"),
    "topk_ortho_decoder": ("batchtopk", "decoder"),
    "topk_ortho_topk": ("topk", "none"),
    "topk_ortho_topk_activations": ("topk", "activations"),
}
_SAELENS: dict[str, dict[str, bool]] = {  # provider: settings; rescaled sparse activations have no backward on a CPU
    "saelens": {},
    "saelens_sparse": {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
}


@functools.lru_cache(maxsize=1)
def _mixtures(batch_size: int, n_features: int, l0: int) -> Tensor:
    """Sparse mixtures [n_tokens, d_in] of twice as many random directions as there are features."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(2 * n_features, _D_IN, generator=generator), dim=1)
    shape = (_N_SHARDS * batch_size, l0)
    chosen = torch.randint(0, len(directions), shape, generator=generator)
    coefficients = torch.rand(shape, generator=generator)
    return embedding_bag(chosen, directions, mode="sum", per_sample_weights=coefficients)


def make_call(case: Case, device: torch.device) -> Call:
    """One training step of a provider, which goes on from the step before."""
    assert case.L0 is not None
    x = _mixtures(case.M, case.N, case.L0)
    if case.provider in _SAELENS:
        return _saelens_step(case, device, x)

    from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
    from topk_ortho.training.run_folder import Run
    from topk_ortho.training.trainer import Trainer

    architecture, target = _OURS[case.provider]
    config = TrainConfig(
        sae=SAEConfig(architecture=architecture, n_features=case.N, l0=case.L0),
        penalty=PenaltyConfig(target=target),
        steps=10**6,
        batch_size=case.M,
        lr=_LR,
        held_out_tokens=case.M,
        device=device.type,
        out_dir=Path(tempfile.gettempdir()) / "topk_ortho_bench",  # a step writes nothing
    )
    source: Any = SimpleNamespace(
        name="synthetic mixtures",
        identity={"source": "mixtures", "M": case.M, "N": case.N, "L0": case.L0},
        d_in=_D_IN,
        tokens_per_second=None,
        left_out={},
        shard_sizes=[case.M] * _N_SHARDS,
        shard=x.split(case.M).__getitem__,
    )
    trainer = Trainer(config, source, Run(config.out_dir))
    return lambda: trainer.train_step(next(trainer.batches).to(device))


def _saelens_step(case: Case, device: torch.device, x: Tensor) -> Call:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    assert case.L0 is not None
    settings: dict[str, Any] = {"d_in": _D_IN, "d_sae": case.N, "k": float(case.L0)} | _SAELENS[case.provider]
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(device=device.type, **settings))
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=case.M, lr=_LR, lr_end=_LR, device=device.type
    )
    trainer: SAETrainer[Any, Any] = SAETrainer(config, sae, _batches(x, case.M, device))
    return lambda: trainer.step(next(trainer.data_provider))


def _batches(x: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches without end for SAELens, of random tokens, as ours are."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            yield x[rows].to(device)


TRAINING = Benchmark(
    cases=lambda device_type: [Case("training", p, "step", "float32", 1024, 4096, 32) for p in (*_SAELENS, *_OURS)],
    make_call=make_call,
    small={"M": 32, "N": 128, "L0": 4},
    inputs=None,
    setting={"d_in": _D_IN, "warmup_steps": 30, "data": "mixtures of L0 of 2 N random directions, uniform weights"},
    rounds=100,
    n_warmup=30,
)
