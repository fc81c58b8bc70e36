"""The folder of a run: who may write to it, where a run goes on, and how a new run takes the place of an old one.

Nothing that a run did not write is ever removed. The files of a run are known by name (`_FILES`), and are removed only
when the run that replaces theirs is whole.
"""

import contextlib
import errno
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from topk_ortho.distributed.ranks import Ranks
from topk_ortho.files import finished_as, remove_abandoned
from topk_ortho.training.checkpoint import (
    CHECKPOINT_FILES,
    Checkpoint,
    CheckpointError,
    checkpoints,
    latest_checkpoint,
)
from topk_ortho.training.config import TrainConfig, differences, flatten
from topk_ortho.training.report import FIGURES

_FILES = (
    "config.json", "metrics.jsonl", "pairs.jsonl", "report.html", "wandb_id",
    "sae/cfg.json", "sae/sae_weights.safetensors",
    *(f"figures/{name}.png" for name in FIGURES), *(f"checkpoints/{name}" for name in CHECKPOINT_FILES),
    "tensorboard/events.out.tfevents.*", "summary.json",
)  # fmt: skip
"""Patterns of what a run writes. What Weights & Biases writes is left to it."""
_LOCK = ".topk_ortho.lock"
_SUCCESSOR, _MOVING = ".successor", ".moving"
"""Subfolder of a run that is to replace the one around it; its name once the files of that one have been removed"""
_FREE = {
    "out_dir", "cache_dir", "device", "log_every", "eval_every", "loggers", "checkpoint_every", "keep_checkpoints",
    "model.batch_size", "data_parallel", "rank_timeout",
}  # fmt: skip
"""Settings that a resumed run may change: none of them decides the weights."""
_NAMES = {"model.name", "model.sha256", "text.source", "text.revision"}
"""Settings that name what is known by its content: the identity of the activations tells whether it has changed."""


class Run(NamedTuple):
    """Where a run writes, and where it starts."""

    folder: Path
    """For everything that the run leaves"""
    checkpoint: Checkpoint | None = None
    """What the run goes on from; None is the beginning"""


@contextlib.contextmanager
def open_run(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, start: bool = True
) -> Iterator[Run]:
    """The run of a configuration, whose folder no other process can write to within the `with` block.

    Parameters
    ----------
    config : TrainConfig
        The run. Its `out_dir` is made if need be. Files in it that are not of a run stay as they are.
    resume : bool
        Go on from the latest good checkpoint in the folder; start from the beginning if there is none. The run may have
        more steps than before, also if it was finished; then it counts as unfinished until it has made them.
    overwrite : bool
        Replace the run that is in the folder, finished or not. The new one is made in the subfolder ``.successor`` and
        takes the place of the old one when the block ends without an error.
    start : bool
        With `resume`: whether a run may begin where the folder holds none.

    Raises
    ------
    ValueError
        If the folder is in use, or holds a run or files that this one would have to replace unasked; or if there are
        checkpoints to go on from and none can be used, or there is no run to go on with and none may begin.
    """
    out_dir = config.out_dir
    is_new = not out_dir.exists()
    nothing_there = f"{out_dir} holds no run to go on with: check --out-dir; --auto-resume begins one where none is"
    if is_new and resume and not start:
        raise ValueError(nothing_there)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        # the system gives the lock back when the process ends, however it ends; the empty file stays
        lock = FileLock(out_dir / _LOCK).acquire(timeout=0)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--out-dir must be a folder, and {error.filename} is a file") from error
    except Timeout as error:
        raise ValueError(f"{out_dir} is in use by another run: wait for it, or choose another --out-dir") from error
    with lock, _without_trace(out_dir) if is_new else contextlib.nullcontext():
        successor = out_dir / _SUCCESSOR
        if _is_finished(successor) or (out_dir / _MOVING).is_dir():  # a process was killed at that
            _move_successor(out_dir)
        remove_abandoned(out_dir)
        checkpoint = None
        if resume:
            folder = folder_to_resume(out_dir, overwrite=overwrite)
            if not start and not checkpoints(folder / "checkpoints") and _settings_in(out_dir) is None:
                raise ValueError(nothing_there)
            checkpoint = _checkpoint_to_go_on_from(folder, config)
        elif overwrite and _settings_in(out_dir) is not None:
            folder = successor
            remove_abandoned(successor)
            _remove(successor)
        else:
            folder = out_dir
        if folder == out_dir and checkpoint is None:
            _refuse_to_replace(out_dir, config if resume else None)
        folder.mkdir(exist_ok=True)
        yield Run(folder, checkpoint)
        if folder == successor and _is_finished(successor):
            _move_successor(out_dir)


@contextlib.contextmanager
def open_run_together(config: TrainConfig, ranks: Ranks, **mode: bool) -> Iterator[Run]:
    """`open_run` for several processes, of which the first holds the folder for all."""
    with contextlib.ExitStack() as opened:
        yield ranks.on_first(lambda: opened.enter_context(open_run(config, **mode)))


def is_finished(config: TrainConfig) -> bool:
    """Whether the folder of a run holds it, finished.

    Raises
    ------
    ValueError
        If the folder holds a run that differs in a setting that decides the weights. The message names it.
    """
    found = _settings_in(config.out_dir)
    if found is None:
        return False
    if changes := _changes(found, config, but=_FREE):
        raise ValueError(f"{config.out_dir} holds a run of other settings ({changes}): choose another --out-dir")
    return _is_finished(config.out_dir)


