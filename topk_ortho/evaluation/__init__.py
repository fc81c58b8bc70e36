"""What a dictionary is judged by: reconstruction, sparsity, the language model's loss, and known true features."""

from topk_ortho.evaluation.ground_truth import ground_truth_metrics
from topk_ortho.evaluation.metrics import evaluate, mean_max_cosine, ratio
from topk_ortho.evaluation.source_metrics import source_metrics

__all__ = ["evaluate", "ground_truth_metrics", "mean_max_cosine", "ratio", "source_metrics"]
