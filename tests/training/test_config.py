from dataclasses import replace

import pytest

from topk_ortho.activations.config import ModelConfig, SyntheticConfig, SynthSAEBenchConfig, TextConfig
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.presets import PRESETS


@pytest.mark.quick
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: TrainConfig(lr=0.0), "lr must be above 0, got 0.0"),
        (lambda: TrainConfig(lr=float("inf")), "lr must be above 0, got inf"),
        (lambda: TrainConfig(seed=2**63), "seed must be in"),
        (lambda: TrainConfig(warmup_fraction=1.5), r"warmup_fraction must be in \[0, 1\], got 1.5"),
        (lambda: TrainConfig(decay_fraction=-0.1), r"decay_fraction must be in \[0, 1\], got -0.1"),
        (lambda: TrainConfig(clip_norm=0.0), "clip_norm must be above 0, or None, got 0.0"),
        (lambda: TrainConfig(held_out_tokens=0), "held_out_tokens must be at least 1, got 0"),
        (lambda: TrainConfig(checkpoint_every=-1), r"checkpoint_every must be 0 \(off\) or more, got -1"),
        (
            lambda: TrainConfig(source="synthetic", token_classes=True),
            'token_classes must be false with source = "synthetic", which has no tokens, got True',
        ),
        (lambda: TrainConfig(pairs_every=-1), r"pairs_every must be 0 \(off\) or more, got -1"),
        (lambda: TrainConfig(keep_checkpoints=0), "keep_checkpoints must be at least 1, got 0"),
        (lambda: TrainConfig(source="web"), "source must be one of .*, got web"),
        (lambda: TrainConfig(autocast="fp8"), "autocast must be one of .*, got fp8"),
        (lambda: TrainConfig(cache="int8"), "cache must be one of .*, got int8"),
        (
            lambda: TrainConfig(loggers=("paper",)),
            r"loggers must be of tensorboard, wandb, each once, got \('paper',\)",
        ),
        (lambda: TrainConfig(loggers=("wandb", "wandb")), "loggers must be of tensorboard, wandb, each once"),
        (lambda: ModelConfig(batch_size=0), "model.batch_size must be at least 1"),
        (lambda: ModelConfig(dtype="int8"), "model.dtype must be one of .*, got int8"),
        (lambda: TextConfig(context_size=4), "text.context_size must be at least 8"),
        (lambda: TextConfig(n_tokens=0), "text.n_tokens must be at least 1"),
        (lambda: SyntheticConfig(d_in=0), "synthetic.d_in must be at least 1"),
        (lambda: SyntheticConfig(n_children=-1), "synthetic.n_children must be 0 or more, got -1"),
        (
            lambda: SyntheticConfig(n_parents=0, n_independent=1),
            "number of true features of synthetic must be at least 2",
        ),
        (lambda: SyntheticConfig(depth=0), "synthetic.depth must be at least 1, got 0"),
        (lambda: SyntheticConfig(group_size=0), "synthetic.group_size must be at least 1, got 0"),
        (lambda: SyntheticConfig(directions="polar"), "synthetic.directions must be one of .*, got polar"),
        (
            lambda: SyntheticConfig(directions="orthogonal", d_in=287),
            "synthetic.d_in must be at least 288, the number of true features, to be orthogonal, got 287",
        ),
        (
            lambda: SyntheticConfig(child_parent_cosine=1.0),
            r"synthetic.child_parent_cosine must be in \[0, 1\), or None, got 1.0",
        ),
        (lambda: SyntheticConfig(zipf_exponent=-0.5), "synthetic.zipf_exponent must be 0 or more, got -0.5"),
        (lambda: SyntheticConfig(zipf_exponent=float("nan")), "synthetic.zipf_exponent must be 0 or more, got nan"),
        (lambda: SyntheticConfig(correlation=1.0), r"synthetic.correlation must be in \[0, 1\), got 1.0"),
        (lambda: SynthSAEBenchConfig(n_true=1), "synthsaebench.n_true must be at least 2, got 1"),
        (lambda: SynthSAEBenchConfig(d_in=0), "synthsaebench.d_in must be at least 1, got 0"),
        (lambda: SAEConfig(n_features=1), "sae.n_features must be at least 2"),
        (lambda: SAEConfig(l0_start=0), r"sae.l0_start must be in \[1, n_features = 4096\], or None, got 0"),
        (lambda: SAEConfig(architecture="standard", l0_start=9), r"sae.l0_start must be None with the architecture"),
        (lambda: SAEConfig(l0_anneal_fraction=1.1), r"sae.l0_anneal_fraction must be in \[0, 1\], got 1.1"),
        (
            lambda: TrainConfig(sae=SAEConfig(l0_start=9), compile=True),
            r"sae.l0_start must be None where compile",
        ),
        (lambda: SAEConfig(l0=0), r"sae.l0 must be in \[1, n_features = 4096\], got 0"),
        (lambda: SAEConfig(n_features=8, l0=9), r"sae.l0 must be in \[1, n_features = 8\], got 9"),
        (lambda: SAEConfig(architecture="gated"), r"sae.architecture must be one of .*, got gated"),
        (lambda: SAEConfig(decoder_norm="l1"), "sae.decoder_norm must be one of .*, got l1"),
        (lambda: SAEConfig(dead_features="pray"), "sae.dead_features must be one of .*, got pray"),
        (lambda: SAEConfig(normalize_activations="max"), "sae.normalize_activations must be one of .*, got max"),
        (lambda: SAEConfig(sparsity_weight=-1.0), "sae.sparsity_weight must be 0"),
        (lambda: SAEConfig(auxk_weight=float("nan")), "sae.auxk_weight must be 0"),
        (lambda: SAEConfig(auxk=0), r"sae.auxk must be in \[1, n_features = 4096\], or None, got 0"),
        (lambda: SAEConfig(n_features=64, auxk=65), r"sae.auxk must be in \[1, n_features = 64\], or None, got 65"),
        (lambda: SAEConfig(resample_every=0), "sae.resample_every must be at least 1"),
        (lambda: SAEConfig(bandwidth=0.0), "sae.bandwidth must be above 0"),
        (lambda: SAEConfig(initial_threshold=-1.0), "sae.initial_threshold must be 0 or more"),
        (lambda: SAEConfig(widths=(64, 32, 4096)), "sae.widths must be ascending and end with n_features = 4096"),
        (lambda: SAEConfig(widths=(32, 64)), "sae.widths must be ascending and end with n_features = 4096"),
        (lambda: SAEConfig(widths=()), "sae.widths must be ascending"),
        (lambda: PenaltyConfig(weight=-1.0), "penalty.weight must be 0 or more"),
        (lambda: PenaltyConfig(weight=float("inf")), "penalty.weight must be 0 or more, got inf"),
        (lambda: PenaltyConfig(warmup_fraction=2.0), r"penalty.warmup_fraction must be in \[0, 1\], got 2.0"),
        (lambda: PenaltyConfig(every=0), "penalty.every must be at least 1"),
        (lambda: PenaltyConfig(n_chunks=0), "penalty.n_chunks must be at least 1"),
        (lambda: PenaltyConfig(fraction=0.0), r"penalty.fraction must be in \(0, 1\], got 0.0"),
        (lambda: PenaltyConfig(n_std=float("nan")), "penalty.n_std must be finite, got nan"),
        (lambda: PenaltyConfig(tau=1.0), "penalty.tau must be"),
        (lambda: PenaltyConfig(tau=1), "penalty.tau must be .* got 1"),
        (lambda: PenaltyConfig(tau="adaptative"), "penalty.tau must be .* got adaptative"),
        (lambda: PenaltyConfig(target="encoder"), r"penalty.target must be one of \('decoder', .* got encoder"),
        (lambda: PenaltyConfig(op="min_cosine"), "penalty.op must be one of"),
        (lambda: PenaltyConfig(similarity="cosine"), "penalty.similarity must be one of"),
    ],
)
def test_nonsense_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: toy(op="max_cosine", n_chunks=145),
            "penalty.n_chunks must be at most 144, .*n_features = 288, got 145",
        ),
        (
            lambda: toy(op="c2r", n_chunks=145),
            "penalty.n_chunks must be at most 144, .*n_features = 288, got 145",
        ),
        (
            lambda: toy(op="c2r", target="activations"),
            'penalty.target must be "decoder" or "none", as penalty.op = "c2r" compares .*, got activations',
        ),
        (
            lambda: toy(op="random_pairs", target="activations"),
            'penalty.target must be "decoder" or "none", as penalty.op = "random_pairs" .*, got activations',
        ),
        (
            lambda: toy(op="max_cosine", encoder_inhibition=0.5),
            'penalty.encoder_inhibition must be 0 unless penalty.op = "topk_pairs" .*, got 0.5',
        ),
        (
            lambda: toy(target="activations", encoder_inhibition=0.5),
            'penalty.encoder_inhibition must be 0 unless .*penalty.target = "decoder".*, got 0.5',
        ),
        (
            lambda: toy(op="c2r", refresh="adaptive"),
            'penalty.refresh must be "exact" unless penalty.op = "topk_pairs" and penalty.target = "decoder".*',
        ),
        (
            lambda: toy(target="activations", refresh="certified"),
            'penalty.refresh must be "exact" unless .*, got certified',
        ),
        (
            lambda: toy(tau="adaptive", refresh="certified"),
            'penalty.refresh must be "exact" where penalty.tau = "adaptive", .*, got certified',
        ),
        (lambda: toy(refresh="often"), "penalty.refresh must be one of .*, got often"),
        (lambda: toy(refresh_recall=1.0), r"penalty.refresh_recall must be in \(0, 1\), got 1.0"),
        (lambda: toy(refresh_margin=0.9), "penalty.refresh_margin must be at least 1, got 0.9"),
        (lambda: toy(encoder_inhibition=-1.0), "penalty.encoder_inhibition must be 0 or more, got -1.0"),
        (
            lambda: TrainConfig(sae=SAEConfig(train_decoder=False)),
            "penalty.target must be activations or none, as sae.train_decoder is false, got decoder",
        ),
        (
            lambda: SAEConfig(train_decoder=False, dead_features="resample"),
            "sae.dead_features must be auxk or none, as sae.train_decoder is false, got resample",
        ),
        (
            lambda: TrainConfig(sae=SAEConfig(initial_decoder="truth")),
            'sae.initial_decoder must be "random" with source = "transformer", .*, got truth',
        ),
        (
            lambda: replace(PRESETS["toy-hierarchy"], sae=SAEConfig(initial_decoder="truth", n_features=289)),
            'sae.n_features must be 288, the number of true features, as sae.initial_decoder is "truth", got 289',
        ),
        (lambda: TrainConfig(warmup_fraction=0.6, decay_fraction=0.5), r"warmup_fraction \+ decay_fraction must be at"),
        (lambda: TrainConfig(batch_size=9, text=TextConfig(n_tokens=9)), "batch_size must be below text.n_tokens = 9"),
        (
            lambda: replace(PRESETS["toy-hierarchy"], batch_size=1_000_000),
            "batch_size must be below synthetic.n_tokens = 1000000, got 1000000",
        ),
        (
            lambda: TrainConfig(source="synthsaebench", synthsaebench=SynthSAEBenchConfig(n_tokens=1024)),
            "batch_size must be below synthsaebench.n_tokens = 1024, got 1024",
        ),
    ],
)
def test_settings_that_cannot_be_met_together_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def toy(**penalty):
    return replace(PRESETS["toy-hierarchy"], penalty=PenaltyConfig(**penalty))


