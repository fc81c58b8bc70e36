"""The decoder's directions and how they are kept at unit length.

They are the rows of W_dec [n_features, d_in], so the columns of the matrix W_dec.T [d_in, n_features] that the penalty
sees. By name:

- "none": lengths are free; an L1 term is then weighted by them.
- "l2": before a step of the optimizer the part of the gradient along a direction is removed, after it directions are
  scaled to unit length. The part removed would only change the length, yet enter Adam's moments.
- "l2-hook": directions are scaled after the step alone.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DecoderNorm = Literal["none", "l2", "l2-hook"]


@torch.no_grad()
def normalize_decoder(W_dec: Tensor) -> None:
    """Scale every direction of W_dec [n_features, d_in] to unit length, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def remove_parallel_gradient(W_dec: nn.Parameter) -> None:
    """Take from the gradient of W_dec [n_features, d_in], whose rows have unit length, its part along each row."""
    if W_dec.grad is not None:
        W_dec.grad.sub_((W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec)


def keep_normalized(optimizer: Optimizer, W_dec: nn.Parameter, decoder_norm: DecoderNorm) -> None:
    """Register the hooks on an optimizer that keep W_dec [n_features, d_in] normalised as `decoder_norm` says."""

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        remove_parallel_gradient(W_dec)

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        normalize_decoder(W_dec)

    if decoder_norm == "l2":
        optimizer.register_step_pre_hook(before)
    if decoder_norm != "none":
        optimizer.register_step_post_hook(after)
