"""All CPU benchmarks in one command: python -m bench.run [--n 2048 ...] [--m 1024] [--repeats 3] [--out PATH].

Memory first, one process a case, which also finds what cannot run; then time, `repeats` processes for every N, each of
which runs all providers. Writes PATH.json, and PATH.png and the README's table through `bench.report`. The default
sizes take half an hour on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from bench.providers import FORWARD, FORWARD_BACKWARD, FRACTION
from bench.report import write_report

_ROOT = Path(__file__).resolve().parent.parent
Case = tuple[str, str, int, int]
"""(provider, mode, M, N)"""
_MODES = {"forward": FORWARD, "forward_backward": FORWARD_BACKWARD}


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--m", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_ROOT / "bench/results/cpu")
    options = parser.parse_args()

    cases = [(p, mode, options.m, n) for n in options.n for mode, providers in _MODES.items() for p in providers]
    rows: dict[Case, dict[str, float | None]] = {case: {"peak_extra_bytes": memory(case)} for case in cases}
    for case, times in time_cases([c for c in cases if rows[c]["peak_extra_bytes"]], options.repeats).items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        rows[case] |= {"time_s": median, "time_q1_s": low, "time_q3_s": high, "rounds": len(times)}
    results = {
        "environment": environment(),
        "fraction": FRACTION,
        "dtype": "float32",
        "data": "Gaussian, independent entries",
        "rows": [dict(zip(("provider", "mode", "M", "N"), case, strict=True)) | row for case, row in rows.items()],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(options.out)


def memory(case: Case) -> int | None:
    """Peak bytes beyond the input and its gradient, None if they exceed the machine's memory."""
    print("memory", *case, end=" ", flush=True)
    process = subprocess.run(
        [sys.executable, "-m", "bench.memory", *map(str, case)], cwd=_ROOT, capture_output=True, text=True
    )
    killed = process.returncode == -9
    if process.returncode and not killed:
        sys.exit(process.stderr)
    answer = "out of memory" if killed else process.stdout.strip()
    print(answer)
    return None if answer == "out of memory" else int(answer)


def time_cases(cases: list[Case], repeats: int) -> dict[Case, list[float]]:
    """Seconds of every timed round of every case."""
    times: dict[Case, list[float]] = defaultdict(list)
    for n in dict.fromkeys(case[3] for case in cases):
        for repeat in range(repeats):
            print(f"time N = {n}, {repeat + 1} of {repeats}", flush=True)
            names = [":".join(map(str, case)) for case in cases if case[3] == n]
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "pytest", "bench/test_cpu.py", "-q", f"--benchmark-json={file.name}"]
                environment = os.environ | {"BENCH_CASES": " ".join(names)}
                process = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
                if process.returncode:
                    sys.exit(process.stdout)
                benchmarks = json.loads(Path(file.name).read_text())["benchmarks"]
            for benchmark in benchmarks:
                info = benchmark["extra_info"]
                times[info["provider"], info["mode"], info["M"], info["N"]] += benchmark["stats"]["data"]
    return times


def environment() -> dict[str, object]:
    """What the figures depend on."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    git = ["git", "-C", str(_ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    status = [*git, "status", "--porcelain", "topk_ortho", "bench/*.py"]
    changed = subprocess.run(status, capture_output=True, text=True)
    return {
        "cpu": cpu.split(":")[1].strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytest-benchmark": version("pytest-benchmark"),
        "commit": commit + ("+changes" if changed.stdout.strip() else ""),
        "utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


if __name__ == "__main__":
    main()
