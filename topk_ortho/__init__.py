"""Exact top-k most similar feature pairs, as a differentiable penalty, without the N x N matrix."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from topk_ortho.backends.kernels_folder import register_kernels

if TYPE_CHECKING:
    from topk_ortho.backends.registry import available_backends
    from topk_ortho.functional import max_cosine_loss, nearest_columns, topk_ortho_loss, topk_pairs
    from topk_ortho.modules import MaxCosineLoss, TopKOrthoLoss
    from topk_ortho.pairs import NearestColumns, TopKPairs, pair_jaccard
    from topk_ortho.refresh import RefreshedPairs
    from topk_ortho.sparse_features import SparseFeatures
    from topk_ortho.warm_start import initial_state

__all__ = [
    "MaxCosineLoss",
    "NearestColumns",
    "RefreshedPairs",
    "SparseFeatures",
    "TopKOrthoLoss",
    "TopKPairs",
    "available_backends",
    "initial_state",
    "max_cosine_loss",
    "nearest_columns",
    "pair_jaccard",
    "topk_ortho_loss",
    "topk_pairs",
]

__version__ = "0.1.0"

_MODULES = {
    "backends.registry": ("available_backends",),
    "functional": ("max_cosine_loss", "nearest_columns", "topk_ortho_loss", "topk_pairs"),
    "modules": ("MaxCosineLoss", "TopKOrthoLoss"),
    "pairs": ("NearestColumns", "TopKPairs", "pair_jaccard"),
    "refresh": ("RefreshedPairs",),
    "sparse_features": ("SparseFeatures",),
    "warm_start": ("initial_state",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

register_kernels()


def __getattr__(name: str) -> Any:
    """Import what is public when it is first asked for, so that settings can be read without torch."""
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in iter_modules(__path__))})
