"""Studies that really train: what they leave, how they fail, and how they go on after they were killed."""

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time

import pandas as pd
import pytest
from filelock import FileLock, Timeout

import train
from topk_ortho.study.__main__ import main
from topk_ortho.study.execute import LOG, train_runs
from topk_ortho.study.plan import load_study
from topk_ortho.training.checkpoint import checkpoints

SMALL = """
description = "A study for tests."
preset = "toy-hierarchy"
seeds = [0]
baseline = "none"
[base]
steps = 20
batch_size = 64
log_every = 1
eval_every = 10
checkpoint_every = 10
held_out_tokens = 500
buffer_tokens = 2_000
sae.n_features = 32
sae.l0 = 3
[base.synthetic]
n_tokens = 8_000
n_parents = 4
n_independent = 4
"""
NONE = '[variants.none]\npenalty.target = "none"\n'


def write(tmp_path, text):
    (tmp_path / "my.toml").write_text(text)
    return str(tmp_path / "my.toml")


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "out"
    assert run("toy", "--out-dir", folder) == 0
    return folder


def test_a_study_leaves_everything_that_explains_it(toy):
    names = {path.name for path in toy.iterdir()} - {".topk_ortho.lock"}
    assert names == {
        "study.toml", "environment.json", "results.csv", "summary.csv", "report.html", "figures", "runs",
    }  # fmt: skip
    folders = sorted(str(path.relative_to(toy / "runs")) for path in toy.glob("runs/*/*"))
    assert folders == ["decoder/seed-0", "decoder/seed-1", "none/seed-0", "none/seed-1"]
    for folder in folders:
        assert {"config.json", "summary.json", "report.html", "sae", "checkpoints", LOG} <= {
            path.name for path in (toy / "runs" / folder).iterdir()
        }
        log = (toy / "runs" / folder / LOG).read_text()
        assert "starting at step 0" in log
        assert "%|" not in log, "a progress bar"
    results = pd.read_csv(toy / "results.csv")
    assert list(results[["variant", "seed"]].itertuples(index=False, name=None)) == [
        ("none", 0), ("none", 1), ("decoder", 0), ("decoder", 1),
    ]  # fmt: skip
    for _, row in results.iterrows():
        summary = json.loads((toy / "runs" / row["variant"] / f"seed-{row['seed']}" / "summary.json").read_text())
        assert row["absorption_rate"] == summary["absorption_rate"]
    assert {path.name for path in (toy / "figures").iterdir()} == {
        "1-front.png", "1-front.svg", "2-steps.png", "2-steps.svg",
    }  # fmt: skip


