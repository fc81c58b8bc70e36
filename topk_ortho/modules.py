"""nn.Module forms of the ops; they add nothing but what is kept between calls."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from topk_ortho.definitions import BackendName, Precision, Reduction, Similarity, Tau
from topk_ortho.functional import loss_and_threshold, max_cosine_loss
from topk_ortho.refresh import RefreshedPairs
from topk_ortho.sparse_features import SparseFeatures
from topk_ortho.validation import check_word
from topk_ortho.warm_start import initial_state

_Refresh = Literal["exact", "adaptive", "certified"]
_OPTIONS = ("dim", "k", "tau", "n_std", "similarity", "reduction", "backend", "precision", "structural_zeros")
"""Arguments of `topk_ortho_loss` that the module keeps as attributes, beside the fraction."""
_SELECTION = ("fraction", "dim", "k", "tau", "similarity", "backend", "precision")
"""Attributes that `RefreshedPairs` has too."""


class TopKOrthoLoss(nn.Module):
    """`topk_ortho_loss` with its arguments and its warm-start state kept.

    Parameters
    ----------
    fraction, dim, k, tau, n_std, similarity, reduction, backend, precision, structural_zeros
        As in `topk_pairs` and `topk_ortho_loss`; checked at the first call. `fraction` is the share of all pairs that
        is penalised, ``dim=0`` takes a decoder [n_features, d_in] as it is, and ``similarity="positive"`` leaves
        opposite directions free, which is advised for decoders.
    refresh : {"exact", "adaptive", "certified"}
        "exact" compares all columns at every call. The others are for an x that changes slowly, such as a decoder, and
        compare them only when it is needed, see `RefreshedPairs`: "adaptive" keeps a measured share of the exact
        selection, "certified" all of it.
    recall, margin
        As in `RefreshedPairs`; unused for ``refresh="exact"``.

    Attributes
    ----------
    state : Tensor, float32 [3]
        Warm-start state, see `initial_state`: a buffer, so that it moves and is saved with the module. ``pairs`` has
        its own.
    threshold : Tensor, float32 []
        Similarity of the last of the selected pairs at the last call, as in `TopKPairs`; NaN before the first one, and
        where a sparse x made no list of pairs necessary. It is not saved.
    pairs : RefreshedPairs or None
        What is kept between calls; None for ``refresh="exact"``. Its ``recall`` and ``interval`` say how it fares.

    Examples
    --------
    >>> penalty = TopKOrthoLoss(fraction=0.5)
    >>> penalty(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    tensor(0.8000)
    """

    state: Tensor

    def __init__(
        self,
        fraction: float = 1e-3,
        *,
        dim: int = 1,
        k: int | None = None,
        tau: Tau = None,
        n_std: float = 1.0,
        similarity: Similarity = "abs",
        reduction: Reduction = "mean",
        backend: BackendName = "auto",
        precision: Precision = "highest",
        structural_zeros: bool = False,
        refresh: _Refresh = "exact",
        recall: float = 0.99,
        margin: float = 4.0,
    ):
        super().__init__()
        self.fraction = fraction
        self.dim = dim
        self.k = k
        self.tau = tau
        self.n_std = n_std
        self.similarity = similarity
        self.reduction = reduction
        self.backend = backend
        self.precision = precision
        self.structural_zeros = structural_zeros
        self.register_buffer("state", initial_state())
        self.threshold = torch.tensor(math.nan)  # no buffer: it would be without data in a model made on "meta"
        self.pairs: RefreshedPairs | None = None
        check_word("refresh", refresh, _Refresh)
        if refresh != "exact":
            if structural_zeros:
                raise ValueError(f'structural_zeros must be False where refresh is "{refresh}"')
            self.pairs = RefreshedPairs(
                fraction, dim=dim, k=k, tau=tau, similarity=similarity, refresh=refresh, recall=recall, margin=margin,
                backend=backend, precision=precision,
            )  # fmt: skip

    def forward(self, x: Tensor | SparseFeatures, priority: Tensor | None = None) -> Tensor:
        """Penalty on the features of x [M, N], or [N, M] with ``dim=0``.

        In each pair the feature of higher `priority` [N] gets no gradient.
        """
        if self.pairs is not None:
            check_word("reduction", self.reduction, Reduction)
            for name in _SELECTION:
                setattr(self.pairs, name, getattr(self, name))
            listed = self.pairs.listed(x, priority)
            self.threshold = listed.threshold.float()
            squares = listed.cosines.square()
            return squares.sum() / max(1, squares.numel()) if self.reduction == "mean" else squares.sum()
        options = {name: getattr(self, name) for name in _OPTIONS}
        loss, threshold = loss_and_threshold(x, self.fraction, priority=priority, state=self.state, **options)
        self.threshold = threshold.float()
        return loss

    def reset_state(self) -> None:
        """Forget what is kept between calls, for instance when the next x has nothing to do with the last."""
        self.state.copy_(initial_state())
        if self.pairs is not None:
            self.pairs.reset()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take a checkpoint that was made without this module too: the state is then that before the first call."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict[f"{prefix}state"] = initial_state()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Arguments, for repr."""
        size = f"fraction={self.fraction}" if self.k is None else f"k={self.k}"
        return ", ".join([size, *(f"{name}={getattr(self, name)!r}" for name in _OPTIONS if name != "k")])


class MaxCosineLoss(nn.Module):
    """`max_cosine_loss` with its arguments kept.

    Parameters
    ----------
    n_chunks, dim, generator, backend, precision
        As in `max_cosine_loss`; checked at the first call.

    Examples
    --------
    >>> MaxCosineLoss()(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    tensor(0.6000)
    """

    def __init__(
        self,
        n_chunks: int = 1,
        *,
        dim: int = 1,
        generator: torch.Generator | None = None,
        backend: BackendName = "auto",
        precision: Precision = "highest",
    ):
        super().__init__()
        self.n_chunks = n_chunks
        self.dim = dim
        self.generator = generator
        self.backend = backend
        self.precision = precision

    def forward(self, x: Tensor | SparseFeatures) -> Tensor:
        """Penalty of x [M, N], or [N, M] with ``dim=0``."""
        options = {name: getattr(self, name) for name in ("dim", "generator", "backend", "precision")}
        return max_cosine_loss(x, self.n_chunks, **options)

    def extra_repr(self) -> str:
        """Arguments, for repr."""
        return f"n_chunks={self.n_chunks}, dim={self.dim}, backend={self.backend!r}, precision={self.precision!r}"
