"""Named configurations of a run."""

import tomllib
from dataclasses import replace
from pathlib import Path

from topk_ortho.activations.config import ModelConfig, SyntheticConfig, TextConfig
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.settings import apply_settings

# what the presets for a GPU share; they need the hub, or a local copy of the model
_GEMMA = TrainConfig(
    model=ModelConfig(name="google/gemma-2-2b", hook="blocks.12.hook_resid_post", dtype="bfloat16", batch_size=16),
    text=TextConfig(source="HuggingFaceFW/fineweb", subset="sample-10BT", context_size=1024, n_tokens=100_000_000),
    sae=SAEConfig(n_features=16_384, l0=64),
    steps=24_000,
    batch_size=4_096,
    lr=3e-4,
    warmup_fraction=0.04,
    cache="bfloat16",
    held_out_tokens=100_000,
    dead_after_tokens=10_000_000,
    log_every=100,
    eval_every=1_000,
    checkpoint_every=1_000,
    out_dir=Path("runs/gemma-2-2b"),
)

# true features in superposition, learned to convergence; without the penalty children absorb their parents
_TOY = TrainConfig(
    source="synthetic",
    synthetic=SyntheticConfig(),
    sae=SAEConfig(n_features=288, l0=5),
    penalty=PenaltyConfig(weight=0.15, fraction=1e-2, encoder_inhibition=3.0),
    steps=5_000,
    held_out_tokens=50_000,
    dead_after_tokens=100_000,
    eval_every=500,
    checkpoint_every=1_000,
    out_dir=Path("runs/toy-hierarchy"),
)

_DIFFICULTIES = {
    "orthogonal": SyntheticConfig(d_in=288, directions="orthogonal"),
    "zipf": SyntheticConfig(zipf_exponent=1.0),
    "correlated": SyntheticConfig(correlation=0.3),
    "leaning": SyntheticConfig(child_parent_cosine=0.4),
    "deep": SyntheticConfig(n_parents=12, depth=2, n_independent=36),
}

PRESETS: dict[str, TrainConfig] = {
    # a real transformer, offline, minutes on two CPU cores
    "minilm": TrainConfig(),
    # a causal language model, offline, an hour or more on two CPU cores
    "smollm2": TrainConfig(
        model=ModelConfig(name="smollm2", hook="blocks.10.hook_resid_post", batch_size=8, max_norm_ratio=5.0),
        text=TextConfig(source="installed-docs", n_tokens=2_000_000),
        steps=4_000,
        lr=1e-3,
        held_out_tokens=60_000,
        token_classes=True,
        log_every=50,
        eval_every=500,
        checkpoint_every=500,
        out_dir=Path("runs/smollm2"),
    ),
    "toy-hierarchy": _TOY,
    # the setting that recovers most true features there: an inner dictionary of a quarter, and of the penalty the
    # inhibition alone, with the weight 0.5
    "toy-matryoshka": replace(
        _TOY,
        sae=replace(_TOY.sae, architecture="matryoshka", widths=(72, 288)),
        penalty=replace(_TOY.penalty, weight=0.001, encoder_inhibition=500.0),
        out_dir=Path("runs/toy-matryoshka"),
    ),
    # data of as many true features that is easier, harder or harder in another way
    **{
        f"toy-{name}": replace(
            _TOY,
            synthetic=synthetic,
            sae=replace(_TOY.sae, l0=2 if name == "deep" else 5),  # the true L0, rounded
            out_dir=Path(f"runs/toy-{name}"),
        )
        for name, synthetic in _DIFFICULTIES.items()
    },
    "gemma-2-2b": _GEMMA,
    # the experiment that this package grew from: the most similar pairs of activations, decoder kept by a hook
    "seed-baseline": replace(
        _GEMMA,
        model=replace(_GEMMA.model, hook="blocks.19.hook_resid_post"),
        text=replace(_GEMMA.text, n_tokens=20_000_000),
        sae=SAEConfig(
            architecture="standard",
            n_features=2_304,
            sparsity_weight=0.04,
            decoder_norm="l2-hook",
            dead_features="none",
        ),
        penalty=PenaltyConfig(target="activations", similarity="abs", priority="none"),
        steps=4_800,
        warmup_fraction=0.0,
        decay_fraction=0.0,
        clip_norm=None,
        out_dir=Path("runs/seed-baseline"),
    ),
}


def _seed_runs() -> dict[str, TrainConfig]:
    """The runs of the original experiment, which the study `seed` lists for both targets of the penalty."""
    path = Path(__file__).parents[1] / "study" / "studies" / "seed.toml"
    study = tomllib.loads(path.read_text("utf-8"))
    runs = {}
    for number in range(1, 6):
        name = f"seed-run-{number}"
        config = apply_settings(PRESETS[study["preset"]], study["base"])
        config = apply_settings(config, study["variants"][f"run_{number}-activations"])
        runs[name] = replace(config, out_dir=Path("runs") / name)
    return runs


PRESETS |= _seed_runs()
