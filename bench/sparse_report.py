"""Figure and README table of the sparse benchmarks: python -m bench.sparse_report bench/results/sparse."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import machine_line, write_into_readme

_BLUE, _LIGHT, _GREY, _RED = "#2a6fbb", "#7fb2e5", "#888888", "#c44e52"
_SERIES = {
    ("sparse", "forward_backward"): ("loss, forward + backward", _BLUE, "-"),
    ("sparse", "forward"): ("loss, forward", _LIGHT, "-"),
    ("sparse", "pairs_fixed_k"): ("pairs listed, k fixed", _BLUE, "--"),
    ("sparse", "pairs"): ("pairs listed, k = 0.1%", _BLUE, ":"),
    ("scipy", "pairs_fixed_k"): ("scipy, k fixed", _GREY, "--"),
    ("scipy", "pairs"): ("scipy, k = 0.1%", _GREY, ":"),
    ("dense", "forward"): ("dense route, forward", _RED, "-"),
    ("dense", "forward_backward"): ("dense route, forward + backward", "#8c2d5a", "-"),
}
Rows = list[dict[str, Any]]


def write_report(out: Path, *, into_readme: bool = True) -> None:
    """OUT.json to OUT.png, and into the README."""
    results = json.loads(out.with_suffix(".json").read_text())
    plot(results, out.with_suffix(".png"))
    if into_readme:
        write_into_readme("sparse-bench", table(results))


def density_sweep(rows: Rows, n_features: int) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of the dense route, which are the same at every density; and (density, seconds) of the sparse one."""
    mine = [row for row in rows if row["sweep"] == "density" and row["N"] == n_features and row["mode"] == "forward"]
    (dense,) = (row["time_s"] for row in mine if row["provider"] == "dense")
    return dense, sorted((row["L0"] / n_features, row["time_s"]) for row in mine if row["provider"] != "dense")


def crossover(rows: Rows, n_features: int) -> float | None:
    """Density at which both take equally long, between two that were measured; None if there is none."""
    dense, points = density_sweep(rows, n_features)
    for (density, time), (next_density, next_time) in itertools.pairwise(points):
        if time <= dense < next_time:
            share = math.log(dense / time) / math.log(next_time / time)
            return float(density * (next_density / density) ** share)
    return None


def table(results: dict[str, Any]) -> str:
    """Markdown: one row for every N of the first sweep, then the crossover."""
    rows = [row for row in results["rows"] if row["sweep"] == "N"]
    cells = {(row["N"], row["provider"], row["mode"]): row for row in rows}
    columns = [
        ("sparse", "forward"), ("sparse", "forward_backward"), ("sparse", "pairs_fixed_k"), ("scipy", "pairs_fixed_k"),
        ("sparse", "pairs"), ("scipy", "pairs"), ("dense", "forward_backward"),
    ]  # fmt: skip
    lines = [
        "| N | " + " | ".join(_SERIES[column][0] for column in columns) + " |",
        "|--:|" + "--:|" * len(columns),
    ]
    sizes = sorted({row["N"] for row in rows})
    lines += [f"| {n:,} | " + " | ".join(_cell(cells.get((n, *column))) for column in columns) + " |" for n in sizes]
    first, last = sizes[0], sizes[-1]
    ratio = cells[last, "sparse", "forward_backward"]["time_s"] / cells[first, "sparse", "forward_backward"]["time_s"]
    crossings = [
        f"{density:.1%} at N = {n:,}"
        for n in sorted({row["N"] for row in results["rows"] if row["sweep"] == "density"})
        if (density := crossover(results["rows"], n)) is not None
    ]
    lines.append(
        f"\n{rows[0]['rows']:,} rows of {rows[0]['L0']} active features, {results['dtype']}; k is 0.1% of the pairs "
        f"or, where it is fixed, {results['fixed_k']:,}. Median time and peak extra memory. Loss and gradient at N = "
        f"{last:,} take {ratio:.2f} times as long as at N = {first:,}. For a dense x of 1,024 rows the two routes take "
        f"equal time at a density of {', '.join(crossings)}. {machine_line(results['environment'])}\n"
    )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory against N, time against L0, and against the density of a dense x."""
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    by_n, memory, by_l0, by_density = figure.subplots(1, 4)
    sweep = {name: [row for row in results["rows"] if row["sweep"] == name] for name in ("N", "L0", "density")}
    _curves(by_n, sweep["N"], "N", "time_s", "time against N, seconds")
    _curves(memory, sweep["N"], "N", "peak_extra_bytes", "peak extra memory, MB")
    _curves(by_l0, sweep["L0"], "L0", "time_s", "time against L0, seconds")
    by_n.set_xlabel("N features, L0 = 64")
    memory.set_xlabel("N features, L0 = 64")
    by_l0.set_xlabel("L0 of 4,096 rows, N = 65,536")
    for n, color in ((16384, _BLUE), (4096, _LIGHT)):
        _density(by_density, sweep["density"], n, color)
    by_density.set_title("dense x, 1,024 rows: forward, seconds", fontsize=9, loc="left")
    by_density.set_xlabel('density (dots: what "auto" does)')
    by_density.set_xscale("log", base=2)
    densities = sorted({row["L0"] / row["N"] for row in sweep["density"] if row["provider"] != "dense"})
    by_density.set_xticks(densities, [f"{density:.1%}" for density in densities])
    by_density.legend(fontsize=7, frameon=False, loc="upper left")
    for axes in (by_n, memory, by_l0, by_density):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.25)
    by_density.set_ylim(top=8 * by_density.get_ylim()[1])  # room for the legend
    curves = {curve.get_label(): curve for axes in (by_n, by_l0) for curve in axes.get_lines()}
    figure.legend(curves.values(), curves.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _curves(axes: Axes, rows: Rows, field: str, value: str, title: str) -> None:
    for (provider, mode), (label, color, style) in _SERIES.items():
        mine = [row for row in rows if (row["provider"], row["mode"]) == (provider, mode)]
        scale = 1e6 if value == "peak_extra_bytes" else 1
        if mine:
            points = ([row[field] for row in mine], [row[value] / scale for row in mine])
            axes.plot(*points, style, marker="o", markersize=4, color=color, label=label)
    values = sorted({row[field] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{v:,}" for v in values], rotation=30)
    axes.set_title(title, fontsize=9, loc="left")


def _density(axes: Axes, rows: Rows, n: int, color: str) -> None:
    """The sparse route's curve, the dense route's level, where they cross, and the choice of "auto"."""
    dense, forced = density_sweep(rows, n)
    axes.plot(*zip(*forced, strict=True), "-", color=color, label=f"sparse route, N = {n:,}")
    axes.axhline(dense, color=color, linestyle="--", linewidth=1, label=f"dense route, N = {n:,}")
    for row in rows:
        if row["N"] == n and row["mode"] == "auto":
            axes.plot(row["L0"] / n, row["time_s"], "o", color=color, markersize=4)
    density = crossover(rows, n)
    if density is not None:
        axes.annotate(
            f"{density:.1%}", (density, dense), xytext=(3, -11), textcoords="offset points", color=color, fontsize=8
        )


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['time_s']:.2f} s, {row['peak_extra_bytes'] / 1e6:,.0f} MB"


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
