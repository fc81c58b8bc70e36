"""Runs of the trainer on small activations in memory, in one process or in several."""

import errno
import io
import json
import os
import signal
from contextlib import closing, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from tests.activations.sources import sparse_mixtures
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.training import results
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.interrupt import Interrupted
from topk_ortho.training.run_folder import open_run_together
from topk_ortho.training.trainer import Trainer


def config_of(out_dir: Path, **changes: Any) -> TrainConfig:
    """A configuration of small sizes, whose numbers no number of processes divides."""
    settings = {
        "steps": 50, "batch_size": 96, "log_every": 10, "eval_every": 25, "held_out_tokens": 200,
        "checkpoint_every": 25, "dead_after_tokens": 1_000, "buffer_tokens": 700, "lr": 3e-3, "out_dir": out_dir,
    } | changes  # fmt: skip
    sae = {"n_features": 35, "l0": 3, "sparsity_weight": 0.03, "initial_threshold": 0.3} | changes.get("sae", {})
    penalty = {"fraction": 0.05} | changes.get("penalty", {})
    return TrainConfig(**(settings | {"sae": SAEConfig(**sae), "penalty": PenaltyConfig(**penalty)}))


def fit(parallel: Parallel, config: TrainConfig, *, resume: bool = False, signal_at: int | None = None) -> int:
    """Train to the end, or until the last rank gets SIGTERM in the step after `signal_at`; returns the steps done."""
    results.write_report = lambda *_: None  # figures take longer than these runs
    config = replace(config, data_parallel=parallel.batch.size)
    with open_run_together(config, parallel.world, resume=resume, overwrite=False) as run:
        trainer = Trainer(config, sparse_mixtures(), run, parallel)
        with closing(trainer.batches):
            step = trainer.train_step

            def interrupted(x: Any) -> Any:
                if trainer.step == signal_at and parallel.world.rank == parallel.world.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(x)

            trainer.train_step = interrupted
            try:
                trainer.fit()
            except Interrupted:
                assert signal_at is not None
        return trainer.step


def resumed(parallel: Parallel, config: TrainConfig) -> int:
    """Go on to the end."""
    return fit(parallel, config, resume=True)


def interrupted(parallel: Parallel, config: TrainConfig, step: int) -> int:
    """Train until a signal comes in a step."""
    return fit(parallel, config, signal_at=step)


def lines(out_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without those that the machine decides."""
    noise = {"tokens_per_second", "data_ms", "sae_ms", "penalty_ms", "memory_bytes"}
    read = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in noise} for line in read]


def fit_with_a_full_disk(parallel: Parallel, config: TrainConfig) -> str:
    """Train while the last rank cannot write its part of the checkpoint of step 2; returns what was said on stderr."""
    write = HuggingFaceStorageWriter.write_data

    def full(writer: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        if "step-00000002" in str(writer.path) and parallel.world.rank == parallel.world.size - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, *arguments)

    HuggingFaceStorageWriter.write_data = full
    with redirect_stderr(io.StringIO()) as said:
        fit(parallel, config)
    return said.getvalue()
