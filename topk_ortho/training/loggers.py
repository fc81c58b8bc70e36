"""Where metrics go: a file of JSON lines always, TensorBoard and Weights & Biases on request."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from topk_ortho.activations.files import write_whole
from topk_ortho.training.config import TrainConfig


class Logger(Protocol):
    """A place for metrics."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Take the metrics of one step."""

    def close(self) -> None:
        """Flush; nothing follows."""


class JSONLines:
    """One JSON object a line in `metrics.jsonl`.

    Parameters
    ----------
    path : Path
        The file. What it holds up to a step stays, the rest, such as lines from after the checkpoint that a run
        resumes from, is cut off.
    step : int
        That step; 0 starts anew.
    """

    def __init__(self, path: Path, step: int):
        kept = []
        for line in path.read_text().splitlines() if step and path.is_file() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # torn when the process was killed
                break
        write_whole(path, "".join(kept))
        self._file = path.open("a")

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars and the density histogram in `tensorboard/` of the run's folder.

    Parameters
    ----------
    folder : Path
        The run's folder.
    step : int
        Step from which the run goes on; later entries of an earlier process are superseded.
    """

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, metrics: dict[str, Any]) -> None:
        """Write the numbers."""
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, by its own environment variables (WANDB_PROJECT, WANDB_MODE, ...).

    Parameters
    ----------
    config : TrainConfig
        Stored with the run. A run that is resumed in its folder goes on under the same identity.
    """

    def __init__(self, config: TrainConfig):
        import wandb

        file = config.out_dir / "wandb_id"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=file.read_text(),
            resume="allow",
            dir=str(config.out_dir),
            config=config.as_json(),
            reinit="return_previous",
        )

    def log(self, metrics: dict[str, Any]) -> None:
        """Send the numbers."""
        self._run.log(_numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


@contextmanager
def open_loggers(config: TrainConfig, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that logs the metrics of a step in every place, for a run that starts, or goes on, after a step."""
    loggers: list[Logger] = []
    try:
        if "tensorboard" in config.loggers:
            loggers.append(TensorBoard(config.out_dir, step))
        if "wandb" in config.loggers:
            loggers.append(WandB(config))
    except ImportError as error:
        raise ValueError(f"loggers needs the package {error.name}: pip install {error.name}") from error
    loggers.insert(0, JSONLines(config.out_dir / "metrics.jsonl", step))

    def log(metrics: dict[str, Any]) -> None:
        for logger in loggers:
            logger.log(metrics)

    try:
        yield log
    finally:
        for logger in loggers:
            logger.close()


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
