"""The standard sparse autoencoder: ReLU features, made sparse by an L1 term.

    features = relu((x - b_dec) @ W_enc + b_enc)        [batch, n_features]
    reconstruction = features @ W_dec + b_dec           [batch, d_in]

Rows of W_dec have unit length.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from topk_ortho.sae.decoder import normalize_decoder


class SAEOutput(NamedTuple):
    """What a forward pass of any SAE returns."""

    reconstruction: Tensor
    """[batch, d_in]"""
    features: Tensor
    """[batch, n_features], non-negative, mostly zero"""


class StandardSAE(nn.Module):
    """ReLU sparse autoencoder.

    Parameters
    ----------
    d_in : int
        Width of the activations.
    n_features : int
        Size of the dictionary.
    generator : torch.Generator, optional
        Draws the decoder's random directions; the encoder starts as its transpose [1]_, times d_in / n_features so that
        the first reconstruction is about as large as its input.

    References
    ----------
    .. [1] Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, section 2.
    """

    def __init__(self, d_in: int, n_features: int, *, generator: torch.Generator | None = None):
        super().__init__()
        self.W_dec = nn.Parameter(torch.randn(n_features, d_in, generator=generator))
        normalize_decoder(self.W_dec)
        self.W_enc = nn.Parameter((self.W_dec.detach().T * (d_in / n_features)).contiguous())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [batch, n_features] of x [batch, d_in]."""
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction [batch, d_in] of features [batch, n_features]."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode x [batch, d_in]."""
        features = self.encode(x)
        return SAEOutput(self.decode(features), features)
