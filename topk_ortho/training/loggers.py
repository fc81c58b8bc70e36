"""Where metrics go: a file of JSON lines always, TensorBoard and Weights & Biases on request.

A logger is a context in which a function takes the metrics of one step after another.
"""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from topk_ortho.files import write_whole
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.metric_table import is_number

Log = Callable[[dict[str, Any]], None]


@contextmanager
def json_lines(path: Path, step: int, *, written_at: str = "step") -> Iterator[Log]:
    """Append the metrics to a file, one JSON object a line, for a run that goes on after a step.

    What was written to the file up to that step stays; the field `written_at` of a line says when that was. The rest is
    cut off, such as lines from after the checkpoint that a run resumes from; step 0 starts the file anew.
    """
    kept = []
    for line in path.read_text().splitlines() if step and path.is_file() else []:
        try:
            if json.loads(line)[written_at] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the process was killed while it wrote this line
            break
    write_whole(path, "".join(kept))
    with path.open("a") as file:
        yield lambda metrics: print(json.dumps(metrics, allow_nan=False), file=file, flush=True)


def open_pairs_log(config: TrainConfig, folder: Path, step: int) -> AbstractContextManager[Log]:
    """Write the windows over which selected pairs are compared to pairs.jsonl, unless the configuration has none."""
    if config.pairs_every == 0:
        return nullcontext(lambda line: None)
    return json_lines(folder / "pairs.jsonl", step, written_at="until")


@contextmanager
def tensorboard(folder: Path, step: int) -> Iterator[Log]:
    """Write the numbers to `tensorboard/` in a run's folder.

    If the run goes on after a step, TensorBoard ignores what an earlier process wrote after it.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None) as writer:

        def log(metrics: dict[str, Any]) -> None:
            for name, value in _numbers(metrics).items():
                writer.add_scalar(name, value, metrics["step"])

        yield log


@contextmanager
def weights_and_biases(config: TrainConfig, folder: Path) -> Iterator[Log]:
    """Send the numbers to Weights & Biases, which its own environment variables steer (WANDB_PROJECT, WANDB_MODE, ...).

    The configuration is stored with them. A run that is resumed in its folder goes on under the same identity.
    """
    import wandb

    file = folder / "wandb_id"
    identity = file.read_text() if file.is_file() else uuid.uuid4().hex[:8]
    try:
        run = wandb.init(
            id=identity,
            resume="allow",
            dir=str(folder),
            config=config.as_json(),
            reinit="return_previous",
        )
    except wandb.Error as error:
        raise ValueError(f"loggers: Weights & Biases refuses to start: {error}") from error
    file.write_text(identity)
    try:
        yield lambda metrics: run.log(_numbers(metrics), step=metrics["step"])
    finally:
        run.finish()


@contextmanager
def open_loggers(config: TrainConfig, folder: Path, step: int) -> Iterator[Log]:
    """Log metrics in every place that the configuration names, for a run that starts, or goes on, after a step."""
    with ExitStack() as stack:
        try:
            # wandb first: if it refuses, nothing has been written yet
            logs = [stack.enter_context(weights_and_biases(config, folder))] if "wandb" in config.loggers else []
            logs += [stack.enter_context(tensorboard(folder, step))] if "tensorboard" in config.loggers else []
        except ImportError as error:
            raise ValueError(f"loggers needs the package {error.name}: pip install {error.name}") from error
        logs.insert(0, stack.enter_context(json_lines(folder / "metrics.jsonl", step)))

        def log(metrics: dict[str, Any]) -> None:
            for log_here in logs:
                log_here(metrics)

        yield log


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if is_number(value)}
