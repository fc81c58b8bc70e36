import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sae_lens

import train
from tests.activations.models import save_tiny_gemma
from topk_ortho.training.config import TrainConfig, flatten
from topk_ortho.training.presets import PRESETS
from topk_ortho.training.run_folder import open_run

ROOT = Path(__file__).resolve().parents[2]


def run(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def test_no_arguments_is_the_minilm_preset():
    assert train.parse([]) == (PRESETS["minilm"], {"resume": False, "overwrite": False, "start": True})


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    assert train.parse(["--preset", name])[0] == PRESETS[name]


def test_every_level_can_be_overridden():
    sae = ["--sae.n-features", "64", "--sae.widths", "8", "64"]
    penalty = ["--penalty.tau", "adaptive", "--penalty.target", "none"]
    config, _ = train.parse(["--preset", "minilm", *sae, *penalty, "--steps", "60", "--out_dir", "x", "--seed", "3"])
    assert (config.sae.n_features, config.sae.widths) == (64, (8, 64))
    assert (config.penalty.tau, config.penalty.target) == ("adaptive", "none")
    assert (config.steps, config.out_dir, config.seed) == (60, Path("x"), 3)


def test_a_file_is_put_over_the_preset_and_the_command_line_over_both(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        'steps = 77\nlr = 0.01\ncompile = true\nloggers = ["tensorboard"]\n'
        '[sae]\nn_features = 64\nwidths = [16, 64]\n[penalty]\ntau = "adaptive"\n'
    )
    config, _ = train.parse(["--config", str(path), "--preset", "toy-hierarchy", "--steps", "78", "--no-compile"])
    assert (config.steps, config.lr, config.compile, config.loggers) == (78, 0.01, False, ("tensorboard",))
    assert (config.sae.n_features, config.sae.widths, config.penalty.tau) == (64, (16, 64), "adaptive")
    assert config.source == "synthetic"


def test_a_resumed_run_has_its_own_settings(tmp_path):
    arguments = ["--out-dir", str(tmp_path), "--sae.n-features", "64", "--penalty.tau", "0.2", "--clip-norm", "None"]
    config, _ = train.parse(arguments)
    (tmp_path / "config.json").write_text(json.dumps(config.as_json()))
    resumed = (config, {"resume": True, "overwrite": False, "start": False})
    assert train.parse(["--out-dir", str(tmp_path), "--resume"]) == resumed
    assert train.parse([*arguments, "--preset", "minilm", "--resume"]) == resumed
    or_begun = (config, {"resume": True, "overwrite": False, "start": True})
    assert train.parse(["--out-dir", str(tmp_path), "--auto-resume"]) == or_begun


def test_default_folders_differ_by_configuration(tmp_path):
    def folder(*arguments):
        return train.parse(list(arguments))[0].out_dir

    without, wider = folder("--penalty.target", "none"), folder("--sae.n-features", "8192")
    assert folder() == folder("--log-every", "1", "--resume") == Path("runs/minilm")
    assert folder("--penalty.target", "none", "--device", "cpu", "--resume") == without
    assert len({folder(), without, wider, folder("--preset", "toy-hierarchy")}) == 4
    assert {path.parent for path in (without, wider)} == {Path("runs")}
    assert without.name.startswith("minilm-")
    (tmp_path / "my.toml").write_text('out_dir = "runs/minilm"\nsteps = 5\n')
    assert folder("--config", str(tmp_path / "my.toml")) == Path("runs/minilm")  # it has a folder of its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--steps", "many"], "--steps"),
        (["--penalty.fraction", "2"], r"penalty.fraction must be in (0, 1], got 2.0"),
        (["--preset", "maxilm"], "maxilm"),
        (["--model.name", "./absent"], "model.name './absent' is not a directory"),
        (["--text.source", "absent.jsonl"], "text.source 'absent.jsonl' is not a file"),
        (["--out-dir", ""], "--out-dir must have a value, got an empty one"),
        (["--compile", "true"], "--compile takes no value, got 'true'; it is --compile or --no-compile"),
        (["--steps", "1e3"], "--steps: invalid literal for int()"),
        (["--out-dir", "None"], "out_dir must be a folder, got None"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--config", "absent.toml"], "absent.toml"),
    ],
    ids=[
        "unknown_key",
        "not_a_number",
        "out_of_range",
        "unknown_preset",
        "no_model",
        "no_text",
        "empty_folder",
        "value_of_a_switch",
        "float_for_an_integer",
        "folder_none",
        "no_device",
        "no_file",
    ],
)
def test_bad_input_ends_in_a_line_that_names_it(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run([*arguments, "--cache-dir", "cache"], monkeypatch)
    assert not any(Path().glob("runs/*"))
    assert message in str(stop.value) + "".join(capsys.readouterr())
    assert stop.value.code != 0


def test_a_bad_file_ends_in_a_line_that_names_it(monkeypatch, tmp_path):
    (tmp_path / "my.toml").write_text("[sae]\nn_feature = 64\n")
    with pytest.raises(SystemExit, match=r"train\.py: .*my\.toml: unknown setting sae\.n_feature"):
        run(["--config", tmp_path / "my.toml"], monkeypatch)


def help_of(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def test_help_is_a_page(capsys, tmp_path):
    """Every option that it shows exists, and the value beside it is that of the preset."""
    page = help_of(["--help"], capsys)
    assert len(page.splitlines()) < 60
    assert max(map(len, page.splitlines())) <= 120
    for word in (*PRESETS, "--config", "--preset", "--resume", "--auto-resume", "--overwrite", "--help-all"):
        assert word in page
    shown = re.findall(r"^  (--[a-z0-9.-]+) (\S+)", page.partition("The activations:")[2], flags=re.MULTILINE)
    assert len(shown) > 15
    for option, value in shown:
        if option != "--out-dir":
            assert train.parse([option, value])[0] == PRESETS["minilm"], option
    assert "--sae.n-features 288" in help_of(["--preset", "toy-hierarchy", "-h"], capsys)
    (tmp_path / "my.toml").write_text("[sae]\nn_features = 77\n")
    page = help_of(["--config", str(tmp_path / "my.toml"), "--help"], capsys)
    assert "--sae.n-features 77" in page
    assert f"those shown here are of minilm, with those of {tmp_path / 'my.toml'} over it" in page
    page = help_of(["-h"], capsys)
    assert f"all {len(flatten(TrainConfig().as_json()))} settings" in page


def test_help_all_explains_every_setting(capsys):
    output = help_of(["--help-all"], capsys)
    for name in flatten(TrainConfig().as_json()):
        assert f"--{name.replace('_', '-')}" in output or f"--no-{name.replace('_', '-')}" in output, name
    for word in ("--resume", "--config", "--preset", "Size of the dictionary"):
        assert word in output


def test_help_needs_no_torch():
    """Which takes seconds to import."""
    code = "import sys, train\ntry: train.parse(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("becomes", [None, RuntimeError("a library made another error of it")])
def test_a_signal_before_training_ends_without_a_traceback(number, code, becomes, tmp_path, monkeypatch, capsys):
    """While it tokenises, say, or while the transformer runs."""

    def interrupted(config, device):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            if becomes is None:
                raise
            raise becomes from None

    monkeypatch.setattr("topk_ortho.training.processes.open_source", interrupted)
    before = signal.signal(number, signal.default_int_handler)  # the tests themselves may run under nohup
    try:
        with pytest.raises(SystemExit) as end:
            run(["--preset", "toy-hierarchy", "--out-dir", tmp_path], monkeypatch)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert end.value.code == code
    assert capsys.readouterr().err == f"train.py: stopped by {number.name}; what was saved is kept\n"
    with open_run(replace(PRESETS["toy-hierarchy"], out_dir=tmp_path)):
        pass  # the folder is free again


def test_whole_run(tmp_path):
    arguments = ["--steps=6", "--log-every=3", "--batch-size=256", "--text.n-tokens=1500", "--sae.n-features=128"]
    arguments += ["--out-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    process = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for message in ("transformer", "sae"):
        assert f"{message}: 100%" in process.stderr
    assert "Explained variance" in process.stdout


def test_a_run_on_three_samples_measures_what_it_can(tmp_path, monkeypatch, capsys):
    tiny = ["--preset", "toy-hierarchy", "--steps", 1, "--batch-size", 1, "--synthetic.n-tokens", 3]
    run([*tiny, "--synthetic.n-independent", 500, "--out-dir", tmp_path], monkeypatch)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["explained_variance"] is summary["absorption_rate"] is None
    shown = {line.strip().split("  ")[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for title in ("Explained variance", "Absorption rate"):
        assert "not measured" in shown[title]
    assert "Excess absorption</dt>" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")  # bfloat16
@pytest.mark.parametrize("preset", ["gemma-2-2b", "seed-baseline"])
def test_the_hub_presets_with_a_small_local_model(preset, tmp_path, monkeypatch, capsys):
    directory = save_tiny_gemma(tmp_path / "model")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": "the quick brown fox jumps over the lazy dog"}) + "\n" for _ in range(400))
    )
    small = ["--model.name", directory, "--model.hook", "blocks.0.hook_resid_post", "--text.context-size", 32]
    small += ["--text.source", tmp_path / "corpus.jsonl", "--text.subset", "None", "--text.n-tokens", 9000]
    small += ["--steps", 8, "--batch-size", 128, "--sae.n-features", 64, "--sae.l0", 8, "--held-out-tokens", 500]
    run(["--preset", preset, *small, "--out-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"], monkeypatch)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 8
    assert {"ce_loss_clean", "ce_loss_reconstructed", "ce_loss_ablated", "ce_loss_recovered"} <= set(summary)
    assert sae_lens.SAE.load_from_disk(tmp_path / "run" / "sae").cfg.metadata.context_size == 32
    assert "CE loss recovered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("minilm", "penalty: decoder, topk_pairs, weight 0.3, 0.10% of the pairs\n"),
        ("toy-matryoshka", "weight 0.001, encoder inhibition 500 times that, 1.00% of the pairs\n"),
    ],
)
def test_the_result_names_the_penalty(preset, said, capsys):
    train.show(PRESETS[preset], {})
    assert said in capsys.readouterr().out
