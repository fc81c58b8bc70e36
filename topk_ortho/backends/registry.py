"""Which backends exist, which can run here, and which one "auto" means."""

import torch

from topk_ortho.backends import naive, tiled
from topk_ortho.backends.base import Backend

BACKENDS: dict[str, Backend] = {"naive": naive, "tiled": tiled}
_PLANNED = ("triton", "sparse")


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, as the `backend` argument of every op takes them.

    Returns
    -------
    list of str
        "naive" materialises the gram and is the reference; "tiled" streams it and runs on any device that torch has.

    Examples
    --------
    >>> available_backends()
    ['naive', 'tiled']
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [name for name, backend in BACKENDS.items() if backend.unavailable_reason(device) is None]


def resolve_backend(name: str, device: torch.device) -> str:
    """Name of the backend that serves `name` on `device`; an explicit choice never falls back to another."""
    if name == "auto":
        return "tiled"
    if isinstance(name, str) and name in BACKENDS:
        reason = BACKENDS[name].unavailable_reason(device)
    else:
        reason = "this version does not have it" if name in _PLANNED else "there is no such backend"
    if reason is not None:
        raise ValueError(f'backend must be "auto" or one of {available_backends()}, got {name!r}: {reason}')
    return name
