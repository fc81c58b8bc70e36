"""The activation cache: a transformer's activations over a text, computed when first needed and kept on disk."""

import contextlib
import hashlib
import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from topk_ortho.activations.config import CacheDtype, ModelConfig, TextConfig
from topk_ortho.activations.files import finished_as
from topk_ortho.activations.text import (
    load_text,
    special_tokens_of,
    text_identity,
    token_windows,
    tokenizer_identity,
)
from topk_ortho.activations.transformer import Transformer

_FORMAT = 2
"""To be raised when this package makes other tokens or activations of the same text and model."""


class TransformerActivations:
    """Activations at a hook of a transformer, without those of special tokens, kept in a folder.

    The folder is named by a hash of all that decides its content. It holds a manifest that spells this out, the token
    ids, and a safetensors file for every shard that was needed so far. Files appear under their names when they are
    whole, so neither an interrupted process nor two processes at a time can leave a part of one.

    Parameters
    ----------
    model : ModelConfig
        The transformer and the hook.
    text : TextConfig
        What it reads.
    cache : {"float16", "bfloat16", "float32", "off"}
        Precision of the shards on disk. "off" keeps none: the transformer runs each time a shard is asked for.
    cache_dir : Path
        Where the folder is made, beside those of other models and texts.
    device : torch.device
        Where the transformer runs.
    """

    def __init__(self, model: ModelConfig, text: TextConfig, cache: CacheDtype, cache_dir: Path, device: torch.device):
        self.transformer = Transformer(model, device)
        self.transformer.check_context_size(text.context_size)
        self.name = f"{model.hook} of {model.name}"
        self._cache_dtype = None if cache == "off" else getattr(torch, cache)
        tokenizer = self.transformer.load_tokenizer()
        self.special_tokens = special_tokens_of(tokenizer)
        self.identity: dict[str, Any] = {
            "source": "transformer",
            "weights": self.transformer.weights_identity,
            "model_dtype": model.dtype,
            "hook": model.hook,
            "tokenizer": tokenizer_identity(tokenizer),
            **text_identity(text),
            "context_size": text.context_size,
            "n_tokens": text.n_tokens,
            "activations_dtype": str(self._cache_dtype or torch.float32).removeprefix("torch."),
            "format": _FORMAT,
        }
        self._folder = cache_dir / _digest(self.identity)
        if not self._folder.is_dir():
            self._tokenize(text, tokenizer)
        manifest = _read_manifest(self._folder, self.identity)
        self._windows = np.memmap(self._folder / "tokens.bin", np.int32, "r").reshape(manifest["shape"])
        self._special = torch.tensor(manifest["special_ids"], dtype=torch.int32)
        # about 64 shards: few enough to load fast, and enough to hold out some from all over the text
        n_windows, context_size = self._windows.shape
        per_shard = max(1, min(65_536, max(1_024, n_windows * context_size // 64)) // context_size)
        self._starts = [*range(0, n_windows, per_shard), n_windows]
        self.shard_sizes = [int((~self._is_special(n)).sum()) for n in range(len(self._starts) - 1)]
        self.d_in = self.shard(0).shape[1]

    @property
    def tokens_per_second(self) -> float | None:
        """Speed at which the transformer made activations; None if it did not run."""
        return self.transformer.tokens_per_second

    def tokens(self, number: int) -> Tensor:
        """Windows of token ids [n_windows, context_size] of a shard, int32, special tokens included."""
        return torch.from_numpy(self._windows[self._starts[number] : self._starts[number + 1]].copy())

    def is_special(self, tokens: Tensor) -> Tensor:
        """Whether token ids are those of special tokens, whose activations are in no shard; bool, of the same shape."""
        return torch.isin(tokens, self._special)

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, on the CPU: read from disk, or made by the transformer."""
        path = self._path(number)
        if path.is_file():
            try:
                loaded: Tensor = load_file(path)["activations"]
                return loaded
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged, delete it: {error}") from error
        activations = self._compute(number)
        if self._cache_dtype is not None:
            with finished_as(path) as unfinished:
                save_file({"activations": activations}, unfinished)
        return activations

    def _tokenize(self, text: TextConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the folder, with the token ids and the manifest."""
        parent = self._folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=parent, prefix="unfinished-", ignore_cleanup_errors=True) as place,
            tqdm(desc="tokenizer", unit=" tokens", unit_scale=True, mininterval=0.5, leave=False) as progress,
        ):
            unfinished = Path(place)
            n_windows = 0
            with (unfinished / "tokens.bin").open("wb") as file:
                for block in token_windows(load_text(text), tokenizer, text):
                    file.write(block.numpy().tobytes())
                    n_windows += block.shape[0]
                    progress.update(block.numel())
            if n_windows < 2:
                raise ValueError(
                    f"text {text.source} fills {n_windows} windows of {text.context_size} tokens; at least 2 are needed"
                )
            shape = {"shape": [n_windows, text.context_size], "special_ids": tokenizer.all_special_ids}
            (unfinished / "manifest.json").write_text(json.dumps(self.identity | shape, indent=2) + "\n")
            with contextlib.suppress(OSError):  # another process finished first, with the same content
                unfinished.rename(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05}.safetensors"

    def _is_special(self, number: int) -> Tensor:
        return self.is_special(self.tokens(number))

    def _compute(self, number: int) -> Tensor:
        """Run the transformer over the windows of a shard."""
        tokens = self.tokens(number)
        hidden = self.transformer.activations(tokens, self._cache_dtype or torch.float32)
        self._progress.update(tokens.numel())
        if self._progress.n >= (self._progress.total or 0):
            self._progress.close()
        activations = hidden[~self._is_special(number)].contiguous()
        if not activations.isfinite().all():
            remedy = " (cache can be bfloat16 or float32)" if self._cache_dtype == torch.float16 else ""
            raise ValueError(f"activations at {self.name} exceed {self._cache_dtype}{remedy}, or the model gave NaN")
        return activations

    @cached_property
    def _progress(self) -> "tqdm[Any]":
        """The progress bar over the shards that are missing when the transformer first runs."""
        missing = [n for n in range(len(self.shard_sizes)) if not self._path(n).is_file()]
        total = sum(self.tokens(n).numel() for n in missing)
        return tqdm(total=total, desc="transformer", unit=" tokens", unit_scale=True, mininterval=0.5)


def _digest(identity: dict[str, Any]) -> str:
    """Name of the folder for activations of this identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _read_manifest(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder, which must be of this identity and fit the token ids beside it."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged, delete it: {error}") from error
    for key, value in identity.items():
        if manifest.get(key) != value:
            raise ValueError(f"{folder} is of {key} {manifest.get(key)!r}, not {value!r}: delete it")
    n_bytes = 4 * int(np.prod(manifest["shape"]))
    if (folder / "tokens.bin").stat().st_size != n_bytes:
        raise ValueError(f"{folder} is damaged, delete it: tokens.bin has not {n_bytes:,} bytes")
    return manifest
