"""Figure and README table from a result file: python -m bench.report bench/results/cpu."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_README = Path(__file__).resolve().parent.parent / "README.md"
_LABELS = {
    "naive": "matmul + torch.topk",
    "naive_autograd": "the same, autograd through the matrix",
    "chunked": "row blocks, merged torch.topk",
    "streamed": "topk_ortho",
    "half_gemm": "the products alone",
}
_COLORS = {
    "naive": "#c44e52",
    "naive_autograd": "#8c2d5a",
    "chunked": "#dd8452",
    "streamed": "#2a6fbb",
    "half_gemm": "#888888",
}


def write_report(out: Path) -> None:
    """OUT.json to OUT.png, and into the README."""
    results = json.loads(out.with_suffix(".json").read_text())
    plot(results, out.with_suffix(".png"))
    write_into_readme("bench", table(results))


def write_into_readme(name: str, table: str) -> None:
    """Replace what stands between the markers of a name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = _README.read_text().split(begin)
    _README.write_text(before + begin + table + end + rest.split(end)[1])


def table(results: dict[str, Any]) -> str:
    """Markdown: one row for every N and mode, with time and peak memory of every provider, and ratios."""
    cells = {(row["N"], row["mode"], row["provider"]): row for row in results["rows"]}
    providers = ["streamed", "half_gemm", "chunked", "naive", "naive_autograd"]
    lines = [
        "| N | pass | "
        + " | ".join(f"{_LABELS[p]}" for p in providers)
        + " | time / products | faster than naive / autograd | memory / naive |",
        "|--:|---|" + "--:|" * (len(providers) + 3),
    ]
    for n, mode in dict.fromkeys(key[:2] for key in cells):
        row = {p: cells.get((n, mode, p)) for p in providers}
        slowdown = speedup = share = ""
        ours, naive = cells[n, mode, "streamed"], cells[n, mode, "naive"]
        if row["half_gemm"] is not None:
            slowdown = f"{ours['time_s'] / row['half_gemm']['time_s']:.2f}"
        if naive["peak_extra_bytes"] is not None:
            speedup = f"{naive['time_s'] / ours['time_s']:.1f} x"
            if row["naive_autograd"] is not None and row["naive_autograd"]["peak_extra_bytes"] is not None:
                speedup += f" / {row['naive_autograd']['time_s'] / ours['time_s']:.1f} x"
            share = f"{ours['peak_extra_bytes'] / naive['peak_extra_bytes']:.2%}"
        pass_name = "forward" if mode == "forward" else "forward + backward"
        lines.append(
            f"| {n:,} | {pass_name} | "
            + " | ".join(map(_cell, row.values()))
            + f" | {slowdown} | {speedup} | {share} |"
        )
    machine = results["environment"]
    rows = {row["M"] for row in results["rows"]}
    lines.append(
        "\nMedian time, and peak memory beyond x; forward + backward holds a gradient as large as x. "
        f"M = {rows.pop():,}, {results['dtype']}, k = {results['fraction']:.1%} of the pairs. {machine_line(machine)}\n"
    )
    return "\n".join(lines)


def machine_line(machine: dict[str, Any]) -> str:
    """What the figures depend on, in a sentence."""
    return (
        f"{machine['cores']} cores of {machine['cpu']} ({machine['capability']}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['utc']} UTC."
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory against N, forward and forward + backward; what ran out of memory is a cross at the top."""
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = [("forward", "time_s", "forward, seconds"), ("forward_backward", "time_s", "forward + backward, seconds")]
    panels.append(("forward", "peak_extra_bytes", "forward, peak extra memory, MB"))
    for axes, (mode, field, title) in zip(figure.subplots(1, 3), panels, strict=True):
        scale = 1e6 if field == "peak_extra_bytes" else 1
        rows = [row for row in results["rows"] if row["mode"] == mode]
        for provider, label in _LABELS.items():
            mine = [row for row in rows if row["provider"] == provider]
            ran = [row for row in mine if row["peak_extra_bytes"] is not None]
            if ran:
                x, y = [row["N"] for row in ran], [row[field] / scale for row in ran]
                axes.plot(x, y, marker="o", markersize=4, color=_COLORS[provider], label=label)
            for row in mine:
                if row["peak_extra_bytes"] is None:
                    axes.plot(row["N"], 0.97, "x", color=_COLORS[provider], transform=axes.get_xaxis_transform())
                    axes.annotate(
                        "out of memory", (row["N"], 0.97), xycoords=axes.get_xaxis_transform(), xytext=(-6, 0),
                        textcoords="offset points", ha="right", va="center", fontsize=8, color=_COLORS[provider],
                    )  # fmt: skip
        n_values = sorted({row["N"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the crosses
        axes.set_xticks(n_values, [f"{n:,}" for n in n_values], rotation=30)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("N features")
        axes.grid(alpha=0.25)
    curves = {
        curve.get_label(): curve for axes in figure.axes[:2] for curve in axes.get_lines() if curve.get_marker() == "o"
    }
    figure.legend(
        [curves[label] for label in _LABELS.values()],
        _LABELS.values(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=150)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["peak_extra_bytes"] is None:
        return "out of memory"
    digits = 3 if row["time_s"] < 0.1 else 2 if row["time_s"] < 10 else 1
    return f"{row['time_s']:.{digits}f} s, {row['peak_extra_bytes'] / 1e6:,.0f} MB"


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
