"""The Matryoshka BatchTopK sparse autoencoder: nested dictionaries that each reconstruct the input [1].

The first features must do without the rest, so they learn what is general, and parents are not absorbed by children.

[1] Bussmann et al., "Learning multi-level features with Matryoshka sparse autoencoders", arXiv:2503.17547.
"""

import torch
from torch import Tensor

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae.active import decode_nested
from topk_ortho.sae.base import SAEOutput
from topk_ortho.sae.batchtopk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """`BatchTopKSAE` whose first ``w`` features reconstruct too, for every ``w`` of `widths`.

    Parameters
    ----------
    d_in, n_features, l0, generator, parallel
        As in `BatchTopKSAE`.
    widths : tuple of int
        Ascending sizes of the nested dictionaries; the last is n_features.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        l0: int,
        widths: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__(d_in, n_features, l0, generator=generator, parallel=parallel)
        self.widths = widths

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode x [batch, d_in], with the inner reconstructions."""
        features = self.encode(x)
        here = self.parallel.rows_here(self.n_features)
        widths_here = tuple(min(max(width, here.start), here.stop) - here.start for width in self.widths)
        nested = self.parallel.sum_features(decode_nested(features, self.W_dec, widths_here)) + self.b_dec
        *inner, whole = nested.unbind(dim=1)
        return SAEOutput(whole, features, None, tuple(inner))
