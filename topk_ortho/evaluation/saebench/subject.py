"""A saved dictionary and the language model whose activations it takes."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.activations.source import mean_and_variance
from topk_ortho.activations.text import Text, token_windows
from topk_ortho.activations.transformer import Transformer
from topk_ortho.files import sha256_of

_CHECKED_WINDOWS = 16
_TOKENS_AT_A_TIME = 1_024
_LONG = 5.0
"""Activations longer than this many times their median, as of attention sinks, do not count in the check"""
_CARRIED_BY_PACKAGES = ("minilm", "smollm2")
"""Names of models that train.py knows; the metadata have those of their originals on the hub"""
_TRANSPOSED = 1 - 1e-4
"""Cosine from which the encoder of a feature is its decoder direction"""


@dataclass(frozen=True)
class Subject:
    """A dictionary to be judged, with its model."""

    name: str
    """What its results are called"""
    sae: Any
    """The `sae_lens.SAE`, with directions of unit norm where its architecture allows"""
    transformer: Transformer
    """The model, which stops at the dictionary's hook"""
    tokenizer: Any
    layer: int
    """The block that the hook belongs to"""
    weights_sha256: str
    """The hash of the dictionary's file of weights"""

    @property
    def hook(self) -> str:
        """The transformer_lens hook point of the dictionary's activations."""
        return self.transformer.config.hook

    @property
    def model_name(self) -> str:
        """The model as its user names it."""
        return self.transformer.config.name

    def activations(self, tokens: Tensor) -> Tensor:
        """Activations at the hook [n, context, d_in], float32, for token ids [n, context]."""
        return self.transformer.activations(tokens, torch.float32).to(self.transformer.device)

    @torch.no_grad()
    def explained_variance(self, x: Tensor) -> float:
        """``1 - sum ||x - x_rec||**2 / sum ||x - mean(x)||**2`` for activations [n, d_in]; NaN if all are equal."""
        squared_error = 0.0
        for part in x.split(_TOKENS_AT_A_TIME):
            squared_error += (part - self.sae(part)).double().square().sum().item()
        _, variance = mean_and_variance(x)
        return 1 - squared_error / (len(x) * variance) if variance else math.nan

    def windows(self, text: TextConfig) -> Tensor:
        """Windows of token ids [n, context] from the beginning of a text.

        Raises
        ------
        ValueError
            If the text is too short for a window.
        """
        self.transformer.check_context_size(text.context_size)
        windows = torch.cat(list(token_windows(Text(text).documents(), self.tokenizer, text)))
        if not len(windows):
            raise ValueError(f"text {text.source} fills no window of {text.context_size} tokens")
        self.transformer.check_tokens(windows)
        return windows.long()


