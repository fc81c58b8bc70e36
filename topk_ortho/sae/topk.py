"""The TopK sparse autoencoder: of each token the k largest pre-activations are kept [1].

[1] Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093.
"""

import torch
from torch import Tensor

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae.active import ActiveFeatures, encode_selected
from topk_ortho.sae.base import SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """The `l0` largest pre-activations of every token, those of them above 0.

    Parameters
    ----------
    d_in, n_features, generator, parallel
        As in `SparseAutoencoder`.
    l0 : int
        Active features of a token.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        l0: int,
        *,
        generator: torch.Generator | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__(d_in, n_features, generator=generator, parallel=parallel)
        self.l0 = l0

    def encode(self, x: Tensor) -> ActiveFeatures:
        """Feature activations [batch, n_features] of x [batch, d_in], by their active entries."""
        features: ActiveFeatures = encode_selected(self.centred(x), self.W_enc, self.b_enc, self._select)
        return features

    def _select(self, pre_activations: Tensor) -> Tensor:
        return self.parallel.largest_in_rows(pre_activations, self.l0)
