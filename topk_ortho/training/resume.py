"""Finds the checkpoint that a run goes on from: the latest in its folder that is whole and belongs to it."""

import sys
from typing import Any

from tqdm import tqdm

from topk_ortho.training.checkpoint import Checkpoint, CheckpointError, checkpoints, latest_checkpoint
from topk_ortho.training.config import TrainConfig, flatten

_FREE = {
    "out_dir", "cache_dir", "device", "log_every", "eval_every", "loggers", "checkpoint_every", "keep_checkpoints",
}  # fmt: skip
"""Settings that a resumed run may change: none of them decides the weights."""


def find_checkpoint(config: TrainConfig, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, None to start anew; says what is wrong with those that are passed over.

    Raises
    ------
    ValueError
        If the run is not to be resumed, and would destroy an unfinished one; or if there are checkpoints and none can
        be used.
    """
    folder = config.out_dir / "checkpoints"
    if not resume:
        if checkpoints(folder) and not (config.out_dir / "summary.json").exists():
            raise ValueError(
                f"{config.out_dir} holds checkpoints of an unfinished run: go on with --resume, "
                "choose another --out-dir, or delete it"
            )
        return None

    def refuse_foreign(checkpoint: Checkpoint) -> None:
        changes = _changes(config.as_json(), checkpoint.config)
        if changes:
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} is of another run: {'; '.join(changes)}")

    checkpoint, problems = latest_checkpoint(folder, refuse_foreign)
    for problem in problems:
        tqdm.write(f"passed over: {problem}", file=sys.stderr)
    where = "no checkpoint yet, starting at step 0" if checkpoint is None else f"going on at step {checkpoint.step}"
    tqdm.write(f"{config.out_dir}: {where}", file=sys.stderr)
    return checkpoint


def _changes(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Settings that differ, except for those that a resumed run may change."""
    mine, other = flatten(ours), flatten(theirs)
    differ = (name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name))
    return [f"{name} was {other.get(name)}, is {mine.get(name)}" for name in differ if name not in _FREE]
