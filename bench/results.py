"""Results as they come: a line of JSON for every finished case, with the environment it was measured in.

A file only grows. A line is written as soon as its case is finished, so that the same command goes on where it was
stopped. What counts as finished are the lines of the same machine, versions and sources; older ones stay in the file.
"""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.cases import Case
from bench.measurement import Measurement

_ROOT = Path(__file__).resolve().parent.parent
Environment = dict[str, Any]


class Result(NamedTuple):
    """A line of a results file."""

    case: Case
    measurement: Measurement
    setting: dict[str, Any]
    """What the benchmark holds constant, such as the share of pairs that are selected"""
    environment: Environment
    """Machine, versions, and a digest of all code that is timed"""
    utc: str
    """When it was written"""


def append(path: Path, result: Result) -> None:
    """Add a line; half a line, left by a run that was killed, is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = result._asdict() | {"case": result.case._asdict(), "measurement": result.measurement._asdict()}
    with path.open("ab") as file:
        file.truncate(len(_whole_lines(path)))
        file.write(json.dumps(line).encode() + b"\n")


def read(path: Path) -> list[Result]:
    """All results of a file, none if there is no file."""
    lines = [json.loads(line) for line in _whole_lines(path).splitlines()]
    return [
        Result(**line | {"case": Case(**line["case"]), "measurement": Measurement(**line["measurement"])})
        for line in lines
    ]


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def latest(results: list[Result]) -> list[Result]:
    """The last result of each case, among those from the machine and versions of its benchmark's last result.

    Cases that differ by the provider alone, between which ratios are taken, come from the same sources. Other cases may
    be older, because a run with a time budget measures the most important ones first.
    """
    machines = {r.case.benchmark: _machine_of(r.environment) for r in results}
    here = [r for r in results if _machine_of(r.environment) == machines[r.case.benchmark]]
    environments = {r.case._replace(provider=""): r.environment for r in here}
    same = [r for r in here if is_same(r.environment, environments[r.case._replace(provider="")])]
    return list({r.case: r for r in same}.values())


def _machine_of(environment: Environment) -> Environment:
    """The machine and the versions that every benchmark depends on."""
    return {name: value for name, value in environment.items() if name not in ("commit", "source", "sae_lens")}


def finished(results: list[Result], environment: Environment) -> set[Case]:
    """Cases that need not be measured again; those that failed for other reasons than memory are tried again."""
    same = [r for r in results if is_same(r.environment, environment)]
    return {r.case for r in same if r.measurement.status != "error"}


def is_same(one: Environment, other: Environment) -> bool:
    """Whether figures can be compared: all but the commit is equal, since the digest tells what a commit changed."""
    return one | {"commit": None} == other | {"commit": None}


def environment_of(device: torch.device) -> Environment:
    """What figures depend on, measured now on a device."""
    sources = sorted([*_ROOT.glob("kernels/*.py"), *_ROOT.glob("topk_ortho/**/*.py")])
    timed = ("dense", "measurement", "mixtures", "providers", "sparse", "training")
    sources += [_ROOT / f"bench/{name}.py" for name in timed]
    changes = _output_of("git", "status", "--porcelain", "topk_ortho", "kernels", "bench/*.py")
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    environment: Environment = {
        "cpu": cpu.split(":")[1].strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): _version(name) for name in ("numpy", "scipy", "triton", "sae-lens")},
        "source": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12],
        "commit": _output_of("git", "rev-parse", "--short", "HEAD") + ("+changes" if changes else ""),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cuda": str(torch.version.cuda or f"hip {torch.version.hip}"),
        }
    return environment


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
