"""All GPU benchmarks in one command: python -m bench.gpu [--out PATH] [--budget-s 480] [--smoke] [--report].

First every answer is checked against float64 (`bench.gpu_gate`); no speed is measured unless all are right. Then the
cases (`bench.gpu_cases`), the most important first, as far as the budget reaches. Each finished one is in OUT.csv at
once (`bench.gpu_log`): the same command goes on where it was stopped, by the budget or by force. A case that failed is
kept as failed. At the end come OUT.json, OUT.png (if matplotlib is there) and a table (`bench.gpu_report`). How a case
is measured: `bench.gpu_measure`. float32 is in "highest" precision, so the products alone run on the FMA units, which
topk_ortho goes round by a screen in fp16.

Needs the package installed (`pip install -e '.[bench]'`) and a CUDA or ROCm device; --report needs neither device nor
checks, it writes OUT.json and OUT.png from OUT.csv again. bench/gpu_check.sh runs this after the tests that need a GPU.
Exit status: 1 if a result is wrong or a case failed for other reasons than memory, 2 if nothing can run.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.gpu_cases import Case, plan, smoke_plan
from bench.gpu_gate import CHECKS, faults_of
from bench.gpu_log import Row, append, case_of, environment_of, read, row_of
from bench.gpu_measure import Measurement, measure, rounds_of
from bench.gpu_report import write_report
from topk_ortho.backends.registry import resolve_backend

_RESULTS = Path(__file__).resolve().parent / "results/gpu"


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, report; the exit status."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_RESULTS, help="path without suffix")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds, checks included; inf for no limit")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to OUT-smoke: a first try of a machine")
    parser.add_argument("--report", action="store_true", help="only write OUT.json and OUT.png from OUT.csv again")
    options = parser.parse_args(arguments)
    out = options.out.with_name(options.out.name + "-smoke") if options.smoke else options.out
    log = out.with_name(out.name + ".csv")
    cases = smoke_plan() if options.smoke else plan()
    try:
        if options.report:
            rows = read(log)
            if not rows:
                raise ValueError(f"{log} has no results")
            write_report(out, rows, cases)
            return 0
        if not torch.cuda.is_available():
            raise ValueError(f"bench.gpu needs a CUDA or ROCm device; torch {torch.__version__} sees none")
        device = torch.device("cuda", torch.cuda.current_device())
        resolve_backend("triton", device)
        environment = environment_of(device)
        rows = read(log, environment)
    except ValueError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2

    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    if not all_right(device):
        return 1
    torch.set_float32_matmul_precision("highest")  # some containers set tf32
    deadline = start + options.budget_s
    run_cases(cases, rows, log, environment, partial(measure, device=device), lambda: deadline - time.monotonic())
    if rows:
        write_report(out, rows, cases)
    return 1 if any(row["status"] == "error" for row in rows) else 0


def all_right(device: torch.device) -> bool:
    """Whether every check passes; prints what does not."""
    faults = []
    for check in CHECKS:
        print(f"check {check.name}:", end=" ", flush=True)
        new = faults_of(check, device, "triton")
        print("wrong" if new else "right", flush=True)
        faults += new
    if faults:
        print("error: wrong results, so no speed is measured:", *faults, sep="\n  ", file=sys.stderr)
    return not faults


def run_cases(
    cases: list[Case],
    rows: list[Row],
    log: Path,
    environment: Row,
    measure: Callable[[Case], Measurement],
    seconds_left: Callable[[], float],
) -> None:
    """Measure the cases that `rows` lack, in order, except for what the time that is left does not reach.

    New rows are added to `rows` and to the log.
    """
    finished = {case_of(row) for row in rows}
    print(f"{len(finished)} cases are finished; {log}")
    n_not_reached = 0
    for case in cases:
        if case in finished:
            continue
        if estimate_s(case, rows) > seconds_left():
            n_not_reached += 1
            continue
        print(case, end=": ", flush=True)
        result = result_of(case, measure)
        print(f"{result['time_ms']:.3f} ms" if result["status"] == "ok" else result["status"], flush=True)
        rows.append(row_of(case, result, environment))
        append(log, rows[-1])
        if result["status"] == "error":
            torch.cuda.synchronize()  # raises if the device is lost; the same command goes on with the next case
    if n_not_reached:
        print(f"{n_not_reached} cases were not reached; the same command goes on with them")


def result_of(case: Case, measure: Callable[[Case], Measurement]) -> Row:
    """Status, note and figures of one case, whatever it does."""
    if case.provider.startswith("naive") and case.N**2 >= 2**31:
        note = "torch.topk of 2**31 elements or more is wrong or slow (pytorch #173622)"
        return {"status": "skipped", "note": note}
    try:
        return {"status": "ok", **measure(case)._asdict()}
    except Exception as error:
        is_memory = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
        return {"status": "out of memory" if is_memory else "error", "note": repr(error)[:300]}


_ASSUMED_RATE = {"bfloat16": 15e12, "float32": 1.5e12}  # N**2 M a second, of what is not measured yet: rather low


def estimate_s(case: Case, rows: list[Row]) -> float:
    """Seconds that a case will take, in proportion to the nearest finished one of its kind."""
    alike = [row for row in rows if row["status"] == "ok" and case_of(row)[:3] == case[:3]]
    work = case.N**2 * case.M
    seconds_of: dict[float, float] = {row["N"] ** 2 * row["M"]: row["time_ms"] / 1e3 for row in alike}
    seconds_of = seconds_of or {_ASSUMED_RATE[case.dtype]: 1.0}
    nearest = min(seconds_of, key=lambda other: abs(math.log(other / work)))
    seconds = seconds_of[nearest] * work / nearest
    rounds = rounds_of(seconds)
    setup_s = 60.0 if case.provider == "naive_compiled" else 5.0  # compilers, mostly
    return setup_s + (2 + min(3, rounds) + rounds) * seconds


if __name__ == "__main__":
    sys.exit(main())
