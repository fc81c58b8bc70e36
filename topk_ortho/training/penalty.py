"""The orthogonality penalty as a term of the training loss, computed by the public ops."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from topk_ortho import MaxCosineLoss, TopKOrthoLoss, TopKPairs, distributed, nearest_columns, topk_pairs
from topk_ortho.definitions import EPS, k_from_fraction
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder, activation_norms
from topk_ortho.training.config import PenaltyConfig
from topk_ortho.training.schedules import warmup

_GATHERED_NUMBERS = 2**22
"""Numbers of a matrix that are gathered at a time for the features of pairs; bounds memory"""


class PenaltyTerm(NamedTuple):
    """The penalty of one step, unweighted, with its gradient."""

    value: Tensor
    """The penalty, []"""
    targets: tuple[Tensor, ...]
    """What the penalty depends on, with the SAE's graph behind it: some of W_dec, the features' values and W_enc"""
    gradients: tuple[Tensor, ...]
    """Gradient of the value with respect to each target, in the target's shape"""


class Penalty(nn.Module):
    """The configured op on the configured target, of value and gradient.

    The gradient is computed apart from the SAE's, so that its time is known and its memory is free again before the
    SAE's backward pass.

    Processes that train together find the pairs together. What no distributed op does (encoder inhibition, kept pairs,
    random pairs) each of them does for itself, with a whole dictionary.

    Parameters
    ----------
    config : PenaltyConfig
        Target, op and its arguments.
    generator : torch.Generator
        Draws chunks and random pairs.
    parallel : Parallel, optional
        The processes; this one alone by default.
    """

    def __init__(self, config: PenaltyConfig, generator: torch.Generator, parallel: Parallel | None = None):
        super().__init__()
        self.config = config
        self.generator = generator
        self.parallel = Parallel.alone() if parallel is None else parallel
        has_op = config.op == "max_cosine" or (config.op == "topk_pairs" and config.refresh == "exact")
        self._is_shared = self.parallel.world.size > 1 and has_op and not config.encoder_inhibition
        self.topk_pairs = TopKOrthoLoss(
            config.fraction,
            reduction=config.reduction,
            refresh=config.refresh,
            recall=config.refresh_recall,
            margin=config.refresh_margin,
            **self._selection(),
        )
        self.max_cosine = MaxCosineLoss(config.n_chunks, generator=generator)

    def weight(self, step: int, steps: int) -> float:
        """Weight in the loss of a step, counted from 0, in a run of `steps`; 0 in a step that goes without."""
        config = self.config
        if config.target == "none" or step % config.every:
            return 0.0
        return config.weight * config.every * warmup(step, config.warmup_fraction * steps)

    def forward(self, sae: SparseAutoencoder, features: Tensor | ActiveFeatures, firing_rate: Tensor) -> PenaltyTerm:
        """Value and gradient for an SAE and its features [batch, n_features].

        If the configuration says so, the feature of a pair that fires more often by firing_rate [n_features] gets no
        gradient.
        """
        targets: tuple[Tensor, ...] = (sae.W_dec, _values(features))
        W_dec, values = leaves = [target.detach().requires_grad_() for target in targets]
        pairs = None
        if self.config.encoder_inhibition:  # needs the pairs themselves, not only the loss of them
            pairs = self._pairs(W_dec, firing_rate)
            value = self._reduced(pairs.values.square())
        else:
            value = self._value(W_dec, _with_values(features, values), firing_rate)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        value = value.detach()
        if pairs is not None:
            inhibition, gradient = encoder_inhibition(sae.W_enc, sae.W_dec, *_rarer_first(pairs, firing_rate))
            value = value + self.config.encoder_inhibition * inhibition
            targets, gradients = (*targets, sae.W_enc), (*gradients, self.config.encoder_inhibition * gradient)
        if not self._is_shared and self.parallel.batch.size > 1:  # gradients will be summed over these processes
            gradients = tuple(None if grad is None else grad / self.parallel.batch.size for grad in gradients)
        used = [pair for pair in zip(targets, gradients, strict=True) if pair[1] is not None]
        return PenaltyTerm(value, *zip(*used, strict=True))

    def refreshes(self) -> dict[str, float | None]:
        """How the kept selection fares, None for what was not measured yet; empty if all pairs are always compared."""
        pairs = self.topk_pairs.pairs
        if pairs is None or self.config.target == "none":
            return {}
        low, high = pairs.recall_interval
        numbers = {"refresh_recall": pairs.recall, "refresh_recall_low": low, "refresh_recall_high": high}
        measured = {name: None if math.isnan(number) else number for name, number in numbers.items()}
        return {"refresh_interval": pairs.interval, **measured}

    def _value(self, W_dec: Tensor, features: Tensor | ActiveFeatures, firing_rate: Tensor) -> Tensor:
        """The penalty, differentiable in those of its arguments that it depends on."""
        config = self.config
        value: Tensor
        if self._is_shared:
            return self._value_of_all(W_dec, features, firing_rate)
        priority = self._priority(firing_rate)
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

    def _value_of_all(self, W_dec: Tensor, features: Tensor | ActiveFeatures, firing_rate: Tensor) -> Tensor:
        """The penalty of what all processes hold; each passes columns that no other does."""
        config, group = self.config, self.parallel.world.group
        x, part = self._columns(W_dec, features)
        if config.op == "max_cosine":
            return distributed.max_cosine_loss(x, config.n_chunks, group=group, generator=self.generator)
        priority = self._priority(firing_rate)
        return distributed.topk_ortho_loss(
            x,
            config.fraction,
            group=group,
            reduction=config.reduction,
            priority=None if priority is None else priority[part],
            state=self.topk_pairs.state,
            **self._selection(),
        )

    def _columns(self, W_dec: Tensor, features: Tensor | ActiveFeatures) -> tuple[Tensor, slice]:
        """The columns that this process passes to a distributed op, and which of its features they are."""
        if self.config.target == "activations":
            return _matrix(features), slice(None)
        rows = self.parallel.batch.part(len(W_dec))
        part = slice(rows.start, rows.stop)
        return W_dec[part].T, part

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
        return self._reduced(cosines.square())

    def _pairs(self, W_dec: Tensor, firing_rate: Tensor) -> TopKPairs:
        """The pairs that are penalised, whose cosines are differentiable in W_dec."""
        priority = self._priority(firing_rate)
        if self.topk_pairs.pairs is not None:
            pairs: TopKPairs = self.topk_pairs.pairs(W_dec.T, priority)
            return pairs
        state = self.topk_pairs.state
        return topk_pairs(W_dec.T, self.config.fraction, priority=priority, state=state, **self._selection())

    def _priority(self, firing_rate: Tensor) -> Tensor | None:
        return firing_rate if self.config.priority == "firing-rate" else None

    def _reduced(self, squares: Tensor) -> Tensor:
        """Sum of the squared cosines of pairs, or their mean, which is 0 over no pair."""
        total = squares.sum()
        return total / max(1, squares.numel()) if self.config.reduction == "mean" else total

    @torch.no_grad()
    def select(self, sae: SparseAutoencoder, features: Tensor | ActiveFeatures) -> TopKPairs:
        """The most similar pairs of the target (of the decoder if there is none), by fraction, tau and similarity.

        Of several processes each gets the pairs that it has found.
        """
        x, _ = self._columns(sae.W_dec.detach(), _with_values(features, _values(features).detach()))
        if self.parallel.world.size > 1:
            group = self.parallel.world.group
            return distributed.topk_pairs(x, self.config.fraction, group=group, **self._selection())
        return topk_pairs(x, self.config.fraction, **self._selection())

    def _selection(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("tau", "n_std", "similarity")}


