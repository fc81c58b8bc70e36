"""Writes what a run leaves in its folder, besides metrics and checkpoints."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from topk_ortho import __version__
from topk_ortho.activations.source import ActivationSource
from topk_ortho.files import write_whole
from topk_ortho.sae import SparseAutoencoder
from topk_ortho.sae.export import save_saelens
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.report import write_report
from topk_ortho.training.saelens_metadata import saelens_metadata


def save_results(
    config: TrainConfig, source: ActivationSource, folder: Path, sae: SparseAutoencoder, summary: dict[str, Any]
) -> None:
    """Write sae/ for SAELens, report.html with its figures, and summary.json into the folder of a run."""
    save_saelens(sae, folder / "sae", saelens_metadata(config, source, summary))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "topk_ortho": __version__,
    }
    summary = summary | {"versions": versions}
    write_report(folder, summary)
    # its presence tells that the run is whole, so it comes last
    write_whole(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
