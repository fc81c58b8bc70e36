"""A saved dictionary and the language model whose activations it takes."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.activations.text import Text, token_windows
from topk_ortho.activations.transformer import Transformer

_CHECKED_WINDOWS = 16
_LONG = 5.0
"""Activations longer than this many times their median, as of attention sinks, do not count in the check"""
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

    def windows(self, text: TextConfig) -> Tensor:
        """Windows of token ids [n, context] from the beginning of a text.

        Raises
        ------
        ValueError
            If the text is too short for a window.
        """
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

    is_run = not (folder / "cfg.json").is_file() and (folder / "sae").is_dir()
    saved = folder / "sae" if is_run else folder
    if not (saved / "cfg.json").is_file():
        raise ValueError(f"{folder} holds no dictionary in SAELens's format: there is no cfg.json")
    sae: Any = SAE.load_from_disk(saved, device=str(device))
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
        with suppress(NotImplementedError):  # of some architectures it would change what fires
            sae.fold_W_dec_norm()
    kwargs = metadata.model_from_pretrained_kwargs or {}
    transformer = Transformer(
        ModelConfig(name=name, hook=hook, dtype=kwargs.get("dtype", "float32"), batch_size=batch_size), device
    )
    if not transformer.has_logits:
        raise ValueError(f"SAEBench judges dictionaries of language models, and {name} predicts no tokens")
    name_of_results = folder.resolve().name if saved.name != "sae" else saved.resolve().parent.name
    load_and_format_sae(name_of_results, sae, str(device))  # gives the configuration the fields that SAEBench reads
    return Subject(name_of_results, sae, transformer, transformer.load_tokenizer(), int(block[1]))


@torch.no_grad()
def check_trained(subject: Subject, text: TextConfig) -> None:
    """Refuse a dictionary that was never trained, whose results would be those of random directions.

    Two things tell: the encoder is the transposed decoder, as most trainers begin, or reconstructions are no better
    than the mean activations.

    Raises
    ------
    ValueError
        If it is such a dictionary.
    """
    sae = subject.sae
    if bool((cosine_similarity(sae.W_enc.T, sae.W_dec) > _TRANSPOSED).all()):
        raise ValueError(
            f"{subject.name} was never trained: its encoder is still the transposed decoder; "
            "--allow-untrained judges it all the same"
        )
    x = subject.activations(subject.windows(text)[:_CHECKED_WINDOWS]).flatten(0, 1)
    norms = torch.linalg.vector_norm(x, dim=1)
    x = x[norms <= _LONG * norms.median()]
    residual = (x - sae(x)).double().square().sum()
    explained_variance = 1 - (residual / (x - x.mean(dim=0)).double().square().sum()).item()
    if not explained_variance > 0:
        raise ValueError(
            f"{subject.name} explains {explained_variance:.2f} of the variance of {subject.hook} of "
            f"{subject.model_name}, no more than their mean does: it was never trained, or on other activations; "
            "--allow-untrained judges it all the same"
        )


def _model_name(metadata: Any) -> str | None:
    """The model that a dictionary's metadata name.

    A dictionary of train.py has the name that was given there, such as that of a model that a package carries.
    """
    settings = metadata.training_config
    if metadata.trained_with == "topk_ortho" and isinstance(settings, dict):
        return str(settings["model"]["name"])
    return metadata.model_name  # type: ignore[no-any-return]
