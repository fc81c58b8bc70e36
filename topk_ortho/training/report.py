"""A finished run for readers: figures/*.png, and report.html, one file that needs nothing else.

The words of the page are in report.html.jinja, those about a metric in metric_table.py, and what all reports
share in page.py. This file draws the figures.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from topk_ortho.training.metric_table import headlines, is_number
from topk_ortho.training.page import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    THOUSANDS,
    WIDTH,
    add_legend,
    label_steps,
    readable,
    render,
    save_figure,
)

_Row = dict[str, Any]


class _Curve(NamedTuple):
    """A metric over the steps of a run."""

    field: str
    color: str
    label: str = ""
    style: str = "-"


class _Panel(NamedTuple):
    """Curves that share a pair of axes."""

    title: str
    scale: Literal["linear", "log", "share"]
    curves: list[_Curve]


def write_report(out_dir: Path, summary: dict[str, Any] | None = None) -> None:
    """Write ``figures/*.png`` and ``report.html`` of a finished run.

    The page holds its figures and needs no other file and no network. What the run did not measure is left out, or
    called "not measured".

    Parameters
    ----------
    out_dir : Path
        Folder of the run, with its config.json and metrics.jsonl. Keys that are not known appear in the tables.
    summary : dict, optional
        The result of the run; without it summary.json in the folder is read.

    Raises
    ------
    FileNotFoundError
        If one of the files is missing.
    """
    config = json.loads((out_dir / "config.json").read_text("utf-8"))
    summary = dict(summary or json.loads((out_dir / "summary.json").read_text("utf-8")))
    rows = _read_rows(out_dir / "metrics.jsonl", penalised=(config.get("penalty") or {}).get("target") != "none")
    if (out_dir / "pairs.jsonl").is_file():
        rows += _read_rows(out_dir / "pairs.jsonl", penalised=True)  # of windows, under names of their own
    (out_dir / "figures").mkdir(exist_ok=True)
    images = {}
    for name, draw in _CHARTS.items():
        path = out_dir / "figures" / f"{name}.png"
        path.unlink(missing_ok=True)  # an earlier run in this folder may have had more to show
        images[name] = save_figure(partial(draw, rows=rows), path)
    versions = summary.pop("versions", None) or {}
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        config=config,
        summary=summary,
        headlines=list(headlines(summary)),
        figures={name: image for name, image in images.items() if image},
        settings=readable(config, missing="null"),
        measurements=readable(summary, missing="not measured"),
        versions=versions,
    )
    (out_dir / "report.html").write_text(page, "utf-8")


def _read_rows(path: Path, *, penalised: bool) -> list[_Row]:
    """The lines of metrics.jsonl, or of pairs.jsonl, by ascending step; if a step stands there twice, its last line."""
    rows = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if not is_number(row.get("step")):
            continue
        if is_number(row.get("explained_variance")):
            row["held_out_fvu"] = 1 - row["explained_variance"]
        if not penalised:
            row |= dict.fromkeys(("penalty", "penalty_ms"))  # the zeros of a penalty that is off say nothing
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _points(rows: list[_Row], field: str) -> dict[int, float]:
    """The values of a metric by step, without those that are missing or not finite."""
    return {row["step"]: row[field] for row in rows if is_number(row.get(field))}


def _draw_lines(figure: Figure, rows: list[_Row], *, panels: list[_Panel]) -> str:
    """Draw the panels that have data, one below the other; returns the alternative text, empty if none has."""
    points = {curve.field: _points(rows, curve.field) for panel in panels for curve in panel.curves}
    panels = [panel for panel in panels if any(points[curve.field] for curve in panel.curves)]
    if not panels:
        return ""
    figure.set_size_inches(WIDTH, 3.2 if len(panels) == 1 else 1 + 1.9 * len(panels))
    sentences, n_labels = [], 0
    for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        curves = [curve for curve in panel.curves if points[curve.field]]
        for curve in curves:
            x, y = zip(*points[curve.field].items(), strict=True)
            style = curve.style if len(x) > 1 else "o"  # one point makes no line
            axes.plot(x, y, style, color=curve.color, label=curve.label or None, markersize=4)
            name = f"{panel.title}, {curve.label}" if curve.label else panel.title
            sentences.append(f"{name}: from {y[0]:.3g} at step {x[0]:,} to {y[-1]:.3g} at step {x[-1]:,}.")
            n_labels += bool(curve.label)
        axes.set_title(panel.title)
        _scale(axes, panel.scale, [value for curve in curves for value in points[curve.field].values()])
    label_steps(axes)
    if n_labels > 1:
        add_legend(figure)
    return "Line chart. " + " ".join(sentences)


def _scale(axes: Axes, scale: Literal["linear", "log", "share"], values: list[float]) -> None:
    """Choose limits and ticks of the vertical axis for the values that it shows."""
    if scale == "log" and min(values) > 0:
        axes.set_yscale("log")
        # within a decade a logarithmic axis may have no tick of its own
        is_narrow = max(values) < 10 * min(values)
        axes.yaxis.set_major_locator(AutoLocator() if is_narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif scale == "share":
        axes.set_ylim(1.05 * min(0, *values), max(0.01, 1.08 * max(values)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_densities(figure: Figure, rows: list[_Row]) -> str:
    """Draw the last histogram that there is; returns the alternative text, empty if there is none."""
    histogram = next((row["density_histogram"] for row in reversed(rows) if row.get("density_histogram")), None)
    if histogram is None:
        return ""
    edges, counts, silent = histogram["log10_edges"], histogram["counts"], histogram["silent"]
    first, width = edges[0], edges[1] - edges[0]
    axes = figure.subplots()
    axes.set_title("features")
    axes.stairs(counts, edges, fill=True, color=BLUE)
    bar = axes.bar(first - 4 * width, silent, 2 * width, color=GREY)
    axes.bar_label(bar, [f"{silent:,}"], padding=2)
    ticks = {-6: "0.0001%", -5: "", -4: "0.01%", -3: "0.1%", -2: "1%", -1: "10%", 0: "100%"}
    axes.set_xticks([first - 4 * width, *ticks], ["never", *ticks.values()])
    axes.set_ylim(0, 1.15 * max(1, silent, *counts))  # leaves room for the label
    axes.set_xlabel("held-out tokens on which a feature fires")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.grid(False, axis="x")
    peak = max(range(len(counts)), key=counts.__getitem__)
    return (
        f"Histogram of {sum(counts) + silent:,} features by how often they fire: {silent:,} never; the tallest bar "
        f"holds {counts[peak]:,}, between {10 ** edges[peak]:.2g} and {10 ** edges[peak + 1]:.2g} of the tokens."
    )


def _draw_step_time(figure: Figure, rows: list[_Row]) -> str:
    """Draw the parts of a step's time, stacked; returns the alternative text, empty if there are no times.

    A row holds the means of the steps since the row before.
    """
    parts = {"data_ms": ("waiting for data", GREY), "sae_ms": ("SAE", BLUE), "penalty_ms": ("penalty", ORANGE)}
    points = {field: _points(rows, field) for field in parts}
    points = {field: values for field, values in points.items() if any(values.values())}
    steps = sorted({step for values in points.values() for step in values})
    if not steps:
        return ""
    labels, colors = zip(*(parts[field] for field in points), strict=True)
    times = [[values.get(step, 0.0) for step in steps] for values in points.values()]
    axes = figure.subplots()
    axes.set_title("milliseconds a step")
    # a step before the first, as every value fills the interval that ends at its step
    axes.stackplot([0, *steps], [[part[0], *part] for part in times], labels=labels, colors=colors, step="pre")
    axes.set_ylim(0, 1.08 * max(map(sum, zip(*times, strict=True))))
    axes.margins(x=0)
    label_steps(axes)
    add_legend(figure)
    means = [f"{label} {sum(part) / len(steps):.3g} ms" for label, part in zip(labels, times, strict=True)]
    return "Stacked areas of the time of a step. On average: " + ", ".join(means) + "."


_CHARTS: dict[str, Callable[..., str]] = {
    "training": partial(_draw_lines, panels=[
        _Panel("fraction of variance unexplained", "log", [
            _Curve("fvu", BLUE, "training batch"),
            _Curve("held_out_fvu", ORANGE, "held-out tokens", "o-"),
        ]),
    ]),
    "sparsity": partial(_draw_lines, panels=[
        _Panel("L0, active features of a token", "linear", [
            _Curve("l0", BLUE, "training batch"),
            _Curve("held_out_l0", ORANGE, "held-out tokens", "o-"),
        ]),
        _Panel("dead features", "share", [_Curve("dead_fraction", RED)]),
    ]),
    "orthogonality": partial(_draw_lines, panels=[
        _Panel("penalty, unweighted", "linear", [_Curve("penalty", BLUE)]),
        _Panel("mean max decoder cosine", "linear", [_Curve("mean_max_decoder_cosine", ORANGE, style="o-")]),
    ]),
    "pairs": partial(_draw_lines, panels=[
        _Panel("threshold, the k-th largest cosine", "linear", [
            _Curve("pair_threshold", BLUE, "threshold", "o-"),
            _Curve("tau", GREY, "tau: no pair below it counts", "--"),
        ]),
        _Panel("pairs kept since the evaluation before", "share", [_Curve("pair_jaccard", ORANGE, style="o-")]),
    ]),
    "pair_stability": partial(_draw_lines, panels=[
        _Panel("pairs in common with those of so many steps later", "share", [
            _Curve("jaccard_lag_1", BLUE, "1 step"),
            _Curve("jaccard_lag_10", ORANGE, "10 steps"),
            _Curve("jaccard_lag_100", RED, "100 steps"),
        ]),
        _Panel("of the pairs", "share", [
            _Curve("turnover", GREY, "new in a step", "--"),
            _Curve("persistent_pairs", PURPLE, "persistent"),
        ]),
    ]),
    "pair_relations": partial(_draw_lines, panels=[
        _Panel("what the pairs stand for", "share", [
            _Curve("parent_child", RED, "parent and child"),
            _Curve("siblings", ORANGE, "siblings"),
            _Curve("relatives", PURPLE, "other relatives"),
            _Curve("unrelated", BLUE, "unrelated"),
            _Curve("same", GREY, "the same"),
            _Curve("unmatched", GREY, "nothing", "--"),
        ]),
    ]),
    "densities": _draw_densities,
    "step_time": _draw_step_time,
    "ground_truth": partial(_draw_lines, panels=[
        _Panel("absorption (lower is better)", "share", [
            _Curve("absorption_rate", RED, "absorption rate", "o-"),
            _Curve("excess_absorption", RED, "excess absorption", "s--"),
        ]),
        _Panel("recovery (higher is better)", "linear", [
            _Curve("parent_recall", ORANGE, "parent recall", "^-"),
            _Curve("f1", PURPLE, "F1", "D-"),
            _Curve("mcc", BLUE, "MCC", "o-"),
            _Curve("mcc_parent", BLUE, "MCC, parents", "s--"),
            _Curve("mcc_child", BLUE, "MCC, children", "v:"),
        ]),
    ]),
}  # fmt: skip
"""Functions that draw the figures of the report, by file name"""
FIGURES = tuple(_CHARTS)
"""Names of the files in figures/, without the suffix."""
