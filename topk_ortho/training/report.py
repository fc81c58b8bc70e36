"""A finished run for readers: figures/*.png, and report.html, one file that needs nothing else.

The words of the page are in report.html.jinja, those about a metric in metric_table.py. This file draws the figures.
"""

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from topk_ortho.training.config import flatten
from topk_ortho.training.metric_table import headlines, is_number

_Row = dict[str, Any]

_BLUE, _ORANGE, _RED, _PURPLE, _GREY = "#2a6fbb", "#dd8452", "#c44e52", "#8c2d5a", "#888888"
_THOUSANDS = FuncFormatter(lambda number, _: f"{number:,.0f}")
_WIDTH = 5.6  # inches: type of 10 points is 15 pixels high where the figure is shown 600 pixels wide
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


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
    figures = {}
    for name, draw in _CHARTS.items():
        path = out_dir / "figures" / f"{name}.png"
        path.unlink(missing_ok=True)  # an earlier run in this folder may have had more to show
        with rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
            alternative_text = draw(figure, rows)
            if alternative_text:
                figure.savefig(path)
                data = base64.b64encode(path.read_bytes()).decode()
                figures[name] = {"source": f"data:image/png;base64,{data}", "alt": alternative_text}

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # any setting may be missing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "duration": _duration}
    environment.tests["number"] = is_number  # jinja's own takes NaN for one
    versions = summary.pop("versions", None) or {}
    page = environment.get_template("report.html.jinja").render(
        config=config,
        summary=summary,
        headlines=list(headlines(summary)),
        figures=figures,
        settings=_readable(config, missing="null"),
        measurements=_readable(summary, missing="not measured"),
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


def _readable(tree: dict[str, Any], *, missing: str) -> dict[str, str]:
    """Nested values as text, by their dotted names; what is null or not finite is called `missing`."""

    def as_text(value: Any) -> str:
        if isinstance(value, str):
            return value
        if is_number(value):
            return f"{value:,}"
        return missing if value is None or isinstance(value, float) else json.dumps(value)

    return {name: as_text(value) for name, value in flatten(tree).items()}


def _number(value: Any) -> str:
    """A number as it stands in a sentence: a count in full, anything else to four digits."""
    if not is_number(value):
        return "an unknown number of"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _points(rows: list[_Row], field: str) -> dict[int, float]:
    """The values of a metric by step, without those that are missing or not finite."""
    return {row["step"]: row[field] for row in rows if is_number(row.get(field))}


def _draw_lines(figure: Figure, rows: list[_Row], *, panels: list[_Panel]) -> str:
    """Draw the panels that have data, one below the other; returns the alternative text, empty if none has."""
    points = {curve.field: _points(rows, curve.field) for panel in panels for curve in panel.curves}
    panels = [panel for panel in panels if any(points[curve.field] for curve in panel.curves)]
    if not panels:
        return ""
    figure.set_size_inches(_WIDTH, 3.2 if len(panels) == 1 else 1 + 1.9 * len(panels))
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
    _label_steps(axes)
    if n_labels > 1:
        _add_legend(figure)
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
    axes.stairs(counts, edges, fill=True, color=_BLUE)
    bar = axes.bar(first - 4 * width, silent, 2 * width, color=_GREY)
    axes.bar_label(bar, [f"{silent:,}"], padding=2)
    ticks = {-6: "0.0001%", -5: "", -4: "0.01%", -3: "0.1%", -2: "1%", -1: "10%", 0: "100%"}
    axes.set_xticks([first - 4 * width, *ticks], ["never", *ticks.values()])
    axes.set_ylim(0, 1.15 * max(1, silent, *counts))  # leaves room for the label
    axes.set_xlabel("held-out tokens on which a feature fires")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(_THOUSANDS)
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
    parts = {"data_ms": ("waiting for data", _GREY), "sae_ms": ("SAE", _BLUE), "penalty_ms": ("penalty", _ORANGE)}
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
    _label_steps(axes)
    _add_legend(figure)
    means = [f"{label} {sum(part) / len(steps):.3g} ms" for label, part in zip(labels, times, strict=True)]
    return "Stacked areas of the time of a step. On average: " + ", ".join(means) + "."


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_THOUSANDS)


def _add_legend(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=3)


_CHARTS: dict[str, Callable[[Figure, list[_Row]], str]] = {
    "training": partial(_draw_lines, panels=[
        _Panel("fraction of variance unexplained", "log", [
            _Curve("fvu", _BLUE, "training batch"),
            _Curve("held_out_fvu", _ORANGE, "held-out tokens", "o-"),
        ]),
    ]),
    "sparsity": partial(_draw_lines, panels=[
        _Panel("L0, active features of a token", "linear", [
            _Curve("l0", _BLUE, "training batch"),
            _Curve("held_out_l0", _ORANGE, "held-out tokens", "o-"),
        ]),
        _Panel("dead features", "share", [_Curve("dead_fraction", _RED)]),
    ]),
    "orthogonality": partial(_draw_lines, panels=[
        _Panel("penalty, unweighted", "linear", [_Curve("penalty", _BLUE)]),
        _Panel("mean max decoder cosine", "linear", [_Curve("mean_max_decoder_cosine", _ORANGE, style="o-")]),
    ]),
    "pairs": partial(_draw_lines, panels=[
        _Panel("threshold, the k-th largest cosine", "linear", [
            _Curve("pair_threshold", _BLUE, "threshold", "o-"),
            _Curve("tau", _GREY, "tau: no pair below it counts", "--"),
        ]),
        _Panel("pairs kept since the evaluation before", "share", [_Curve("pair_jaccard", _ORANGE, style="o-")]),
    ]),
    "pair_stability": partial(_draw_lines, panels=[
        _Panel("pairs in common with those of so many steps later", "share", [
            _Curve("jaccard_lag_1", _BLUE, "1 step"),
            _Curve("jaccard_lag_10", _ORANGE, "10 steps"),
            _Curve("jaccard_lag_100", _RED, "100 steps"),
        ]),
        _Panel("of the pairs", "share", [
            _Curve("turnover", _GREY, "new in a step", "--"),
            _Curve("persistent_pairs", _PURPLE, "persistent"),
        ]),
    ]),
    "pair_relations": partial(_draw_lines, panels=[
        _Panel("what the pairs stand for", "share", [
            _Curve("parent_child", _RED, "parent and child"),
            _Curve("siblings", _ORANGE, "siblings"),
            _Curve("relatives", _PURPLE, "other relatives"),
            _Curve("unrelated", _BLUE, "unrelated"),
            _Curve("same", _GREY, "the same"),
            _Curve("unmatched", _GREY, "nothing", "--"),
        ]),
    ]),
    "densities": _draw_densities,
    "step_time": _draw_step_time,
    "ground_truth": partial(_draw_lines, panels=[
        _Panel("absorption (lower is better)", "share", [
            _Curve("absorption_rate", _RED, "absorption rate", "o-"),
            _Curve("excess_absorption", _RED, "excess absorption", "s--"),
        ]),
        _Panel("recovery (higher is better)", "linear", [
            _Curve("parent_recall", _ORANGE, "parent recall", "^-"),
            _Curve("f1", _PURPLE, "F1", "D-"),
            _Curve("mcc", _BLUE, "MCC", "o-"),
            _Curve("mcc_parent", _BLUE, "MCC, parents", "s--"),
            _Curve("mcc_child", _BLUE, "MCC, children", "v:"),
        ]),
    ]),
}  # fmt: skip
"""Functions that draw the figures of the report, by file name"""
FIGURES = tuple(_CHARTS)
"""Names of the files in figures/, without the suffix."""
