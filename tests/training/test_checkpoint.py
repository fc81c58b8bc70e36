import json
import resource
import shutil
import signal

import pytest
import torch

from topk_ortho.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def checkpoint(step=3, **values):
    tensors = {"weights": torch.arange(6.0).view(2, 3).T, "counter": torch.tensor(7), "empty": torch.zeros(0)}
    return Checkpoint(step, tensors, {"variance": 0.1 + 0.2, **values}, {"seed": 0})


def accept(checkpoint):
    pass


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = checkpoint()
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert (loaded.step, loaded.values, loaded.config) == (saved.step, saved.values, saved.config)
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, checkpoint(mark=1))
    save_checkpoint(tmp_path, checkpoint(mark=2))
    assert [load_checkpoint(path).values["mark"] for path in checkpoints(tmp_path)] == [2]


def damage(path, how):
    state, manifest = path / "state.safetensors", path / "manifest.json"
    if how == "torn_state":
        state.write_bytes(state.read_bytes()[:-5])
    elif how == "flipped_bit":
        content = bytearray(state.read_bytes())
        content[-3] ^= 1
        state.write_bytes(content)
    elif how == "lost_state":
        state.unlink()
    elif how == "lost_manifest":
        manifest.unlink()
    elif how == "torn_manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif how == "other_format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    elif how == "not_ours":
        manifest.write_text("[1, 2]")
    elif how == "lost_key":
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "values"}))


DAMAGE = [
    "torn_state", "flipped_bit", "lost_state", "lost_manifest", "torn_manifest", "other_format", "not_ours", "lost_key",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, tmp_path):
    save_checkpoint(tmp_path, checkpoint(2))
    path = save_checkpoint(tmp_path, checkpoint(10))
    damage(path, how)
    with pytest.raises(CheckpointError, match=str(path)):
        load_checkpoint(path)
    good, problems = latest_checkpoint(tmp_path, accept)
    assert good.step == 2
    assert [str(path) in problem for problem in problems] == [True]


def test_a_foreign_checkpoint_is_passed_over(tmp_path):
    def refuse_the_latest(checkpoint):
        if checkpoint.step > 5:
            raise CheckpointError("of another run")

    save_checkpoint(tmp_path, checkpoint(2))
    save_checkpoint(tmp_path, checkpoint(10))
    good, problems = latest_checkpoint(tmp_path, refuse_the_latest)
    assert good.step == 2
    assert problems == ["of another run"]


def test_none_good_is_an_error_and_none_at_all_is_not(tmp_path):
    assert latest_checkpoint(tmp_path / "absent", accept) == (None, [])
    damage(save_checkpoint(tmp_path, checkpoint()), "torn_state")
    with pytest.raises(CheckpointError, match="is damaged"):
        latest_checkpoint(tmp_path, accept)


def test_the_latest_few_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 30, 4, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "step-00000900")  # of a longer run, perhaps
    prune_checkpoints(tmp_path, 100, keep_last=2, best_step=2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000900", "step-00000100", "step-00000030", "step-00000002",
    ]  # fmt: skip
    prune_checkpoints(tmp_path, 100, keep_last=1, best_step=None)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000900", "step-00000100"]


def test_what_a_killed_process_left_unfinished_is_neither_seen_nor_in_the_way(tmp_path):
    (tmp_path / ".unfinished-step-00000003").mkdir()
    (tmp_path / ".unfinished-step-00000003" / "state.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, checkpoint(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.fixture
def full_disk():
    """Writing stops in the middle of a file, after 100 kB."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_loses_nothing(tmp_path, full_disk):
    save_checkpoint(tmp_path, checkpoint(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="step-00000009 could not be written"):
        save_checkpoint(tmp_path, Checkpoint(9, {"weights": torch.zeros(100_000)}, {}, {}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_what_else_lies_in_a_checkpoint_stays_when_its_step_is_saved_again(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(mark=1))
    (path / "note.txt").write_text("the best")
    save_checkpoint(tmp_path, checkpoint(mark=2))
    assert (path / "note.txt").read_text() == "the best"
    assert load_checkpoint(path).values["mark"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
