"""Compare finished training runs: python -m topk_ortho.compare RUN RUN... [--baseline RUN] [--out-dir DIR]."""

import argparse
import json
import math
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from topk_ortho.study.figures import draw_steps
from topk_ortho.study.results import metric_of, shown
from topk_ortho.training.config import flatten
from topk_ortho.training.metric_table import METRICS, is_number
from topk_ortho.training.page import readable, render, save_figure

_CURVES = ("explained_variance", "l0", "dead_fraction", "mean_max_decoder_cosine", "absorption_rate", "mcc")
"""Metrics of metrics.jsonl that are drawn over the steps, as far as the runs have them."""


class FinishedRun(NamedTuple):
    """A run to compare."""

    folder: Path
    label: str
    settings: dict[str, Any]
    """By their dotted names"""
    summary: dict[str, Any]


class Comparison(NamedTuple):
    """A metric of all runs, in words."""

    title: str
    meaning: str
    values: list[str]
    is_best: list[bool]


def main(arguments: list[str] | None = None) -> None:
    """Show how runs differ, on the terminal and, with --out-dir, as figures and report.html."""
    parser = argparse.ArgumentParser(
        prog="python -m topk_ortho.compare", description=(__doc__ or "").split(":")[0] + "."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run, or of a study: all its runs"
    )
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="show all others as differences to this one")
    parser.add_argument("--out-dir", type=Path, metavar="DIR", help="folder for report.html and its figures")
    options = parser.parse_args(arguments)
    try:
        runs = open_runs([*([options.baseline] if options.baseline else []), *options.runs])
    except ValueError as error:
        sys.exit(f"compare: {error}")
    settings, metrics = differing_settings(runs), comparisons(runs, has_baseline=options.baseline is not None)
    _print(runs, settings, metrics)
    if options.out_dir:
        _write(options.out_dir, runs, settings, metrics, has_baseline=options.baseline is not None)
        print(f"\nreport: {options.out_dir}/report.html")


def open_runs(folders: list[Path]) -> list[FinishedRun]:
    """The runs in some folders, each once; of a study's folder all that are finished.

    Raises
    ------
    ValueError
        If a folder holds no finished run, or fewer than two runs are left.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        inner = sorted(path.parent for path in (folder / "runs").glob("*/*/summary.json"))
        if not inner and not all((folder / name).is_file() for name in ("summary.json", "config.json")):
            raise ValueError(
                f"{folder} is neither the folder of a finished run, which has a summary.json, nor of a study"
            )
        found |= dict.fromkeys(path.resolve() for path in inner or [folder])
    if len(found) < 2:
        raise ValueError(f"at least 2 runs are needed, got {len(found)}")
    paths = list(found)
    # the parts of the paths that tell the runs apart
    n_common = next(i for i, parts in enumerate(zip(*(p.parts for p in paths), strict=False)) if len(set(parts)) > 1)
    return [
        FinishedRun(
            path,
            "/".join(part for part in path.parts[n_common:] if part != "runs"),
            flatten(json.loads((path / "config.json").read_text("utf-8"))),
            flatten(json.loads((path / "summary.json").read_text("utf-8"))),
        )
        for path in paths
    ]


def differing_settings(runs: list[FinishedRun]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, by name, with the value in each; folders are left out."""
    names = {name: None for run in runs for name in run.settings if name not in ("out_dir", "cache_dir")}
    texts = {name: [readable({name: run.settings.get(name)}, missing="None")[name] for run in runs] for name in names}
    return {name: values for name, values in texts.items() if len(set(values)) > 1}


def comparisons(runs: list[FinishedRun], *, has_baseline: bool) -> list[Comparison]:
    """The titled metrics of which the runs differ as they are shown, with the best value of each that has a direction.

    With a baseline, the first run, the difference to it stands behind every other value.
    """
    found = []
    for metric in METRICS:
        values = [run.summary.get(metric.key) for run in runs]
        numbers: list[Any] = [value if is_number(value) else math.nan for value in values]
        texts = [shown(metric.key, number) for number in numbers]
        if not metric.title or len(set(texts)) == 1:
            continue
        finite = [number for number in numbers if is_number(number)]
        best = {"higher": max(finite), "lower": min(finite)}.get(metric.better)
        if has_baseline:
            differences = [number - numbers[0] for number in numbers]
            texts[1:] = [
                f"{text} ({shown(metric.key, difference, '+')})" if is_number(difference) else text
                for text, difference in zip(texts[1:], differences[1:], strict=True)
            ]
        found.append(Comparison(metric.title, metric.meaning, texts, [number == best for number in numbers]))
    return found


def _print(runs: list[FinishedRun], settings: dict[str, list[str]], metrics: list[Comparison]) -> None:
    labels = [run.label for run in runs]
    print("settings that differ:" if settings else "All settings are the same.")
    if settings:
        print(pd.DataFrame(settings, index=labels).T.to_string())
    print("\nmetrics that differ, * the best:" if metrics else "\nNo metric differs.")
    if metrics:
        cells = {
            metric.title: [
                f"{value}{' *' if best else ''}" for value, best in zip(metric.values, metric.is_best, strict=True)
            ]
            for metric in metrics
        }
        print(pd.DataFrame(cells, index=labels).T.to_string())


def _write(
    out_dir: Path,
    runs: list[FinishedRun],
    settings: dict[str, list[str]],
    metrics: list[Comparison],
    *,
    has_baseline: bool,
) -> None:
    """Write the overlaid curves and report.html."""
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    folders = {run.label: [run.folder] for run in runs}
    baseline = runs[0].label if has_baseline else ""
    figures = []
    for key in _CURVES:
        draw = partial(draw_steps, runs=folders, metric=key, baseline=baseline)
        image = save_figure(draw, out_dir / "figures" / f"{key}.png", out_dir / "figures" / f"{key}.svg")
        figures.append((metric_of(key), image))
    page = render(
        Path(__file__).parent / "study" / "compare.html.jinja",
        runs=runs,
        folders={run.label: str(run.folder) for run in runs},
        baseline=baseline,
        settings=settings,
        metrics=metrics,
        figures=[(metric, image) for metric, image in figures if image],
        version=version("topk-ortho"),
    )
    (out_dir / "report.html").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
