"""What a dictionary is judged by."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from topk_ortho.sae import StandardSAE


@torch.no_grad()
def evaluate(sae: StandardSAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """Explained variance and L0 over all the batches [batch, d_in].

    ``explained_variance = 1 - sum ||x - x_rec||**2 / sum ||x - mean(x)||**2``; ``l0`` is the mean number of features
    above 0.
    """
    n_tokens = n_active = 0
    squared_error = squared_norm = 0.0
    total = torch.zeros(1, dtype=torch.float64)
    for x in batches:
        reconstruction, features = sae(x)
        n_tokens += x.shape[0]
        n_active += int((features > 0).sum())
        squared_error += (x - reconstruction).double().square().sum().item()
        squared_norm += x.double().square().sum().item()
        total = total + x.double().sum(dim=0).cpu()
    squared_deviation = squared_norm - total.square().sum().item() / n_tokens
    return {"explained_variance": 1 - squared_error / squared_deviation, "l0": n_active / n_tokens}


@torch.no_grad()
def mean_max_cosine(W_dec: Tensor) -> float:
    """Mean over directions of W_dec [n_features, d_in] of the largest signed cosine to another one."""
    W_hat = normalize(W_dec.float(), dim=1)
    largest = []
    for first, rows in enumerate(W_hat.split(1024)):
        cosine = rows @ W_hat.T
        own = torch.arange(rows.shape[0], device=rows.device)
        cosine[own, first * 1024 + own] = -1.0
        largest.append(cosine.amax(dim=1))
    return torch.cat(largest).mean().item()
