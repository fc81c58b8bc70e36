"""What a run does to the folder it is given: nobody's files are lost, and two runs never share one."""

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.activations.sources import sparse_mixtures
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.training.checkpoint import load_checkpoint
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.run_folder import digest_of, open_run
from topk_ortho.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Figures take longer than these runs."""
    monkeypatch.setattr("topk_ortho.training.results.write_report", lambda *_: None)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        sae=SAEConfig(architecture="topk", n_features=32, l0=3),
        penalty=PenaltyConfig(fraction=0.05),
        steps=4, batch_size=100, eval_every=2, held_out_tokens=200, checkpoint_every=2, out_dir=tmp_path / "run",
    )  # fmt: skip


def train(config, source=None, **mode):
    with open_run(config, **mode) as run, contextlib.ExitStack() as stack:
        trainer = Trainer(config, source or sparse_mixtures(), run)
        stack.callback(trainer.batches.close)
        return trainer.fit()


def stop_after(n_steps, config, **mode):
    """Train for some steps, save a checkpoint and leave the run unfinished, as a signal does."""
    with open_run(config, **mode) as run:
        trainer = Trainer(config, sparse_mixtures(), run)
        for _ in range(n_steps):
            trainer.train_step(trainer.next_batch())
        trainer.save()
        trainer.batches.close()


def content(folder):
    """All files of a folder by name, with their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".topk_ortho.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps(folder):
    return json.loads((folder / "summary.json").read_text())["steps"]


FOREIGN = (
    "notes.txt", "wandb/run-1/log", "sae/readme.md", "figures/mine.png", "tensorboard/mine", "wandb_ids",
    "checkpoints/mine/w.pt", "checkpoints/step-0-notes/manifest.json", "checkpoints/step-by-step.txt",
)  # fmt: skip


def add_foreign_files(folder):
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def assert_foreign_files(folder):
    assert {name for name in FOREIGN if (folder / name).is_file() and (folder / name).read_text() == name} == {*FOREIGN}


def test_files_of_others_stay(config):
    add_foreign_files(config.out_dir)
    train(config)
    assert_foreign_files(config.out_dir)
    train(replace(config, steps=6), overwrite=True)
    assert steps(config.out_dir) == 6
    assert_foreign_files(config.out_dir)


def test_what_a_checkpoint_folder_holds_besides_stays(config):
    train(config)
    note = config.out_dir / "checkpoints" / "step-00000002" / "note.txt"
    note.write_text("the best")
    train(replace(config, steps=6), overwrite=True)
    assert note.read_text() == "the best"
    assert not (note.parent / "manifest.json").exists()


@pytest.mark.parametrize("mode", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("name", ["sae/cfg.json", "config.json", "figures/training.png"])
def test_a_file_that_would_be_replaced_is_named(name, mode, config):
    path = config.out_dir / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"run holds {name}, which a run would write, but no run: choose another"):
        train(config, **mode)
    assert content(config.out_dir) == {name: b"mine"}


def test_a_finished_run_is_replaced_on_request_alone(config):
    train(config)
    before = content(config.out_dir)
    with pytest.raises(ValueError, match="finished run: choose another --out-dir, or replace that run with --over"):
        train(replace(config, steps=6))
    assert content(config.out_dir) == before
    train(replace(config, steps=6, checkpoint_every=0), overwrite=True)
    after = content(config.out_dir)
    assert {name for name in after if name.startswith("checkpoints/step-0000000")} == {
        "checkpoints/step-00000006/manifest.json", "checkpoints/step-00000006/state.safetensors",
    }  # fmt: skip
    assert [json.loads(line)["step"] for line in after["metrics.jsonl"].splitlines()] == [2, 4, 6]
    assert json.loads(after["config.json"])["out_dir"] == str(config.out_dir)
    assert not list(config.out_dir.glob(".[!t]*")), "no folder of the replacement is left"


def test_an_unfinished_run_is_refused_too(config):
    train(config)
    (config.out_dir / "summary.json").unlink()
    with pytest.raises(ValueError, match="run holds an unfinished run: go on with --resume, choose another --out-dir"):
        train(config)


def test_a_finished_run_without_checkpoints_is_not_resumed(config):
    train(config)
    shutil.rmtree(config.out_dir / "checkpoints")
    before = content(config.out_dir)
    for other in (config, replace(config, seed=1)):
        with pytest.raises(ValueError, match="run holds a finished run without checkpoints"):
            train(other, resume=True)
    assert content(config.out_dir) == before


