"""Activations of a transformer over a text: tokenised once, computed when first needed, kept on disk."""

import contextlib
import hashlib
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from topk_ortho.sae import SparseAutoencoder
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.files import finished_as
from topk_ortho.training.text import fingerprint, load_text, token_windows
from topk_ortho.training.transformer import Transformer

_CE_WINDOWS = 16  # for the cross-entropy recovered, at each evaluation


class TransformerActivations:
    """Activations at a hook of a transformer, without those of special tokens, kept in a folder.

    The folder is named by a hash of all that decides its content and holds a manifest that spells this out, the token
    ids, and a safetensors file for every shard that was needed so far. Files appear under their names when they are
    whole, so that neither an interrupted process nor two at a time can leave a part.

    Parameters
    ----------
    config : TrainConfig
        `model`, `text`, `cache`, `cache_dir`.
    device : torch.device
        Where the transformer runs.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.transformer = Transformer(config.model, device)
        self.transformer.check_context_size(config.text.context_size)
        self.name = f"{config.model.hook} of {config.model.name}"
        self._cache_dtype = None if config.cache == "off" else getattr(torch, config.cache)
        self._folder, manifest = self._open(config)
        self._windows = np.memmap(self._folder / "tokens.bin", np.int32, "r").reshape(manifest["shape"])
        self._special = torch.tensor(manifest["special_ids"], dtype=torch.int32)
        # about 64 shards, so that those held out are from all over the text, of a size that loads fast
        n_windows, context_size = self._windows.shape
        per_shard = max(1, min(65_536, max(1_024, n_windows * context_size // 64)) // context_size)
        self._starts = [*range(0, n_windows, per_shard), n_windows]
        self.shard_sizes = [int((~self._is_special(n)).sum()) for n in range(len(self._starts) - 1)]
        self._progress: tqdm[Any] | None = None
        self._n_computed, self._seconds = 0, 0.0
        self._lock = threading.Lock()  # the transformer runs for one thread at a time
        self.d_in = self.shard(0).shape[1]

    @property
    def tokens_per_second(self) -> float | None:
        """Speed at which the transformer made activations, None if it did not run."""
        return self._n_computed / self._seconds if self._n_computed else None

    def shard(self, number: int) -> Tensor:
        """Activations [n_tokens, d_in] of a shard, on the CPU: from disk, or by the transformer."""
        path = self._path(number)
        if path.is_file():
            try:
                loaded: Tensor = load_file(path)["activations"]
                return loaded
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged, delete it: {error}") from error
        with self._lock:
            activations = self._compute(number)
        if self._cache_dtype is not None:
            with finished_as(path) as unfinished:
                save_file({"activations": activations}, unfinished)
        return activations

    def measure(self, sae: SparseAutoencoder, held_out: list[int]) -> dict[str, float]:
        """Cross-entropy of the model as it is, with reconstructions in place of activations, and with their mean.

        ``ce_loss_recovered = (ablated - reconstructed) / (ablated - clean)``: 1 if nothing is lost.
        """
        if not self.transformer.has_logits:
            return {}
        tokens = torch.cat([self._tokens(number) for number in held_out])[:_CE_WINDOWS]

        def reconstruct(x: Tensor) -> Tensor:
            rebuilt: Tensor = sae(x.flatten(0, 1).float()).reconstruction
            return rebuilt.view_as(x)

        def ablate(x: Tensor) -> Tensor:
            return x.float().mean(dim=(0, 1)).expand_as(x)

        with self._lock:
            clean = self.transformer.cross_entropy(tokens)
            reconstructed = self.transformer.cross_entropy(tokens, reconstruct)
            ablated = self.transformer.cross_entropy(tokens, ablate)
        return {
            "ce_loss_clean": clean,
            "ce_loss_reconstructed": reconstructed,
            "ce_loss_ablated": ablated,
            "ce_loss_recovered": (ablated - reconstructed) / (ablated - clean),
        }

    def _open(self, config: TrainConfig) -> tuple[Path, dict[str, Any]]:
        """The folder of these activations, made if need be, and its manifest."""
        wanted = {
            "model": config.model.name,
            "model_version": self.transformer.version,
            "model_dtype": config.model.dtype,
            "hook": config.model.hook,
            "text": fingerprint(config.text),
            "column": config.text.column,
            "context_size": config.text.context_size,
            "n_tokens": config.text.n_tokens,
            "dtype": config.cache,
        }
        # not the name: a copy of a model elsewhere is the same model
        content = json.dumps({key: value for key, value in wanted.items() if key != "model"})
        folder = config.cache_dir / hashlib.sha256(content.encode()).hexdigest()[:16]
        if not folder.is_dir():
            self._tokenize(config, folder, wanted)
        try:
            manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is damaged, delete it: {error}") from error
        for key, value in wanted.items():
            if key != "model" and manifest.get(key) != value:
                raise ValueError(f"{folder} is of {key} {manifest.get(key)!r}, not {value!r}: delete it")
        n_bytes = 4 * int(np.prod(manifest["shape"]))
        if (folder / "tokens.bin").stat().st_size != n_bytes:
            raise ValueError(f"{folder} is damaged, delete it: tokens.bin has not {n_bytes:,} bytes")
        return folder, manifest

    def _tokenize(self, config: TrainConfig, folder: Path, manifest: dict[str, Any]) -> None:
        """Write the token ids and the manifest."""
        tokenizer = self.transformer.load_tokenizer()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-", ignore_cleanup_errors=True) as place,
            tqdm(desc="tokenizer", unit=" tokens", unit_scale=True, mininterval=0.5, leave=False) as progress,
        ):
            unfinished = Path(place)
            n_windows = 0
            with (unfinished / "tokens.bin").open("wb") as file:
                for block in token_windows(load_text(config.text), tokenizer, config.text):
                    file.write(block.numpy().tobytes())
                    n_windows += block.shape[0]
                    progress.update(block.numel())
            if n_windows < 2:
                raise ValueError(
                    f"text {config.text.source} fills {n_windows} windows of {config.text.context_size} tokens; "
                    "at least 2 are needed"
                )
            shape = {"shape": [n_windows, config.text.context_size], "special_ids": tokenizer.all_special_ids}
            (unfinished / "manifest.json").write_text(json.dumps(manifest | shape, indent=2) + "\n")
            with contextlib.suppress(OSError):  # another process finished first, with the same content
                unfinished.rename(folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05}.safetensors"

    def _tokens(self, number: int) -> Tensor:
        return torch.from_numpy(self._windows[self._starts[number] : self._starts[number + 1]].copy())

    def _is_special(self, number: int) -> Tensor:
        return torch.isin(self._tokens(number), self._special)

    def _compute(self, number: int) -> Tensor:
        """Run the transformer over the windows of a shard."""
        _ = self.transformer.bridge  # loading is not counted as running
        tokens = self._tokens(number)
        started = time.perf_counter()
        hidden = self.transformer.activations(tokens).to("cpu", self._cache_dtype or torch.float32)
        self._seconds += time.perf_counter() - started
        self._n_computed += tokens.numel()
        self._show_progress(tokens.numel())
        activations = hidden[~self._is_special(number)].contiguous()
        if not activations.isfinite().all():
            remedy = " (cache can be bfloat16 or float32)" if self._cache_dtype == torch.float16 else ""
            raise ValueError(f"activations at {self.name} exceed {self._cache_dtype}{remedy}, or the model gave NaN")
        return activations

    def _show_progress(self, n_tokens: int) -> None:
        if self._progress is None:
            missing = [n for n in range(len(self.shard_sizes)) if not self._path(n).is_file()]
            total = sum(self._tokens(n).numel() for n in missing)
            self._progress = tqdm(total=total, desc="transformer", unit=" tokens", unit_scale=True, mininterval=0.5)
        self._progress.update(n_tokens)
        if self._progress.n >= (self._progress.total or 0):
            self._progress.close()
