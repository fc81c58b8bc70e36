"""The results of `bench.gpu` as they come: a CSV, a row for every finished case, with the environment it ran in.

A row is written as soon as its case is finished. What counts as finished for the next run are the rows of the same GPU,
versions and sources; others stay in the file and are passed over.
"""

import csv
import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.gpu_cases import Case

_ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
"""A line of the CSV, or some of its fields; what was not measured is None."""
_IDENTITY = ("gpu", "gpu_memory_bytes", "driver", "cuda", "torch", "triton", "python", "source")
ENVIRONMENT_FIELDS = (*_IDENTITY, "commit")
_PARSERS: dict[str, Callable[[str], Any]] = {
    "provider": str, "mode": str, "dtype": str, "M": int, "N": int,
    "status": str, "time_ms": float, "time_q20_ms": float, "time_q80_ms": float, "rounds": int,
    "peak_extra_bytes": int, "kernels_ms": json.loads, "note": str, "utc": str,
    **dict.fromkeys(ENVIRONMENT_FIELDS, str), "gpu_memory_bytes": int,
}  # fmt: skip
"""Every column, and what reads its text."""


def environment_of(device: torch.device) -> Row:
    """What the figures depend on; `source` is a digest of all code that is timed."""
    import triton  # is not wherever a report is written

    properties = torch.cuda.get_device_properties(device)
    sources = sorted([*_ROOT.glob("kernels/*.py"), *_ROOT.glob("topk_ortho/**/*.py")])
    sources += [_ROOT / "bench/gpu_measure.py", _ROOT / "bench/providers.py"]
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": str(torch.version.cuda or f"hip {torch.version.hip}"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "source": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12],
        "commit": _output_of("git", "-C", str(_ROOT), "describe", "--always", "--dirty=+changes"),
    }


def row_of(case: Case, result: Row, environment: Row) -> Row:
    """A line from its parts."""
    utc = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return dict.fromkeys(_PARSERS) | case._asdict() | result | environment | {"utc": utc}


def case_of(row: Row) -> Case:
    """Which case a line is of."""
    return Case(*(row[field] for field in Case._fields))


def append(log: Path, row: Row) -> None:
    """Add a line; half a line, left by a run that was killed, is cut off first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    whole = _whole_lines(log)
    with log.open("a", newline="") as file:
        file.truncate(len(whole.encode()))
        writer = csv.DictWriter(file, _PARSERS, lineterminator="\n")
        if not whole:
            writer.writeheader()
        writer.writerow(row | {"kernels_ms": row["kernels_ms"] and json.dumps(row["kernels_ms"])})


def read(log: Path, environment: Row | None = None) -> list[Row]:
    """Rows of this environment, or of that of the last row.

    Raises
    ------
    ValueError
        If the file has other columns.
    """
    reader = csv.DictReader(io.StringIO(_whole_lines(log), newline=""))
    if reader.fieldnames is not None and list(reader.fieldnames) != list(_PARSERS):
        raise ValueError(f"{log} has columns of another version: move it away, or choose another --out")
    rows = [{name: parse(line[name]) if line[name] else None for name, parse in _PARSERS.items()} for line in reader]
    environment = environment or (rows[-1] if rows else {})
    return [row for row in rows if all(row[name] == environment[name] for name in _IDENTITY)]


def _whole_lines(log: Path) -> str:
    text = log.read_text() if log.exists() else ""
    return text[: text.rfind("\n") + 1]


def _output_of(*command: str) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return process.stdout.strip()