def test_a_run_that_ended_before_its_first_checkpoint_is_resumed_with_its_own_settings(config):
    train(config)
    shutil.rmtree(config.out_dir / "checkpoints")
    (config.out_dir / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"run holds another unfinished run \(seed was 0, is 1\)"):
        train(replace(config, seed=1), resume=True)
    train(config, resume=True)
    assert steps(config.out_dir) == 4


def test_two_replacements_in_a_row(config):
    """What lies in the hidden folder besides, such as the empty folders of Weights & Biases, is in nobody's way."""
    train(config)
    for n_steps in (6, 8):
        longer = replace(config, steps=n_steps)
        with open_run(longer, overwrite=True) as run, contextlib.ExitStack() as stack:
            (run.folder / "wandb" / "run-1" / "tmp" / "code").mkdir(parents=True)
            (run.folder / "wandb" / "run-1" / "log").write_text(str(n_steps))
            (run.folder / ".DS_Store").touch()
            trainer = Trainer(longer, sparse_mixtures(), run)
            stack.callback(trainer.batches.close)
            trainer.fit()
        assert steps(config.out_dir) == n_steps
        assert (config.out_dir / "wandb" / "run-1" / "log").read_text() == str(n_steps)
        assert not (config.out_dir / ".moving").exists()
        assert not (config.out_dir / ".successor").exists()


def test_checkpoints_on_another_file_system(config, monkeypatch):
    train(config)
    replace_file = Path.replace

    def replace_within(path, target):
        if path.name == "state.safetensors" and ".moving" in path.parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", replace_within)
    train(replace(config, steps=6, checkpoint_every=0), overwrite=True)
    (path,) = (config.out_dir / "checkpoints").iterdir()
    assert load_checkpoint(path).step == 6


@pytest.mark.parametrize("failure", ["diverges", "wandb", "report"])
def test_a_run_that_fails_replaces_nothing(failure, config, monkeypatch):
    train(config)
    before = content(config.out_dir)
    if failure == "diverges":
        config = replace(config, lr=1e30, warmup_fraction=0.0, clip_norm=None, penalty=PenaltyConfig(target="none"))
        error, message = FloatingPointError, "training diverged"
    elif failure == "report":

        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr("topk_ortho.training.results.write_report", full)
        error, message = OSError, "No space left on device"
    else:
        import wandb

        def init(**arguments):
            raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

        monkeypatch.setattr("wandb.init", init)
        config = replace(config, loggers=("wandb", "tensorboard"))
        error, message = ValueError, "loggers: Weights & Biases refuses to start: No API key configured"
    with pytest.raises(error, match=message):
        train(config, overwrite=True)
    with pytest.raises(ValueError, match="run holds a finished run"):
        train(config)  # which does not complete what failed
    after = content(config.out_dir)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(".successor/") for name in after.keys() - before.keys())


def test_a_run_that_was_not_trained_replaces_nothing(config):
    train(config)
    with open_run(config, overwrite=True):
        pass
    assert steps(config.out_dir) == 4


def test_wandb_without_a_key_leaves_nothing(config, monkeypatch):
    import wandb

    def init(**arguments):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr("wandb.init", init)
    with pytest.raises(ValueError, match="No API key configured"):
        train(replace(config, loggers=("wandb", "tensorboard")))
    assert content(config.out_dir) == {}


