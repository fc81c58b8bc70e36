"""SAEBench's sparse probing: how well one, two and five latents tell the class of a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pandas as pd
import torch
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.eval_output import (
    SparseProbingEvalOutput,
)
from sae_bench.evals.sparse_probing.main import run_eval_single_dataset
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations
from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset
from sae_bench.sae_bench_utils.dataset_utils import filter_dataset, get_multi_label_train_test_data
from sae_bench.sae_bench_utils.general_utils import average_results_dictionaries
from torch import Tensor
from transformers import set_seed

from topk_ortho.activations.text import special_tokens_of
from topk_ortho.evaluation.saebench.output import Evaluation, provenance
from topk_ortho.evaluation.saebench.subject import Subject

TextsOfClasses = dict[str, list[str]]

_HELD_OUT = 5
"""Every fifth text of a class tests the probes"""
_FEWEST_TEXTS = 10


def measure_sparse_probing(subject: Subject, data: list[Path], work_dir: Path, *, seed: int) -> Any:
    """Sparse probing, as SAEBench's `SparseProbingEvalOutput`; accuracies of single classes are unstructured results.

    Parameters
    ----------
    subject : Subject
        The dictionary.
    data : list of Path
        Files of labelled texts, each a data set: .jsonl, .csv or .parquet with the columns ``text`` and ``label``.
        Every class gives as many texts as the smallest one has, and one in five of them tests. An empty list takes
        SAEBench's own data sets, from the hub.
    work_dir : Path
        An empty folder, for the activations of a data set.
    seed : int
        Draws texts of data sets on the hub, and seeds the probes.

    Raises
    ------
    ValueError
        If a file is not such a data set.
    OSError
        If a data set cannot be read.
    """
    config = SparseProbingEvalConfig(
        model_name=subject.model_name,
        random_seed=seed,
        llm_batch_size=subject.transformer.config.batch_size,
        llm_dtype=subject.transformer.config.dtype,
    )
    if data:
        texts = {path.stem: _labelled_texts(path) for path in data}
        if len(texts) < len(data):
            raise ValueError(f"two of the data sets have the same name: {', '.join(map(str, data))}")
        config.dataset_names = list(texts)
    else:
        texts = {name: _texts_on_the_hub(name, config) for name in config.dataset_names}
    subject.transformer.check_context_size(config.context_length)
    results, of_classes = {}, {}
    for name, (train, test) in texts.items():
        with _sizes_unchecked():
            set_seed(seed)
            activations = work_dir / f"{name}_activations.pt".replace("/", "_")
            _prepare(subject, config, train, test, activations)
            set_seed(seed)
            results[name], of_classes[name] = run_eval_single_dataset(
                name,
                config,
                subject.sae,
                None,
                subject.layer,
                subject.hook,
                str(subject.transformer.device),
                str(work_dir),
                save_activations=False,
            )
            activations.unlink()
    means = average_results_dictionaries({f"{name}_results": of for name, of in results.items()}, list(results))
    return SparseProbingEvalOutput(
        eval_config=config,
        eval_result_metrics={
            part: {name: value for name, value in means.items() if name.startswith(f"{part}_")}
            for part in ("llm", "sae")
        },
        eval_result_details=[{"dataset_name": f"{name}_results"} | of for name, of in results.items()],
        eval_result_unstructured={f"{name}_results": of for name, of in of_classes.items()},
        **provenance(subject),
    )


@contextmanager
def _sizes_unchecked() -> Iterator[None]:
    """Let two functions of SAEBench that call each other mean different sizes by one name, as they do.

    Their decorators refuse it with jaxtyping 0.3.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _summary(result: dict[str, Any]) -> str:
    latents, model = (result["eval_result_metrics"][part] for part in ("sae", "llm"))
    return (
        f"accuracy with one latent {latents['sae_top_1_test_accuracy']:.3f}, with five "
        f"{latents['sae_top_5_test_accuracy']:.3f}, with all {latents['sae_test_accuracy']:.3f}, "
        f"and with the model's own activations {model['llm_test_accuracy']:.3f}"
    )


