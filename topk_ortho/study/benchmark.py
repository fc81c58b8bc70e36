"""SAEBench on the finished runs of a study that asks for it: each dictionary is judged after its training."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from topk_ortho.training.config import flatten
from topk_ortho.training.metric_table import Metric, is_number

SAEBENCH_METRICS = [
    Metric(
        "saebench.absorption.mean_latent_f1",
        "How well one latent tells the first letter of words, by SAEBench: F1 score of the firing of the latent that "
        "its sparse probe chooses first for a letter, on average over the letters that a linear probe reads.",
        "F1 of first-letter latents (SAEBench)", "{saebench.absorption.mean_latent_f1:.3f}", "higher",
    ),
    Metric(
        "saebench.absorption.with_latent",
        "Letters whose latent has an F1 score of 0.5 or more. Of the others a rate of absorption says nothing.",
        "Letters with a latent (SAEBench)", "{saebench.absorption.with_latent:.1f}", "higher",
    ),
    Metric(
        "saebench.absorption.mean_full_absorption_rate_with_latent",
        "Words that are absorbed by SAEBench's measure, on average over the letters that have a latent.",
        "Absorption where there is a latent (SAEBench)",
        "{saebench.absorption.mean_full_absorption_rate_with_latent:.1%}", "lower",
    ),
    Metric(
        "saebench.absorption.mean.mean_full_absorption_score",
        "SAEBench's own figure: words that are absorbed, on average over all letters that a probe reads, whether they "
        "have a latent or not.",
        "Absorption of all letters (SAEBench)", "{saebench.absorption.mean.mean_full_absorption_score:.1%}", "lower",
    ),
]  # fmt: skip
"""Those that the report of a study shows; results.csv has every number of SAEBench's results."""


class Benchmark(NamedTuple):
    """What SAEBench measures on the runs of a study."""

    evals: list[Literal["absorption", "core"]]
    words: int | None = None
    """Words that absorption draws from the model's vocabulary; None for all of them"""

    def judge(self, folder: Path) -> str | None:
        """Measure what a finished run has no result of; returns what went wrong, if anything."""
        from topk_ortho.evaluation.saebench.__main__ import main

        words = [] if self.words is None else ["--words", str(self.words)]
        try:
            main([str(folder), "--evals", *self.evals, *words])
        except SystemExit as end:  # with a message
            return str(end)
        return None

    def has_judged(self, folder: Path) -> bool:
        """Whether a run has all results, of as many words."""
        judged = {name: result["eval_result_unstructured"]["judged"] for name, result in _results(folder).items()}
        if not set(self.evals) <= judged.keys():
            return False
        return "absorption" not in self.evals or bool(judged["absorption"]["number_of_words"] == self.words)


def saebench_numbers(folder: Path) -> dict[str, float]:
    """Every number in SAEBench's results of a run, as in ``saebench.absorption.mean.mean_full_absorption_score``."""
    found: dict[str, float] = {}
    for name, result in _results(folder).items():
        beside = dict(result["eval_result_unstructured"])
        del beside["judged"]
        numbers = flatten({"saebench": {name: result["eval_result_metrics"] | beside}})
        found |= {key: value for key, value in numbers.items() if is_number(value)}
    return found


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    """SAEBench's results of a run, by the names of the evaluations."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("saebench/*/*.json")}
