"""Metrics of a dictionary that only some sources of activations allow."""

import torch

from topk_ortho.activations.source import ActivationSource
from topk_ortho.activations.synthetic import KnownActivations
from topk_ortho.evaluation.ground_truth import ground_truth_metrics
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder


def source_metrics(sae: SparseAutoencoder, source: ActivationSource, shards: list[int]) -> dict[str, float | None]:
    """Metrics that only this kind of source allows, on some of its shards.

    Synthetic activations are compared with their true features, see `ground_truth_metrics`. A transformer is run with
    reconstructions in place of its activations, see `cross_entropy_metrics`. Any other source
    allows none. What is not defined on these shards is None. Where processes hold the SAE together, all of them pass
    the same shards, and do the same but for their features.
    """
    if isinstance(source, KnownActivations):
        x, coefficients = (torch.cat(parts) for parts in zip(*map(source.sample, shards), strict=True))
        features = sae.encode(x.to(sae.W_dec.device))
        dense = features.to_dense() if isinstance(features, ActiveFeatures) else features
        W_dec, by_feature = (
            sae.parallel.gather_features(part.detach().cpu(), sae.n_features) for part in (sae.W_dec, dense.T)
        )
        return ground_truth_metrics(W_dec, by_feature.T, source.truth, coefficients)
    # imported only when needed: transformers and datasets take a second
    from topk_ortho.activations.cache import TransformerActivations
    from topk_ortho.evaluation.cross_entropy import cross_entropy_metrics

    return cross_entropy_metrics(sae, source, shards) if isinstance(source, TransformerActivations) else {}
