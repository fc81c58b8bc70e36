"""The figures of a study, each drawn from its means and intervals over seeds."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from topk_ortho.evaluation.stability import LAGS
from topk_ortho.study.plan import Curve, FigureSpec, Front, Heatmap, Lags, Point, Steps, Study
from topk_ortho.study.results import mean_interval, metric_of, shown
from topk_ortho.training.metric_table import is_number
from topk_ortho.training.page import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    WIDTH,
    Image,
    add_legend,
    label_steps,
    save_figure,
)

_COLORS = (BLUE, ORANGE, RED, PURPLE, "#55a868", "#937860", "#64b5cd", "#b8a03a", "#d977b0", "#3d3d5c")
_MARKERS = "osD^vP*X<"  # one fewer than colors, so that 90 lines differ
_Styles = dict[str, dict[str, Any]]


def draw_figures(study: Study, summary: pd.DataFrame, folder: Path) -> list[Image | None]:
    """Draw the figures that a study asks for as ``folder/NUMBER-KIND.png`` and ``.svg``; None where there are no data.

    Figures that an earlier call left in the folder are removed.
    """
    folder.mkdir(exist_ok=True)
    for path in [*folder.glob("[0-9]*-*.png"), *folder.glob("[0-9]*-*.svg")]:
        path.unlink()
    images = []
    for number, spec in enumerate(study.figures, start=1):
        points = [p for p in study.points if not spec.variants or p.variant in spec.variants]
        paths = [folder / f"{number}-{spec.kind}.{suffix}" for suffix in ("png", "svg")]
        images.append(save_figure(partial(_draw, spec=spec, study=study, points=points, summary=summary), *paths))
    return images


def over_steps(folder: Path, metric: str) -> dict[int, float]:
    """The values of a metric in the metrics.jsonl of a run, by step; of a metric of pairs, those in its pairs.jsonl."""
    group, _, name = metric.rpartition(".")
    path = folder / ("pairs.jsonl" if group in ("pair_stability", "pair_relations") else "metrics.jsonl")
    if not path.is_file():  # the run has noted no pairs
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {row["step"]: row[name] for row in rows if is_number(row.get(name))}


def draw_steps(figure: Figure, runs: dict[str, list[Path]], metric: str, baseline: str = "") -> str:
    """Draw a metric over the training steps, a line for each group of runs; returns the alternative text.

    Parameters
    ----------
    figure : Figure
        The figure, empty.
    runs : dict of str to list of Path
        Folders of finished runs, by the label of their line. Of several runs the mean is drawn, with its 95% interval
        as a band.
    metric : str
        Its name among the metrics, such as ``fvu`` or ``pair_stability.turnover``.
    baseline : str
        Label of the line that others are compared with, which is grey.
    """
    axes, sentences = figure.subplots(), []
    everything: list[float] = []
    styles = _styles(list(runs), baseline)
    for label, folders in runs.items():
        frame = pd.DataFrame([over_steps(folder, metric) for folder in folders]).sort_index(axis="columns")
        frame = frame.dropna(axis="columns")  # a mean over fewer seeds than before would jump
        if frame.empty:
            continue
        steps = [int(step) for step in frame.columns]
        means, low, high = zip(*(mean_interval(frame[step].tolist()) for step in steps), strict=True)
        axes.plot(steps, means, color=styles[label]["color"], label=label, marker="" if len(steps) > 1 else "o")
        axes.fill_between(steps, low, high, color=styles[label]["color"], alpha=0.15, linewidth=0)
        first, last = shown(metric, means[0]), shown(metric, means[-1])
        sentences.append(f"{label}: from {first} at step {steps[0]:,} to {last} at step {steps[-1]:,}.")
        everything += means
    if not everything:
        return ""
    if not _is_share(metric) and min(everything) > 0 and max(everything) > 10 * min(everything):
        axes.set_yscale("log")
    _format(axes.yaxis, metric)
    axes.set_title(_title(metric))
    label_steps(axes)
    _add_legend(figure)
    return f"Line chart of {metric_of(metric).title} over the training steps. " + " ".join(sentences)


def _draw(figure: Figure, *, spec: FigureSpec, study: Study, points: list[Point], summary: pd.DataFrame) -> str:
    """Draw a figure; returns the alternative text, empty if its metrics were not measured."""
    points = [point for point in points if point.label in set(summary.get("point", ()))]
    match spec:
        case Front():
            return _draw_front(figure, spec, study.baseline, points, summary)
        case Curve():
            return _draw_curve(figure, spec, study.baseline, points, summary)
        case Heatmap():
            return _draw_heatmap(figure, spec, points, summary)
        case Lags():
            return _draw_lags(figure, study.baseline, points, summary)
        case Steps():
            finished = {p.label: [r.config.out_dir for r in study.runs if r.point.label == p.label] for p in points}
            folders = {label: [f for f in found if (f / "summary.json").is_file()] for label, found in finished.items()}
            baseline = next((p.label for p in points if p.variant == study.baseline), "")
            return draw_steps(figure, folders, spec.y, baseline)


def _draw_front(figure: Figure, spec: Front, baseline: str, points: list[Point], summary: pd.DataFrame) -> str:
    x, y = _of_metric(summary, spec.x), _of_metric(summary, spec.y)
    points = [point for point in points if point.label in x.index and point.label in y.index]
    axes, sentences = figure.subplots(), []
    groups = _groups(points, keep=lambda point: list(point.swept)[:-1])
    styles = _styles(list(groups), baseline)
    for label, members in groups.items():
        names = [point.label for point in members]
        xs, ys = x.loc[names], y.loc[names]
        axes.errorbar(
            xs["mean"], ys["mean"], xerr=_half_widths(xs), yerr=_half_widths(ys), label=label, markersize=5,
            elinewidth=0.8, linestyle="-", linewidth=1, **styles[label],
        )  # fmt: skip
        for point in members:
            place = (x.loc[point.label, "mean"], y.loc[point.label, "mean"])
            value = str(list(point.swept.values())[-1]) if point.swept else ""
            axes.annotate(value, place, (4, 4), textcoords="offset points", fontsize=7, color=styles[label]["color"])
            sentences.append(f"{point.label}: {shown(spec.y, place[1])} at {shown(spec.x, place[0])}.")
    if not sentences:
        return ""
    _format(axes.xaxis, spec.x)
    _format(axes.yaxis, spec.y)
    axes.set_xlabel(_title(spec.x))
    axes.set_title(_title(spec.y))
    _add_legend(figure)
    return f"Scatter plot of {metric_of(spec.y).title} at {metric_of(spec.x).title}. " + " ".join(sentences)


def _draw_curve(figure: Figure, spec: Curve, baseline: str, points: list[Point], summary: pd.DataFrame) -> str:
    y = _of_metric(summary, spec.y)
    points = [point for point in points if point.label in y.index]
    axes, sentences = figure.subplots(), []
    swept = [point for point in points if spec.x in point.swept]
    axis = _ordered([point.swept[spec.x] for point in swept])
    is_numeric = all(map(is_number, axis))
    groups = _groups(swept, keep=lambda point: [name for name in point.swept if name != spec.x])
    styles = _styles(list(groups), baseline)
    for label, members in groups.items():
        members = sorted(members, key=lambda point: axis.index(point.swept[spec.x]))
        values = [point.swept[spec.x] for point in members]
        xs = values if is_numeric else [axis.index(value) for value in values]
        ys = y.loc[[point.label for point in members]]
        axes.plot(xs, ys["mean"], label=label, markersize=5, **styles[label])
        axes.fill_between(xs, ys["low"], ys["high"], color=styles[label]["color"], alpha=0.15, linewidth=0)
        told = [f"{shown(spec.y, mean)} at {value}" for value, mean in zip(values, ys["mean"], strict=True)]
        sentences.append(f"{label}: {', '.join(told)}.")
    if not sentences:
        return ""
    for point in points:
        if point.variant == baseline and spec.x not in point.swept:
            mean, low, high = y.loc[point.label, ["mean", "low", "high"]]
            axes.axhline(mean, color=GREY, linestyle="--", label=point.label)
            axes.axhspan(low, high, color=GREY, alpha=0.1, linewidth=0)
            sentences.append(f"{point.label}: {shown(spec.y, mean)}.")
    if not is_numeric:
        axes.set_xticks(range(len(axis)), [str(value) for value in axis])
    elif min(axis) > 0 and max(axis) >= 20 * min(axis):
        axes.set_xscale("log")
        axes.set_xticks(axis, [f"{value:g}" for value in axis])
        axes.xaxis.set_minor_formatter(NullFormatter())
    _format(axes.yaxis, spec.y)
    axes.set_xlabel(spec.x)
    axes.set_title(_title(spec.y))
    _add_legend(figure)
    return f"Line chart of {metric_of(spec.y).title} against {spec.x}. " + " ".join(sentences)


def _draw_heatmap(figure: Figure, spec: Heatmap, points: list[Point], summary: pd.DataFrame) -> str:
    values = _of_metric(summary, spec.metric)
    points = [p for p in points if p.label in values.index and {spec.x, spec.y} <= p.swept.keys()]
    if not points:
        return ""
    groups = _groups(points, keep=lambda point: [name for name in point.swept if name not in (spec.x, spec.y)])
    figure.set_size_inches(WIDTH, 0.6 + 2.6 * len(groups))
    means = [values.loc[point.label, "mean"] for point in points]
    sentences = []
    for axes, (label, members) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True):
        columns, rows = (_ordered([point.swept[name] for point in members]) for name in (spec.x, spec.y))
        cells = np.full((len(rows), len(columns)), math.nan)
        for point in members:
            row, column = rows.index(point.swept[spec.y]), columns.index(point.swept[spec.x])
            cells[row, column] = mean = values.loc[point.label, "mean"]
            is_dark = mean < (min(means) + max(means)) / 2
            color = "white" if is_dark else "black"
            axes.text(column, row, shown(spec.metric, mean), ha="center", va="center", color=color, fontsize=8)
            sentences.append(f"{label}, {point.swept[spec.x]} and {point.swept[spec.y]}: {shown(spec.metric, mean)}.")
        axes.imshow(cells, origin="lower", aspect="auto", cmap="viridis", vmin=min(means), vmax=max(means))
        axes.set_xticks(range(len(columns)), [str(value) for value in columns])
        axes.set_yticks(range(len(rows)), [str(value) for value in rows])
        axes.set_ylabel(spec.y)
        axes.set_title(f"{_title(spec.metric)}: {label}")
        axes.grid(False)
    axes.set_xlabel(spec.x)
    return f"Heat map of {metric_of(spec.metric).title} over {spec.x} and {spec.y}. " + " ".join(sentences)


def _draw_lags(figure: Figure, baseline: str, points: list[Point], summary: pd.DataFrame) -> str:
    by_lag = {lag: _of_metric(summary, f"pair_stability.jaccard_lag_{lag}") for lag in LAGS}
    axes, sentences = figure.subplots(), []
    styles = _styles([point.label for point in points], baseline)
    for point in points:
        lags = [lag for lag, rows in by_lag.items() if point.label in rows.index]
        if not lags:
            continue
        means, low, high = zip(*(by_lag[lag].loc[point.label, ["mean", "low", "high"]] for lag in lags), strict=True)
        axes.plot(lags, means, label=point.label, markersize=5, **styles[point.label])
        axes.fill_between(lags, low, high, color=styles[point.label]["color"], alpha=0.15, linewidth=0)
        sentences.append(f"{point.label}: from {means[0]:.1%} at {lags[0]} to {means[-1]:.1%} at {lags[-1]}.")
    if not sentences:
        return ""
    axes.set_xscale("log")
    axes.set_xticks(LAGS, [str(lag) for lag in LAGS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("steps between the selections")
    axes.set_title("Pairs in common (Jaccard)")
    _add_legend(figure)
    return "Line chart of the pairs that two selections share against the steps between them. " + " ".join(sentences)


def _of_metric(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric by the labels of their points, without those that have no mean."""
    rows: pd.DataFrame = summary[summary["metric"] == metric] if len(summary) else summary.reindex(columns=["point"])
    return rows.dropna(subset=["mean"] if "mean" in rows else []).set_index("point")


