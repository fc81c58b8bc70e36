"""A finished run for readers: figures/*.png, and report.html, one file that needs nothing else.

The words are in report.html.jinja, but for those that stand beside a number or a figure: these are in the tables of
metric_table.py, and of this file.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from topk_ortho.training.config import flatten
from topk_ortho.training.metric_table import headlines, is_number

_Row = dict[str, Any]
_Draw = Callable[[Figure, list[_Row]], str]

_BLUE, _ORANGE, _RED, _PURPLE, _GREY = "#2a6fbb", "#dd8452", "#c44e52", "#8c2d5a", "#888888"
_WIDTH = 5.6  # inches: type of 10 points is 15 pixels high where the figure is shown 600 pixels wide
_DPI = 200


class _Curve(NamedTuple):
    field: str
    color: str
    label: str = ""
    style: str = "-"


class _Panel(NamedTuple):
    title: str
    scale: Literal["linear", "log", "share"]
    curves: Sequence[_Curve]


class _Chart(NamedTuple):
    name: str
    title: str
    caption: str
    draw: _Draw
    """Returns the alternative text; empty if there is nothing to draw."""


def write_report(out_dir: Path) -> None:
    """Write ``figures/*.png`` and ``report.html`` of a finished run.

    The page holds its figures and needs no other file and no network. What the run did not measure is left out, or
    called "not measured".

    Parameters
    ----------
    out_dir : Path
        Folder of the run, with its config.json, metrics.jsonl and summary.json. Keys that are not known appear in the
        tables.

    Raises
    ------
    FileNotFoundError
        If one of the three files is missing.
    """
    config, summary = (json.loads((out_dir / name).read_text("utf-8")) for name in ("config.json", "summary.json"))
    rows = _read_rows(out_dir / "metrics.jsonl", penalised=(config.get("penalty") or {}).get("target") != "none")
    (out_dir / "figures").mkdir(exist_ok=True)
    figures = []
    for chart in _CHARTS:
        path = out_dir / "figures" / f"{chart.name}.png"
        path.unlink(missing_ok=True)  # an earlier run here may have had more to show
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        alt = chart.draw(figure, rows)
        if alt:
            path.write_bytes(_png(figure))
            source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            figures.append({"source": source, "alt": alt, "title": chart.title, "caption": chart.caption})

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # any setting may be missing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "duration": _duration}
    versions = summary.pop("versions", None) or {}
    page = environment.get_template("report.html.jinja").render(
        config=config,
        summary=summary,
        headlines=list(headlines(summary)),
        figures=figures,
        settings=_readable(config),
        measurements=_readable(summary),
        versions=versions,
    )
    (out_dir / "report.html").write_text(page, "utf-8")


def _read_rows(path: Path, *, penalised: bool) -> list[_Row]:
    """Lines in order of their step, of which the last counts if a run was resumed before it."""
    rows = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row.get("explained_variance") is not None:
            row["held_out_fvu"] = 1 - row["explained_variance"]
        if not penalised:
            row |= dict.fromkeys(("penalty", "penalty_ms"))  # zeros that say nothing
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _readable(tree: dict[str, Any]) -> dict[str, str]:
    """Dotted names of nested values, and the values as text."""
    return {
        name: value if isinstance(value, str) else f"{value:,}" if is_number(value) else json.dumps(value)
        for name, value in flatten(tree).items()
    }


def _number(value: Any) -> str:
    """For a sentence: a count in full, anything else to four digits."""
    if not is_number(value):
        return "an unknown number of"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)


def _style_steps(axes: Axes) -> None:
    axes.set_xlabel("training step", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _legend(figure: Figure, artists: Mapping[str, Artist]) -> None:
    figure.legend(
        list(artists.values()), list(artists), loc="outside lower center", ncols=3, frameon=False, fontsize=10
    )


def _points(rows: list[_Row], field: str, *, positive: bool = False) -> list[tuple[float, float]]:
    """(step, value) where there is one."""
    points = [(row["step"], row[field]) for row in rows if is_number(row.get(field))]
    return [(step, value) for step, value in points if value > 0 or not positive]


def _lines(*panels: _Panel) -> _Draw:
    return partial(_draw_lines, panels)


def _draw_lines(panels: Sequence[_Panel], figure: Figure, rows: list[_Row]) -> str:
    """Panels with data, one below the other."""
    points = {c.field: _points(rows, c.field, positive=p.scale == "log") for p in panels for c in p.curves}
    panels = [panel for panel in panels if any(points[curve.field] for curve in panel.curves)]
    if not panels:
        return ""
    figure.set_size_inches(_WIDTH, 3.2 if len(panels) == 1 else 1 + 1.9 * len(panels))
    lines: dict[str, Line2D] = {}
    descriptions = []
    for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for curve in panel.curves:
            if points[curve.field]:
                x, y = zip(*points[curve.field], strict=True)
                style = curve.style if len(x) > 1 else "o"  # one point makes no line
                (line,) = axes.plot(x, y, style, color=curve.color, markersize=4)
                lines.setdefault(curve.label, line)
                name = f"{panel.title}, {curve.label}" if curve.label else panel.title
                descriptions.append(f"{name}: from {y[0]:.3g} at step {x[0]:,} to {y[-1]:.3g} at step {x[-1]:,}.")
        _style(axes, panel.title)
        _scale(axes, panel, [value for curve in panel.curves for _, value in points[curve.field]])
    _style_steps(axes)
    lines.pop("", None)
    if len(lines) > 1:
        _legend(figure, lines)
    return "Line chart. " + " ".join(descriptions)


def _scale(axes: Axes, panel: _Panel, values: list[float]) -> None:
    if panel.scale == "log":
        axes.set_yscale("log")
        # within a decade a logarithmic axis may have no tick of its own
        narrow = max(values) < 10 * min(values)
        axes.yaxis.set_major_locator(AutoLocator() if narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif panel.scale == "share":
        axes.set_ylim(1.05 * min(0, *values), max(0.01, 1.08 * max(values)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_densities(figure: Figure, rows: list[_Row]) -> str:
    """The last histogram that there is."""
    histogram = next((row["density_histogram"] for row in reversed(rows) if row.get("density_histogram")), None)
    if histogram is None:
        return ""
    edges, counts, silent = histogram["log10_edges"], histogram["counts"], histogram["silent"]
    first, width = edges[0], edges[1] - edges[0]
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=_BLUE)
    bar = axes.bar(first - 4 * width, silent, 2 * width, color=_GREY)
    axes.bar_label(bar, [f"{silent:,}"], fontsize=10, padding=2)
    ticks = {-6: "0.0001%", -5: "", -4: "0.01%", -3: "0.1%", -2: "1%", -1: "10%", 0: "100%"}
    axes.set_xticks([first - 4 * width, *ticks], ["never", *ticks.values()])
    axes.set_ylim(0, 1.15 * max(1, silent, *counts))  # room for the label
    axes.set_xlabel("held-out tokens on which a feature fires", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    _style(axes, "features")
    axes.grid(False, axis="x")
    peak = max(range(len(counts)), key=counts.__getitem__)
    return (
        f"Histogram of {sum(counts) + silent:,} features by how often they fire: {silent:,} never; the tallest bar "
        f"holds {counts[peak]:,}, between {10 ** edges[peak]:.2g} and {10 ** edges[peak + 1]:.2g} of the tokens."
    )


def _draw_step_time(figure: Figure, rows: list[_Row]) -> str:
    """Each line of the metrics as the mean of the steps since the line before."""
    parts = {"data_ms": ("waiting for data", _GREY), "sae_ms": ("SAE", _BLUE), "penalty_ms": ("penalty", _ORANGE)}
    rows = [row for row in rows if any(is_number(row.get(field)) for field in parts)]
    if not rows:
        return ""
    times = {field: [row[field] if is_number(row.get(field)) else 0.0 for row in rows] for field in parts}
    axes = figure.subplots()
    edges = [0, *(row["step"] for row in rows)]
    base = [0.0] * len(rows)
    areas, means = {}, []
    for field, (label, color) in parts.items():
        if any(times[field]):
            top = [a + b for a, b in zip(base, times[field], strict=True)]
            areas[label] = axes.stairs(top, edges, baseline=base, fill=True, color=color)
            base = top
            means.append(f"{label} {sum(times[field]) / len(rows):.3g} ms")
    axes.set_ylim(0, 1.08 * max(base))
    axes.margins(x=0)
    _style(axes, "milliseconds a step")
    _style_steps(axes)
    _legend(figure, areas)
    return "Stacked areas of the time of a step. On average: " + ", ".join(means) + "."


_CHARTS = [
    _Chart(
        "training", "Reconstruction error",
        "The fraction of the activations' variance that the reconstruction misses; lower is better. Held-out tokens "
        "are never trained on: if their curve turned up while the other fell, the dictionary would be learning its "
        "training tokens by heart.",
        _lines(
            _Panel("fraction of variance unexplained", "log", [
                _Curve("fvu", _BLUE, "training batch"),
                _Curve("held_out_fvu", _ORANGE, "held-out tokens", "o-"),
            ]),
        ),
    ),
    _Chart(
        "sparsity", "Sparsity and dead features",
        "Above, how many features are active on a token; it should settle. Below, the share of features that have "
        "stopped firing; it should stay near 0.",
        _lines(
            _Panel("L0, active features of a token", "linear", [
                _Curve("l0", _BLUE, "training batch"),
                _Curve("held_out_l0", _ORANGE, "held-out tokens", "o-"),
            ]),
            _Panel("dead features", "share", [_Curve("dead_fraction", _RED)]),
        ),
    ),
    _Chart(
        "orthogonality", "Similarity of features",
        "The penalty, before its weight, and the cosine of a feature's direction to its nearest neighbour's, on "
        "average. Both may rise while features take shape; a penalty that is at work then holds or lowers them.",
        _lines(
            _Panel("penalty, unweighted", "linear", [_Curve("penalty", _BLUE)]),
            _Panel("mean max decoder cosine", "linear", [_Curve("mean_max_decoder_cosine", _ORANGE, style="o-")]),
        ),
    ),
    _Chart(
        "pairs", "Penalised pairs",
        "Above, the cosine of the least similar pair that is still penalised: it falls as similar pairs are pushed "
        "apart. Below, how many pairs stayed the same since the evaluation before: near 100% the penalty works on a "
        "fixed set, near 0% on ever new pairs.",
        _lines(
            _Panel("threshold, the k-th largest cosine", "linear", [
                _Curve("pair_threshold", _BLUE, "threshold", "o-"),
                _Curve("tau", _GREY, "tau: no pair below it counts", "--"),
            ]),
            _Panel("pairs kept since the evaluation before", "share", [_Curve("pair_jaccard", _ORANGE, style="o-")]),
        ),
    ),
    _Chart(
        "densities", "How often features fire",
        "Features by the share of held-out tokens on which they fire, at the last evaluation. Far right: active nearly "
        "always, and hard to interpret. Far left: rare. The grey bar: on no held-out token.",
        _draw_densities,
    ),
    _Chart(
        "step_time", "Where the time goes",
        "Mean time of a step, stacked. Much grey means that the SAE waits for its data; orange is what the penalty "
        "costs.",
        _draw_step_time,
    ),
    _Chart(
        "ground_truth", "Against the known features",
        "The true features of synthetic data are known. Absorption, above, should fall; how well the features are "
        "recovered, below, should rise towards 1.",
        _lines(
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
        ),
    ),
]  # fmt: skip
