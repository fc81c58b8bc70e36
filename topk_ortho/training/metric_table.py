"""Every number that a run reports, with its name and meaning: for the terminal, the report and docs/metrics.md.

A number that is not defined, such as a share of nothing, is null in the files, and "not measured" for readers.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from topk_ortho.evaluation.stability import LAGS


class Metric(NamedTuple):
    """A number in metrics.jsonl, in summary.json or in both."""

    key: str
    """Its name in the files"""
    meaning: str
    """A sentence or two for readers who do not know the project"""
    title: str = ""
    """What a headline of the terminal and of the report calls it; empty if it is no headline"""
    value: str = ""
    """How readers see it, a format of the summary; empty for four digits"""
    better: Literal["higher", "lower", "trade-off"] = "trade-off"
    detail: str = ""
    """What a headline adds, a format of the summary, left out if the summary lacks a value"""
    is_optional: bool = False
    """Whether a headline is left out if the summary lacks the metric, because only some sources allow it"""


class Headline(NamedTuple):
    """A metric of a finished run in words."""

    metric: Metric
    value: str
    detail: str


def _share(key: str, meaning: str) -> Metric:
    return Metric(key, meaning, value=f"{{{key}:.1%}}")


METRICS = [
    Metric("step", "Optimizer steps done; `steps` in the summary."),
    Metric("tokens", "Training tokens seen so far."),
    Metric("seconds", "Time spent on training, without evaluations."),
    Metric("lr", "Learning rate of the step."),
    Metric("loss", "What was minimised in the step, but for the penalty."),
    Metric(
        "fvu",
        "Fraction of variance unexplained: how much of the batch's variance the reconstruction misses.",
    ),
    Metric("sparsity", "The sparsity term of the loss, unweighted."),
    Metric("auxiliary", "Share of the residual that dead features cannot reconstruct; unweighted."),
    Metric(
        "penalty",
        "The penalty on similar features, unweighted. Activations are compared over the batch, in the summary over "
        "1,024 held-out tokens.",
    ),
    Metric("penalty_weight", "Weight of the penalty in the step; 0 in a step that goes without."),
    Metric("gradient_norm", "Norm of the gradient before it is clipped."),
    Metric(
        "explained_variance",
        "How much of the held-out activations the reconstruction keeps; 1 is all of their variance.",
        "Explained variance", "{explained_variance:.3f}", "higher",
    ),
    Metric("normalized_mse", "Squared error of the reconstruction over the squared norm of the held-out activations."),
    Metric(
        "l0",
        "Features active on a token, on average. Fewer are easier to read and reconstruct less.",
        "L0", "{l0:.1f}", "trade-off",
    ),
    Metric("held_out_l0", "The same on held-out tokens; `l0` in the summary."),
    Metric(
        "dead_fraction",
        "Features that have stopped firing and are of no use.",
        "Dead features", "{dead_fraction:.1%}", "lower", "{dead_features:,} features.",
    ),
    Metric("dead_features", "Number of features that have not fired for `--dead-after-tokens`."),
    Metric("density_histogram", "How many features fire on which share of the held-out tokens, and how many never."),
    Metric(
        "mean_max_decoder_cosine",
        "Cosine of a feature's direction to the nearest other one, on average. At 0 no two point alike; at 1 each has "
        "a double.",
        "Mean max decoder cosine", "{mean_max_decoder_cosine:.3f}", "lower",
    ),
    Metric(
        "penalised_pairs",
        "Pairs that are penalised: at most `penalty.fraction` of all, fewer if too few exceed tau. Activations are "
        "compared over 1,024 held-out tokens.",
    ),
    Metric(
        "pair_threshold",
        "Similarity of the least similar pair that is penalised, the k-th. Activations are compared over 1,024 "
        "held-out tokens.",
    ),
    Metric("tau", "Cosine that a pair must exceed to be penalised, if there is such a number."),
    Metric(
        "pair_jaccard",
        "Share of the penalised pairs that two successive evaluations have in common, if there are any.",
    ),
    Metric(
        "refresh_interval",
        "Uses of the penalty from one comparison of all pairs to the next, if `penalty.refresh` is not exact: between "
        "the last two or, if these are more, since the last.",
    ),
    _share(
        "refresh_recall",
        "Share of the exact selection that was found, at the last comparison of all pairs that was due, by the pairs "
        "that would have been compared in its place; 1 if it is certified.",
    ),
    Metric("refresh_recall_low", "Lower end of Wilson's 95% interval of this share."),
    Metric("refresh_recall_high", "Its upper end."),
    Metric("pair_stability", "Means over the windows of pairs.jsonl, if `--pairs-every` is not 0:"),
    Metric("pair_stability.n_pairs", "Pairs that were selected in the first step of a window, in its own batch."),
    *(
        _share(
            f"pair_stability.jaccard_lag_{lag}",
            f"Share of these pairs and of those selected {lag} step{'s' if lag > 1 else ''} later that is in both.",
        )
        for lag in LAGS
    ),
    _share("pair_stability.turnover", "Share of the selected pairs that were not selected in the step before."),
    _share("pair_stability.persistent_pairs", "Share of the pairs that were selected at all of these lags, up to 100."),
    Metric(
        "pair_relations",
        "What the selected pairs stand for in a known truth, as shares. A feature stands for its closest true one, if "
        "the cosine is 0.5 or more:",
    ),
    _share("pair_relations.unmatched", "One of the two features stands for nothing."),
    _share("pair_relations.same", "Both stand for the same true feature."),
    _share("pair_relations.parent_child", "For a parent and its child."),
    _share("pair_relations.siblings", "For two children of one parent."),
    _share("pair_relations.relatives", "For two others of one tree."),
    _share("pair_relations.unrelated", "For two true features of different trees."),
    Metric(
        "tokens_per_second",
        "Tokens learned from in a second, the penalty included.",
        "Training tokens/s", "{tokens_per_second:,.0f}", "higher",
        "The transformer alone: {transformer_tokens_per_second:,.0f}.",
    ),
    Metric("transformer_tokens_per_second", "Tokens that the transformer read in a second, if it ran."),
    Metric("left_out_tokens", "Tokens of the text that are neither trained on nor judged:"),
    Metric("left_out_tokens.special", "Special tokens, such as the beginning of a window, and separators."),
    Metric("left_out_tokens.high_norm", "Tokens with activations above `model.max_norm_ratio` times the median norm."),
    Metric("data_ms", "Time of a step spent waiting for activations, in milliseconds."),
    Metric("sae_ms", "Time of a step spent on the SAE, in milliseconds."),
    Metric("penalty_ms", "Time of a step spent on the penalty, in milliseconds."),
    Metric("memory_bytes", "Largest memory so far, of the GPU or, on a CPU, of the process."),
    Metric(
        "ce_loss_recovered",
        "How well the language model predicts with the reconstruction in place of its activations: 1 as before, "
        "0 as if they were removed. Special tokens keep theirs, and their predictions do not count.",
        "CE loss recovered", "{ce_loss_recovered:.3f}", "higher",
        "Loss {ce_loss_clean:.3f}, reconstructed {ce_loss_reconstructed:.3f}, removed {ce_loss_ablated:.3f}.",
        is_optional=True,
    ),
    Metric("ce_loss_clean", "Cross-entropy of the language model as it is, in nats for a prediction."),
    Metric("ce_loss_reconstructed", "The same with reconstructions in place of activations."),
    Metric("ce_loss_ablated", "The same with the activations' mean over all these tokens in their place."),
    Metric("token_classes", "Classes of tokens, such as first letters and endings, if `--token-classes` is given:"),
    Metric("token_classes.known", "Classes that a linear probe of the activations reads, with an F1 of 0.6 or more."),
    Metric("token_classes.with_latent", "Those of them whose latents have an F1 score of 0.5 or more."),
    Metric("token_classes.latent_f1", "F1 score of the latents of a class, on average over all known classes."),
    _share(
        "token_classes.absorption_rate",
        "How often the latents of a class are silent on a token whose class the probe reads, while another latent has "
        "most of the class's direction; on average over the classes with a latent.",
    ),
    Metric(
        "token_class",
        "The same for every known class by its name, with the F1 of the probe, the number of samples that were "
        "measured, and that of the latents into which the class is split.",
    ),
    Metric(
        "absorption_rate",
        "How often a parent's feature is silent, though the parent is there, because one of its children is too.",
        "Absorption rate", "{absorption_rate:.1%}", "lower", is_optional=True,
    ),
    Metric(
        "excess_absorption",
        "The absorption rate, less how often that feature is silent when the parent is there alone.",
        "Excess absorption", "{excess_absorption:.1%}", "lower", is_optional=True,
    ),
    Metric(
        "absorption_rate_level_1",
        "The absorption rate of parents at the top of the hierarchy; `absorption_rate_level_2` is that of their "
        "children, absorbed by grandchildren, and so on. Only where the hierarchy is so deep.",
    ),
    Metric("excess_absorption_level_1", "The excess absorption, level by level in the same way."),
    Metric(
        "parent_recall",
        "How often a parent's feature fires when the parent is there.",
        "Parent recall", "{parent_recall:.1%}", "higher", "Child recall: {child_recall:.1%}.", is_optional=True,
    ),
    Metric("child_recall", "How often a child's feature fires when the child is there."),
    Metric(
        "mcc",
        "Cosine of each true direction to the learned one that is matched to it, on average; 1 is perfect.",
        "MCC", "{mcc:.3f}", "higher", "Parents {mcc_parent:.3f}, children {mcc_child:.3f}.", is_optional=True,
    ),
    Metric("mcc_parent", "The same over parents alone."),
    Metric("mcc_child", "The same over children alone."),
    Metric(
        "f1",
        "How well the firing of a matched feature tells that the true one is there; 1 is perfect.",
        "F1", "{f1:.3f}", "higher", is_optional=True,
    ),
    Metric(
        "uniqueness",
        "Number of true features that are the closest one to a learned feature, over the number of learned features; 1 "
        "if no two of these are closest to the same one.",
    ),
]  # fmt: skip


def headlines(summary: Mapping[str, Any]) -> Iterator[Headline]:
    """The metrics that sum up a finished run: those that every run measures first, then those that only some do."""
    for metric in sorted((metric for metric in METRICS if metric.title), key=lambda metric: metric.is_optional):
        value = _filled(metric.value, summary)
        if value or metric.key in summary or not metric.is_optional:
            yield Headline(metric, value or "not measured", _filled(metric.detail, summary))


def as_markdown() -> str:
    """The table of all metrics as it stands in docs/metrics.md."""
    return "\n".join(["| metric | meaning |", "|---|---|", *(f"| `{m.key}` | {m.meaning} |" for m in METRICS)])


def is_number(value: object) -> bool:
    """Whether a value of the files is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _filled(template: str, values: Mapping[str, Any]) -> str:
    """The template with the values put in; empty if one is missing or no number."""
    try:
        return template.format_map({name: value for name, value in values.items() if is_number(value)})
    except KeyError:
        return ""
