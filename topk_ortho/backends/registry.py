"""Which backends exist, which can run here, and which one "auto" means."""

import torch

from topk_ortho.backends import naive, tiled, triton
from topk_ortho.backends.base import Backend

BACKENDS: dict[str, Backend] = {"naive": naive, "tiled": tiled, "triton": triton}
_PLANNED = ("sparse",)


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, as the `backend` argument of every op takes them.

    Returns
    -------
    list of str
        "naive" materialises the gram and is the reference; "tiled" streams it and runs on any device that torch has;
        "triton" streams it on CUDA and ROCm devices.

    Examples
    --------
    >>> "tiled" in available_backends()
    True
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return [name for name, backend in BACKENDS.items() if backend.unavailable_reason(device) is None]


def resolve_backend(name: str, device: torch.device) -> str:
    """Name of the backend that serves `name` on `device`; an explicit choice never falls back to another."""
    if name == "auto":
        is_accelerated = device.type == "cuda" and BACKENDS["triton"].unavailable_reason(device) is None
        return "triton" if is_accelerated else "tiled"
    if isinstance(name, str) and name in BACKENDS:
        reason = BACKENDS[name].unavailable_reason(device)
    else:
        reason = "this version does not have it" if name in _PLANNED else "there is no such backend"
    if reason is not None:
        raise ValueError(f'backend must be "auto" or one of {available_backends()}, got {name!r}: {reason}')
    return name
