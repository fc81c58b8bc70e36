"""Metrics of a dictionary that every source of activations allows. A metric that divides by nothing is None."""

from typing import Any

import torch
from torch import Tensor

from topk_ortho import nearest_columns
from topk_ortho.activations.source import mean_and_variance
from topk_ortho.sae import SparseAutoencoder, firing_counts

_TOKENS_AT_A_TIME = 1_024
_LOG10_EDGES = [-6 + 0.25 * n for n in range(25)]


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, activations: Tensor) -> dict[str, Any]:
    """Reconstruction and sparsity on activations [n, d_in], which may be on another device than the SAE.

    - ``explained_variance = 1 - sum ||x - x_rec||**2 / sum ||x - mean(x)||**2``, None if the activations are all equal
      up to rounding, see `mean_and_variance`;
    - ``normalized_mse = sum ||x - x_rec||**2 / sum ||x||**2``, None if the activations are all 0;
    - ``l0``, the mean number of features above 0 for a token;
    - ``density_histogram``: numbers of features by log10 of the share of tokens on which they fire, between the edges
      (what lies outside is counted in the first or last), and of features that are silent.

    All are None if there is no token.
    """
    n_tokens = len(activations)
    if n_tokens == 0:
        return dict.fromkeys(("explained_variance", "normalized_mse", "l0", "density_histogram"))
    squared_error = squared_norm = 0.0
    counts = torch.zeros(sae.n_features, dtype=torch.int64)
    for part in activations.split(_TOKENS_AT_A_TIME):
        x = part.to(sae.W_dec.device).float()
        output = sae(x)
        counts += firing_counts(output.features).cpu()
        squared_error += (x - output.reconstruction).double().square().sum().item()
        squared_norm += x.double().square().sum().item()
    _, variance = mean_and_variance(activations)
    fvu = ratio(squared_error, n_tokens * variance)
    return {
        "explained_variance": None if fvu is None else 1 - fvu,
        "normalized_mse": ratio(squared_error, squared_norm),
        "l0": counts.sum().item() / n_tokens,
        "density_histogram": _density_histogram(counts, n_tokens),
    }


@torch.no_grad()
def mean_max_cosine(W_dec: Tensor) -> float | None:
    """Mean over the directions in W_dec [n_features, d_in] of the largest signed cosine to another direction.

    It is None if there are fewer than two.
    """
    if len(W_dec) < 2:
        return None
    return nearest_columns(W_dec.float().T).cosines.mean().item()


def ratio(numerator: float, denominator: float) -> float | None:
    """The numerator divided by the denominator; None if the denominator is 0."""
    return numerator / denominator if denominator else None


def _density_histogram(counts: Tensor, n_tokens: int) -> dict[str, Any]:
    log10 = (counts[counts > 0].double() / n_tokens).log10().clamp(_LOG10_EDGES[0], _LOG10_EDGES[-1])
    histogram = torch.histogram(log10, torch.tensor(_LOG10_EDGES, dtype=torch.float64)).hist
    return {
        "log10_edges": _LOG10_EDGES,
        "counts": [int(n) for n in histogram],
        "silent": int((counts == 0).sum()),
    }
