"""The orthogonality penalty as a term of the training loss, computed by the public ops."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from topk_ortho import MaxCosineLoss, TopKOrthoLoss, TopKPairs, pair_jaccard, topk_pairs
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder
from topk_ortho.training.config import PenaltyConfig
from topk_ortho.training.schedules import warmup


class PenaltyTerm(NamedTuple):
    """The penalty of one step, unweighted, with its gradient."""

    value: Tensor
    """The penalty, []"""
    target: Tensor
    """What the penalty is a function of, with the SAE's graph behind it: W_dec, or the values of the features"""
    gradient: Tensor
    """Gradient of the value with respect to the target, in the target's shape"""


class Penalty(nn.Module):
    """`topk_ortho_loss` or `max_cosine_loss` of the configured target.

    Its gradient is computed apart from the SAE's, so that its time is known and its memory is free again before the
    SAE's backward pass.

    Parameters
    ----------
    config : PenaltyConfig
        Target, op and its arguments.
    generator : torch.Generator
        Draws the chunks of max_cosine.
    """

    def __init__(self, config: PenaltyConfig, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.op: TopKOrthoLoss | MaxCosineLoss
        if config.op == "max_cosine":
            self.op = MaxCosineLoss(config.n_chunks, generator=generator)
        else:
            self.op = TopKOrthoLoss(config.fraction, reduction=config.reduction, **self._selection())

    def weight(self, step: int, steps: int) -> float:
        """Weight in the loss of a step, counted from 0, in a run of `steps`; 0 in a step that goes without."""
        config = self.config
        if config.target == "none" or step % config.every:
            return 0.0
        return config.weight * config.every * warmup(step, config.warmup_fraction * steps)

    def forward(self, sae: SparseAutoencoder, features: Tensor | ActiveFeatures, firing_rate: Tensor) -> PenaltyTerm:
        """Value and gradient for an SAE and its features [batch, n_features].

        If the configuration says so, the feature of a pair that fires more often by firing_rate [n_features] is held.
        """
        target = sae.W_dec if self.config.target == "decoder" else _values(features)
        leaf = target.detach().requires_grad_()
        x = leaf.T if self.config.target == "decoder" else _with_values(features, leaf)
        if isinstance(self.op, TopKOrthoLoss):
            value = self.op(x, firing_rate if self.config.priority == "firing-rate" else None)
        else:
            value = self.op(x)
        (gradient,) = torch.autograd.grad(value, leaf)
        return PenaltyTerm(value.detach(), target, gradient)

    @torch.no_grad()
    def select(self, sae: SparseAutoencoder, features: Tensor | ActiveFeatures) -> TopKPairs:
        """The most similar pairs of the target (of the decoder if there is none), by fraction, tau and similarity."""
        is_decoder = self.config.target != "activations"
        x = sae.W_dec.detach().T if is_decoder else _with_values(features, _values(features).detach())
        return topk_pairs(x, self.config.fraction, **self._selection())

    def _selection(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("tau", "n_std", "similarity")}


class PairStability:
    """How many of the most similar pairs stay the same from one evaluation to the next."""

    def __init__(self) -> None:
        self._last: TopKPairs | None = None

    def jaccard_with_last(self, pairs: TopKPairs) -> float | None:
        """`pair_jaccard` with the pairs of the last call; None at the first, and if neither has a pair to share."""
        last, self._last = self._last, pairs
        if last is None or last.rows.numel() == pairs.rows.numel() == 0:
            return None
        device = pairs.rows.device
        return pair_jaccard(last._replace(rows=last.rows.to(device), cols=last.cols.to(device)), pairs)

    def state_dict(self) -> dict[str, Tensor]:
        """The last pairs as tensors by name; empty before the first call."""
        fields = {} if self._last is None else self._last._asdict()
        fields.pop("tau", None)  # it may be None, and nothing is compared with it
        return {name: torch.as_tensor(value) for name, value in fields.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the last pairs."""
        if state:
            sizes: dict[str, Any] = {name: int(state[name]) for name in ("n_features", "k")}
            self._last = TopKPairs(**(state | sizes), tau=None)


def _values(features: Tensor | ActiveFeatures) -> Tensor:
    return features.values if isinstance(features, ActiveFeatures) else features


def _with_values(features: Tensor | ActiveFeatures, values: Tensor) -> Tensor:
    """The same features with other values, as the public ops take them."""
    return features._replace(values=values).to_sparse() if isinstance(features, ActiveFeatures) else values
