"""Exact top-k most similar feature pairs, as a differentiable penalty, without the N x N matrix."""

from topk_ortho.backends.registry import available_backends
from topk_ortho.functional import max_cosine_loss, nearest_columns, topk_ortho_loss, topk_pairs
from topk_ortho.modules import MaxCosineLoss, TopKOrthoLoss
from topk_ortho.pairs import NearestColumns, TopKPairs, pair_jaccard
from topk_ortho.refresh import RefreshedPairs
from topk_ortho.sparse_features import SparseFeatures
from topk_ortho.warm_start import initial_state

__all__ = [
    "MaxCosineLoss",
    "NearestColumns",
    "RefreshedPairs",
    "SparseFeatures",
    "TopKOrthoLoss",
    "TopKPairs",
    "available_backends",
    "initial_state",
    "max_cosine_loss",
    "nearest_columns",
    "pair_jaccard",
    "topk_ortho_loss",
    "topk_pairs",
]

__version__ = "0.1.0"
