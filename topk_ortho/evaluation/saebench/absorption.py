"""SAEBench's absorption of first letters, and whether the dictionary has latents for these letters at all.

The model reads words of its own vocabulary in prompts such as "cat has the first letter:", and a linear probe finds the
directions of the letters at the words. A word is absorbed if the probe sees its letter, no latent of the letter fires,
and another latent carries the letter's direction. What the model makes of the words, and the probes, are the same for
every dictionary of a hook, so they are kept.
"""

import hashlib
import json
import math
import random
import statistics
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_bench.evals.absorption.common import train_and_save_probes
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.absorption.eval_output import (
    AbsorptionEvalOutput,
    AbsorptionMeanMetrics,
    AbsorptionMetricCategories,
    AbsorptionResultDetail,
)
from sae_bench.evals.absorption.feature_absorption import run_feature_absortion_experiment
from sae_bench.evals.absorption.k_sparse_probing import run_k_sparse_probing_experiment
from sae_bench.evals.absorption.main import _aggregate_results_df
from sae_bench.evals.absorption.prompting import first_letter
from sae_bench.evals.absorption.vocab import LETTERS, convert_tokens_to_string, get_alpha_tokens
from torch import Tensor
from transformers import set_seed

from topk_ortho.activations.text import special_tokens_of, tokenizer_identity
from topk_ortho.evaluation.saebench import LATENT_STANDS_FOR
from topk_ortho.evaluation.saebench.output import Evaluation, provenance
from topk_ortho.evaluation.saebench.subject import Subject
from topk_ortho.files import finished_folder, made_once, remove_abandoned

_FEWEST_BATCHES = 8
_FEWEST_WORDS = 100
_MOST_KEPT_BYTES = 4 * 2**30
"""Activations of the features on all words are kept while their probes are trained, unless they are more than this"""


def measure_absorption(subject: Subject, n_words: int | None, work_dir: Path, *, seed: int, cache_dir: Path) -> Any:
    """The absorption of first letters, as SAEBench's `AbsorptionEvalOutput`.

    ``eval_result_unstructured`` has what SAEBench leaves out: for every letter that the probe reads the F1 score of the
    firing of the latent that SAEBench chooses first, ``latent_f1``; and ``with_latent``, the number of letters where it
    is 0.5 or more, with the mean rate of full absorption over these alone.

    Parameters
    ----------
    subject : Subject
        A dictionary of the residual stream after a block.
    n_words : int or None
        How many words are drawn from those of the model's vocabulary; None takes all, as SAEBench does.
    work_dir : Path
        An empty folder, for SAEBench's tables.
    seed : int
        Draws words, prompts, and the order in which probes are trained.
    cache_dir : Path
        Where the activations of the words are kept.

    Raises
    ------
    ValueError
        If the hook is another one, or too few letters can be read from the model.
    """
    measured = f"blocks.{subject.layer}.hook_resid_post"
    if subject.hook != measured:
        raise ValueError(f"absorption is measured at {measured}, and this dictionary is of {subject.hook}")
    words, position = _words(subject, n_words, seed)
    config = AbsorptionEvalConfig(
        model_name=subject.model_name,
        random_seed=seed,
        prompt_token_pos=position,
        llm_batch_size=subject.transformer.config.batch_size,
        llm_dtype=subject.transformer.config.dtype,
        precalc_k_sparse_probe_sae_acts=4 * len(words) * subject.sae.cfg.d_sae <= _MOST_KEPT_BYTES,
    )
    # SAEBench's number is for whole vocabularies: of fewer words the probes that choose latents would see so few
    # batches that they stay as they were drawn
    batch_size = math.ceil(len(words) / _FEWEST_BATCHES)
    config.k_sparse_probe_batch_size = min(config.k_sparse_probe_batch_size, batch_size)
    model = _Model(subject, words)
    probes_dir = _cached_probes(subject, model, config, cache_dir)
    # SAEBench draws from the global generators, and seeds none of them for this evaluation
    set_seed(seed)
    sparse_dir, absorption_dir = work_dir / "k_sparse_probing", work_dir / "feature_absorption"
    common = {
        "model": model,
        "sae": subject.sae,
        "layer": subject.layer,
        "sae_name": subject.name,
        "max_k_value": config.max_k_value,
        "prompt_template": config.prompt_template,
        "prompt_token_pos": config.prompt_token_pos,
        "device": str(subject.transformer.device),
        "probes_dir": probes_dir,
    }
    probing = run_k_sparse_probing_experiment(
        **common,
        experiment_dir=sparse_dir,
        f1_jump_threshold=config.f1_jump_threshold,
        k_sparse_probe_l1_decay=config.k_sparse_probe_l1_decay,
        k_sparse_probe_batch_size=config.k_sparse_probe_batch_size,
        k_sparse_probe_num_epochs=config.k_sparse_probe_num_epochs,
        eval_batch_size=config.eval_k_sparse_probe_batch_size,
        precalc_k_sparse_probe_sae_acts=config.precalc_k_sparse_probe_sae_acts,
        verbose=False,
    ).set_index("letter")
    read = probing.index[probing["f1_probe"] > config.min_GT_probe_f1]
    if len(read) < config.min_feats_for_eval:
        raise ValueError(
            f"SAEBench asks for {config.min_feats_for_eval} letters that a probe reads with an F1 score above "
            f"{config.min_GT_probe_f1}, and with {len(words):,} words there are {len(read)}: give more --words, or the "
            "model does not know first letters at this layer"
        )
    words_absorbed = run_feature_absortion_experiment(
        **common,
        experiment_dir=absorption_dir,
        sparse_probing_experiment_dir=sparse_dir,
        feature_split_f1_jump_threshold=config.f1_jump_threshold,
        batch_size=subject.transformer.config.batch_size,
    )
    letters = _aggregate_results_df(words_absorbed).set_index("letter")
    details = [
        AbsorptionResultDetail(
            first_letter=letter,
            mean_absorption_fraction=row["mean_absorption_fraction"],
            full_absorption_rate=row["full_absorption_rate"],
            num_full_absorption=int(row["num_full_absorption"]),
            num_probe_true_positives=int(row["num_probe_true_positives"]),
            num_split_features=row["num_split_feats"],
        )
        for letter, row in letters.loc[letters.index.isin(read)].iterrows()
    ]
    return AbsorptionEvalOutput(
        eval_config=config,
        eval_result_metrics=AbsorptionMetricCategories(mean=_means(details)),
        eval_result_details=details,
        eval_result_unstructured=_validity(probing, details) | {"n_words": len(words)},
        **provenance(subject),
    )


