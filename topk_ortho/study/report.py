"""The report of a study: report.html, one file that needs nothing else. Its words are in study.html.jinja."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from topk_ortho.study.benchmark import SAEBENCH_METRICS
from topk_ortho.study.figures import draw_figures
from topk_ortho.study.plan import FigureSpec, Study
from topk_ortho.study.results import ABSORPTION_PER_SECOND, ABSORPTION_PER_VARIANCE, environment, shown
from topk_ortho.training.metric_table import METRICS, Metric
from topk_ortho.training.page import readable, render


class Cell(NamedTuple):
    """A metric of a point as the table shows it."""

    value: str
    """The mean over seeds, with the half width of its interval"""
    difference: str = ""
    """The paired difference to the baseline, in the same form; empty if there is none"""
    is_clear: bool = False
    """Whether the interval of the difference leaves out 0"""


class Row(NamedTuple):
    """A line of the table: a point of the grid."""

    label: str
    n_runs: int
    cells: list[Cell]


def write_report(
    study: Study, out_dir: Path, results: pd.DataFrame, summary: pd.DataFrame, failures: dict[str, str]
) -> None:
    """Write ``figures/`` and ``report.html`` of a study.

    Parameters
    ----------
    study : Study
        The study.
    out_dir : Path
        Its folder.
    results, summary : DataFrame
        The numbers of its finished runs, see `collect`, and their comparison, see `summarise`. The table shows the
        metrics that the table of metrics has a title for.
    failures : dict of str to str
        Error messages of the runs that failed, by their names.
    """
    metrics = [metric for metric in _titled() if len(summary) and metric.key in set(summary["metric"])]
    images = draw_figures(study, summary, out_dir / "figures")
    figures = list(zip(study.figures, images, strict=True))
    page = render(
        Path(__file__).with_name("study.html.jinja"),
        study=study,
        out_dir=out_dir,
        metrics=metrics,
        rows=_rows(study, results, summary, metrics),
        figures=[(spec, image, _meanings(spec)) for spec, image in figures if image],
        undrawn=[spec.title for spec, image in figures if image is None],
        changes={name: _in_words(changes) for name, changes in study.changes.items()},
        failures=failures,
        n_missing=len(study.runs) - len(results) - len(failures),
        environment=readable(environment(), missing="unknown"),
    )
    (out_dir / "report.html").write_text(page, "utf-8")


def _in_words(settings: dict[str, Any]) -> str:
    texts = readable(settings, missing="None")
    return ", ".join(f"{name} = {text}" for name, text in texts.items()) or "nothing"


def _meanings(spec: FigureSpec) -> dict[str, str]:
    """What the metrics of a figure mean that have no title, and of which the figure shows the name in the files."""
    untitled = {metric.key: metric.meaning for metric in METRICS if not metric.title}
    return {name: untitled[name] for name in vars(spec).values() if isinstance(name, str) and name in untitled}


def _titled() -> list[Metric]:
    """The metrics of the table: those with a title, first what every run has; SAEBench's; the penalty's efficiency."""
    titled = sorted((metric for metric in METRICS if metric.title), key=lambda metric: metric.is_optional)
    return [*titled, *SAEBENCH_METRICS, ABSORPTION_PER_VARIANCE, ABSORPTION_PER_SECOND]


def _rows(study: Study, results: pd.DataFrame, summary: pd.DataFrame, metrics: list[Metric]) -> list[Row]:
    rows = []
    for point in study.points:
        if point.label in results.index:
            own = summary[summary["point"] == point.label].set_index("metric").to_dict("index")
            cells = [_cell(metric.key, own[metric.key]) if metric.key in own else Cell("") for metric in metrics]
            rows.append(Row(point.label, len(results.loc[[point.label]]), cells))
    return rows


def _cell(key: str, numbers: dict[Any, Any]) -> Cell:
    """A cell of the table; the two ends of an interval are named where it is not symmetric, as that of a ratio."""
    mean, low, high = numbers["mean"], numbers["low"], numbers["high"]
    if key in (ABSORPTION_PER_VARIANCE.key, ABSORPTION_PER_SECOND.key):
        interval = "" if math.isnan(low) else f" [{shown(key, low)}, {shown(key, high)}]"
        note = numbers["note"]
        return Cell(note if math.isnan(mean) else f"{shown(key, mean)}{interval}{f' ({note})' if note else ''}")
    value = _with_half_width(shown(key, mean), key, high - mean)
    if math.isnan(numbers["difference"]):
        return Cell(value)
    low, high = numbers["difference_low"], numbers["difference_high"]
    difference = _with_half_width(shown(key, numbers["difference"], "+"), key, high - numbers["difference"])
    return Cell(value, difference, is_clear=low > 0 or high < 0)


def _with_half_width(text: str, key: str, half_width: float) -> str:
    return text if math.isnan(half_width) else f"{text} ± {shown(key, half_width)}"