SPARSE_PROBING = Evaluation("sparse_probing", "eval_output_schema_sparse_probing.json", _summary)


def _labelled_texts(path: Path) -> tuple[TextsOfClasses, TextsOfClasses]:
    """The texts of a file by their classes, as many of each, for training and for testing.

    Rows without a text or without a label are passed over.
    """
    readers = {
        ".jsonl": partial(pd.read_json, lines=True, dtype=False),
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} must be a {', '.join(readers)} file with the columns text and label")
    rows = reader(path)
    if missing := {"text", "label"} - set(rows.columns):
        raise ValueError(f"{path} has no column {min(missing)}; it has {', '.join(map(str, rows.columns))}")
    rows = rows.dropna(subset=["text", "label"]).convert_dtypes()  # whole numbers stay what they are
    of_class: TextsOfClasses = {}
    for text, label in zip(rows["text"], rows["label"], strict=True):
        if str(text).strip():
            of_class.setdefault(str(label), []).append(str(text))
    n_texts = min(map(len, of_class.values()), default=0)
    if len(of_class) < 2 or n_texts < _FEWEST_TEXTS:
        raise ValueError(
            f"{path} must have two classes or more with {_FEWEST_TEXTS} texts or more each; "
            f"it has {', '.join(f'{label} ({len(texts)})' for label, texts in of_class.items()) or 'none'}"
        )
    used = {label: texts[:n_texts] for label, texts in of_class.items()}
    test = {label: texts[::_HELD_OUT] for label, texts in used.items()}
    train = {label: [text for number, text in enumerate(texts) if number % _HELD_OUT] for label, texts in used.items()}
    return train, test


def _texts_on_the_hub(name: str, config: SparseProbingEvalConfig) -> tuple[TextsOfClasses, TextsOfClasses]:
    """The texts of one of SAEBench's data sets."""
    try:
        parts = get_multi_label_train_test_data(
            name, config.probe_train_set_size, config.probe_test_set_size, config.random_seed
        )
    except Exception as error:  # whatever datasets, the hub's client or the network raise
        raise OSError(
            f"no --probing-data is given, and SAEBench's data set {name} cannot be read from the hub "
            f"(some of them need datasets < 4): {error}"
        ) from error
    train, test = (filter_dataset(part, chosen_classes_per_dataset[name]) for part in parts)
    return train, test


def _prepare(
    subject: Subject, config: SparseProbingEvalConfig, train: TextsOfClasses, test: TextsOfClasses, path: Path
) -> None:
    """Write what SAEBench keeps of a data set for every dictionary: activations, and how well the model itself does."""
    activations = [
        {label: _activations(subject, texts, config.context_length) for label, texts in part.items()}
        for part in (train, test)
    ]
    means = [create_meaned_model_activations(part) for part in activations]
    _, accuracies = train_probe_on_activations(*means, use_sklearn=False, batch_size=250, epochs=100, lr=1e-2)
    of_model = {"llm_test_accuracy": accuracies}
    for k in config.k_values:
        of_model[f"llm_top_{k}_test_accuracy"] = train_probe_on_activations(*means, select_top_k=k)[1]
    torch.save({"train": activations[0], "test": activations[1], "llm_results": of_model}, path)


def _activations(subject: Subject, texts: list[str], context_size: int) -> Tensor:
    """Activations [n, context, d_in] of the beginnings of texts; 0 where there is no ordinary token."""
    special = special_tokens_of(subject.tokenizer)
    opening = [] if special.first is None else [special.first]
    tokens = torch.full((len(texts), context_size), subject.tokenizer.eos_token_id or 0)
    is_text = torch.zeros(tokens.shape, dtype=torch.bool)
    rows = subject.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=context_size - len(opening))
    for number, ids in enumerate(rows["input_ids"]):
        tokens[number, : len(opening) + len(ids)] = torch.tensor(opening + ids)
        is_text[number, len(opening) : len(opening) + len(ids)] = True
    is_text &= ~torch.isin(tokens, torch.tensor(special.ids))
    return subject.activations(tokens) * is_text[:, :, None].to(subject.transformer.device)