@torch.no_grad()
def encoder_inhibition(W_enc: Tensor, W_dec: Tensor, rarer: Tensor, frequent: Tensor) -> tuple[Tensor, Tensor]:
    """How much the encoders of frequent features are inhibited by what rarer ones stand for; 0 without pairs.

    In absorption a feature learns to be silent where a rarer one takes its place: the product of its encoder e with the
    rarer one's decoder direction d_r falls below what its own decoder direction d explains. This is the mean over pairs
    of ``max(0, d . d_r - e . d_r) ** 2``, where d_r has length 1 and d is divided by the square of its length, as e of
    a feature that recognises its own direction is.

    Parameters
    ----------
    W_enc, W_dec : Tensor, shape [n_features, d_in]
        Encoder and decoder, one feature a row.
    rarer, frequent : Tensor, shape [n_pairs], int64
        The features of each pair.

    Returns
    -------
    value : Tensor, shape []
        The mean.
    gradient : Tensor, shape [n_features, d_in]
        Its gradient with respect to W_enc; directions are held.
    """
    total, gradient = W_enc.new_zeros(()), torch.zeros_like(W_enc)
    lengths = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min(EPS)
    size = max(1, _GATHERED_NUMBERS // W_enc.shape[1])
    for r, q in zip(rarer.split(size), frequent.split(size), strict=True):
        direction = W_dec[r] / lengths[r]
        inhibited = ((W_dec[q] / lengths[q].square() - W_enc[q]) * direction).sum(dim=1).clamp_min(0)
        total += inhibited.square().sum()
        gradient.index_add_(0, q, -2 * inhibited[:, None] * direction)
    n_pairs = max(1, rarer.numel())
    return total / n_pairs, gradient / n_pairs


def _rarer_first(pairs: TopKPairs, firing_rate: Tensor) -> tuple[Tensor, Tensor]:
    """The features of every pair as (rarer, more frequent), two tensors [n_pairs]."""
    rarer = torch.where(firing_rate[pairs.rows] < firing_rate[pairs.cols], pairs.rows, pairs.cols)
    return rarer, pairs.rows + pairs.cols - rarer


def _values(features: Tensor | ActiveFeatures) -> Tensor:
    return features.values if isinstance(features, ActiveFeatures) else features


def _with_values(features: Tensor | ActiveFeatures, values: Tensor) -> Tensor | ActiveFeatures:
    """The same features with other values."""
    return features._replace(values=values) if isinstance(features, ActiveFeatures) else values


def _matrix(features: Tensor | ActiveFeatures) -> Tensor:
    """Features [batch, n_features] as the public ops take them."""
    return features.to_sparse() if isinstance(features, ActiveFeatures) else features
