"""What a backend is: a reason why it cannot run, and three functions over plain tensors.

A backend finds pairs and moves gradients; it knows nothing of losses, reductions, autograd or user input. To add one,
write a class with the methods of `Backend`, name an instance in `topk_ortho.backends.registry`, and its name in
`topk_ortho.definitions.BackendName`. Everything a backend
returns has a shape that follows from its arguments, so that the ops above it can be traced without running it. How a
backend cuts its work into pieces are fields of a frozen dataclass, with defaults: they change the time that a call
takes, never what it finds.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from topk_ortho.definitions import Precision, Query
from topk_ortho.selection import Selection


class MaxCosine(NamedTuple):
    """For each column its most similar other column."""

    cosines: Tensor
    """[N] signed cosine, float32, or float64 for float64 input"""
    partners: Tensor
    """int64 [N], the lowest index among equals"""
    norms: Tensor
    """[N] column norms of x"""


class WeightedPairs(NamedTuple):
    """Pairs of columns, and how much gradient each of the two gets through their cosine.

    Pairs may repeat a column, and each other; a pair whose weights are 0 is padding.
    """

    rows: Tensor
    """int64 [p]"""
    cols: Tensor
    """int64 [p]"""
    row_weights: Tensor
    """[p] gradient of the loss in the pair's cosine, for the column of x that `rows` names; 0 for one that gets none"""
    col_weights: Tensor
    """[p] the same for the column of x that `cols` names"""


class Backend(Protocol):
    """The methods of every backend."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`, in words that an error can quote; None if it can."""

    def topk_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """Select exactly. `state` is read, never written."""

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> MaxCosine:
        """Largest signed cosine of each column to another one of its chunk.

        `chunks` partition the columns, each of two or more; None is one chunk of all.
        """

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gradient in x of sum_p weight_p * cosine_p, where column j of x sees the weights that name j.

        `norms` [N] are the column norms of x, `cosines` [p] those of the pairs.
        """