def load_subject(folder: Path, *, model: str | None, batch_size: int, device: torch.device) -> Subject:
    """A dictionary in SAELens's format, and the model that its metadata name.

    Parameters
    ----------
    folder : Path
        A folder with cfg.json and sae_weights.safetensors, or that of a run of train.py.
    model : str or None
        Another name for the model, or its directory.
    batch_size : int
        Windows in one forward pass.
    device : torch.device
        Where both are.

    Raises
    ------
    ValueError
        If there is no such dictionary, or its metadata do not say what it is of.
    OSError
        If the model cannot be loaded.
    """
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE

    folder = folder.resolve()
    is_run = not (folder / "cfg.json").is_file() and (folder / "sae").is_dir()
    saved = folder / "sae" if is_run else folder
    if not (saved / "cfg.json").is_file():
        raise ValueError(f"{folder} holds no dictionary in SAELens's format: there is no cfg.json")
    try:
        sae: Any = SAE.load_from_disk(saved, device="cpu", dtype="float32").to(device)
    except Exception as error:  # also bare ones, of safetensors
        raise OSError(f"the dictionary in {saved} cannot be loaded: {type(error).__name__}: {error}") from error
    if "transcoder" in sae.cfg.architecture() or not hasattr(sae, "W_enc"):
        raise ValueError(f"SAEBench judges autoencoders with an encoder; {saved} is a {sae.cfg.architecture()}")
    metadata = sae.cfg.metadata
    hook, name = metadata.hook_name, model or _model_name(metadata)
    if hook is None:
        raise ValueError(f"the metadata in {saved / 'cfg.json'} name no hook_name")
    if name is None:
        raise ValueError(f"the metadata in {saved / 'cfg.json'} name no model_name: give --model")
    block = re.match(r"blocks\.(\d+)\.", hook)
    if block is None:
        raise ValueError(f"SAEBench measures at hooks of blocks, such as blocks.10.hook_resid_post; this one is {hook}")
    metadata.model_name = metadata.model_name or name
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        with suppress(NotImplementedError):  # SAELens refuses it where it would change which features fire
            sae.fold_W_dec_norm()
    is_bfloat16 = (metadata.model_from_pretrained_kwargs or {}).get("dtype") == "bfloat16"
    config = ModelConfig(name=name, hook=hook, dtype="bfloat16" if is_bfloat16 else "float32", batch_size=batch_size)
    transformer = Transformer(config, device)
    if not transformer.has_logits:
        raise ValueError(f"SAEBench judges dictionaries of language models, and {name} predicts no tokens")
    name_of_results = folder.parent.name if folder.name == "sae" else folder.name
    load_and_format_sae(name_of_results, sae, str(device))  # gives the configuration the fields that SAEBench reads
    weights = sha256_of(saved / "sae_weights.safetensors")
    return Subject(name_of_results, sae, transformer, transformer.load_tokenizer(), int(block[1]), weights)


@torch.no_grad()
def check_subject(subject: Subject, text: TextConfig, *, allow_untrained: bool) -> None:
    """Refuse a dictionary of other activations, or one that was never trained, whose results would say nothing.

    Two things tell that it was not trained: the encoder is the transposed decoder, as most trainers begin, or
    reconstructions are no better than the mean activations.

    Raises
    ------
    ValueError
        If it is such a dictionary; one that was not trained may be allowed.
    """
    sae = subject.sae
    x = subject.activations(subject.windows(text)[:_CHECKED_WINDOWS]).flatten(0, 1)
    if x.shape[1] != sae.cfg.d_in:
        raise ValueError(
            f"{subject.name} takes activations of width {sae.cfg.d_in}, and {subject.hook} of {subject.model_name} has "
            f"{x.shape[1]}: give the dictionary's own --model"
        )
    if allow_untrained:
        return
    advice = "--allow-untrained judges it all the same"
    has_own_encoder = "W_enc" in dict(sae.named_parameters())  # else it is the transposed decoder by design
    if has_own_encoder and bool((cosine_similarity(sae.W_enc.T, sae.W_dec) > _TRANSPOSED).all()):
        raise ValueError(f"{subject.name} was never trained: its encoder is still the transposed decoder; {advice}")
    norms = torch.linalg.vector_norm(x, dim=1)
    x = x[norms <= _LONG * norms.median()]
    explained_variance = subject.explained_variance(x)
    if not explained_variance > 0:
        raise ValueError(
            f"{subject.name} explains {explained_variance:.2f} of the variance of {subject.hook} of "
            f"{subject.model_name}, no more than their mean does: "
            f"it was never trained, or on other activations; {advice}"
        )


def _model_name(metadata: Any) -> str | None:
    """The model that a dictionary's metadata name, as it can be loaded."""
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    settings, name = metadata.training_config, metadata.model_name
    if metadata.trained_with == "topk_ortho" and settings["model"]["name"] in _CARRIED_BY_PACKAGES:
        return str(settings["model"]["name"])
    # transformer_lens has names of its own for some models, such as gpt2-small
    return None if name is None else str(make_model_alias_map().get(name.lower(), name))
