"""SAEBench's core metrics: reconstruction, sparsity, and what reconstructions do to the model's predictions."""

from typing import Any

import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.eval_output import CoreEvalOutput
from sae_bench.evals.core.main import (
    calculate_misc_metrics,
    convert_feature_metrics,
    replace_nans_with_negative_one,
    run_evals,
)
from torch import Tensor

from topk_ortho.activations.config import TextConfig
from topk_ortho.evaluation.saebench.output import Evaluation, provenance
from topk_ortho.evaluation.saebench.subject import Subject


def measure_core(subject: Subject, text: TextConfig, *, n_batches: int) -> Any:
    """The core metrics, as SAEBench's `CoreEvalOutput`. Its ``eval_config.dataset`` is the text.

    ``eval_result_unstructured`` has the explained variance as `train.py` defines it.

    Parameters
    ----------
    subject : Subject
        The dictionary.
    text : TextConfig
        What the model reads. It is begun anew if it is shorter than what is asked for.
    n_batches : int
        Batches of the model's batch size, for either part of the metrics.
    """
    config = CoreEvalConfig(
        model_name=subject.model_name,
        llm_dtype=subject.transformer.config.dtype,
        batch_size_prompts=subject.transformer.config.batch_size,
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        dataset=text.source,
        context_size=text.context_size,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    tokenizer = subject.tokenizer
    windows = subject.windows(text)[: n_batches * config.batch_size_prompts]
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    metrics, of_features = run_evals(
        subject.sae,
        _Windows(windows.to(subject.transformer.device)),
        subject.transformer.bridge,
        config,
        ignore_tokens=ignored,
        verbose=True,
    )
    metrics = replace_nans_with_negative_one(metrics | {"misc_metrics": calculate_misc_metrics(of_features)})
    x = subject.activations(windows)[~torch.isin(windows, torch.tensor(sorted(ignored)))]
    return CoreEvalOutput(
        eval_config=config,
        eval_result_metrics=metrics,
        eval_result_details=convert_feature_metrics(replace_nans_with_negative_one(of_features)),
        eval_result_unstructured={"explained_variance": subject.explained_variance(x)},
        **provenance(subject),
    )


def _summary(result: dict[str, Any]) -> str:
    metrics = result["eval_result_metrics"]
    predictions = metrics["model_performance_preservation"]
    return (
        f"explained variance {result['eval_result_unstructured']['explained_variance']:.4f}, "
        f"cross-entropy score {predictions['ce_loss_score']:.4f}, "
        f"L0 {metrics['sparsity']['l0']:.1f}, features that fired {metrics['misc_metrics']['frac_alive']:.1%}"
    )


CORE = Evaluation("core", "eval_output_schema_core.json", _summary)


class _Windows:
    """Windows of token ids in the order of the text, over and over, with what SAEBench uses of an ActivationsStore."""

    def __init__(self, windows: Tensor):
        self._windows = windows
        self._next = 0
        self.context_size = windows.shape[1]

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        """The next windows [batch_size, context]."""
        index = torch.arange(self._next, self._next + batch_size) % len(self._windows)
        self._next += batch_size
        return self._windows[index]

    def reset_input_dataset(self) -> None:
        """Begin anew."""
        self._next = 0