def test_no_folder_is_made_where_nothing_goes_on(config, tmp_path):
    nowhere = replace(config, out_dir=tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="b holds no run to go on with"):
        train(nowhere, resume=True, start=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_successor_is_resumed_or_made_anew(resume, config, capsys):
    train(config)
    longer = replace(config, steps=8, checkpoint_every=0)

    stop_after(3, longer, overwrite=True)
    assert steps(config.out_dir) == 4
    train(longer, overwrite=True, resume=resume)
    assert ("going on at step 3" in capsys.readouterr().err) == resume
    assert steps(config.out_dir) == 8
    assert (config.out_dir / "checkpoints" / "step-00000003").exists() == resume
    whole = train(replace(longer, out_dir=config.out_dir.with_name("whole")))
    resumed = json.loads((config.out_dir / "summary.json").read_text())
    assert resumed["explained_variance"] == whole["explained_variance"]


@pytest.mark.parametrize("n_moved", range(-1, 4))
def test_a_replacement_that_is_killed_on_the_way_is_finished_by_the_next_command(n_moved, config, monkeypatch):
    train(config)
    longer = replace(config, steps=6, checkpoint_every=0)
    steps_of_moving = []

    def killed_in(method):
        def step(path, target):
            if ".moving" in path.parts or path.name == ".successor":
                if len(steps_of_moving) == n_moved + 1:
                    raise KeyboardInterrupt
                steps_of_moving.append(path)
            return method(path, target)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed_in(Path.replace))
        patch.setattr(Path, "rename", killed_in(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            train(longer, overwrite=True)
    with pytest.raises(ValueError, match="run holds a finished run"):
        train(longer)
    expected = train(replace(longer, out_dir=config.out_dir.with_name("whole")))
    assert steps(config.out_dir) == 6
    assert json.loads((config.out_dir / "config.json").read_text())["steps"] == 6
    assert content(config.out_dir).keys() == content(config.out_dir.with_name("whole")).keys()
    assert json.loads((config.out_dir / "summary.json").read_text())["penalty"] == expected["penalty"]


def test_two_runs_never_share_a_folder(config, tmp_path):
    with open_run(config):
        link = tmp_path / "link"
        link.symlink_to(config.out_dir)
        for mode in ({}, {"resume": True}, {"overwrite": True}):
            for other in (config.out_dir, link):
                with (
                    pytest.raises(ValueError, match="is in use by another run"),
                    open_run(replace(config, out_dir=other), **mode),
                ):
                    pass
    train(config)


def test_a_killed_run_holds_its_folder_no_longer(config):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from topk_ortho.training.config import TrainConfig; from topk_ortho.training.run_folder import open_run\n"
        "with open_run(TrainConfig(out_dir=Path(sys.argv[1]))): print('held', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(config.out_dir)], cwd=ROOT, stdout=subprocess.PIPE) as held:
        try:
            assert held.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match="is in use by another run"):
                train(config)
        finally:
            held.kill()
    train(config)


def test_checkpoints_of_other_activations_are_refused(config):
    config = replace(config, steps=8)
    stop_after(1, config)
    other = sparse_mixtures()
    other.identity |= {"source": "elsewhere"}
    message = "cannot be resumed, as its activations have changed: source was memory, is elsewhere"
    with pytest.raises(ValueError, match=message):
        train(config, other, resume=True)
    train(config, resume=True)
    assert steps(config.out_dir) == 8


def test_names_of_what_is_known_by_its_content_may_change(config):
    config = replace(config, steps=8)
    stop_after(1, config)
    moved = replace(config, text=TextConfig(source="elsewhere.txt"), model=ModelConfig(name="a-copy", batch_size=8))
    train(moved, resume=True)
    assert steps(config.out_dir) == 8
    assert digest_of(moved) != digest_of(config)


def test_an_interrupted_replacement_of_nothing_goes_on_where_it_was_written(config):
    config = replace(config, steps=8)
    stop_after(1, config, overwrite=True)
    with open_run(config, overwrite=True, resume=True) as run:
        assert (run.folder, run.checkpoint.step) == (config.out_dir, 1)


def test_a_colleague_can_read_what_a_run_leaves(config):
    before = os.umask(0o027)
    try:
        train(config)
    finally:
        os.umask(before)
    files = [path for path in config.out_dir.rglob("*") if path.is_file() and path.name != ".topk_ortho.lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_what_a_killed_process_left_unfinished_goes(config):
    code = "import os, sys; from pathlib import Path; from files import finished_as\n"
    code += "with finished_as(Path(sys.argv[1]) / 'config.json') as path: os.kill(os.getpid(), 9)\n"
    config.out_dir.mkdir()
    # a module of the folder, not of the package, which takes seconds to import
    environment = os.environ | {"PYTHONPATH": str(ROOT / "topk_ortho")}
    process = subprocess.run([sys.executable, "-c", code, str(config.out_dir)], env=environment, check=False)
    assert process.returncode == -9
    assert len(list(config.out_dir.glob("unfinished-*"))) == 1
    left = config.out_dir / "checkpoints" / ".unfinished-step-00000099"
    with open_run(config) as run:
        left.mkdir(parents=True)
        (left / "state.safetensors").write_bytes(b"half")
        trainer = Trainer(config, sparse_mixtures(), run)
        trainer.save()
        trainer.batches.close()
    assert not left.exists()
    assert not list(config.out_dir.glob("unfinished-*"))


def test_the_digest_follows_what_decides_the_weights(config, tmp_path):
    same = replace(config, out_dir=tmp_path, log_every=1, device="cpu", loggers=("wandb",))
    assert digest_of(same) == digest_of(config)
    others = [replace(config, seed=1), replace(config, sae=replace(config.sae, l0=4)), replace(config, steps=5)]
    assert len({digest_of(other) for other in [config, *others]}) == 4
