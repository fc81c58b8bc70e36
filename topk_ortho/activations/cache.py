"""The activation cache: a transformer's activations over a text, computed when first needed and kept on disk."""

import hashlib
import json
import sys
from functools import cached_property
from importlib.metadata import version
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
from topk_ortho.activations.text import Text, special_tokens_of, token_windows, tokenizer_identity
from topk_ortho.activations.transformer import Transformer
from topk_ortho.files import finished_as, finished_folder, made_once, remove_abandoned

_FORMAT = 2
"""To be raised when this package makes other tokens or activations of the same text and model."""


class TransformerActivations:
    """Activations at a hook of a transformer, one for each ordinary token of a text, kept in a folder.

    Special tokens are left out and, if the model's settings have a limit, tokens with very long activations.

    The folder is named by a hash of all that decides its content. It holds a manifest that spells this out, the token
    ids, and a safetensors file for every shard that was needed so far. Files appear under their names when they are
    whole, so neither an interrupted process nor two processes at a time can leave a part of one. Where a folder
    cannot be written, shards that it lacks are made each time.

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
        self._is_kept = cache != "off"
        self._dtype: torch.dtype = getattr(torch, cache) if self._is_kept else torch.float32
        remove_abandoned(cache_dir)
        tokenizer = self.transformer.load_tokenizer()
        self.special_tokens = special_tokens_of(tokenizer)
        self._text = Text(text)
        self._kept_identity: dict[str, Any] = {
            "source": "transformer",
            "weights": self.transformer.weights_identity,
            "model_dtype": model.dtype,
            "hook": model.hook,
            "tokenizer": tokenizer_identity(tokenizer),
            **self._text.identity,
            "context_size": text.context_size,
            "n_tokens": text.n_tokens,
            "activations_dtype": str(self._dtype).removeprefix("torch."),
            "format": _FORMAT,
        }
        if self._text.is_on_hub:
            self._kept_identity["commit"] = _commit_of(self._text, self._kept_identity, cache_dir)
        # the limit decides which activations are used, not which are kept
        self.identity = dict(self._kept_identity)
        if model.max_norm_ratio is not None:
            self.identity["max_norm_ratio"] = model.max_norm_ratio
        self._folder = cache_dir / _digest(self._kept_identity)
        remove_abandoned(self._folder)
        if not self._folder.is_dir():
            self._tokenize(text, tokenizer)
        manifest = self._manifest()
        self._windows = np.memmap(self._folder / "tokens.bin", np.int32, "r").reshape(manifest["shape"])
        self._special = torch.tensor(manifest["special_ids"], dtype=torch.int32)
        # about 64 shards: few enough to load fast, and enough to hold out some from all over the text
        n_windows, context_size = self._windows.shape
        per_shard = max(1, min(65_536, max(1_024, n_windows * context_size // 64)) // context_size)
        self._starts = [*range(0, n_windows, per_shard), n_windows]
        self._n_ordinary = [int((~self._is_special(n)).sum()) for n in range(len(self._starts) - 1)]
        self._is_unsaved = False
        self.shard_sizes = self._n_ordinary
        self.left_out = {"special": n_windows * context_size - sum(self._n_ordinary)}
        self._is_short: list[Tensor] | None = None  # for each shard, whether each of its ordinary tokens stays
        if model.max_norm_ratio is not None:
            norms = self._norms()
            self._is_short = list((norms <= model.max_norm_ratio * norms.median()).split(self._n_ordinary))
            self.shard_sizes = [int(is_short.sum()) for is_short in self._is_short]
            self.left_out["high_norm"] = len(norms) - sum(self.shard_sizes)
        self.d_in = self._ordinary(0).shape[1]

    @property
    def tokens_per_second(self) -> float | None:
        """Speed at which the transformer made activations; None if it did not run."""
        return self.transformer.tokens_per_second

    def tokens(self, number: int) -> Tensor:
        """Windows of token ids [n_windows, context_size] of a shard, int32, special tokens included."""
        return torch.from_numpy(self._windows[self._starts[number] : self._starts[number + 1]].copy())

    def is_used(self, number: int) -> Tensor:
        """True for the tokens of a shard's windows whose activations it has, bool [n_windows, context_size]."""
        is_used = ~self._is_special(number)
        if self._is_short is not None:
            is_used[is_used.clone()] = self._is_short[number]
        return is_used

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, on the CPU: read from disk, or made by the transformer."""
        activations = self._ordinary(number)
        return activations if self._is_short is None else activations[self._is_short[number]]

    def _ordinary(self, number: int) -> Tensor:
        """Activations [n_ordinary, d_in] of all tokens of a shard but the special ones, which is what is kept."""
        path = self._path(number)
        if path.is_file():
            return self._read(path, self._n_ordinary[number], self._dtype)
        if not self._is_kept or self._is_unsaved:
            return self._compute(number)
        with made_once(path):  # runs that need it at the same time wait, and read it
            if path.is_file():
                if "_progress" in vars(self):  # which counts it among what is missing
                    self._advance(number)
                return self._read(path, self._n_ordinary[number], self._dtype)
            activations = self._compute(number)
            self._save(activations, path)
        return activations

    def _read(self, path: Path, n_tokens: int, dtype: torch.dtype) -> Tensor:
        """The activations in a file, which must be as many as are expected."""
        try:
            activations: Tensor = load_file(path)["activations"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged, delete it: {error}") from error
        if activations.ndim != 2 or len(activations) != n_tokens or activations.dtype != dtype:
            found = f"{activations.dtype} {list(activations.shape)}"
            raise ValueError(f"{path} is damaged, delete it: it holds {found}, not {n_tokens} tokens in {dtype}")
        return activations

    def _norms(self) -> Tensor:
        """Norms of the activations of all ordinary tokens, float32 [sum(n_ordinary)], in the order of the shards."""
        path = self._folder / "norms.safetensors"
        if path.is_file():
            return self._read(path, sum(self._n_ordinary), torch.float32).flatten()
        shards = map(self._ordinary, range(len(self._n_ordinary)))
        norms = torch.cat([torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32) for x in shards])
        self._save(norms, path)
        return norms.flatten()

    def _save(self, activations: Tensor, path: Path) -> None:
        """Keep activations, if they can be; that they cannot is said once."""
        try:
            with finished_as(path) as unfinished:
                save_file({"activations": activations}, unfinished)
        except OSError as error:
            if not self._is_unsaved:
                tqdm.write(f"activations are made anew each time, as they cannot be kept: {error}", file=sys.stderr)
            self._is_unsaved = True

    def _tokenize(self, text: TextConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the folder, with the token ids and the manifest."""
        with (
            finished_folder(self._folder) as unfinished,
            tqdm(desc="tokenizer", unit=" tokens", unit_scale=True, mininterval=0.5, leave=False) as progress,
        ):
            n_windows = 0
            with (unfinished / "tokens.bin").open("wb") as file:
                for block in token_windows(self._text.documents(), tokenizer, text):
                    self.transformer.check_tokens(block)
                    file.write(block.numpy().tobytes())
                    n_windows += block.shape[0]
                    progress.update(block.numel())
            if n_windows < 2:
                raise ValueError(
                    f"text {text.source} fills {n_windows} windows of {text.context_size} tokens; at least 2 are needed"
                )
            more = {
                "shape": [n_windows, text.context_size],
                "special_ids": tokenizer.all_special_ids,
                "made_with": _versions(),
            }
            (unfinished / "manifest.json").write_text(json.dumps(self._kept_identity | more, indent=2) + "\n")

    def _manifest(self) -> dict[str, Any]:
        """The manifest of the folder, which must be of these activations."""
        manifest = _read_manifest(self._folder)
        for key, value in self._kept_identity.items():
            if manifest.get(key) != value:
                raise ValueError(f"{self._folder} is of {key} {manifest.get(key)!r}, not {value!r}: delete it")
        if manifest.get("made_with") != _versions():
            tqdm.write(
                f"{self._folder} was begun with {manifest.get('made_with')}, and this is {_versions()}: "
                "if they make other activations, delete it",
                file=sys.stderr,
            )
        return manifest

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05}.safetensors"

    def _is_special(self, number: int) -> Tensor:
        return torch.isin(self.tokens(number), self._special)

    def _compute(self, number: int) -> Tensor:
        """Run the transformer over the windows of a shard."""
        tokens = self.tokens(number)
        hidden = self.transformer.activations(tokens, self._dtype)
        self._advance(number)
        activations = hidden[~self._is_special(number)].contiguous()
        if not activations.isfinite().all():
            remedy = " (cache can be bfloat16 or float32)" if self._dtype == torch.float16 else ""
            raise ValueError(f"activations at {self.name} exceed {self._dtype}{remedy}, or the model gave NaN")
        return activations

    def _advance(self, number: int) -> None:
        """Move the progress bar on by a shard."""
        self._progress.update(self.tokens(number).numel())
        if self._progress.n >= (self._progress.total or 0):
            self._progress.close()

    @cached_property
    def _progress(self) -> "tqdm[Any]":
        """The progress bar over the shards that are missing when the transformer first runs."""
        missing = [n for n in range(len(self._n_ordinary)) if not self._path(n).is_file()]
        total = sum(self.tokens(n).numel() for n in missing)
        return tqdm(total=total, desc="transformer", unit=" tokens", unit_scale=True, mininterval=0.5)


