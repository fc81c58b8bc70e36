"""Which device a name means."""

import torch


def resolve_device(device: str) -> torch.device:
    """The device that a torch device string names; "auto" is CUDA where there is one.

    Raises
    ------
    ValueError
        If it cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # fails on the device "meta", which holds no data
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
