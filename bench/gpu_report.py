"""What `bench.gpu` measured, for readers: OUT.json, a table with the goals, and OUT.png.

From the time of a case follow, with N(N-1)/2 * 2M useful operations (2 N**2 M in the full product of cublas),

    tflops       = useful operations / time
    of_model     = floor of `bench.roofline` / time
    to_half_gemm = time / that of as many operations at the rate of the cublas case of this dtype and M
"""

import json
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu_cases import LABELS, Case
from bench.gpu_log import ENVIRONMENT_FIELDS, Row, case_of
from bench.providers import FRACTION
from bench.roofline import forward_backward_floor, forward_floor, hardware_of
from topk_ortho.definitions import k_from_fraction

_TABLE = [  # title, field, unit, format
    ("ms", "time_ms", 1, ".3f"),
    ("20%", "time_q20_ms", 1, ".3f"),
    ("80%", "time_q80_ms", 1, ".3f"),
    ("Tflop/s", "tflops", 1, ".1f"),
    ("of model", "of_model", 1, ".0%"),
    ("/ half-GEMM", "to_half_gemm", 1, ".2f"),
    ("extra MB", "peak_extra_bytes", 1e6, ",.0f"),
]
_PANELS = [  # mode, field, unit, title
    ("forward", "time_ms", 1, "forward, ms"),
    ("forward_backward", "time_ms", 1, "forward + backward, ms"),
    ("forward", "to_half_gemm", 1, "forward / half-GEMM at the cuBLAS rate"),
    ("forward", "peak_extra_bytes", 1e6, "forward, extra memory, MB"),
]


def write_report(out: Path, rows: list[Row], cases: list[Case]) -> None:
    """OUT.json, OUT.png if matplotlib is there, and the table on stdout."""
    results = results_of(rows, cases)
    out.with_name(out.name + ".json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is missing; python -m bench.gpu --report draws it later, on any machine")
    else:
        plot(results, out.with_name(out.name + ".png"))


def results_of(rows: list[Row], cases: list[Case]) -> dict[str, Any]:
    """What OUT.json holds: rows with what follows from them, and what was not reached."""
    cublas_rate = {  # operations a millisecond
        (row["dtype"], row["M"]): case_of(row).operations / row["time_ms"]
        for row in rows
        if row["provider"] == "cublas" and row["status"] == "ok"
    }
    finished = {case_of(row) for row in rows}
    return {
        "environment": {field: rows[-1][field] for field in (*ENVIRONMENT_FIELDS, "utc")},
        "fraction": FRACTION,
        "data": "Gaussian, independent entries, row-major; 1/64 of the columns drawn anew before each call",
        "rows": [
            {field: value for field, value in row.items() if field not in ENVIRONMENT_FIELDS}
            | _derived(row, cublas_rate.get((row["dtype"], row["M"])))
            for row in rows
        ],
        "not_reached": [case._asdict() for case in cases if case not in finished],
    }


def _derived(row: Row, cublas_rate: float | None) -> Row:
    derived: Row = dict.fromkeys(("tflops", "of_model", "to_half_gemm"))
    if row["status"] != "ok" or row["provider"] == "kernels":
        return derived
    case, time_ms, hardware = case_of(row), row["time_ms"], hardware_of(row["gpu"])
    derived["tflops"] = case.operations / time_ms / 1e9
    if hardware is not None and case.provider != "cublas":
        floor = forward_floor if case.mode == "forward" else forward_backward_floor
        k = k_from_fraction(case.N, FRACTION)
        derived["of_model"] = 1e3 * floor(hardware, case.M, case.N, k, row["dtype"]) / time_ms
    if cublas_rate is not None and case.provider != "cublas":
        derived["to_half_gemm"] = time_ms * cublas_rate / case.operations
    return derived


