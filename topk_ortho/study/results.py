"""The numbers of a study: of every run, and for every point of a grid their mean over seeds and the paired difference.

    mean +- t(n - 1) * s / sqrt(n),    with t the 97.5% quantile of Student's t and s the standard deviation over seeds

A difference to the baseline is taken seed by seed first, so that what a seed does to both cancels.
"""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from topk_ortho.study.benchmark import ABSORPTION, SAEBENCH_METRICS, absorption_in_common
from topk_ortho.study.plan import Study
from topk_ortho.training.config import flatten
from topk_ortho.training.metric_table import METRICS, Metric, is_number
from topk_ortho.training.run_folder import is_finished

ABSORPTION_PER_VARIANCE = Metric(
    "absorption_per_variance",
    "Absorption reduction efficiency: how much less absorption than the baseline for how much less explained variance; "
    "at 2, absorption falls by two points where one point of explained variance is lost.",
    "Absorption removed per variance lost", "{absorption_per_variance:.2f}", "higher",
)  # fmt: skip
ABSORPTION_PER_SECOND = Metric(
    "absorption_per_second",
    "How much less absorption than the baseline for each further second of training.",
    "Absorption removed per extra second", "{absorption_per_second:.2%}", "higher",
)  # fmt: skip
_EFFICIENCY = [ABSORPTION_PER_VARIANCE, ABSORPTION_PER_SECOND]
_METRICS = {metric.key: metric for metric in [*METRICS, *SAEBENCH_METRICS, *_EFFICIENCY]}


class Interval(NamedTuple):
    """An estimate with its 95% interval, NaN where there is none."""

    value: float
    low: float
    high: float


def metric_of(key: str) -> Metric:
    """The metric of a name in results.csv; one without a title is called by its name."""
    metric = _METRICS.get(key, Metric(key, "", title=key))
    title = metric.title or key.rpartition(".")[2].replace("_", " ")
    return metric._replace(title=title, value=metric.value or f"{{{key}:.4g}}")


def shown(key: str, value: float, sign: str = "") -> str:
    """A value of a metric as the table of metrics writes it, such as 72.4%."""
    spec = next((spec for _, name, spec, _ in Formatter().parse(metric_of(key).value) if name == key), ".4g")
    return format(value, f"{sign}{spec}") if is_number(value) else "not measured"


def swept_settings(study: Study) -> list[str]:
    """Names of all settings that some variant sweeps."""
    return sorted({name for point in study.points for name in point.swept})


def collect(study: Study) -> pd.DataFrame:
    """The numbers of all finished runs: variant, seed, swept settings, every number of the summary and of SAEBench.

    A setting that the run's variant does not sweep is None. The index is the label of the run's point.
    """
    rows, labels = [], []
    for run in study.runs:
        if is_finished(run.config):
            summary = flatten(json.loads((run.config.out_dir / "summary.json").read_text("utf-8")))
            numbers = {name: value for name, value in summary.items() if is_number(value)}
            if run.benchmark:
                numbers |= run.benchmark.numbers(run.config.out_dir)
            swept = {name: run.point.swept.get(name) for name in swept_settings(study)}
            rows.append({"variant": run.point.variant, "seed": run.seed} | swept | numbers)
            labels.append(run.point.label)
    return pd.DataFrame(rows, index=pd.Index(labels, name="point"))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its 95% interval by Student's t; of a single value there is no interval, of none no mean."""
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else np.nan, np.nan, np.nan)
    mean, half = float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Ratio of two means of paired values, with its 95% interval by Fieller's theorem.

    The interval holds the ratios r for which the mean of ``numerator - r * denominator`` does not differ from 0 by a
    t test. There is none if the mean of the denominators does not differ from 0 either: any ratio is possible then.
    """
    n = len(numerators)
    a, b = float(np.mean(numerators)), float(np.mean(denominators))
    if n < 2:
        return Interval(a / b, np.nan, np.nan)
    (aa, ab), (_, bb) = stats.t.ppf(0.975, n - 1) ** 2 / n * np.cov(numerators, denominators)
    # r is in the interval where r**2 * square - 2 * r * linear + constant <= 0
    square, linear, constant = b**2 - bb, a * b - ab, a**2 - aa
    if square <= 0:
        return Interval(a / b, np.nan, np.nan)
    root = np.sqrt(max(0.0, linear**2 - square * constant))
    return Interval(a / b, (linear - root) / square, (linear + root) / square)


def summarise(study: Study, results: pd.DataFrame) -> pd.DataFrame:
    """Every metric at every point of the grid: mean over seeds, and the paired difference to the baseline.

    Returns
    -------
    DataFrame
        A row for each point and metric, with the columns point, variant, the swept settings, metric, n, mean, low,
        high, n_pairs, difference, difference_low, difference_high and note. Cells are NaN where nothing is defined.
    """
    swept = swept_settings(study)
    metrics = [name for name in results.columns if name not in {"variant", "seed", *swept}]
    rows = []
    for point in study.points:
        if point.label not in results.index:
            continue
        own = results.loc[[point.label]].set_index("seed")
        other = study.baseline_of(point)
        base = results.loc[results.index == (other.label if other else None)].set_index("seed")
        head = {"point": point.label, "variant": point.variant} | {name: own[name].iloc[0] for name in swept}
        for metric in metrics:
            more = absorption_in_common(own, base) if metric == ABSORPTION else own[metric] - base[metric]
            values, differences = own[metric].dropna(), more.dropna()
            mean, difference = mean_interval(values.tolist()), mean_interval(differences.tolist())
            rows.append(head | _cells(metric, len(values), mean, len(differences), difference))
        rows += [head | row for row in _efficiency(own, base)]
    return pd.DataFrame(rows)


_NONE = Interval(np.nan, np.nan, np.nan)


def _cells(
    metric: str, n: int, mean: Interval, n_pairs: int = 0, difference: Interval = _NONE, note: str = ""
) -> dict[str, Any]:
    return {
        "metric": metric, "n": n, "mean": mean.value, "low": mean.low, "high": mean.high, "n_pairs": n_pairs,
        "difference": difference.value, "difference_low": difference.low, "difference_high": difference.high,
        "note": note,
    }  # fmt: skip


def _efficiency(own: pd.DataFrame, base: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Absorption that is removed, relative to what it costs; nothing where it was not measured or is not compared."""
    if not {"absorption_rate", "explained_variance", "seconds"} <= set(own.columns):
        return
    removed = base["absorption_rate"] - own["absorption_rate"]
    costs = {
        ABSORPTION_PER_VARIANCE: (base["explained_variance"] - own["explained_variance"], "no loss"),
        ABSORPTION_PER_SECOND: (own["seconds"] - base["seconds"], "no extra time"),
    }
    for metric, (cost, none) in costs.items():
        pairs = pd.DataFrame({"removed": removed, "cost": cost}).dropna()
        if len(pairs) == 0:
            continue
        if pairs["cost"].mean() <= 0:
            yield _cells(metric.key, len(pairs), _NONE, note=none)
            continue
        ratio = ratio_interval(pairs["removed"].tolist(), pairs["cost"].tolist())
        note = "unbounded, as the cost may be none" if len(pairs) > 1 and np.isnan(ratio.low) else ""
        yield _cells(metric.key, len(pairs), ratio, note=note)


def environment() -> dict[str, Any]:
    """The machine and the versions that a study ran with, and the date."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system than Linux, or another processor than x86
        processor = platform.processor() or platform.machine()
    packages = ("topk-ortho", "torch", "numpy", "scipy", "pandas", "joblib")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in packages},
    }
