"""The folder of a run: who may write to it, where a run goes on, and how a new run takes the place of an old one.

Nothing that a run did not write is ever removed. The files of a run are known by name (`_FILES`), and are removed only
when the run that replaces theirs is whole.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from topk_ortho.activations.files import remove_abandoned
from topk_ortho.training.checkpoint import CHECKPOINT_FILES, Checkpoint, CheckpointError, latest_checkpoint
from topk_ortho.training.config import TrainConfig, differences, flatten
from topk_ortho.training.report import FIGURES

_FILES = (
    "config.json", "metrics.jsonl", "report.html", "wandb_id", "sae/cfg.json", "sae/sae_weights.safetensors",
    *(f"figures/{name}.png" for name in FIGURES), *(f"checkpoints/{name}" for name in CHECKPOINT_FILES),
    "tensorboard/events.out.tfevents.*", "summary.json",
)  # fmt: skip
"""Patterns of what a run writes. What Weights & Biases writes is left to it."""
_LOCK = ".lock"
_SUCCESSOR, _MOVING = ".successor", ".moving"
"""Subfolder of a run that is to replace the one around it; its name once the files of that one have been removed"""
_FREE = {
    "out_dir", "cache_dir", "device", "log_every", "eval_every", "loggers", "checkpoint_every", "keep_checkpoints",
}  # fmt: skip
"""Settings that a resumed run may change: none of them decides the weights."""


class Run(NamedTuple):
    """Where a run writes, and where it starts."""

    folder: Path
    """For everything that the run leaves"""
    checkpoint: Checkpoint | None = None
    """What the run goes on from; None is the beginning"""


@contextlib.contextmanager
def open_run(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Iterator[Run]:
    """The run of a configuration, whose folder no other process can write to within the `with` block.

    Parameters
    ----------
    config : TrainConfig
        The run. Its `out_dir` is made if need be. Files in it that are not of a run stay as they are.
    resume : bool
        Go on from the latest good checkpoint in the folder; start from the beginning if there is none.
    overwrite : bool
        Replace the run that is in the folder, finished or not. The new one is made in the subfolder ``.successor`` and
        takes the place of the old one when the block ends without an error.

    Raises
    ------
    ValueError
        If the folder is in use, or holds a run or files that this one would have to replace unasked; or if there are
        checkpoints to go on from and none can be used.
    """
    out_dir = config.out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        # the system gives the lock back when the process ends, however it ends; the empty file stays
        lock = FileLock(out_dir / _LOCK).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out_dir} is in use by another run: wait for it, or choose another --out-dir") from error
    with lock, _without_trace(out_dir):
        remove_abandoned(out_dir)
        successor = out_dir / _SUCCESSOR
        if (successor / "summary.json").is_file() or (out_dir / _MOVING).is_dir():  # a process was killed at that
            _move_successor(out_dir)
        replaces = overwrite and bool(_written(out_dir))
        folder = successor if replaces else out_dir
        if replaces and not resume:
            _remove(successor)
        elif not resume:
            _refuse_to_replace(out_dir)
        folder.mkdir(exist_ok=True)
        yield Run(folder, _checkpoint_to_go_on_from(folder, config) if resume else None)
        if replaces and (folder / "summary.json").is_file():
            _move_successor(out_dir)


@contextlib.contextmanager
def _without_trace(folder: Path) -> Iterator[None]:
    """Remove the folder after the block if nothing but the lock is in it, as when the transformer is not found."""
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def digest_of(config: TrainConfig) -> str:
    """A short name for the settings that decide the weights."""
    return hashlib.sha256(json.dumps(_deciding(config.as_json()), sort_keys=True).encode()).hexdigest()[:8]


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, except for those that a resumed run may change."""
    return {name: value for name, value in flatten(settings).items() if name not in _FREE}


def _written(folder: Path) -> list[Path]:
    """The files in a folder that are named as a run names its own."""
    return [path for pattern in _FILES for path in sorted(folder.glob(pattern))]


def _refuse_to_replace(folder: Path) -> None:
    """Refuse a folder in which this run would have to replace something."""
    written = _written(folder)
    if not written:
        return
    remedies = "choose another --out-dir, or replace that run with --overwrite"
    if not (folder / "config.json").exists():
        name = written[0].relative_to(folder)
        raise ValueError(f"{folder} holds {name}, which a run would write, and no config.json of a run: {remedies}")
    if (folder / "summary.json").exists():
        raise ValueError(f"{folder} holds a finished run: {remedies}")
    raise ValueError(f"{folder} holds an unfinished run: go on with --resume, {remedies}")


def _checkpoint_to_go_on_from(folder: Path, config: TrainConfig) -> Checkpoint | None:
    """The latest checkpoint that is whole and of this configuration; says what is wrong with those passed over."""

    def refuse_foreign(checkpoint: Checkpoint) -> None:
        mine, other = _deciding(config.as_json()), _deciding(checkpoint.config)
        if changes := differences(other, mine):
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} is of another run: {changes}")

    checkpoint, problems = latest_checkpoint(folder / "checkpoints", refuse_foreign)
    for problem in problems:
        tqdm.write(f"passed over: {problem}", file=sys.stderr)
    where = "no checkpoint yet, starting at step 0" if checkpoint is None else f"going on at step {checkpoint.step}"
    tqdm.write(f"{folder}: {where}", file=sys.stderr)
    return checkpoint


def _move_successor(folder: Path) -> None:
    """Put the run in the subfolder in the place of the one around it; goes on where a killed process stopped."""
    moving = folder / _MOVING
    if not moving.exists():
        _remove(folder)
        (folder / _SUCCESSOR).rename(moving)
    logs = [path for path in (moving / "wandb").rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in [*_written(moving), *logs]:
        target = folder / path.relative_to(moving)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        _remove_empty(path.parent, folder)


def _remove(folder: Path) -> None:
    """Remove the files of a run, and the folders in its folder that are empty then."""
    for path in _written(folder):
        path.unlink()
        _remove_empty(path.parent, folder)


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove a folder and those around it up to `top`, as far as they are empty."""
    with contextlib.suppress(OSError):
        while folder != top:
            folder.rmdir()
            folder = folder.parent