def table(results: dict[str, Any]) -> str:
    """Text: the environment, the cases by mode, dtype and M, the goals, and what was not reached."""
    lines = [", ".join(f"{name} {value}" for name, value in results["environment"].items())]
    lines.append(f"k = {results['fraction']:.1%} of the pairs; half-GEMM: its products at the rate of cuBLAS")
    kernels = [row for row in results["rows"] if row["provider"] == "kernels"]
    rows = [row for row in results["rows"] if row["provider"] != "kernels"]
    for group in dict.fromkeys((row["mode"], row["dtype"], row["M"]) for row in rows):
        mine = [row for row in rows if (row["mode"], row["dtype"], row["M"]) == group]
        mine.sort(key=lambda row: row["N"])  # stable: providers stay in the order of the plan
        lines.append("\n{}, {}, M = {:,}".format(*group).replace("_", " + "))
        lines.append(f"{'N':>9}  {'':<38}" + "".join(f"{title:>12}" for title, *_ in _TABLE))
        lines += [f"{row['N']:>9,}  {LABELS[row['provider']]:<38}{_cells(row)}" for row in mine]
    lines.append("")
    for row in kernels:
        times = sorted((row["kernels_ms"] or {}).items(), key=lambda item: -item[1])
        each = ", ".join(f"{name} {time_ms:.3f}" for name, time_ms in times)
        lines.append(f"{case_of(row)}, ms: {each or row['note']}")
    lines += ["goals:", *(f"  {line}" for line in goals(results))]
    if results["not_reached"]:
        lines += ["not reached:", *(f"  {Case(**case)}" for case in results["not_reached"])]
    return "\n".join(lines)


def _cells(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']:>14}  {row['note']}"
    return "".join(
        f"{'' if row[field] is None else format(row[field] / unit, spec):>12}" for _, field, unit, spec in _TABLE
    )


def goals(results: dict[str, Any]) -> list[str]:
    """The figures to reach, and what was measured."""
    rows = {case_of(row): row for row in results["rows"] if row["status"] == "ok"}

    def shown(value: float | None, spec: str) -> str:
        return "not measured" if value is None else format(value, spec)

    ours = rows.get(Case("triton", "forward", "bfloat16", 4096, 65536))
    ratio, share = (ours["to_half_gemm"], ours["peak_extra_bytes"] / (4 * 65536**2)) if ours else (None, None)
    lines = [
        f"forward, bfloat16, N = 65,536, time / half-GEMM at the cuBLAS rate: {shown(ratio, '.2f')} (1.25 or less)",
        f"forward, bfloat16, N = 65,536, extra memory / N**2 float32: {shown(share, '.2%')} (2% or less)",
    ]
    for dtype in ("bfloat16", "float32"):
        for provider, goal in (("naive_autograd", " (4 or more)"), ("naive", ""), ("chunked", " (2 or more)")):
            ours, other = (rows.get(Case(p, "forward_backward", dtype, 4096, 32768)) for p in ("triton", provider))
            speedup = other["time_ms"] / ours["time_ms"] if ours and other else None
            name = f"forward + backward, {dtype}, N = 32,768, times faster than {LABELS[provider]}"
            lines.append(f"{name}: {shown(speedup, '.1f')}{goal}")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """A row of panels for each dtype, against N at the M that most cases have; out of memory is a cross at the top."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["provider"] not in ("cublas", "kernels")]
    m = statistics.mode([row["M"] for row in rows] or [0])
    rows = [row for row in rows if row["M"] == m]
    n_values = sorted({row["N"] for row in rows})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}):
        figure = Figure(figsize=(14, 7), layout="constrained")
        for dtype, line in zip(("bfloat16", "float32"), figure.subplots(2, len(_PANELS)), strict=True):
            for axes, (mode, field, unit, title) in zip(line, _PANELS, strict=True):
                panel = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
                for number, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
                    mine = [row for row in panel if row["provider"] == provider]
                    ran = sorted((row["N"], row[field] / unit) for row in mine if row[field] is not None)
                    lost = [row["N"] for row in mine if row["status"] == "out of memory"]
                    style = {"color": f"C{number}", "markersize": 4}
                    axes.plot([n for n, _ in ran], [value for _, value in ran], "o-", label=LABELS[provider], **style)
                    axes.plot(lost, [0.98] * len(lost), "x", transform=axes.get_xaxis_transform(), **style)
                axes.set_xscale("log", base=2)
                if any(row[field] is not None for row in panel):
                    axes.set_yscale("log")
                axes.set_xticks(n_values, [f"{n:,}" for n in n_values], rotation=30)
                axes.set_title(f"{dtype}: {title}", fontsize=8, loc="left")
                axes.set_xlabel("N features")
                axes.grid(alpha=0.25)
        figure.suptitle(f"{results['environment']['gpu']}, M = {m:,}; x: out of memory", fontsize=9)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=130)
