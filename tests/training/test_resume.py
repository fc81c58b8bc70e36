"""kill -9 at random moments: the run that goes on ends with the weights of one that was left alone."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from topk_ortho.training.checkpoint import checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
ARGUMENTS = [
    "--preset", "toy-hierarchy", "--steps", str(STEPS), "--checkpoint-every", "3", "--eval-every", "20",
    "--batch-size", "128", "--synthetic.n-tokens", "8000", "--held-out-tokens", "500", "--buffer-tokens", "2000",
    "--sae.dead-features", "resample", "--sae.resample-every", "9", "--dead-after-tokens", "1000",
]  # fmt: skip


def command(out_dir, *more):
    return [sys.executable, "train.py", *ARGUMENTS, "--out-dir", str(out_dir), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(out_dir), cwd=ROOT, check=True, capture_output=True)
    return out_dir


def test_killed_at_random_moments_it_ends_as_if_left_alone(whole, tmp_path):
    out_dir, chance = tmp_path / "killed", random.Random(0)
    n_killed = 0
    while not (out_dir / "sae" / "cfg.json").exists() or not (out_dir / "summary.json").exists():
        process = subprocess.Popen(command(out_dir, "--resume"), cwd=ROOT, stderr=subprocess.PIPE)
        if n_killed < 2:
            before = {path.name for path in checkpoints(out_dir / "checkpoints")}
            while process.poll() is None and {path.name for path in checkpoints(out_dir / "checkpoints")} == before:
                time.sleep(0.01)  # it is under way
            time.sleep(chance.uniform(0.0, 0.3))
            process.kill()
            n_killed += 1
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error.decode()
    assert n_killed == 2
    for name in ("sae/sae_weights.safetensors", f"checkpoints/step-{STEPS:08}/state.safetensors"):
        expected, actual = load_file(whole / name), load_file(out_dir / name)
        assert expected.keys() == actual.keys()
        different = [key for key, tensor in expected.items() if not torch.equal(tensor, actual[key])]
        assert different == []


def test_sigterm_saves_exits_and_goes_on(whole, tmp_path):
    out_dir = tmp_path / "terminated"
    process = subprocess.Popen(command(out_dir, "--checkpoint-every", "0"), cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not (out_dir / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, error.decode()
    assert "train.py: stopped by SIGTERM at step" in error.decode()
    (path,) = checkpoints(out_dir / "checkpoints")
    assert 0 <= load_checkpoint(path).step < STEPS
    finished = subprocess.run(command(out_dir, "--resume"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "going on at step" in finished.stderr
    expected, actual = (load_file(run / "sae" / "sae_weights.safetensors") for run in (whole, out_dir))
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())
