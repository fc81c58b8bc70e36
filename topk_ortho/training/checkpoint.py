"""Checkpoints that are either whole or absent, and are checked when they are read.

A checkpoint is a folder `step-00000200` with `state.safetensors` (all tensors) and `manifest.json` (numbers, the
configuration, and the sha256 of the state). It is written under another name, synced to disk and renamed. So earlier
checkpoints stay as they were if the process is killed at any moment, or if the disk is full.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from topk_ortho.files import finished_as, remove_abandoned, sha256_of

_FORMAT = 3
_NAME = "step-" + 8 * "[0-9]"
_FILES = ("state.safetensors", "manifest.json")
CHECKPOINT_FILES = tuple(f"{prefix}{_NAME}/{file}" for prefix in ("", ".unfinished-") for file in _FILES)
"""Patterns of all files in a folder of checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    step: int
    """Number of optimizer steps done"""
    tensors: dict[str, Tensor]
    """All tensors of the run by name, on the CPU"""
    values: dict[str, Any]
    """Everything else that decides the rest of the run, as JSON values"""
    config: dict[str, Any]
    """The configuration of the run, as JSON values"""

    def tensors_of(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part of the run, by the names that they have there."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a folder of checkpoints; returns its path. An error leaves the folder as it was."""
    path = folder / _name(checkpoint.step)
    unfinished = folder / f".unfinished-{path.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".unfinished-{_NAME}"):  # by a process that was killed
        remove_abandoned(left)
        _remove(left)
    try:
        unfinished.mkdir()
        state = unfinished / "state.safetensors"
        with finished_as(state) as file:
            # safetensors refuses tensors that are not contiguous
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}, file)
        manifest = {
            "format": _FORMAT,
            "step": checkpoint.step,
            "sha256": sha256_of(state),
            "values": checkpoint.values,
            "config": checkpoint.config,
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for file in (state, unfinished / "manifest.json", unfinished):
            _sync(file)
        if path.is_dir():  # a resumed run comes to the same step again
            for name in _FILES:
                (unfinished / name).replace(path / name)
            unfinished.rmdir()
        else:
            unfinished.rename(path)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        _remove(unfinished)
        raise OSError(f"checkpoint {path} could not be written: {error}") from error
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises `CheckpointError` if it is torn or not one of ours."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version")
        if sha256_of(path / "state.safetensors") != manifest["sha256"]:
            raise CheckpointError(f"{path} is damaged: the sha256 of state.safetensors is not the one in its manifest")
        tensors = load_file(path / "state.safetensors")
        return Checkpoint(manifest["step"], tensors, manifest["values"], manifest["config"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error


def checkpoints(folder: Path) -> list[Path]:
    """Paths of the checkpoints in a folder, the latest first."""
    return sorted((path for path in folder.glob(_NAME) if path.is_dir()), reverse=True)


def latest_checkpoint(folder: Path, check: Callable[[Checkpoint], None]) -> tuple[Checkpoint | None, list[str]]:
    """The latest checkpoint of a folder that can be read and passes `check`, and what is wrong with later ones.

    `check` raises `CheckpointError` for a checkpoint of another run. If there are checkpoints and none of them is good,
    this function raises that error too, as a run should not start anew unasked.
    """
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            checkpoint = load_checkpoint(path)
            check(checkpoint)
            return checkpoint, problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    return None, []


def prune_checkpoints(folder: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Remove the checkpoints up to a step, except for the latest few and the best one."""
    ours = [path for path in checkpoints(folder) if path.name <= _name(step)]
    for path in ours[keep_last:]:
        if best_step is None or path.name != _name(best_step):
            _remove(path)


def _name(step: int) -> str:
    return f"step-{step:08}"


def _remove(path: Path) -> None:
    """Remove a checkpoint; what else is in its folder stays, and the folder with it."""
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or not there
        path.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