def _means(details: list[AbsorptionResultDetail]) -> AbsorptionMeanMetrics:
    """Means and standard deviations over the letters."""
    fractions, rates, splits = (
        [getattr(detail, name) for detail in details]
        for name in ("mean_absorption_fraction", "full_absorption_rate", "num_split_features")
    )
    return AbsorptionMeanMetrics(
        mean_absorption_fraction_score=statistics.mean(fractions),
        mean_full_absorption_score=statistics.mean(rates),
        mean_num_split_features=statistics.mean(splits),
        std_dev_absorption_fraction_score=statistics.stdev(fractions),
        std_dev_full_absorption_score=statistics.stdev(rates),
        std_dev_num_split_features=statistics.stdev(splits),
    )


def _validity(probing: Any, details: list[AbsorptionResultDetail]) -> dict[str, Any]:
    """How well the first latent of each letter tells it, and what is absorbed of those letters that have one."""
    letters = {
        detail.first_letter: {
            "probe_f1": float(probing.at[detail.first_letter, "f1_probe"]),
            "latent_f1": float(probing.at[detail.first_letter, "f1_sum_sparse_sae_1"]),
            "full_absorption_rate": detail.full_absorption_rate,
        }
        for detail in details
    }
    rates = [one["full_absorption_rate"] for one in letters.values() if one["latent_f1"] >= LATENT_STANDS_FOR]
    return {
        "letters": letters,
        "mean_latent_f1": statistics.mean(one["latent_f1"] for one in letters.values()),
        "with_latent": len(rates),
        "mean_full_absorption_rate_with_latent": statistics.mean(rates) if rates else None,
    }


def _summary(result: dict[str, Any]) -> str:
    mean, validity = result["eval_result_metrics"]["mean"], result["eval_result_unstructured"]
    rate = validity["mean_full_absorption_rate_with_latent"]
    of_those = "" if rate is None else f", of whose words {rate:.1%} are absorbed"
    return (
        f"full absorption {mean['mean_full_absorption_score']:.1%} and fraction "
        f"{mean['mean_absorption_fraction_score']:.3f} over {len(validity['letters'])} letters. The latent that is "
        f"chosen first for a letter has a mean F1 score of {validity['mean_latent_f1']:.2f}.\n"
        f"  {validity['with_latent']} letters have a latent with an F1 score of {LATENT_STANDS_FOR} or more{of_those};"
        " of the others the figures say nothing."
    )


ABSORPTION = Evaluation("absorption", "eval_output_schema_absorption_first_letter.json", _summary)


