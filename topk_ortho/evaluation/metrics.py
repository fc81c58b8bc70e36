"""Metrics of a dictionary that every source of activations allows. A metric that divides by nothing is None."""

from typing import Any

import torch
from torch import Tensor

from topk_ortho import distributed, nearest_columns
from topk_ortho.activations.source import mean_and_variance
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.distributed.ranks import Ranks
from topk_ortho.sae import SparseAutoencoder, firing_counts

_TOKENS_AT_A_TIME = 1_024
_LOG10_EDGES = [-6 + 0.25 * n for n in range(25)]


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, activations: Tensor) -> dict[str, Any]:
    """Reconstruction and sparsity on activations [n, d_in], which may be on another device than the SAE.

    Where processes hold the SAE together, each passes other activations, and gets the result for those of all.

    - ``explained_variance = 1 - sum ||x - x_rec||**2 / sum ||x - mean(x)||**2``, None if the activations are all equal
      up to rounding, see `mean_and_variance`;
    - ``normalized_mse = sum ||x - x_rec||**2 / sum ||x||**2``, None if the activations are all 0;
    - ``l0``, the mean number of features above 0 for a token;
    - ``density_histogram``: numbers of features by log10 of the share of tokens on which they fire, between the edges
      (what lies outside is counted in the first or last), and of features that are silent.

    All are None if there is no token.
    """
    parallel = sae.parallel
    n_tokens = parallel.count_of_all(activations[:, 0])
    if n_tokens == 0:
        return dict.fromkeys(("explained_variance", "normalized_mse", "l0", "density_histogram"))
    squared_error = squared_norm = 0.0
    counts = torch.zeros(len(sae.W_dec), dtype=torch.int64)
    for x in parallel.shared_parts(activations, _TOKENS_AT_A_TIME, sae.W_dec.device):
        output = sae(x)
        counts += firing_counts(output.features).cpu()
        squared_error += (x - output.reconstruction).double().square().sum().item()
        squared_norm += x.double().square().sum().item()
    squared_error, squared_norm = parallel.batch.sum(torch.tensor([squared_error, squared_norm]).double()).tolist()
    counts = parallel.gather_features(parallel.batch.sum(counts), sae.n_features)
    _, variance = mean_and_variance(activations, parallel.world)
    fvu = ratio(squared_error, n_tokens * variance)
    return {
        "explained_variance": None if fvu is None else 1 - fvu,
        "normalized_mse": ratio(squared_error, squared_norm),
        "l0": counts.sum().item() / n_tokens,
        "density_histogram": _density_histogram(counts, n_tokens),
    }


@torch.no_grad()
def mean_max_cosine(W_dec: Tensor, parallel: Parallel | None = None) -> float | None:
    """Mean over the directions in W_dec [n_features, d_in] of the largest signed cosine to another direction.

    It is None if there are fewer than two. W_dec may be the part of a process.
    """
    ranks = Ranks.alone() if parallel is None else parallel.features
    n_features = int(ranks.sum(torch.tensor(len(W_dec))))
    if n_features < 2:
        return None
    if ranks.size == 1:
        return nearest_columns(W_dec.float().T).cosines.mean().item()
    _, cosines = distributed.largest_cosines(W_dec.float().T, group=ranks.group)
    return ranks.sum(cosines.sum()).item() / n_features


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
