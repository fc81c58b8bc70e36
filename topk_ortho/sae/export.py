"""Dictionaries in SAELens's format: cfg.json and sae_weights.safetensors, for `sae_lens.SAE.load_from_disk`."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from topk_ortho.files import finished_as, write_whole
from topk_ortho.sae.base import SparseAutoencoder
from topk_ortho.sae.batchtopk import BatchTopKSAE
from topk_ortho.sae.jumprelu import JumpReLUSAE
from topk_ortho.sae.topk import TopKSAE

_FORMAT_VERSION = "6.0.0"
"""Version of SAELens that a file names; SAELens takes a file without one for an older format."""


def save_saelens(sae: SparseAutoencoder, folder: Path, metadata: dict[str, Any]) -> None:
    """Write an SAE of raw activations for SAELens, which computes what it computes in eval mode.

    BatchTopK and its Matryoshka form become "jumprelu" with their inference threshold at every feature.

    Parameters
    ----------
    sae : SparseAutoencoder
        The dictionary.
    folder : Path
        Made if need be.
    metadata : dict
        What to know about it (model_name, hook_name, context_size, ...), as JSON.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    weights = {
        "W_enc": sae.W_enc.detach().T,  # [d_in, n_features]
        "W_dec": sae.W_dec.detach(),
        "b_enc": sae.b_enc.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    config: dict[str, Any] = {"architecture": "standard"}
    if isinstance(sae, TopKSAE):
        config = {"architecture": "topk", "k": sae.l0, "rescale_acts_by_decoder_norm": False}
    elif isinstance(sae, BatchTopKSAE | JumpReLUSAE):
        config = {"architecture": "jumprelu"}
        weights["threshold"] = sae.threshold.detach().expand(sae.n_features)
    n_features, d_in = sae.W_dec.shape
    config |= {
        "d_in": d_in,
        "d_sae": n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _FORMAT_VERSION} | metadata,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with finished_as(folder / "sae_weights.safetensors") as unfinished:
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, unfinished)
    write_whole(folder / "cfg.json", json.dumps(config, indent=2) + "\n")
