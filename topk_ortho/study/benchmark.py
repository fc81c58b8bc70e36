"""SAEBench on the finished runs of a study that asks for it: each dictionary is judged after its training."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from topk_ortho.evaluation.saebench import LATENT_STANDS_FOR, result_name
from topk_ortho.files import sha256_of
from topk_ortho.training.config import TrainConfig, flatten
from topk_ortho.training.metric_table import Metric, is_number

_PREFIX = "saebench.absorption"
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
        "Words that are absorbed by SAEBench's measure, on average over the letters that have a latent. Differences "
        "are taken letter by letter, over those that have one in both dictionaries.",
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
ABSORPTION = SAEBENCH_METRICS[2].key


class Benchmark(NamedTuple):
    """What SAEBench measures on the runs of a study."""

    evals: list[Literal["absorption", "core"]]
    words: int | None = None
    """Words that absorption draws from the model's vocabulary; None for all of them"""

    def judge(self, config: TrainConfig) -> str | None:
        """Measure what a finished run has no result of; returns what went wrong, if anything."""
        from topk_ortho.evaluation.saebench.__main__ import main

        missing = [name for name in self.evals if name not in self.results(config.out_dir)]
        if not missing:
            return None
        words = [] if self.words is None else ["--words", str(self.words)]
        sizes = ["--device", config.device, "--batch-size", str(config.model.batch_size)]
        try:
            main([str(config.out_dir), "--evals", *missing, "--overwrite", *words, *sizes])
        except SystemExit as end:  # with a message
            return str(end)
        return None

    def has_judged(self, folder: Path) -> bool:
        """Whether SAEBench has judged the dictionary of this run, in all evaluations that the study asks for."""
        return len(self.results(folder)) == len(self.evals)

    def results(self, folder: Path) -> dict[str, dict[str, Any]]:
        """SAEBench's results of a run's dictionary, of as many words, by the names of the evaluations."""
        found: dict[str, dict[str, Any]] = {}
        weights = folder / "sae" / "sae_weights.safetensors"
        dictionary = sha256_of(weights) if weights.is_file() else None
        for name in self.evals:
            path = folder / "saebench" / name / result_name(folder.name)
            try:
                result = json.loads(path.read_text())
                judged = result["eval_result_unstructured"]["judged"]
            except (OSError, ValueError, KeyError, TypeError):  # none, or one that was not written by this package
                continue
            words = self.words if name == "absorption" else None
            if judged.get("dictionary") == dictionary and judged.get("number_of_words") == words:
                found[name] = result
        return found

    def numbers(self, folder: Path) -> dict[str, float]:
        """Every number in these results, as in ``saebench.absorption.mean.mean_full_absorption_score``."""
        found: dict[str, float] = {}
        for name, result in self.results(folder).items():
            beside = dict(result["eval_result_unstructured"])
            del beside["judged"]
            numbers = flatten({"saebench": {name: result["eval_result_metrics"] | beside}})
            found |= {key: value for key, value in numbers.items() if is_number(value)}
        return found


def absorption_in_common(own: pd.DataFrame, base: pd.DataFrame) -> pd.Series:
    """How much more is absorbed than in the dictionaries of a baseline, for every seed that both have.

    It is a mean over the letters that have a latent in both dictionaries of a seed, NaN where there are none: letters
    differ much, so that means over different letters cannot be compared.
    """
    rates, scores = (
        [f"{_PREFIX}.letters.{letter}.{name}" for letter in _letters(own)]
        for name in ("full_absorption_rate", "latent_f1")
    )
    seeds = own.index.intersection(base.index)
    own, base = own.loc[seeds].reindex(columns=rates + scores), base.loc[seeds].reindex(columns=rates + scores)
    stands = (own[scores].to_numpy() >= LATENT_STANDS_FOR) & (base[scores].to_numpy() >= LATENT_STANDS_FOR)
    return (own[rates] - base[rates]).where(stands).mean(axis="columns")


def _letters(results: pd.DataFrame) -> list[str]:
    ends = (f"{_PREFIX}.letters.", ".latent_f1")
    names = [name for name in results.columns if name.startswith(ends[0]) and name.endswith(ends[1])]
    return [name.removeprefix(ends[0]).removesuffix(ends[1]) for name in names]
