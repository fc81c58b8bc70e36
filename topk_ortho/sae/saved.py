"""Reads a dictionary in SAELens's format, so that another run begins with its weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from topk_ortho.definitions import EPS
from topk_ortho.sae.base import SparseAutoencoder
from topk_ortho.sae.batchtopk import BatchTopKSAE
from topk_ortho.sae.jumprelu import JumpReLUSAE

_WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
_ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu")
_NEUTRAL = {"normalize_activations": ("none",), "reshape_activations": ("none", "hook_z")}
"""What settings of a file that change its input must be"""


class SavedDictionary(NamedTuple):
    """Weights for activations as the transformer gives them; ``f = act(W_enc @ (x - b_dec) + b_enc)``."""

    W_enc: Tensor
    """[n_features, d_in], float32, as all of them are"""
    W_dec: Tensor
    """[n_features, d_in]"""
    b_enc: Tensor
    """[n_features]"""
    b_dec: Tensor
    """[d_in]"""
    threshold: Tensor | None
    """[n_features], what a pre-activation must exceed; None if the architecture has no such thing"""

    def of_unit_length(self) -> "SavedDictionary":
        """A dictionary that computes the same, whose decoder directions have length 1.

        Each feature's encoder, bias and threshold are multiplied by what its direction was divided by. A direction of
        length 0 stays as it is.
        """
        lengths = torch.linalg.vector_norm(self.W_dec, dim=1)
        lengths = torch.where(lengths > EPS, lengths, 1.0)
        threshold = None if self.threshold is None else self.threshold * lengths
        W_enc, W_dec = self.W_enc * lengths[:, None], self.W_dec / lengths[:, None]
        return SavedDictionary(W_enc, W_dec, self.b_enc * lengths, self.b_dec, threshold)


def read_saelens(folder: Path) -> SavedDictionary:
    """The dictionary in a folder that SAELens, or a run of `train.py`, has written.

    Parameters
    ----------
    folder : Path
        With cfg.json and sae_weights.safetensors, of architecture standard, topk, batchtopk, jumprelu or a training
        form of them.

    Raises
    ------
    ValueError
        If files are missing or damaged, or if the dictionary takes its input in a form that other weights cannot
        imitate. The message names the folder.
    """
    try:
        config: dict[str, Any] = dict(json.loads((folder / "cfg.json").read_text()))
        weights = {name: tensor.float() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
        W_enc, W_dec, b_enc, b_dec = (weights[name] for name in _WEIGHTS)
    except KeyError as error:
        raise ValueError(f"{folder} holds no dictionary that can be trained on: it lacks {error}") from error
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        inner = folder / "sae"
        hint = f"; did you mean {inner}?" if (inner / "cfg.json").is_file() else f": {error}"
        raise ValueError(
            f"{folder} holds no dictionary in SAELens's format, cfg.json and sae_weights.safetensors{hint}"
        ) from error
    architecture = str(config.get("architecture")).removeprefix("topk_ortho_")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{folder} holds a dictionary of architecture {architecture}, not {', '.join(_ARCHITECTURES)}")
    for name, allowed in _NEUTRAL.items():
        if config.get(name, "none") not in allowed:
            raise ValueError(f"{folder} has {name} = {config[name]!r}, which must be folded into the weights first")
    W_enc = W_enc.T.contiguous()
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + W_enc @ b_dec
    saved = SavedDictionary(W_enc, W_dec, b_enc, b_dec, weights.get("threshold"))
    # the form that SAELens trains TopK in: it chooses by activation times length
    return saved.of_unit_length() if config.get("rescale_acts_by_decoder_norm") else saved


def check_size(saved: SavedDictionary, n_features: int) -> None:
    """Refuse a dictionary of another number of features, with a ValueError that says what to set."""
    size = len(saved.W_dec)
    if size != n_features:
        raise ValueError(f"init_from holds {size} features: sae.n_features must be {size}, got {n_features}")


@torch.no_grad()
def start_from_saved(sae: SparseAutoencoder, saved: SavedDictionary, scale: float) -> None:
    """Take the weights of a dictionary into one that is trained on activations times `scale`.

    BatchTopK takes the median of the thresholds, and an architecture without thresholds none. Where several processes
    hold the dictionary, each takes the rows of its features.

    Raises
    ------
    ValueError
        If the dictionaries differ in size. The message says how.
    """
    check_size(saved, sae.n_features)
    width, wanted = saved.W_dec.shape[1], sae.W_dec.shape[1]
    if width != wanted:
        raise ValueError(f"init_from holds directions of width {width}, and the activations have {wanted}")
    here = sae.parallel.rows_here(sae.n_features)
    sae.W_enc.copy_(saved.W_enc[here])
    sae.W_dec.copy_(saved.W_dec[here])
    sae.b_enc.copy_(saved.b_enc[here] * scale)
    sae.b_dec.copy_(saved.b_dec * scale)
    if saved.threshold is not None and isinstance(sae, JumpReLUSAE):
        sae.threshold.copy_(saved.threshold[here] * scale)
    elif saved.threshold is not None and isinstance(sae, BatchTopKSAE):
        sae.threshold.copy_(saved.threshold.median() * scale)
