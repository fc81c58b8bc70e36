"""How much of a language model's prediction survives if reconstructions take the place of its activations.

Only ordinary tokens are judged, those that the dictionary was trained on. As in SAELens and SAEBench, special tokens
(the beginning of a window, separators, padding) keep their activations, and the predictions that they make are not
counted; so it is with tokens that are left out for their long activations. A prediction that an ordinary token makes
counts whatever comes next, a special token too.
"""

import math

import torch
from torch import Tensor

from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.sae import SparseAutoencoder

_N_WINDOWS = 16
_NAMES = ("ce_loss_clean", "ce_loss_reconstructed", "ce_loss_ablated", "ce_loss_recovered")


def cross_entropy_metrics(
    sae: SparseAutoencoder, source: TransformerActivations, shards: list[int]
) -> dict[str, float | None]:
    """Cross-entropy of the model as it is, with reconstructions in place of activations, and with their mean.

    It is measured on the first 16 windows of the shards. What takes the place of an ordinary token's activations is
    their reconstruction or, to remove them, the mean activations of all ordinary tokens of these windows. How many
    windows the model reads at a time makes no difference but for rounding.

    Returns
    -------
    dict of str to float or None
        ``ce_loss_clean``, ``ce_loss_reconstructed`` and ``ce_loss_ablated``, in nats for a prediction, and
        ``ce_loss_recovered = (ablated - reconstructed) / (ablated - clean)``, which is 1 if nothing is lost. It is None
        if removing the activations changes the loss by no more than rounding, as in a model that ignores them. All four
        are None if no ordinary token makes a prediction. A model that does not predict tokens has no such metrics, and
        the result is empty.
    """
    transformer = source.transformer
    if not transformer.has_logits:
        return {}
    tokens = torch.cat([source.tokens(number) for number in shards])[:_N_WINDOWS]
    is_ordinary = torch.cat([source.is_used(number) for number in shards])[:_N_WINDOWS]
    total = torch.zeros(source.d_in, dtype=torch.float64)

    def add_to_total(x: Tensor) -> Tensor:
        total.add_(x.double().sum(dim=0).cpu())
        return x

    def reconstruct(x: Tensor) -> Tensor:
        reconstruction: Tensor = sae(x).reconstruction
        return reconstruction

    clean = transformer.cross_entropy(tokens, is_ordinary, add_to_total).double()
    if clean.numel() == 0:
        return dict.fromkeys(_NAMES)
    mean = total / is_ordinary.sum()
    reconstructed = transformer.cross_entropy(tokens, is_ordinary, reconstruct).double()
    ablated = transformer.cross_entropy(tokens, is_ordinary, lambda x: mean.to(x).expand_as(x)).double()
    losses = [each.mean().item() for each in (clean, reconstructed, ablated)]
    # The roundings of single losses are independent, so their mean has the less the more there are. Each is some times
    # that of the loss itself, as logits are larger than the loss and pass through several roundings.
    rounding = torch.finfo(getattr(torch, transformer.config.dtype)).eps * losses[0] / math.sqrt(clean.numel())
    values = [*losses, _recovered(*losses, noise=16 * rounding)]
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in zip(_NAMES, values, strict=True)
    }


def _recovered(clean: float, reconstructed: float, ablated: float, *, noise: float) -> float | None:
    """Share of the loss's rise that reconstructions avoid; None if the rise is no more than the noise."""
    rise = ablated - clean
    return (ablated - reconstructed) / rise if abs(rise) > noise else None