def _half_widths(rows: pd.DataFrame) -> Any:
    """Distances [2, n] of the ends of the intervals from the means; 0 where there is no interval."""
    return np.nan_to_num(np.stack([rows["mean"] - rows["low"], rows["high"] - rows["mean"]]))


def _groups(points: Sequence[Point], keep: Any) -> dict[str, list[Point]]:
    """Points that one line joins, by its label: the variant, and the values of the settings that `keep` names."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        group = point._replace(swept={name: point.swept[name] for name in keep(point)})
        groups.setdefault(group.label, []).append(point)
    return groups


def _ordered(values: list[Any]) -> list[Any]:
    """Different values of a setting: numbers in ascending order, others as they stand in the study."""
    unique = list(dict.fromkeys(values))
    return sorted(unique) if all(map(is_number, unique)) else unique


def _styles(labels: list[str], baseline: str) -> _Styles:
    """Color and marker of each line; the baseline is grey."""
    others = [label for label in labels if label.split(",")[0] != baseline and label != baseline]
    styles = {
        label: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, label in enumerate(others)
    }
    return {label: styles.get(label, {"color": GREY, "marker": "s"}) for label in labels}


def _title(metric: str) -> str:
    """The name of a metric, with the direction in which it improves."""
    better = metric_of(metric).better
    return metric_of(metric).title + ("" if better == "trade-off" else f" ({better} is better)")


def _is_share(metric: str) -> bool:
    return "%}" in metric_of(metric).value


def _format(axis: Axis, metric: str) -> None:
    """Write shares as percentages."""
    if _is_share(metric):
        axis.set_major_formatter(PercentFormatter(1))


def _add_legend(figure: Figure) -> None:
    n_lines = len(figure.axes[0].get_legend_handles_labels()[1])
    add_legend(figure, ncols=2 if n_lines > 3 else 3, fontsize=8)
