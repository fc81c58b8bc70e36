"""SAEBench's core metrics: reconstruction, sparsity, and what reconstructions do to the model's predictions."""

from typing import Any

import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.eval_output import (
    CoreEvalOutput,
    CoreMetricCategories,
    MiscMetrics,
    ModelBehaviorPreservationMetrics,
    ModelPerformancePreservationMetrics,
    ReconstructionQualityMetrics,
    ShrinkageMetrics,
    SparsityMetrics,
    TokenStatsMetrics,
)
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

_WINDOWS_AT_A_TIME = 64


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
    return CoreEvalOutput(
        eval_config=config,
        eval_result_metrics=CoreMetricCategories(
            model_behavior_preservation=ModelBehaviorPreservationMetrics(**metrics["model_behavior_preservation"]),
            model_performance_preservation=ModelPerformancePreservationMetrics(
                **metrics["model_performance_preservation"]
            ),
            reconstruction_quality=ReconstructionQualityMetrics(**metrics["reconstruction_quality"]),
            shrinkage=ShrinkageMetrics(**metrics["shrinkage"]),
            sparsity=SparsityMetrics(**metrics["sparsity"]),
            token_stats=TokenStatsMetrics(**metrics["token_stats"]),
            misc_metrics=MiscMetrics(**metrics["misc_metrics"]),
        ),
        eval_result_details=convert_feature_metrics(replace_nans_with_negative_one(of_features)),
        eval_result_unstructured={"explained_variance": _explained_variance(subject, windows, ignored)},
        **provenance(subject),
    )


@torch.no_grad()
def _explained_variance(subject: Subject, windows: Tensor, ignored: set[int]) -> float:
    """``1 - sum ||x - x_rec||**2 / sum ||x - mean(x)||**2`` over ordinary tokens; SAEBench has no such figure."""
    is_ordinary = ~torch.isin(windows, torch.tensor(sorted(ignored)))
    n, squared_error = 0, 0.0
    total, squares = torch.zeros(subject.sae.cfg.d_in, dtype=torch.float64), 0.0
    for part, here in zip(windows.split(_WINDOWS_AT_A_TIME), is_ordinary.split(_WINDOWS_AT_A_TIME), strict=True):
        x = subject.activations(part)[here.to(subject.transformer.device)]
        squared_error += (x - subject.sae(x)).double().square().sum().item()
        n += len(x)
        total += x.double().sum(dim=0).cpu()
        squares += x.double().square().sum().item()
    return 1 - squared_error / (squares - total.square().sum().item() / n)


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