def folder_to_resume(out_dir: Path, *, overwrite: bool) -> Path:
    """Where the run lies that is to go on: in the folder or, if it was begun to replace a finished one, inside it."""
    successor = out_dir / _SUCCESSOR
    replaces = overwrite and (_is_finished(out_dir) or bool(checkpoints(successor / "checkpoints")))
    return successor if replaces else out_dir


@contextlib.contextmanager
def _without_trace(folder: Path) -> Iterator[None]:
    """Remove the folder after the block if nothing but the lock is in it, as when the transformer is not found."""
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
                folder.rmdir()


def digest_of(config: TrainConfig) -> str:
    """A short name for the settings that decide the weights."""
    return hashlib.sha256(json.dumps(_without(_FREE, config.as_json()), sort_keys=True).encode()).hexdigest()[:8]


def _without(names: set[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, except for some."""
    return {name: value for name, value in flatten(settings).items() if name not in names}


def _changes(before: dict[str, Any], config: TrainConfig, *, but: set[str] = _FREE | _NAMES) -> str:
    """In words, the settings that differ from those of before, but for some; empty if none does.

    Settings that did not exist before, in an older version, had what are now their defaults.
    """
    defaults = _without(but, TrainConfig().as_json())
    return differences(defaults | _without(but, before), _without(but, config.as_json()))


def _is_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None if it holds no run of ours."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(settings, dict) and {"sae", "penalty", "out_dir"} <= settings.keys()
    return settings if is_ours else None


def _written(folder: Path) -> list[Path]:
    """The files in a folder that are named as a run names its own."""
    return [path for pattern in _FILES for path in sorted(folder.glob(pattern))]


def _refuse_to_replace(folder: Path, resumed: TrainConfig | None) -> None:
    """Refuse a folder in which a run that starts at the beginning would have to replace something.

    A configuration that is resumed may take the place of its own run if that ended before its first checkpoint.
    """
    written, settings = _written(folder), _settings_in(folder)
    if not written:
        return
    if settings is None:
        name = written[0].relative_to(folder)
        raise ValueError(f"{folder} holds {name}, which a run would write, but no run: choose another --out-dir")
    remedies = "choose another --out-dir, or replace that run with --overwrite"
    if _is_finished(folder):
        without = " without checkpoints" if resumed else ""
        raise ValueError(f"{folder} holds a finished run{without}: {remedies}")
    if resumed is None:
        raise ValueError(f"{folder} holds an unfinished run: go on with --resume, {remedies}")
    if changes := _changes(settings, resumed):
        raise ValueError(f"{folder} holds another unfinished run ({changes}): {remedies}")


def _checkpoint_to_go_on_from(folder: Path, config: TrainConfig) -> Checkpoint | None:
    """The latest checkpoint that is whole and of this configuration; says what is wrong with those passed over."""

    def refuse_foreign(checkpoint: Checkpoint) -> None:
        if changes := _changes(checkpoint.config, config, but=_FREE | _NAMES | {"steps"}):
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} is of other settings: {changes}")
        if checkpoint.step > config.steps:
            raise ValueError(
                f"{folder} is at step {checkpoint.step}: --steps must be at least that to go on, got {config.steps}"
            )

    checkpoint, problems = latest_checkpoint(folder / "checkpoints", refuse_foreign)
    for problem in problems:
        tqdm.write(f"passed over: {problem}", file=sys.stderr)
    where = "no checkpoint yet, starting at step 0" if checkpoint is None else f"going on at step {checkpoint.step}"
    if checkpoint is not None and checkpoint.step == config.steps:
        where += ", the last one: nothing is left to train"
    if checkpoint is not None and checkpoint.config["steps"] != config.steps:
        where += f" of {config.steps} in place of {checkpoint.config['steps']}; {_schedules(config, checkpoint.step)}"
    tqdm.write(f"{folder}: {where}", file=sys.stderr)
    return checkpoint


def _schedules(config: TrainConfig, step: int) -> str:
    """In words, what depends on the number of steps in a run that goes on at a step with another number of them."""
    first = math.floor((1 - config.decay_fraction) * config.steps) + 1
    stays = first > config.steps
    words = [f"the learning rate {'stays at' if stays else 'is'} {config.lr:g}"]
    if not stays:
        words[0] += f", and falls to 0 from step {first}"
    shares = {
        "the learning rate rises": config.warmup_fraction,
        "the weight of the penalty rises": config.penalty.warmup_fraction if config.penalty.target != "none" else 0.0,
        "the number of active features falls": config.sae.l0_anneal_fraction if config.sae.l0_start else 0.0,
    }
    ends = {what: math.ceil(share * config.steps) for what, share in shares.items()}
    return "; ".join([*words, *(f"{what} until step {end}" for what, end in ends.items() if end > step)])


def _move_successor(folder: Path) -> None:
    """Put the run in the subfolder in the place of the one around it; goes on where a killed process stopped."""
    moving = folder / _MOVING
    if not moving.exists():
        _remove(folder)
        (folder / _SUCCESSOR).rename(moving)
    for path in list(moving.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            target = folder / path.relative_to(moving)
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(path, target)
    shutil.rmtree(moving)  # folders alone are left


def _move(path: Path, target: Path) -> None:
    """Move a file, to another file system too."""
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with finished_as(target) as unfinished:
            shutil.copyfile(path, unfinished)
        path.unlink()


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