class _Model:
    """The model as SAEBench's absorption uses it, run no further than the dictionary's hook."""

    def __init__(self, subject: Subject, words: dict[str, int]):
        self._subject = subject
        # the name becomes a part of paths, so it must not be a path itself
        self.cfg = SimpleNamespace(model_name="model", d_model=subject.sae.cfg.d_in)
        convert = subject.tokenizer.convert_tokens_to_string
        self.tokenizer = SimpleNamespace(vocab=words, convert_tokens_to_string=convert)

    def to_tokens(self, prompt: str) -> Tensor:
        """Token ids [1, context] of a prompt, after the token that opens a window."""
        first = special_tokens_of(self._subject.tokenizer).first
        opening = [] if first is None else [first]
        return torch.tensor([opening + _ids(self._subject, prompt)])

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, Tensor]]:
        """Activations of prompts of equal length."""
        assert names_filter == [self._subject.hook]
        tokens = torch.cat([self.to_tokens(prompt) for prompt in prompts])
        return None, {self._subject.hook: self._subject.activations(tokens)}


def _words(subject: Subject, n_words: int | None, seed: int) -> tuple[dict[str, int], int]:
    """Tokens of the vocabulary that are words, with their ids, and where a prompt has its word, from its end.

    Every line of a prompt comes after a line break. Words are left out that the tokenizer splits there or, so that all
    prompts have equally many tokens, that make a line longer or shorter than most words do.
    """
    vocabulary, template = subject.tokenizer.get_vocab(), AbsorptionEvalConfig().prompt_template
    source = SimpleNamespace(vocab=vocabulary, convert_tokens_to_string=subject.tokenizer.convert_tokens_to_string)
    places = {}
    for token in get_alpha_tokens(source, replace_special_chars=False):
        word = convert_tokens_to_string(token, subject.tokenizer)
        question = "\n" + template.format(word=word)
        ids, ids_with_answer = _ids(subject, question), _ids(subject, question + first_letter(word))
        if ids.count(vocabulary[token]) == 1:
            places[token] = (ids.index(vocabulary[token]) - len(ids), len(ids), len(ids_with_answer))
    if not places:
        raise ValueError(f"the tokenizer of {subject.model_name} has no words as tokens")
    usual = statistics.mode(places.values())
    whole = sorted(token for token, place in places.items() if place == usual)
    if n_words is not None:
        whole = random.Random(seed).sample(whole, min(n_words, len(whole)))
    words = {token: vocabulary[token] for token in whole}
    n_letters = len({convert_tokens_to_string(token, subject.tokenizer).strip()[0].lower() for token in words})
    if n_letters < len(LETTERS) or len(words) < _FEWEST_WORDS:
        raise ValueError(f"with {len(words):,} words only {n_letters} letters begin one: give more --words")
    return words, usual[0]


def _ids(subject: Subject, text: str) -> list[int]:
    ids: list[int] = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _cached_probes(subject: Subject, model: _Model, config: AbsorptionEvalConfig, cache_dir: Path) -> Path:
    """The folder of the words' activations and the probes; made if it is not there.

    Raises
    ------
    ValueError
        If the words that train the probes lack a letter, or the folder is damaged.
    """
    identity = {
        "weights": subject.transformer.weights_identity,
        "dtype": subject.transformer.config.dtype,
        "hook": subject.hook,
        "tokenizer": tokenizer_identity(subject.tokenizer),
        "words": model.tokenizer.vocab,
        "template": config.prompt_template,
        "seed": config.random_seed,
        "sae_bench": version("sae-bench"),
    }
    folder = cache_dir / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    remove_abandoned(cache_dir)
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with made_once(folder, longest_wait=3600.0):  # it takes minutes, and others may need the same
            if not folder.is_dir():
                set_seed(config.random_seed)
                with finished_folder(folder) as unfinished:
                    train_and_save_probes(
                        model,
                        layers=[subject.layer],
                        base_template=config.prompt_template,
                        pos_idx=config.prompt_token_pos,
                        probes_dir=unfinished,
                        device=str(subject.transformer.device),
                    )
                    for activations in unfinished.rglob("*.dat"):  # they are in data.npz, too
                        activations.unlink()
    data = folder / model.cfg.model_name / f"layer_{subject.layer}" / "data.npz"
    if not data.is_file():
        raise ValueError(f"{folder} is damaged, delete it: it lacks {data.name}")
    with np.load(data) as arrays:
        n_letters = len(np.unique(arrays["y_train"]))
    if n_letters < len(LETTERS):
        raise ValueError(f"of the words that train the probes only {n_letters} letters begin one: give more --words")
    return folder
