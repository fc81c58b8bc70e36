"""The benchmark of a training step, beside SAELens's, on the same activations.

Both trainers take whole steps as their users do: fetch a batch, forward, loss, backward, clip the gradient, Adam,
count what fires. Steps alternate, so that all see the same machine. SAELens is timed as it comes and in its fastest
setting, topk_ortho without and with the penalty.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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


def make_call(case: Case, device: torch.device) -> Call:
    """One training step of a provider, which goes on from the step before."""
    # here, as the other benchmarks do without the packages that training needs
    from bench.mixtures import Size, make_trainer, mixtures
    from topk_ortho.training.config import PenaltyConfig

    assert case.L0 is not None
    size = Size(case.N, _D_IN, case.M, case.L0)
    x = mixtures(size, _N_SHARDS)
    if case.provider in _SAELENS:
        return _saelens_step(case, device, x)
    architecture, target = _OURS[case.provider]
    trainer = make_trainer(x, size, PenaltyConfig(target=target), architecture=architecture, lr=_LR, device=device.type)
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
