"""What a backend is: four functions over plain tensors.

A backend finds pairs and moves gradients; it knows nothing of losses, reductions, autograd or user input. To add one,
write a module with the functions of `Backend` and name it in `topk_ortho.backends.registry`. Everything a backend
returns has a shape that follows from its arguments, so that the ops above it can be traced without running it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Similarity = Literal["abs", "positive"]
Precision = Literal["highest", "high", "medium"]

EPS = 1e-12
"""Floor of a column norm, as in `torch.nn.functional.normalize`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Which pairs to select; every field is already checked."""

    k: int
    """Number of pairs asked for, 1 <= k <= N(N-1)/2."""
    tau: float | None = None
    """Fixed floor: a pair counts only if its |cosine| is above it. None for no floor."""
    n_std: float | None = None
    """Adaptive floor: tau = mean + n_std * std of |cosine| over all pairs. None unless tau is adaptive."""
    similarity: Similarity = "abs"
    """Order by |cosine|, or by the signed cosine with those <= 0 dropped."""
    precision: Precision = "highest"
    """Least precision of the products, in the words of `torch.set_float32_matmul_precision`."""


class Selection(NamedTuple):
    """The selected pairs, in order, padded to k with 0."""

    values: Tensor
    """[k] signed cosines, in `accumulation_dtype(x)`"""
    rows: Tensor
    """int64 [k]"""
    cols: Tensor
    """int64 [k], rows < cols"""
    n_selected: Tensor
    """int64 [], how many of the k are pairs and not padding"""
    threshold: Tensor
    """[] the k-th similarity, or the floor in force if fewer than k pairs passed it"""
    tau: Tensor
    """[] the floor used, -1 if none"""
    norms: Tensor
    """[N] column norms of x"""
    state: Tensor
    """[3] warm-start state for the next call, see `topk_ortho.selection`; empty if none came in"""


class RowMax(NamedTuple):
    """For each column its most similar other column."""

    values: Tensor
    """[N] signed cosine, in `accumulation_dtype(x)`"""
    partners: Tensor
    """int64 [N], the lowest index among equals"""
    norms: Tensor
    """[N] column norms of x"""


class Backend(Protocol):
    """The interface; a module satisfies it."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`, in words that an error can quote; None if it can."""

    def select_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """Select exactly, in the order of `topk_ortho.selection`. `state` is read, never written."""

    def row_max(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> RowMax:
        """Largest signed cosine of each column to another one of its chunk.

        `chunks` partition the columns, each of two or more; None is one chunk of all.
        """

    def pair_gradient(
        self, x: Tensor, norms: Tensor, rows: Tensor, cols: Tensor, values: Tensor, grad_rows: Tensor, grad_cols: Tensor
    ) -> Tensor:
        """Gradient in x of sum_p weight_p * values_p.

        A pair's row column sees the weight grad_rows, its col column grad_cols. All pair arguments are [p]; pairs may
        repeat a column, and padding has weight 0.
        """


def may_wait(device: torch.device, state: Tensor | None) -> bool:
    """Whether a call may wait for the device to tell, so as to raise an error that depends on data.

    Not in a training loop on an accelerator, which passes a warm-start state: there the result is NaN instead.
    """
    return device.type == "cpu" or state is None


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Dtype of norms, products and values: float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
