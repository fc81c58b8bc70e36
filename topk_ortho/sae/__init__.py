"""Sparse autoencoders, one architecture a file, the normalisation of their decoders, and SAELens's format."""

from topk_ortho.sae.active import ActiveFeatures, activation_norms, firing_counts
from topk_ortho.sae.base import SAEOutput, SparseAutoencoder
from topk_ortho.sae.batchtopk import BatchTopKSAE
from topk_ortho.sae.decoder import DecoderNorm, keep_normalized, normalize_decoder, remove_parallel_gradient
from topk_ortho.sae.jumprelu import JumpReLUSAE
from topk_ortho.sae.matryoshka import MatryoshkaSAE
from topk_ortho.sae.standard import StandardSAE
from topk_ortho.sae.topk import TopKSAE

__all__ = [
    "ActiveFeatures",
    "BatchTopKSAE",
    "DecoderNorm",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "SAEOutput",
    "SparseAutoencoder",
    "StandardSAE",
    "TopKSAE",
    "activation_norms",
    "firing_counts",
    "keep_normalized",
    "normalize_decoder",
    "remove_parallel_gradient",
]
