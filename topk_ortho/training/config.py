"""Everything that decides a training run. Values out of range are refused here, by name, before any model loads."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from topk_ortho.activations.config import (
    CacheDtype,
    ModelConfig,
    SyntheticConfig,
    SynthSAEBenchConfig,
    TextConfig,
    expanded,
    require,
    require_at_least,
    require_words,
)

Architecture = Literal["standard", "topk", "batchtopk", "jumprelu", "matryoshka"]


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names: {"sae": {"l0": 32}} becomes {"sae.l0": 32}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = flatten(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}.{key}" if key else str(name): leaf for key, leaf in inner.items()}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, the values that differ by name; empty if none does."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig:
    """The sparse autoencoder."""

    architecture: Architecture = "batchtopk"
    """"standard" (ReLU and an L1 term), "topk", "batchtopk", "jumprelu", or "matryoshka" (nested BatchTopK)."""
    n_features: int = 4096
    """Size of the dictionary."""
    l0: int = 32
    """Number of active features of a token: exactly (topk), on average (batchtopk, matryoshka), or the average that
    the sparsity term pulls to (jumprelu). The standard architecture has no such number."""
    l0_start: int | None = None
    """Number of active features that training begins with, from which it goes to l0 in a straight line; often several
    times l0, so that more features learn something before they have to compete. None begins with l0."""
    l0_anneal_fraction: float = 0.3
    """Share of the steps, at the beginning, over which it does so."""
    sparsity_weight: float = 0.1
    """Weight of the sparsity term. For standard this is the mean L1 norm of the features, relative to the root of the
    activations' total variance; for jumprelu it is (L0 / l0 - 1)**2. The other architectures have none."""
    decoder_norm: Literal["none", "l2", "l2-hook"] = "l2"
    """Length of decoder directions: "none" (free), "l2" (1; the gradient along them is removed), "l2-hook" (1, by a
    hook after the optimizer's step alone)."""
    initial_decoder: Literal["random", "truth"] = "random"
    """Directions that the decoder starts from: random ones, or the true ones of synthetic data (a control, which
    shows how good a dictionary can be, and whether training stays there)."""
    train_decoder: bool = True
    """False keeps the decoder's directions as they are, and trains the encoder alone: a control, with random
    directions that of arXiv:2602.14111."""
    normalize_activations: Literal["none", "rms"] = "rms"
    """"rms" scales activations to a mean square of 1 a dimension while training; the saved weights take them
    unscaled."""
    dead_features: Literal["none", "auxk", "resample"] = "auxk"
    """What revives features that stopped firing: "auxk" lets them reconstruct what the others leave over,
    "resample" restarts them at tokens that are reconstructed badly."""
    auxk: int | None = None
    """Number of dead features that a token may use for its auxiliary reconstruction; None is half the width of the
    activations, or n_features if these are fewer."""
    auxk_weight: float = 1 / 8
    """Weight of the share of the residual that the auxiliary reconstruction misses, relative to the fraction of
    variance unexplained."""
    resample_every: int = 250
    """Steps between two resamplings; none in the last fifth of the run."""
    widths: tuple[int, ...] | None = None
    """Ascending sizes of the nested dictionaries (matryoshka); None is n_features / 16, / 8, / 4, / 2 and / 1."""
    initial_threshold: float = 1.0
    """Threshold that every feature starts with (jumprelu), in units of the scaled activations."""
    bandwidth: float = 0.5
    """Distance from its threshold over which a feature learns it (jumprelu), in the same units."""

    def __post_init__(self) -> None:
        require_words(self, "sae.")
        require_at_least(2, self, "sae.", "n_features")
        require_at_least(1, self, "sae.", "resample_every")
        in_range = 1 <= self.l0 <= self.n_features
        require(in_range, "sae.l0", self.l0, f"in [1, n_features = {self.n_features}]")
        if self.l0_start is not None:
            in_range = 1 <= self.l0_start <= self.n_features
            require(in_range, "sae.l0_start", self.l0_start, f"in [1, n_features = {self.n_features}], or None")
            allowed = "None with the architecture standard, which has no number of active features"
            require(self.architecture != "standard", "sae.l0_start", self.l0_start, allowed)
        in_range = 0 <= self.l0_anneal_fraction <= 1
        require(in_range, "sae.l0_anneal_fraction", self.l0_anneal_fraction, "in [0, 1]")
        for name in ("sparsity_weight", "auxk_weight"):
            require(0 <= getattr(self, name) < math.inf, f"sae.{name}", getattr(self, name), "0 (off) or more")
        in_range = self.auxk is None or 1 <= self.auxk <= self.n_features
        require(in_range, "sae.auxk", self.auxk, f"in [1, n_features = {self.n_features}], or None")
        allowed = "auxk or none, as sae.train_decoder is false"
        require(self.train_decoder or self.dead_features != "resample", "sae.dead_features", "resample", allowed)
        require(0 <= self.initial_threshold < math.inf, "sae.initial_threshold", self.initial_threshold, "0 or more")
        require(0 < self.bandwidth < math.inf, "sae.bandwidth", self.bandwidth, "above 0")
        if self.widths is not None:
            ascend = all(a < b for a, b in zip((0, *self.widths), self.widths, strict=False))
            allowed = f"ascending and end with n_features = {self.n_features}"
            require(ascend and self.widths[-1:] == (self.n_features,), "sae.widths", self.widths, allowed)

    @property
    def nested_widths(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries."""
        return self.widths or tuple(sorted({max(1, self.n_features // part) for part in (16, 8, 4, 2, 1)}))


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyConfig:
    """The orthogonality penalty on similar pairs of features."""

    target: Literal["decoder", "activations", "none"] = "decoder"
    """What should not be similar: the features' decoder directions, or their activations over a batch. "none" turns
    the penalty off."""
    op: Literal["topk_pairs", "max_cosine", "c2r", "random_pairs"] = "topk_pairs"
    """"topk_pairs" penalises the most similar pairs of all, "max_cosine" (OrtSAE) every feature's most similar one,
    "c2r" the same weighted by how active both features are (decoder), "random_pairs" as many random ones (decoder; a
    control)."""
    weight: float = 0.3
    """Weight, relative to the fraction of variance unexplained."""
    warmup_fraction: float = 0.0
    """Share of the steps, at the beginning, over which the weight rises from 0."""
    every: int = 1
    """Steps between two uses; the weight is multiplied by it, so that the pull is the same on average."""
    fraction: float = 1e-3
    """Share of all feature pairs that is penalised (topk_pairs)."""
    tau: float | Literal["adaptive"] | None = None
    """Only pairs with |cosine| above this count (topk_pairs); "adaptive" is mean + n_std * std over all pairs."""
    n_std: float = 1.0
    """Standard deviations above the mean, for the adaptive tau."""
    similarity: Literal["abs", "positive"] = "positive"
    """"abs" takes anti-parallel features for similar too, "positive" leaves them free (topk_pairs). The package's
    functions, such as topk_ortho_loss, take "abs" where nothing else is said."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether squared cosines are averaged or summed over the selected pairs (topk_pairs)."""
    priority: Literal["firing-rate", "none"] = "firing-rate"
    """With "firing-rate" the feature of a pair that fires more often gets no gradient, so that only the rarer one is
    changed (topk_pairs); with "none" both are changed."""
    encoder_inhibition: float = 0.0
    """Weight, relative to that of the penalty, of a further term on the pairs that it selects (topk_pairs, decoder):
    how much the encoder of the feature that fires more often is inhibited where the rarer one is present, which is how
    a feature comes to be absorbed. 0 turns it off."""
    refresh: Literal["exact", "adaptive", "certified"] = "exact"
    """When all pairs are compared (topk_pairs, decoder): "exact" does so at every use, "adaptive" as often as the
    measured recall asks for, and "certified" where it cannot be excluded that other pairs are selected. In between only
    the pairs are compared that were the most similar ones."""
    refresh_recall: float = 0.99
    """Share of the exact selection that "adaptive" aims at."""
    refresh_margin: float = 4.0
    """How many pairs are kept to be compared, as a multiple of those that are penalised."""
    n_chunks: int = 1
    """Number of random chunks, of two features or more, within which features are compared (max_cosine, c2r); 1
    compares all with all."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < math.inf, "penalty.weight", self.weight, "0 or more")
        require(0 <= self.warmup_fraction <= 1, "penalty.warmup_fraction", self.warmup_fraction, "in [0, 1]")
        require_at_least(1, self, "penalty.", "every", "n_chunks")
        in_range = 0 <= self.encoder_inhibition < math.inf
        require(in_range, "penalty.encoder_inhibition", self.encoder_inhibition, "0 or more")
        require(math.isfinite(self.n_std), "penalty.n_std", self.n_std, "finite")
        require(0 < self.fraction <= 1, "penalty.fraction", self.fraction, "in (0, 1]")
        if self.tau not in (None, "adaptive"):
            in_range = isinstance(self.tau, int | float) and 0 <= self.tau < 1
            require(in_range, "penalty.tau", self.tau, 'in [0, 1), "adaptive" or None')
        require_words(self, "penalty.")
        require(0 < self.refresh_recall < 1, "penalty.refresh_recall", self.refresh_recall, "in (0, 1)")
        require(1 <= self.refresh_margin < math.inf, "penalty.refresh_margin", self.refresh_margin, "at least 1")
        if self.refresh != "exact":
            allowed = '"exact" unless penalty.op = "topk_pairs" and penalty.target = "decoder" or "none"'
            has_pairs = self.op == "topk_pairs" and self.target != "activations"
            require(has_pairs, "penalty.refresh", self.refresh, allowed)
            allowed = '"exact" where penalty.tau = "adaptive", which depends on all pairs'
            require(self.tau != "adaptive", "penalty.refresh", self.refresh, allowed)
        if self.op in ("c2r", "random_pairs"):
            allowed = f'"decoder" or "none", as penalty.op = "{self.op}" compares decoder directions'
            require(self.target != "activations", "penalty.target", self.target, allowed)
        if self.encoder_inhibition:
            allowed = '0 unless penalty.op = "topk_pairs" and penalty.target = "decoder" or "none"'
            has_pairs = self.op == "topk_pairs" and self.target != "activations"
            require(has_pairs, "penalty.encoder_inhibition", self.encoder_inhibition, allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run."""

    source: Literal["transformer", "synthetic", "synthsaebench"] = "transformer"
    """Where activations come from: a transformer that reads a text, or synthetic data with known features, of our own
    or as SynthSAEBench makes it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    synthsaebench: SynthSAEBenchConfig = field(default_factory=SynthSAEBenchConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)

    init_from: Path | None = None
    """Folder of a dictionary in SAELens's format, such as runs/minilm/sae, whose weights the run begins with. None
    begins with random directions. The dictionary may be of another architecture, and has the run's size."""
    steps: int = 600
    """Number of optimizer steps."""
    batch_size: int = 1024
    """Number of tokens in a step."""
    lr: float = 3e-3
    """Peak learning rate of Adam."""
    warmup_fraction: float = 0.08
    """Share of the steps, at the beginning, over which the learning rate and the sparsity term's weight rise from 0."""
    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it. None turns it off."""
    autocast: Literal["auto", "bfloat16", "off"] = "auto"
    """Precision of the SAE's matrix products; "auto" is bfloat16 on CUDA and off elsewhere. Weights, gradients and
    Adam's moments are float32 always."""
    compile: bool = False
    """Compile the SAE with torch.compile."""

    buffer_tokens: int = 500_000
    """Number of tokens that are shuffled together; two such buffers are in memory, one in use and one being filled."""
    cache: CacheDtype = "float16"
    """Precision of the activations on disk. "off" keeps none: the transformer runs each time they are needed."""
    held_out_tokens: int = 16_384
    """Number of tokens that are never trained on and that the dictionary is judged by, at most half of all."""
    token_classes: bool = False
    """At the end, measure on the held-out tokens how classes of tokens (capitals, endings, first letters) are absorbed,
    on a transformer's activations. 50,000 tokens or more should be held out for it."""

    dead_after_tokens: int = 200_000
    """A feature that has not fired for this many training tokens counts as dead."""
    log_every: int = 25
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 100
    """Steps between two evaluations on held-out tokens, which go into the same file."""
    pairs_every: int = 0
    """Steps between the beginnings of two windows of 100 steps over which the selected pairs are compared, which goes
    into pairs.jsonl. 0 turns it off."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further places that the metrics are sent to, besides metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; 0 leaves only those made when the run is interrupted and when it ends."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints that are kept, besides the one with the best explained variance."""

    data_parallel: int = 1
    """Number of parts that a batch is spread over, where torchrun starts several processes. A number that divides
    that of the processes; the dictionary is spread over the rest, so 1 spreads it over all of them."""
    rank_timeout: float = 1_800.0
    """Seconds that a process waits for the others before it takes them for lost, where torchrun starts several."""
    seed: int = 0
    """Seeds the initial weights, the held-out tokens, the order of the others, and synthetic data."""
    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one."""
    out_dir: Path = Path("runs/minilm")
    """Folder for everything that the run leaves. A run that train.py is given no folder for goes to that of its preset
    or, if any setting that decides the weights differs, to one beside it."""
    cache_dir: Path = Path("runs/activations")
    """Folder of cached activations, reused by every run with the same model, hook and text."""

    def __post_init__(self) -> None:
        for name in ("out_dir", "cache_dir"):
            path = Path(expanded(name, str(getattr(self, name))))
            require(path != Path("None"), name, path, "a folder")
            object.__setattr__(self, name, path)
        if self.init_from is not None:
            object.__setattr__(self, "init_from", Path(expanded("init_from", str(self.init_from))))
            allowed = '"random" where init_from names the weights that the run begins with'
            is_random = self.sae.initial_decoder == "random"
            require(is_random, "sae.initial_decoder", self.sae.initial_decoder, allowed)
        require_at_least(1, self, "", "steps", "batch_size", "buffer_tokens", "held_out_tokens", "dead_after_tokens")
        require_at_least(1, self, "", "log_every", "eval_every", "keep_checkpoints", "data_parallel")
        require(0 < self.rank_timeout < 1e8, "rank_timeout", self.rank_timeout, "above 0")
        require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 (off) or more")
        require(self.pairs_every >= 0, "pairs_every", self.pairs_every, "0 (off) or more")
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
        for name in ("warmup_fraction", "decay_fraction"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        clips = self.clip_norm is None or 0 < self.clip_norm < math.inf
        require(clips, "clip_norm", self.clip_norm, "above 0, or None")
        is_known = set(self.loggers) <= {"tensorboard", "wandb"} and len(set(self.loggers)) == len(self.loggers)
        require(is_known, "loggers", self.loggers, "of tensorboard, wandb, each once")
        require_words(self, "")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse settings that are in range each, and cannot be met together."""
        shares = self.warmup_fraction + self.decay_fraction
        allowed = "at most 1, or the learning rate never reaches its peak"
        require(shares < 1 + 1e-9, "warmup_fraction + decay_fraction", shares, allowed)
        # some tokens are held out, and there must be a batch of others
        name, n_tokens = {
            "transformer": ("text.n_tokens", self.text.n_tokens),
            "synthetic": ("synthetic.n_tokens", self.synthetic.n_tokens),
            "synthsaebench": ("synthsaebench.n_tokens", self.synthsaebench.n_tokens),
        }[self.source]
        require(self.batch_size < n_tokens, "batch_size", self.batch_size, f"below {name} = {n_tokens}")
        allowed = f'false with source = "{self.source}", which has no tokens'
        require(not self.token_classes or self.source == "transformer", "token_classes", self.token_classes, allowed)
        self._check_initial_decoder()
        allowed = "None where compile is on, which would compile anew for every number of active features"
        require(not self.compile or self.sae.l0_start is None, "sae.l0_start", self.sae.l0_start, allowed)
        allowed = "activations or none, as sae.train_decoder is false"
        moves = self.sae.train_decoder or self.penalty.target != "decoder"
        require(moves, "penalty.target", self.penalty.target, allowed)
        if self.penalty.target != "none" and self.penalty.op in ("max_cosine", "c2r"):
            most = self.sae.n_features // 2
            allowed = f"at most {most}, two features to a chunk or more with sae.n_features = {self.sae.n_features}"
            require(self.penalty.n_chunks <= most, "penalty.n_chunks", self.penalty.n_chunks, allowed)

    def _check_initial_decoder(self) -> None:
        """Refuse to start from the true features where they are unknown, or where their number is another."""
        if self.sae.initial_decoder == "random":
            return
        allowed = '"random" with source = "transformer", whose true features nobody knows'
        require(self.source != "transformer", "sae.initial_decoder", self.sae.initial_decoder, allowed)
        n_true = (self.synthetic if self.source == "synthetic" else self.synthsaebench).n_true
        allowed = f'{n_true}, the number of true features, as sae.initial_decoder is "truth"'
        require(self.sae.n_features == n_true, "sae.n_features", self.sae.n_features, allowed)

    def as_json(self) -> dict[str, Any]:
        """The whole configuration as plain JSON values."""
        values: dict[str, Any] = adapter().dump_python(self, mode="json")
        return values


@functools.cache
def adapter() -> TypeAdapter[TrainConfig]:
    """What makes JSON values of a configuration, and a configuration of them."""
    return TypeAdapter(TrainConfig)
