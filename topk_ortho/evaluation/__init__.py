"""What a dictionary got right, where the true features are known."""

from topk_ortho.evaluation.ground_truth import ground_truth_metrics
from topk_ortho.evaluation.hierarchy import HierarchicalFeatures, hierarchical_features

__all__ = ["HierarchicalFeatures", "ground_truth_metrics", "hierarchical_features"]
