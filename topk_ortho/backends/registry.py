"""Which backends exist, which can run here, and which one "auto" means."""

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

    An explicit choice never falls back to another.
    """
    if is_sparse and name == "auto":
        name = "sparse"
    if is_sparse and name != "sparse":
        raise ValueError(
            f'backend must be "auto" or "sparse" where x is sparse, got {name!r}; or convert x with x.to_dense()'
        )
    if name == "auto":
        is_accelerated = device.type == "cuda" and BACKENDS["triton"].unavailable_reason(device) is None
        return "triton" if is_accelerated else "auto" if device.type == "cpu" else "tiled"
    is_known = isinstance(name, str) and name in BACKENDS
    reason = BACKENDS[name].unavailable_reason(device) if is_known else "there is no such backend"
    if reason is not None:
        raise ValueError(f'backend must be "auto" or one of {available_backends()}, got {name!r}: {reason}')
    return name


def backend_for(name: str, x: Tensor) -> Backend:
    """The backend of a name from `resolve_backend`; "auto" looks at how many entries of x are 0."""
    if name == "auto":
        name = "sparse" if is_cheaper(x) else "tiled"
    return BACKENDS[name]
