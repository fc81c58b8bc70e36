"""The orthogonality penalty as a term of the training loss, computed by the public ops."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from topk_ortho import MaxCosineLoss, TopKOrthoLoss, TopKPairs, nearest_columns, pair_jaccard, topk_pairs
from topk_ortho.definitions import k_from_fraction
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder, activation_norms
from topk_ortho.training.config import PenaltyConfig
from topk_ortho.training.schedules import warmup


class PenaltyTerm(NamedTuple):
    """The penalty of one step, unweighted, with its gradient."""

    value: Tensor
    """The penalty, []"""
    targets: tuple[Tensor, ...]
    """What the penalty depends on, with the SAE's graph behind it: W_dec, the values of the features, or both"""
    gradients: tuple[Tensor, ...]
    """Gradient of the value with respect to each target, in the target's shape"""


class Penalty(nn.Module):
    """The configured op on the configured target, of value and gradient.

    The gradient is computed apart from the SAE's, so that its time is known and its memory is free again before the
    SAE's backward pass.

    Parameters
    ----------
    config : PenaltyConfig
        Target, op and its arguments.
    generator : torch.Generator
        Draws chunks and random pairs.
    """

    def __init__(self, config: PenaltyConfig, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.generator = generator
        self.topk_pairs = TopKOrthoLoss(config.fraction, reduction=config.reduction, **self._selection())
        self.max_cosine = MaxCosineLoss(config.n_chunks, generator=generator)

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
        targets = (sae.W_dec, _values(features))
        W_dec, values = leaves = [target.detach().requires_grad_() for target in targets]
        value = self._value(W_dec, _with_values(features, values), firing_rate)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        used = [pair for pair in zip(targets, gradients, strict=True) if pair[1] is not None]
        return PenaltyTerm(value.detach(), *zip(*used, strict=True))

    def _value(self, W_dec: Tensor, features: Tensor | ActiveFeatures, firing_rate: Tensor) -> Tensor:
        """The penalty, differentiable in those of its arguments that it depends on."""
        config = self.config
        value: Tensor
        priority = firing_rate if config.priority == "firing-rate" else None
        x = W_dec.T if config.target == "decoder" else _matrix(features)
        match config.op:
            case "topk_pairs":
                value = self.topk_pairs(x, priority)
            case "max_cosine":
                value = self.max_cosine(x)
            case "c2r":
                value = self._activation_weighted(x, features)
            case "random_pairs":
                value = self._of_random_pairs(W_dec, priority)
        return value

    def _activation_weighted(self, x: Tensor, features: Tensor | ActiveFeatures) -> Tensor:
        """The penalty of C2R (arXiv:2606.30609): like OrtSAE's, weighted by how active both features of a pair are.

        ``mean_i (n_i + n_j) * max(0, cosine(i, j)) ** 2``, where j is the most similar other feature of i's random
        chunk and n the L2 norm of a feature's activations over the batch. The gradient goes to both.
        """
        nearest = nearest_columns(x, self.config.n_chunks, generator=self.generator)
        norms = activation_norms(features)
        return ((norms + norms[nearest.partners]) * nearest.cosines.clamp_min(0).square()).mean()

    def _of_random_pairs(self, W_dec: Tensor, priority: Tensor | None) -> Tensor:
        """A control of `topk_ortho_loss`: the same number of pairs, drawn at random with replacement.

        Takes memory for two copies of the directions of every pair.
        """
        config, n = self.config, len(W_dec)
        size = (k_from_fraction(n, config.fraction),)
        rows = torch.randint(n, size, generator=self.generator)
        cols = torch.randint(n - 1, size, generator=self.generator)
        cols += cols >= rows
        W_hat = normalize(W_dec, dim=1)
        of_rows, of_cols = W_hat[rows], W_hat[cols]
        if priority is not None:
            is_held = (priority[rows] > priority[cols])[:, None]
            of_rows = torch.where(is_held, of_rows.detach(), of_rows)
            is_held = (priority[cols] > priority[rows])[:, None]
            of_cols = torch.where(is_held, of_cols.detach(), of_cols)
        cosines = (of_rows * of_cols).sum(dim=1)
        if config.similarity == "positive":
            cosines = cosines.clamp_min(0)
        squares = cosines.square()
        return squares.mean() if config.reduction == "mean" else squares.sum()

    @torch.no_grad()
    def select(self, sae: SparseAutoencoder, features: Tensor | ActiveFeatures) -> TopKPairs:
        """The most similar pairs of the target (of the decoder if there is none), by fraction, tau and similarity."""
        is_decoder = self.config.target != "activations"
        x = sae.W_dec.detach().T if is_decoder else _matrix(_with_values(features, _values(features).detach()))
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


def _with_values(features: Tensor | ActiveFeatures, values: Tensor) -> Tensor | ActiveFeatures:
    """The same features with other values."""
    return features._replace(values=values) if isinstance(features, ActiveFeatures) else values


def _matrix(features: Tensor | ActiveFeatures) -> Tensor:
    """Features [batch, n_features] as the public ops take them."""
    return features.to_sparse() if isinstance(features, ActiveFeatures) else features
