import subprocess
import sys
from pathlib import Path

import pytest

import train
from topk_ortho.training.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def test_no_arguments_is_the_minilm_preset():
    assert train.parse([]) == PRESETS["minilm"]


def test_every_level_can_be_overridden():
    sae = ["--sae.n-features", "64"]
    penalty = ["--penalty.tau", "adaptive", "--penalty.target", "none"]
    config = train.parse(["--preset", "minilm", *sae, *penalty, "--steps", "60", "--out_dir", "x"])
    assert (config.sae.n_features, config.penalty.tau, config.penalty.target) == (64, "adaptive", "none")
    assert (config.steps, config.out_dir) == (60, Path("x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--steps", "many"], "--steps"),
        (["--penalty.fraction", "2"], r"penalty.fraction must be in (0, 1], got 2.0"),
        (["--preset", "maxilm"], "maxilm"),
        (["--model.name", "./absent"], "model.name './absent' is not a directory"),
        (["--text.source", "absent.jsonl"], "text.source 'absent.jsonl' is not a file"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
    ids=["unknown_key", "not_a_number", "out_of_range", "unknown_preset", "no_model", "no_text", "no_device"],
)
def test_bad_input_ends_in_a_line_that_names_it(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert message in str(stop.value) + "".join(capsys.readouterr())
    assert stop.value.code != 0


def test_whole_run(tmp_path):
    arguments = ["--steps=6", "--warmup-steps=2", "--log-every=3", "--batch-size=256"]
    arguments += ["--text.n-tokens=1500", "--sae.n-features=128"]
    arguments += ["--out-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    for message in ("transformer", "sae"):  # the second run reads the cache
        process = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert f"{message}: 100%" in process.stderr
        assert "explained variance" in process.stdout
    assert "transformer: " not in process.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "sae.safetensors",
    }
