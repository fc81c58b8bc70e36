"""What all sparse autoencoders share: parameters, initialisation, and the contract with the trainer.

    features = activation(W_enc (x - b_dec) + b_enc)     [batch, n_features]
    reconstruction = features @ W_dec + b_dec            [batch, d_in]

Row i of W_enc and of W_dec belongs to feature i. Several processes can hold a dictionary together, each the rows of
some of its features. Then "features" are those of this process, and reconstructions those of all.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae.active import ActiveFeatures, decode_active
from topk_ortho.sae.decoder import normalize_decoder


class SAEOutput(NamedTuple):
    """What a forward pass of any SAE returns."""

    reconstruction: Tensor
    """[batch, d_in]"""
    features: Tensor | ActiveFeatures
    """[batch, n_features], non-negative, mostly zero"""
    pre_activations: Tensor | None
    """[batch, n_features] for an architecture whose sparsity term needs them, else None"""
    inner: tuple[Tensor, ...]
    """Reconstructions [batch, d_in] by the first features alone (Matryoshka), else empty"""


_DRAWN_ROWS = 1_024
"""Directions that are drawn at a time, as all of them may be more than this process holds; a multiple of 16, by which
torch gives the same numbers in parts as at once"""


class SparseAutoencoder(nn.Module, ABC):
    """Encoder and decoder of a dictionary; a subclass adds the activation.

    Parameters
    ----------
    d_in : int
        Width of the activations.
    n_features : int
        Size of the dictionary.
    encoder_scale : float, default 1.0
        The encoder starts as the decoder times this, tied [1]_.
    generator : torch.Generator, optional
        Draws the decoder's random directions, of unit length.
    parallel : Parallel, optional
        The processes that hold the dictionary together; this one alone by default.

    References
    ----------
    .. [1] Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, section 2.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        encoder_scale: float = 1.0,
        generator: torch.Generator | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__()
        self.parallel = Parallel.alone() if parallel is None else parallel
        self.n_features = n_features
        self._encoder_scale = encoder_scale
        n_here = len(range(n_features)[self.parallel.rows_here(n_features)])
        self.W_dec = nn.Parameter(torch.empty(n_here, d_in))
        self.W_enc = nn.Parameter(torch.empty(n_here, d_in))
        self._draw_directions(generator)
        self.b_enc = nn.Parameter(torch.zeros(n_here))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Take directions [n_features, d_in], of any length but 0, for the decoder and for the tied encoder."""
        self.W_dec.copy_(directions[self.parallel.rows_here(self.n_features)])
        self._start()

    @torch.no_grad()
    def _draw_directions(self, generator: torch.Generator | None) -> None:
        here = self.parallel.rows_here(self.n_features)
        for first in range(0, self.n_features, _DRAWN_ROWS):
            drawn = torch.randn(min(_DRAWN_ROWS, self.n_features - first), self.W_dec.shape[1], generator=generator)
            kept = range(max(first, here.start), min(first + len(drawn), here.stop))
            if kept:
                own = drawn[kept.start - first : kept.stop - first]
                self.W_dec[kept.start - here.start : kept.stop - here.start] = own
        self._start()

    def _start(self) -> None:
        normalize_decoder(self.W_dec)
        self.W_enc.copy_(self.W_dec * self._encoder_scale)

    def is_of_features(self, name: str) -> bool:
        """Whether a parameter or buffer has a row for each feature: W_dec has, while b_dec has a number for each input.

        Where several processes hold the SAE, each has the rows of its own features, and a copy of everything else.
        """
        return self.state_dict()[name].dim() > 0 and name != "b_dec"

    def centred(self, x: Tensor) -> Tensor:
        """``x - b_dec``, the input of the encoder, [batch, d_in], for x [batch, d_in].

        Raises
        ------
        ValueError
            If x has another shape, such as [batch, position, d_in].
        """
        d_in = self.b_dec.shape[0]
        if x.ndim != 2 or x.shape[1] != d_in:
            flat = ": flatten its other dimensions" if x.ndim > 2 and x.shape[-1] == d_in else ""
            raise ValueError(f"x must have shape [batch, d_in = {d_in}], got {list(x.shape)}{flat}")
        return x - self.parallel.take_to_features(self.b_dec)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Inputs of the activation function, [batch, n_features], for x [batch, d_in]."""
        return linear(self.centred(x), self.W_enc, self.b_enc)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor | ActiveFeatures:
        """Feature activations [batch, n_features] of x [batch, d_in]."""

    def decode(self, features: Tensor | ActiveFeatures) -> Tensor:
        """Reconstruction [batch, d_in] of features [batch, n_features]."""
        own = decode_active(features, self.W_dec) if isinstance(features, ActiveFeatures) else features @ self.W_dec
        return self.parallel.sum_features(own.to(self.b_dec.dtype)) + self.b_dec  # not in the dtype of autocast

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode x [batch, d_in]."""
        features = self.encode(x)
        return SAEOutput(self.decode(features), features, None, ())

    def sparsity(self, output: SAEOutput, variance: float) -> Tensor:
        """The sparsity term of the loss, unweighted, []; 0 if the activation alone makes features sparse.

        `variance` is the activations' total variance, by which a term is made free of their scale.
        """
        return output.reconstruction.new_zeros(())

    @torch.no_grad()
    def observe(self, features: Tensor | ActiveFeatures) -> None:
        """Learn from the features of a training step what inference needs; most architectures need nothing."""

    @torch.no_grad()
    def divide_scale(self, factor: float) -> None:
        """Turn an SAE of activations times `factor` into the same SAE of the activations, in place."""
        self.b_enc.div_(factor)
        self.b_dec.div_(factor)

    @torch.no_grad()
    def project(self) -> None:
        """Bring parameters back into their range after a step of the optimizer; most architectures have no range."""
