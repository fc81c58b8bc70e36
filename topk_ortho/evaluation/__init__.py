"""What a dictionary is judged by: reconstruction, sparsity, the language model's loss, and known true features."""

from topk_ortho.evaluation.ground_truth import ground_truth_metrics
from topk_ortho.evaluation.metrics import evaluate, mean_max_cosine, ratio
from topk_ortho.evaluation.source_metrics import source_metrics
from topk_ortho.evaluation.stability import PairStability, PairWindows, mean_stability, pair_relations

__all__ = [
    "PairStability",
    "PairWindows",
    "evaluate",
    "ground_truth_metrics",
    "mean_max_cosine",
    "mean_stability",
    "pair_relations",
    "ratio",
    "source_metrics",
]
