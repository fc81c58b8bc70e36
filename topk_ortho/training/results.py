"""Writes what a run leaves in its folder, besides metrics and checkpoints."""

import json
import platform
import shutil
from importlib.metadata import version
from typing import Any

import torch

from topk_ortho.activations.files import write_whole
from topk_ortho.sae import SparseAutoencoder
from topk_ortho.sae.export import save_saelens
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.report import write_report


def prepare_folder(config: TrainConfig, step: int) -> None:
    """Make the folder, without results of an earlier run, and write config.json.

    A run that goes on after a step keeps what it has written up to there.
    """
    config.out_dir.mkdir(parents=True, exist_ok=True)
    stale = ["summary.json", "report.html", "sae", "figures"]
    if step == 0:
        stale += ["checkpoints", "tensorboard", "wandb", "wandb_id"]
    for name in stale:
        path = config.out_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_whole(config.out_dir / "config.json", json.dumps(config.as_json(), indent=2) + "\n")


def save_results(config: TrainConfig, sae: SparseAutoencoder, summary: dict[str, Any]) -> None:
    """Write sae/ for SAELens, summary.json, and report.html with its figures."""
    metadata: dict[str, Any] = {"trained_with": "topk_ortho", "training_config": config.as_json()}
    if config.source == "transformer":
        metadata |= {
            "model_name": config.model.name,
            "hook_name": config.model.hook,
            "context_size": config.text.context_size,
            "dataset_path": config.text.source,
        }
    save_saelens(sae, config.out_dir / "sae", metadata)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "topk_ortho": version("topk-ortho"),
    }
    write_whole(config.out_dir / "summary.json", json.dumps(summary | {"versions": versions}, indent=2) + "\n")
    write_report(config.out_dir)
