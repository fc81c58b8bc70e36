import dataclasses
import json

import pytest

from topk_ortho.training.config import PRESETS, ModelConfig, PenaltyConfig, SAEConfig, TextConfig, TrainConfig


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: TrainConfig(lr=0.0), "lr must be above 0, got 0.0"),
        (lambda: TrainConfig(steps=10, warmup_steps=10), r"warmup_steps must be in \[0, steps = 10\), got 10"),
        (lambda: TrainConfig(held_out_fraction=1.0), r"held_out_fraction must be in \(0, 1\), got 1.0"),
        (lambda: ModelConfig(batch_size=0), "model.batch_size must be at least 1"),
        (lambda: TextConfig(context_size=4), "text.context_size must be at least 8"),
        (lambda: TextConfig(n_tokens=0), "text.n_tokens must be at least 1"),
        (lambda: SAEConfig(n_features=1), "sae.n_features must be at least 2"),
        (lambda: SAEConfig(l1_weight=-1.0), "sae.l1_weight must be 0"),
        (lambda: PenaltyConfig(weight=-1.0), "penalty.weight must be 0 or more"),
        (lambda: PenaltyConfig(fraction=0.0), r"penalty.fraction must be in \(0, 1\], got 0.0"),
        (lambda: PenaltyConfig(weight=float("inf")), "penalty.weight must be 0 or more, got inf"),
        (lambda: PenaltyConfig(n_std=float("nan")), "penalty.n_std must be finite, got nan"),
        (lambda: TrainConfig(lr=float("inf")), "lr must be above 0, got inf"),
        (lambda: TrainConfig(seed=2**63), "seed must be in"),
        (lambda: PenaltyConfig(tau=1.0), "penalty.tau must be"),
        (lambda: PenaltyConfig(tau=1), "penalty.tau must be .* got 1"),
        (lambda: PenaltyConfig(tau="adaptative"), "penalty.tau must be .* got adaptative"),
        (lambda: PenaltyConfig(target="encoder"), r"penalty.target must be one of \('decoder', .* got encoder"),
        (lambda: PenaltyConfig(similarity="cosine"), "penalty.similarity must be one of"),
    ],
)
def test_nonsense_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_config_survives_json():
    config = PRESETS["minilm"]
    stored = json.loads(json.dumps(config.as_json()))
    assert stored["penalty"] == dataclasses.asdict(config.penalty)
    assert stored["out_dir"] == str(config.out_dir)
