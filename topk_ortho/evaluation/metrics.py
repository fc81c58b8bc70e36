"""Metrics of a dictionary that every source of activations allows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from topk_ortho.sae import SparseAutoencoder, firing_counts

_LOG10_EDGES = [-6 + 0.25 * n for n in range(25)]


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Reconstruction and sparsity over all the batches [batch, d_in].

    - ``explained_variance = 1 - sum ||x - x_rec||**2 / sum ||x - mean(x)||**2``;
    - ``normalized_mse = sum ||x - x_rec||**2 / sum ||x||**2``;
    - ``l0``, the mean number of features above 0 for a token;
    - ``density_histogram``: numbers of features by log10 of the share of tokens on which they fire, between the edges
      (what lies outside is counted in the first or last), and of features that are silent.
    """
    n_tokens = 0
    squared_error = squared_norm = 0.0
    total = torch.zeros(1, dtype=torch.float64)
    counts = torch.zeros(sae.n_features, dtype=torch.int64)
    for x in batches:
        output = sae(x)
        n_tokens += x.shape[0]
        counts += firing_counts(output.features).cpu()
        squared_error += (x - output.reconstruction).double().square().sum().item()
        squared_norm += x.double().square().sum().item()
        total = total + x.double().sum(dim=0).cpu()
    squared_deviation = squared_norm - total.square().sum().item() / n_tokens
    return {
        "explained_variance": 1 - squared_error / squared_deviation,
        "normalized_mse": squared_error / squared_norm,
        "l0": counts.sum().item() / n_tokens,
        "density_histogram": _density_histogram(counts, n_tokens),
    }


@torch.no_grad()
def mean_max_cosine(W_dec: Tensor) -> float:
    """Mean over the directions in W_dec [n_features, d_in] of the largest signed cosine to another direction."""
    # no public op returns these cosines: `max_cosine_loss` is their mean square
    W_hat = normalize(W_dec.float(), dim=1)
    largest = []
    for first, rows in enumerate(W_hat.split(1024)):
        cosine = rows @ W_hat.T
        own = torch.arange(rows.shape[0], device=rows.device)
        cosine[own, first * 1024 + own] = -1.0
        largest.append(cosine.amax(dim=1))
    return torch.cat(largest).mean().item()


def _density_histogram(counts: Tensor, n_tokens: int) -> dict[str, Any]:
    log10 = (counts[counts > 0].double() / n_tokens).log10().clamp(_LOG10_EDGES[0], _LOG10_EDGES[-1])
    histogram = torch.histogram(log10, torch.tensor(_LOG10_EDGES, dtype=torch.float64)).hist
    return {
        "log10_edges": _LOG10_EDGES,
        "counts": [int(n) for n in histogram],
        "silent": int((counts == 0).sum()),
    }
