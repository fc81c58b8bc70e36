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

from topk_ortho.evaluation.saebench import result_name
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


def write_result(evaluation: Evaluation, output: Any, judged: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a result of SAEBench, an object of its own classes, together with what was judged and how.

    Raises
    ------
    ValueError
        If the schema in SAEBench's package refuses it.
    """
    values = asdict(output)
    values["eval_result_unstructured"] = values["eval_result_unstructured"] | {"judged": judged}
    text = json.dumps(values, indent=2, default=str)
    schema = files("sae_bench.evals") / evaluation.folder / evaluation.schema
    try:
        jsonschema.validate(json.loads(text), json.loads(schema.read_text()))
    except jsonschema.ValidationError as error:
        raise ValueError(f"SAEBench's schema refuses its result: {error.message}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")
    result: dict[str, Any] = json.loads(text)
    return result


def read_result(path: Path, judged: dict[str, Any]) -> dict[str, Any]:
    """A result that was written before, which must be of the same dictionary, model and settings.

    Raises
    ------
    ValueError
        If it is of others.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    before = (result.get("eval_result_unstructured") or {}).get("judged", {})
    others = [name for name, value in judged.items() if before.get(name) != value]
    if others:
        raise ValueError(f"{path} is of another {others[0].replace('_', ' ')}: --overwrite measures anew")
    return result


def result_path(evaluation: Evaluation, subject: Subject, folder: Path) -> Path:
    """Where SAEBench would write a result."""
    return folder / evaluation.folder / result_name(subject.name)
