"""Builds what a configuration names: the source of activations, and the SAE."""

from typing import Any

import torch

from topk_ortho.activations.source import ActivationSource
from topk_ortho.activations.synthetic import KnownActivations, SyntheticActivations
from topk_ortho.activations.synthsaebench import SynthSAEBenchActivations
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, SparseAutoencoder, StandardSAE, TopKSAE
from topk_ortho.training.config import SAEConfig, TrainConfig


def open_source(config: TrainConfig, device: torch.device) -> ActivationSource:
    """The source of activations that a configuration names; a transformer runs on the device."""
    if config.source == "synthetic":
        return SyntheticActivations(config.synthetic, config.seed)
    if config.source == "synthsaebench":
        return SynthSAEBenchActivations(config.synthsaebench, config.seed)
    from topk_ortho.activations.cache import TransformerActivations  # transformers and datasets take a second to import

    return TransformerActivations(config.model, config.text, config.cache, config.cache_dir, device)


def build_sae(
    config: SAEConfig, source: ActivationSource, generator: torch.Generator, parallel: Parallel | None = None
) -> SparseAutoencoder:
    """The SAE of a configuration as it is before training, for the activations of a source: the part of a process."""
    sae = _random_sae(config, source.d_in, generator, parallel)
    if config.initial_decoder == "truth":
        assert isinstance(source, KnownActivations)  # the configuration names no other source with it
        sae.start_from(source.truth.directions)
    return sae


def _random_sae(
    config: SAEConfig, d_in: int, generator: torch.Generator, parallel: Parallel | None
) -> SparseAutoencoder:
    """The SAE of a configuration with random directions, for activations of width d_in."""
    sizes = (d_in, config.n_features)
    shared: dict[str, Any] = {"generator": generator, "parallel": parallel}
    match config.architecture:
        case "standard":
            return StandardSAE(*sizes, **shared)
        case "topk":
            return TopKSAE(*sizes, config.l0, **shared)
        case "batchtopk":
            return BatchTopKSAE(*sizes, config.l0, **shared)
        case "matryoshka":
            return MatryoshkaSAE(*sizes, config.l0, config.nested_widths, **shared)
        case "jumprelu":
            return JumpReLUSAE(
                *sizes,
                config.l0,
                initial_threshold=config.initial_threshold,
                bandwidth=config.bandwidth,
                **shared,
            )
