"""Sparse autoencoders, one architecture a file, and the normalisation of their decoders."""

from topk_ortho.sae.decoder import normalize_after_step, normalize_decoder
from topk_ortho.sae.standard import SAEOutput, StandardSAE

__all__ = ["SAEOutput", "StandardSAE", "normalize_after_step", "normalize_decoder"]