def _digest(identity: dict[str, Any]) -> str:
    """Name of the folder for activations of this identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _commit_of(text: Text, identity: dict[str, Any], cache_dir: Path) -> str:
    """The commit of a data set on the hub; if the hub does not tell, that of the activations that were begun last.

    If the settings name a commit, none but activations of this one will do.
    """
    try:
        return text.ask_commit()
    except OSError as error:
        for path in sorted(cache_dir.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                manifest = _read_manifest(path.parent)
            except (OSError, ValueError):
                continue
            is_alike = all(manifest.get(key) == value for key, value in identity.items())
            if is_alike and text.config.revision in (None, manifest["commit"]):
                commit = str(manifest["commit"])
                tqdm.write(f"{error}; what was made of its commit {commit} is used", file=sys.stderr)
                return commit
        raise


def _versions() -> dict[str, str]:
    """Versions of what runs the transformer. They do not decide the activations, but may change them."""
    return {name: version(name) for name in ("transformers", "transformer_lens")}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, which must fit the token ids beside it."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        if not {"shape", "special_ids"} <= set(manifest):
            raise ValueError("manifest.json lacks a part")
        n_bytes = 4 * int(np.prod(manifest["shape"]))
        actual = (folder / "tokens.bin").stat().st_size
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is damaged, delete it: {error}") from error
    if actual != n_bytes:
        raise ValueError(f"{folder} is damaged, delete it: tokens.bin has {actual:,} bytes, not {n_bytes:,}")
    return manifest
