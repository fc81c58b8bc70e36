"""What SAEBench writes: its JSON, checked by the schema that its package has for it."""

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

from topk_ortho.evaluation.saebench.subject import Subject
from topk_ortho.files import write_whole


class Evaluation(NamedTuple):
    """One of SAEBench's evaluations."""

    folder: str
    """What SAEBench calls the folder of its code and results"""
    schema: str
    """Name of its schema's file there"""
    summary: Callable[[dict[str, Any]], str]
    """The result in a line or two"""


def provenance(subject: Subject) -> dict[str, Any]:
    """The fields that every result of SAEBench has: what was judged, when, and by which versions."""
    return {
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(datetime.now().timestamp() * 1000),
        # there it is the commit of whatever repository lies around; results of a release are told by its number
        "sae_bench_commit_hash": f"sae-bench {version('sae-bench')}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": subject.name,
        "sae_lens_version": version("sae-lens"),
        "sae_cfg_dict": subject.sae.cfg.to_dict(),
    }


def write_result(evaluation: Evaluation, output: Any, path: Path) -> None:
    """Write a result of SAEBench, an object of its own classes.

    Raises
    ------
    jsonschema.ValidationError
        If the schema in SAEBench's package refuses it.
    """
    text = json.dumps(asdict(output), indent=2, default=str)
    schema = files("sae_bench.evals") / evaluation.folder / evaluation.schema
    jsonschema.validate(json.loads(text), json.loads(schema.read_text()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")


def result_path(evaluation: Evaluation, subject: Subject, folder: Path) -> Path:
    """Where SAEBench would write a result."""
    return folder / evaluation.folder / f"{subject.name}_custom_sae_eval_results.json"
