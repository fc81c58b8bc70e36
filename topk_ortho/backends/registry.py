"""Which backends exist, which can run here, and which one "auto" means."""

import warnings

import torch
from torch import Tensor

from topk_ortho.backends.base import Backend
from topk_ortho.backends.naive import NaiveBackend
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.cost import is_cheaper
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.backends.triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    "naive": NaiveBackend(),
    "tiled": TiledBackend(),
    "triton": TritonBackend(),
    "sparse": SparseBackend(),
}

_warned_of: set[str] = set()
"""Why "auto" went without kernels, as far as it was said. Python's own memory of warnings forgets when their filters
change."""


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, as the `backend` argument of every op takes them.

    Returns
    -------
    list of str
        "naive" materialises the gram and is the reference; "tiled" streams it and runs on any device that torch has;
        "triton" streams it on CUDA and ROCm devices; "sparse" computes only the pairs of features that are active
        together, on the CPU and where "triton" runs.

    Examples
    --------
    >>> "tiled" in available_backends()
    True
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return [name for name, backend in BACKENDS.items() if backend.unavailable_reason(device) is None]


def resolve_backend(name: str, device: torch.device, *, is_sparse: bool = False) -> str:
    """Name of the backend that serves `name` on `device`, or still "auto" where that depends on the data.

    An explicit choice never falls back to another. "auto" on a GPU where the kernels cannot run warns once, with the
    reason, and means "tiled".
    """
    if is_sparse and name == "auto":
        name = "sparse"
    if is_sparse and name != "sparse":
        raise ValueError(
            f'backend must be "auto" or "sparse" where x is sparse, got {name!r}; or convert x with x.to_dense()'
        )
    if name == "auto":
        return _automatic(device)
    is_known = isinstance(name, str) and name in BACKENDS
    reason = BACKENDS[name].unavailable_reason(device) if is_known else "there is no such backend"
    if reason is not None:
        raise ValueError(f'backend must be "auto" or one of {available_backends()}, got {name!r}: {reason}')
    return name


def _automatic(device: torch.device) -> str:
    """What "auto" means for a dense x on a device."""
    if device.type != "cuda":
        return "auto" if device.type == "cpu" else "tiled"
    reason = BACKENDS["triton"].unavailable_reason(device)
    if reason is None:
        return "triton"
    _warn_without_kernels(reason)
    return "tiled"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it while it traces
def _warn_without_kernels(reason: str) -> None:
    """Warn, at the first call with a reason."""
    if reason in _warned_of:
        return
    warnings.warn(
        f'backend="auto" takes plain torch on this GPU, because the kernels of "triton" cannot run: {reason}. '
        'With backend="tiled" it does so without this warning',
        stacklevel=5,
    )
    _warned_of.add(reason)


def backend_for(name: str, x: Tensor, *, is_selection: bool = False) -> Backend:
    """The backend of a name from `resolve_backend`; "auto" looks at how many entries of x are 0.

    `is_selection` says that it is for `topk_pairs` without an adaptive tau, which may be screened.
    """
    if name == "auto":
        name = "sparse" if is_cheaper(x, is_selection=is_selection) else "tiled"
    return BACKENDS[name]
