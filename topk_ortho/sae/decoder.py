"""The decoder's directions.

They are the rows of W_dec [n_features, d_in], so the columns of the matrix W_dec.T [d_in, n_features] that the penalty
sees.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


@torch.no_grad()
def normalize_decoder(W_dec: Tensor) -> None:
    """Scale every direction of W_dec [n_features, d_in] to unit length, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min(1e-12))


def normalize_after_step(optimizer: Optimizer, W_dec: Tensor) -> RemovableHandle:
    """Normalise W_dec after every step of the optimizer, by a hook; returns the hook's handle."""

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        normalize_decoder(W_dec)

    return optimizer.register_step_post_hook(hook)
