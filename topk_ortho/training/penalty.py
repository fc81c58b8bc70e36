"""The orthogonality penalty as a term of the training loss."""

import torch
from torch import Tensor, nn

from topk_ortho.modules import TopKOrthoLoss
from topk_ortho.training.config import PenaltyConfig


class Penalty(nn.Module):
    """`topk_ortho_loss` of the configured target; unweighted, and 0 if there is no target."""

    def __init__(self, config: PenaltyConfig):
        super().__init__()
        self.config = config
        self.op = TopKOrthoLoss(
            config.fraction,
            tau=config.tau,
            n_std=config.n_std,
            similarity=config.similarity,
            reduction=config.reduction,
        )

    def forward(self, W_dec: Tensor, features: Tensor, firing_rate: Tensor) -> Tensor:
        """Penalty of W_dec [n_features, d_in] or of features [batch, n_features].

        The priority is firing_rate [n_features].
        """
        if self.config.target == "none":
            return torch.zeros((), device=W_dec.device)
        x = W_dec.T if self.config.target == "decoder" else features
        result: Tensor = self.op(x, firing_rate if self.config.priority == "firing-rate" else None)
        return result
