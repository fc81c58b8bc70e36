import json
import re
from pathlib import Path

import pytest

from topk_ortho.training.config import TrainConfig
from topk_ortho.training.presets import PRESETS
from topk_ortho.training.settings import check_arguments, with_settings


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
        ('compile = "true"', "compile must be true or false, got 'true'"),
        ("steps = true", "steps must be an integer, got True"),
        ("steps = 6.5", "steps must be an integer, got 6.5"),
        ('lr = "fast"', "lr must be a number, got 'fast'"),
        ("lr = 1979-05-27", "lr must be a number, got '1979-05-27'"),
        ("device = 0", "device must be a string, got 0"),
        ("out_dir = 0", "out_dir must be a string, got 0"),
        ('autocast = "fp8"', "autocast must be 'auto', 'bfloat16' or 'off', got 'fp8'"),
        ('loggers = "wandb"', "loggers must be a list, got 'wandb'"),
        ('[penalty]\ntau = "low"', "penalty.tau must be a number or 'adaptive' or 'None', got 'low'"),
        ("[sae]\nwidths = [1.5]", "sae.widths.0 must be an integer, got 1.5"),
        ("sae = 3", "sae must be a table of settings, got 3"),
        ("[sae]\nn_feature = 64", "unknown setting sae.n_feature; did you mean sae.n_features?"),
        ("[model]\nzzz = 1", "unknown setting model.zzz; there are name, hook, dtype, sha256, batch_size"),
        ('loggers = ["paper"]', "loggers.0 must be 'tensorboard' or 'wandb', got 'paper'"),
        ("[penalty]\ntau = true", "penalty.tau must be a number or 'adaptive' or 'None', got True"),
        ('clip_norm = "none"', "clip_norm must be a number or 'None', got 'none'"),
        ('steps = "600"', "steps must be an integer, got '600'"),
        ("steps = 1e3", "steps must be an integer, got 1000.0"),
        ("lr = nan", "lr must be above 0, got nan"),
        ('out_dir = "None"', "out_dir must be a string, got None"),
        ('cache_dir = ""', "cache_dir must have a value, got an empty one"),
        ("[steps]\na = 1", "steps must be an integer, got {'a': 1}"),
        ("[[sae]]\nl0 = 1", "sae must be a table of settings, got [{'l0': 1}]"),
        ("[sae]\nn-features = 64", "unknown setting sae.n-features; did you mean sae.n_features?"),
        ("n-features = 64", "unknown setting n-features; did you mean sae.n_features?"),
        ("STEPS = 64", "unknown setting STEPS; did you mean steps?"),
        ('"sae.l0" = 5', "unknown setting sae.l0; it is l0 in the table sae"),
        ('out_dir = "$NOT_SET_HERE/x"', "out_dir must be a path of known users and variables, got $NOT_SET_HERE"),
        ('[model]\nname = "~nobody-of-this-name/m"', "model.name must be a path of known users"),
        ("[sae]\nl0 = 0", "sae.l0 must be in [1, n_features = 4096], got 0"),
    ],
)
def test_a_bad_setting_is_named_with_its_file_and_what_is_allowed(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"my.toml: {message}")):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile", "true"], "--compile takes no value, got 'true'; it is --compile or --no-compile"),
        (["--steps", "5", "--no-compile=0"], "--no-compile takes no value, got '0'"),
        (["--resume", "yes"], "--resume takes no value, got 'yes'; leave it out to turn it off"),
        (["--penalty", "none"], "--penalty is a group of settings; did you mean --penalty.target none?"),
        (["--penalty=c2r"], "--penalty is a group of settings; did you mean --penalty.op c2r?"),
        (["--sae", "auxk"], "--sae is a group of settings; did you mean --sae.dead-features auxk?"),
        (["--penalty", "0.3"], "--penalty is a group of settings; did you mean --penalty.weight 0.3?"),
        (["--sae", "16384"], "--sae is a group of settings; did you mean --sae.n-features 16384?"),
        (["--model", "gpt2"], "--model is a group of settings; did you mean --model.name gpt2?"),
        (["--cache-dir", " ", "--compile"], "--cache-dir must have a value, got an empty one"),
        (["--sae.l0="], "--sae.l0 must have a value, got an empty one"),
    ],
)
def test_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments, switches=["--resume"])


def test_good_arguments_are_left_to_the_parser():
    check_arguments([], switches=["--resume"])
    check_arguments(
        ["--compile", "--resume", "--lr=1", "--penalty.tau", "-1", "--loggers", "--no-compile"], ["--resume"]
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("my.toml", "[sae", "cannot be read as TOML: "),
        ("my.toml", "steps = 7\ncompile = True", "which is 'compile = True'; true and false are written small"),
        ("my.toml", "steps = 7\nsteps = 8", "which is 'steps = 8'"),
        ("my.yaml", "steps: 7", "cannot be read as TOML: "),
        ("config.json", "{", "cannot be read as JSON: "),
        ("config.json", '{\n"steps": 7,\n}', "which is '}'"),
        ("config.json", '{"sae": {"l0": 7, "l0": 8}}', "gives l0 more than once"),
        ("config.json", '{"steps": NaN}', "steps must be an integer, got nan"),
        ("config.json", '{"lr": Infinity}', "lr must be above 0, got inf"),
        ("config.json", '{"out_dir": null}', "out_dir must be a string, got None"),
        ("config.JSON", "[1, 2]", "holds no settings"),
        ("my.toml", "", "is empty"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named_with_the_place(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.* {re.escape(message)}"):
        with_settings(TrainConfig(), tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my.toml", b"steps = 1_000\r\n"),
        ("my.JSON", b'{"steps": 1000}'),
        ("without_suffix", b' {"steps": 1000}'),
        ("utf-8-with-mark.toml", "\ufeffsteps = 1000".encode()),
        ("utf-8-with-mark.json", '\ufeff{"steps": 1000}'.encode()),
        ("utf-16.toml", "steps = 1000".encode("utf-16")),
    ],
)
def test_a_file_as_some_editors_write_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert with_settings(TrainConfig(), tmp_path / name) == TrainConfig(steps=1000)


def test_a_file_of_another_encoding_or_a_folder_is_named(tmp_path):
    (tmp_path / "my.toml").write_bytes('device = "é"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"my\.toml cannot be read: it must be text in UTF-8"):
        with_settings(TrainConfig(), tmp_path / "my.toml")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder; name a file of settings, such as .*config.json"):
        with_settings(TrainConfig(), tmp_path)


def test_paths_may_name_the_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = read(
        tmp_path,
        'out_dir = "~/runs"\ncache_dir = "${SCRATCH}/a"\n[model]\nname = "~/m"\n[text]\nsource = "$SCRATCH/t.txt"\n',
    )
    assert (config.out_dir, config.cache_dir) == (tmp_path / "home" / "runs", Path("/scratch/a"))
    assert (config.model.name, config.text.source) == (str(tmp_path / "home" / "m"), "/scratch/t.txt")