def test_finished_runs_are_not_repeated_and_study_toml_is_the_study(toy, capsys):
    files = [path for path in toy.glob("runs/**/*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run(toy / "study.toml", "--out-dir", toy) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "4 runs are finished" in capsys.readouterr().out


def test_a_folder_with_a_run_of_other_settings_is_refused_by_what_differs(toy, tmp_path):
    text = (toy / "study.toml").read_text().replace("weight = 1.0", "weight = 0.5")
    message = run(write(tmp_path, text), "--out-dir", toy)
    assert "decoder/seed-0 holds a run of other settings (penalty.weight was 1.0, is 0.5)" in message


def test_a_run_of_a_study_is_a_folder_that_train_py_goes_on_with(toy, monkeypatch, capsys):
    folder = toy / "runs" / "none" / "seed-0"
    weights = (folder / "sae" / "sae_weights.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out-dir", str(folder)])
    monkeypatch.setattr("topk_ortho.training.results.write_report", lambda *_: None)
    train.main()
    assert "going on at step 300" in capsys.readouterr().err
    assert (folder / "sae" / "sae_weights.safetensors").read_bytes() == weights


def test_one_failed_run_does_not_end_the_others_and_is_named(tmp_path, capsys):
    study = write(tmp_path, SMALL + NONE + '[variants.bad]\ndevice = "abacus"\n')
    out = tmp_path / "out"
    assert run(study, "--out-dir", out, "--jobs", 1) == 1
    failures = json.loads((out / "failures.json").read_text())
    assert failures.keys() == {"bad/seed-0"}
    assert "ValueError: device 'abacus' cannot be used here" in failures["bad/seed-0"]
    assert "study: bad/seed-0 failed: ValueError: device 'abacus'" in capsys.readouterr().err
    assert "Traceback" in (out / "runs" / "bad" / "seed-0" / LOG).read_text()
    assert pd.read_csv(out / "results.csv")["variant"].tolist() == ["none"]
    assert "device &#39;abacus&#39; cannot be used here" in (out / "report.html").read_text("utf-8")
    assert run(study, "--out-dir", out, "--only", "none") == 0
    assert not (out / "failures.json").exists()


def wait_until(condition):
    while not condition():
        time.sleep(0.05)


def lines_in(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_study_goes_on_after_kill_9_and_after_sigterm(tmp_path, capsys):
    text = SMALL.replace("steps = 20", "steps = 900").replace("checkpoint_every = 10", "checkpoint_every = 0")
    study, out = write(tmp_path, text + NONE + "[variants.on]\n"), tmp_path / "out"
    arguments = [study, "--out-dir", str(out), "--jobs", "1"]
    folder = out / "runs" / "none" / "seed-0"
    saved = folder / "checkpoints"
    process = multiprocessing.get_context("forkserver").Process(target=main, args=(arguments,))
    process.start()
    wait_until(lambda: not process.is_alive() or lines_in(folder / "metrics.jsonl") >= 5)
    process.kill()
    process.join()
    wait_until(lambda: checkpoints(saved))  # the run is saved though nobody waits for it any more
    (first,) = checkpoints(saved)
    assert first.name < "step-00000900"
    wait_until(lambda: can_be_locked(folder / ".topk_ortho.lock"))

    def terminate():
        n_lines = lines_in(folder / "metrics.jsonl")
        wait_until(lambda: lines_in(folder / "metrics.jsonl") >= n_lines + 5)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    assert run(*arguments) == 128 + signal.SIGTERM
    killer.join()
    message = "stopped by SIGTERM with 0 of 2 runs finished; the same command goes on from there"
    assert message in capsys.readouterr().err
    assert not (out / "runs" / "on").exists()
    assert first < checkpoints(saved)[0] < saved / "step-00000900"

    assert train_runs(load_study(study, out).runs[:1], jobs=1, threads=1) == ({}, None)
    assert (folder / LOG).read_text().count("going on at step") == 2
    assert json.loads((folder / "summary.json").read_text())["steps"] == 900


def can_be_locked(path):
    try:
        with FileLock(path).acquire(timeout=0):
            return True
    except Timeout:
        return False


def test_a_process_that_dies_is_a_failed_run(tmp_path):
    study = load_study(write(tmp_path, SMALL.replace("steps = 20", "steps = 100_000") + NONE), tmp_path / "out")

    def kill():
        wait_until(lambda: lines_in(study.runs[0].config.out_dir / "metrics.jsonl"))
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    failures, _ = train_runs(study.runs, jobs=1, threads=1)
    killer.join()
    assert failures.keys() == {"none/seed-0"}
    assert "the process ended with exit code" in failures["none/seed-0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], r"--only must name variants \(none\), got 'nothing'"),
        (["--seeds", "-1"], "seed must be in"),
        (["--preset", "maxilm"], "preset must be one of minilm"),
        (["--backend", "abacus"], "abacus"),
    ],
)
def test_options_are_refused_by_name(arguments, message, tmp_path):
    assert re.search(message, str(run(write(tmp_path, SMALL + NONE), "--out-dir", tmp_path / "out", *arguments)))


def test_two_studies_do_not_share_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".topk_ortho.lock"):
        assert "is in use by another study" in run(write(tmp_path, SMALL + NONE), "--out-dir", tmp_path / "out")


def test_help_lists_the_studies(capsys):
    assert run("--help") == 0
    output = capsys.readouterr().out
    for word in ("toy: ", "seed: ", "--jobs", "--backend", "The original experiment"):
        assert word in output


def test_on_dask(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    out = tmp_path / "out"
    assert run(write(tmp_path, SMALL + NONE), "--out-dir", out, "--backend", "dask", "--jobs", 1) == 0
    assert pd.read_csv(out / "results.csv")["steps"].tolist() == [20]
    assert "starting at step 0" in (out / "runs" / "none" / "seed-0" / LOG).read_text()
