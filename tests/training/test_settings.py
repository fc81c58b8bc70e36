import json
import re
from pathlib import Path

import pytest

from topk_ortho.training.config import TrainConfig
from topk_ortho.training.presets import PRESETS
from topk_ortho.training.settings import with_settings


def read(tmp_path, text, base=None):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return with_settings(base or TrainConfig(), path)


def test_what_the_file_does_not_name_stays(tmp_path):
    base = PRESETS["toy-hierarchy"]
    config = read(tmp_path, "steps = 7\n[sae]\nl0 = 9\n", base)
    assert (config.steps, config.sae.l0) == (7, 9)
    assert (config.source, config.sae.n_features, config.penalty) == (base.source, base.sae.n_features, base.penalty)


def test_values_get_the_types_of_their_settings(tmp_path):
    config = read(
        tmp_path,
        'lr = 1\nclip_norm = "None"\nout_dir = "runs/x"\nloggers = ["wandb"]\ncompile = true\n'
        '[text]\nsubset = "None"\n[sae]\nwidths = [8, 4096]\n[penalty]\ntau = "adaptive"\n',
    )
    assert (config.lr, type(config.lr), config.clip_norm, config.out_dir) == (1.0, float, None, Path("runs/x"))
    assert (config.loggers, config.compile, config.text.subset) == (("wandb",), True, None)
    assert (config.sae.widths, config.penalty.tau) == ((8, 4096), "adaptive")


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_its_json(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS[name].as_json()))
    assert with_settings(TrainConfig(), path) == PRESETS[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('compile = "true"', "compile must be a valid boolean, got 'true'"),
        ("steps = true", "steps must be a valid integer, got True"),
        ("steps = 6.5", "steps must be a valid integer, got 6.5"),
        ('lr = "fast"', "lr must be a valid number, got 'fast'"),
        ("lr = 1979-05-27", "lr must be a valid number, got '1979-05-27'"),
        ("device = 0", "device must be a valid string, got 0"),
        ("out_dir = 0", "out_dir must be a valid string, got 0"),
        ('autocast = "fp8"', "autocast must be 'auto', 'bfloat16' or 'off', got 'fp8'"),
        ('loggers = "wandb"', "loggers must be a valid array, got 'wandb'"),
        ('[penalty]\ntau = "low"', "penalty.tau must be a valid number or 'adaptive', got 'low'"),
        ("[sae]\nwidths = [1.5]", "sae.widths.0 must be a valid integer, got 1.5"),
        ("sae = 3", "sae must be an object, got 3"),
        ("[sae]\nn_feature = 64", "unknown setting sae.n_feature; did you mean sae.n_features?"),
        ("[model]\nzzz = 1", "unknown setting model.zzz; there are name, hook, dtype, sha256, batch_size"),
        ('loggers = ["paper"]', "loggers.0 must be 'tensorboard' or 'wandb', got 'paper'"),
        ("[penalty]\ntau = true", "penalty.tau must be a valid number or 'adaptive', got True"),
        ("[sae]\nl0 = 0", "sae.l0 must be in [1, n_features = 4096], got 0"),
    ],
)
def test_a_bad_setting_is_named_with_its_file_and_what_is_allowed(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"my.toml: {message}")):
        read(tmp_path, text)


@pytest.mark.parametrize(("name", "text"), [("my.toml", "[sae"), ("config.json", "{")])
def test_a_file_that_cannot_be_parsed_is_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        with_settings(TrainConfig(), tmp_path / name)


def test_a_file_without_settings_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json holds no settings"):
        with_settings(TrainConfig(), tmp_path / "config.json")