def test_settings_that_can_just_be_met_together():
    toy(op="max_cosine", n_chunks=144)
    toy(op="max_cosine", n_chunks=145, target="none")
    TrainConfig(warmup_fraction=0.7, decay_fraction=0.3)
    TrainConfig(batch_size=9, text=TextConfig(n_tokens=10))
    SAEConfig(n_features=64, auxk=64)


def test_nested_widths():
    assert SAEConfig(n_features=64).nested_widths == (4, 8, 16, 32, 64)
    assert SAEConfig(n_features=3, l0=1).nested_widths == (1, 3)
    assert SAEConfig(n_features=64, widths=(10, 64)).nested_widths == (10, 64)


def test_the_seed_baseline_is_the_experiment_it_is_named_for():
    config = PRESETS["seed-baseline"]
    assert (config.model.name, config.model.hook) == ("google/gemma-2-2b", "blocks.19.hook_resid_post")
    assert (config.sae.architecture, config.sae.n_features, config.sae.sparsity_weight) == ("standard", 2304, 0.04)
    assert (config.lr, config.sae.decoder_norm) == (3e-4, "l2-hook")
    penalty = config.penalty
    assert (penalty.target, penalty.fraction, penalty.similarity, penalty.priority) == (
        "activations",
        1e-3,
        "abs",
        "none",
    )


def test_the_gemma_preset():
    config = PRESETS["gemma-2-2b"]
    assert (config.model.name, config.model.hook) == ("google/gemma-2-2b", "blocks.12.hook_resid_post")
    assert config.sae.n_features == 16_384


@pytest.mark.parametrize("name", ["~nobody-of-this-name.txt", "a$NOT_SET_HERE.jsonl", "${x}.parquet"])
def test_a_path_that_exists_is_taken_literally(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"text\.source must be a path of known users and variables"):
        TextConfig(source=name)
    (tmp_path / name).touch()
    assert TextConfig(source=name).source == name
