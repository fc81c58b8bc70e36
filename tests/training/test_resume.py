"""kill -9 at random moments: the run that goes on ends with the weights of one that was left alone."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pydoc_data.topics import topics

import datasets
import pytest
import torch
from safetensors.torch import load_file

import train
from topk_ortho.training.checkpoint import checkpoints, load_checkpoint

STEPS = 60
ARGUMENTS = [
    "--preset", "toy-hierarchy", "--steps", str(STEPS), "--checkpoint-every", "3", "--eval-every", "20",
    "--batch-size", "128", "--synthetic.n-tokens", "8000", "--held-out-tokens", "500", "--buffer-tokens", "2000",
    "--sae.dead-features", "resample", "--sae.resample-every", "9", "--dead-after-tokens", "1000",
]  # fmt: skip
PROCESSES = multiprocessing.get_context("forkserver")
# imports take longer than these runs
PROCESSES.set_forkserver_preload(
    ["train", "topk_ortho.training.trainer", "topk_ortho.training.results", "topk_ortho.activations.cache"]
)


class Run:
    """`python train.py` in a process of its own."""

    def __init__(self, out_dir, *more, arguments=ARGUMENTS, data_set=None):
        self._log = out_dir.with_suffix(".log")
        arguments = ["train.py", *arguments, "--out-dir", str(out_dir), *more]
        self._process = PROCESSES.Process(target=_train, args=(arguments, self._log, data_set))
        self._process.start()

    @property
    def is_running(self):
        return self._process.is_alive()

    def send(self, number):
        os.kill(self._process.pid, number)

    def kill_when(self, condition):
        while self.is_running and not condition():
            time.sleep(0.005)
        self._process.kill()
        code, output = self.end()
        assert code == -signal.SIGKILL, output

    def end(self):
        """Wait for the end; the exit status and what was printed."""
        self._process.join()
        return self._process.exitcode, self._log.read_text()


def _train(arguments, log, data_set):
    datasets.load_dataset_builder = lambda *names, revision: data_set
    sys.argv = arguments
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    train.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    code, output = Run(out_dir).end()
    assert code == 0, output
    return out_dir


def test_killed_at_random_moments_it_ends_as_if_left_alone(whole, tmp_path):
    out_dir, chance = tmp_path / "killed", random.Random(0)
    n_killed = 0
    while not (out_dir / "sae" / "cfg.json").exists() or not (out_dir / "summary.json").exists():
        run = Run(out_dir, "--auto-resume")
        if n_killed < 2:
            before = {path.name for path in checkpoints(out_dir / "checkpoints")}
            while run.is_running and {path.name for path in checkpoints(out_dir / "checkpoints")} == before:
                time.sleep(0.01)  # it is under way
            time.sleep(chance.uniform(0.0, 0.3))
            run.send(signal.SIGKILL)
            n_killed += 1
        code, output = run.end()
        assert code in (0, -signal.SIGKILL), output
    assert n_killed == 2
    for name in ("sae/sae_weights.safetensors", f"checkpoints/step-{STEPS:08}/state.safetensors"):
        expected, actual = load_file(whole / name), load_file(out_dir / name)
        assert expected.keys() == actual.keys()
        different = [key for key, tensor in expected.items() if not torch.equal(tensor, actual[key])]
        assert different == []


def test_sigterm_saves_exits_and_goes_on(whole, tmp_path):
    out_dir = tmp_path / "terminated"
    run = Run(out_dir, "--checkpoint-every", "0")
    while run.is_running and not (out_dir / "metrics.jsonl").exists():
        time.sleep(0.01)
    run.send(signal.SIGTERM)
    code, output = run.end()
    assert code == 128 + signal.SIGTERM, output
    assert "train.py: stopped by SIGTERM at step" in output
    (path,) = checkpoints(out_dir / "checkpoints")
    assert 0 <= load_checkpoint(path).step < STEPS
    code, output = Run(out_dir, "--resume").end()
    assert code == 0, output
    assert "going on at step" in output
    expected, actual = (load_file(run / "sae" / "sae_weights.safetensors") for run in (whole, out_dir))
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


DOCUMENTS = [f"{title}. {text}" for title, text in sorted(topics.items())[:40]]
STREAMED = [
    "--preset", "minilm", "--text.source", "owner/name", "--text.n-tokens", "4096", "--text.context-size", "32",
    "--sae.n-features", "256", "--sae.l0", "8", "--steps", "45", "--batch-size", "256", "--checkpoint-every", "5",
    "--keep-checkpoints", "9", "--held-out-tokens", "512", "--buffer-tokens", "2048", "--eval-every", "45",
]  # fmt: skip


class HubDataSet:
    """Stands in for a data set on the hub, whose stream does not go on while a file is there."""

    hash = "0123abcd"

    def __init__(self, barrier):
        self._barrier = barrier

    def as_streaming_dataset(self, split):
        for number, document in enumerate(DOCUMENTS):
            while number == 3 and self._barrier.exists():
                self._barrier.write_text("reached")
                time.sleep(0.01)
            yield {"text": document}


def test_killed_while_it_streams_reads_and_goes_through_epochs(tmp_path):
    """Killed in the data set's stream, in the transformer's pass, and in two later epochs of training."""
    whole, out_dir = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    for folder in (whole, out_dir):
        folder.parent.mkdir()
    barrier = tmp_path / "barrier"

    def run_into(out_dir):
        cache = ["--cache-dir", str(out_dir.parent / "cache")]
        return Run(out_dir, "--auto-resume", *cache, arguments=STREAMED, data_set=HubDataSet(barrier))

    code, output = run_into(whole).end()
    assert code == 0, output

    barrier.touch()
    run_into(out_dir).kill_when(lambda: barrier.read_text() == "reached")
    barrier.unlink()
    cache = out_dir.parent / "cache"
    assert not [path for path in cache.glob("*") if not path.name.startswith("unfinished")]  # nothing but what is left
    run_into(out_dir).kill_when(lambda: any(cache.glob("*/shard-*.safetensors")))
    for step in (20, 35):  # an epoch has at most 15 steps of 256 tokens
        checkpoint = out_dir / "checkpoints" / f"step-{step:08}"
        run_into(out_dir).kill_when(checkpoint.is_dir)
    code, output = run_into(out_dir).end()
    assert code == 0, output
    assert "going on at step" in output
    for name in ("sae/sae_weights.safetensors", "checkpoints/step-00000045/state.safetensors"):
        expected, actual = load_file(whole / name), load_file(out_dir / name)
        assert expected.keys() == actual.keys()
        assert [key for key, tensor in expected.items() if not torch.equal(tensor, actual[key])] == []
