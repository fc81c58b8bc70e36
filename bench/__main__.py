"""All benchmarks in one command: python -m bench [NAME ...] [--device cuda] [--time-budget SECONDS] [--report].

First the results of everything that will be timed are checked against float64 (`bench.gate`); no speed is measured
unless all are right. Then the cases are measured (`bench.measurement`), the most important first, as far as the time
reaches. What is finished is written at once (`bench.results`): the same command goes on where it was stopped, by the
budget or by force. At the end the tables are printed. Exit status: 1 if a result is wrong or a case failed for other
reasons than memory, 2 if nothing can run.

--report measures nothing: it prints the tables, draws the figures, and writes the tables into docs/benchmarks.md.
"""

import argparse
import json
import math
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench import results
from bench.cases import Benchmark, Case
from bench.dense import DENSE
from bench.gate import faults_of
from bench.measurement import groups_of, measure, print_peak_memory
from bench.report import PAGE, tables_of, write_report
from bench.sparse import SPARSE_DENSITY, SPARSE_L0, SPARSE_N
from bench.training import TRAINING

BENCHMARKS = {
    "dense": DENSE,
    "sparse_n": SPARSE_N,
    "sparse_l0": SPARSE_L0,
    "sparse_density": SPARSE_DENSITY,
    "training": TRAINING,
}
_RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, report; the exit status."""
    start = time.monotonic()
    names = ", ".join(BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {names}, or sparse for its three; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help='"cuda" is ROCm too')
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="SECONDS",
                        help="when no further cases are begun, checks included")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="small cases, into results of their own")
    parser.add_argument("--out", type=Path, metavar="PATH.jsonl", help="default: bench/results/DEVICE.jsonl")
    parser.add_argument("--report", action="store_true", help="only write tables and figures of what was measured")
    parser.add_argument("--peak-memory-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak_memory_of:
        case = Case(*options.peak_memory_of)
        print_peak_memory(BENCHMARKS[case.benchmark], case)
        return 0
    chosen: dict[str, Benchmark] = {}
    for name in options.names or BENCHMARKS:
        if name not in (*BENCHMARKS, "sparse"):
            parser.error(f"unknown benchmark {name!r}; there are {names}, and sparse for its three")
        chosen |= {key: BENCHMARKS[key] for key in BENCHMARKS if name in (key, key.split("_")[0])}
    out = options.out or _RESULTS / f"{options.device}{'-smoke' if options.smoke else ''}.jsonl"
    if options.report:
        if not (known := results.read(out)):
            parser.error(f"{out} has no results")
        print("\n".join(f"{name}:\n\n{table}" for name, table in tables_of(known).items()))
        write_report(known, out, PAGE if out in (_RESULTS / "cpu.jsonl", _RESULTS / "cuda.jsonl") else None)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a CUDA or ROCm device; torch {torch.__version__} sees none")

    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    torch.set_float32_matmul_precision("highest")  # some containers set tf32
    if faults := faults_of(chosen.values(), device):
        print("error: wrong results, so no speed is measured:", *faults, sep="\n  ", file=sys.stderr)
        return 1
    return run(chosen, device, out, smoke=options.smoke, deadline=start + options.time_budget)


def run(benchmarks: dict[str, Benchmark], device: torch.device, out: Path, *, smoke: bool, deadline: float) -> int:
    """Measure what the file lacks, group by group, until the deadline of `time.monotonic`; the exit status."""
    environment = results.environment_of(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    known = results.read(out)
    finished = results.finished(known, environment)
    has_failed, n_left = False, 0
    for benchmark in benchmarks.values():
        cases = benchmark.small_cases(device.type) if smoke else benchmark.cases(device.type)
        for group in groups_of(case for case in cases if case not in finished):
            if time.monotonic() >= deadline:
                n_left += len(group)
                continue
            for case, measurement in measure(benchmark, group, device).items():
                time_s, utc = measurement.time_s, datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
                print(case, measurement.note if time_s is None else f"{1e3 * time_s:.3f} ms", sep=": ", flush=True)
                known.append(results.Result(case, measurement, benchmark.setting, environment, utc))
                results.append(out, known[-1])
                has_failed |= measurement.status == "error"
    tables = tables_of(known)
    print(*(f"\n{tables[name]}" for name in dict.fromkeys(name.split("_")[0] for name in benchmarks)))
    if n_left:
        print(f"{n_left} cases were not reached; the same command goes on with them")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
