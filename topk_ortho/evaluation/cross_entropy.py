"""How much of a language model's prediction survives if reconstructions take the place of its activations."""

import torch
from torch import Tensor

from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.sae import SparseAutoencoder

_N_WINDOWS = 16


def cross_entropy_metrics(
    sae: SparseAutoencoder, source: TransformerActivations, shards: list[int]
) -> dict[str, float]:
    """Cross-entropy of the model as it is, with reconstructions in place of activations, and with their mean.

    It is measured on the first 16 windows of the shards; a model that does not predict tokens has no such metrics.

    Returns
    -------
    dict of str to float
        ``ce_loss_clean``, ``ce_loss_reconstructed`` and ``ce_loss_ablated``, in nats for a token, and
        ``ce_loss_recovered = (ablated - reconstructed) / (ablated - clean)``, which is 1 if nothing is lost.
    """
    transformer = source.transformer
    if not transformer.has_logits:
        return {}
    tokens = torch.cat([source.tokens(number) for number in shards])[:_N_WINDOWS]

    def reconstruct(x: Tensor) -> Tensor:
        rebuilt: Tensor = sae(x.flatten(0, 1).float()).reconstruction
        return rebuilt.view_as(x)

    def ablate(x: Tensor) -> Tensor:
        return x.float().mean(dim=(0, 1)).expand_as(x)

    clean = transformer.cross_entropy(tokens)
    reconstructed = transformer.cross_entropy(tokens, reconstruct)
    ablated = transformer.cross_entropy(tokens, ablate)
    return {
        "ce_loss_clean": clean,
        "ce_loss_reconstructed": reconstructed,
        "ce_loss_ablated": ablated,
        "ce_loss_recovered": (ablated - reconstructed) / (ablated - clean),
    }
