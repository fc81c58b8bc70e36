"""Where work can run: whether Triton's kernels can, which GPU is the current one, whether a call may wait for it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    from topk_ortho.kernels import (  # noqa: F401  # all of them, so that a Triton which lacks something shows here
        coactivation,
        gram_histogram,
        gram_sample,
        gram_survivors,
        max_cosine,
        norms,
        pair_gradient,
        radix_select,
        rescore,
        round_columns,
    )
    from topk_ortho.kernels.launch import INTERPRETED, TRITON_VERSION

    IMPORT_ERROR = None
except (ImportError, AttributeError) as error:  # none installed, or one that is too old
    IMPORT_ERROR = f"Triton 3.6 or later could not be imported ({error}); `pip install triton` (Linux)"

_TRITON_FOR_SM_100 = (3, 9)  # Triton 3.9 compiles the kernels for sm_100 and 3.6 fails; versions between were not tried


def kernels_unavailable_reason(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`; None if they can.

    There may be no Triton, no GPU that it supports, or the tensor may be elsewhere.
    """
    if IMPORT_ERROR is not None:
        return IMPORT_ERROR
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET is set, which runs kernels on CPU tensors only"
    if device.type != "cuda":
        return f"it needs a CUDA or ROCm device, not {device.type!r}; TRITON_INTERPRET=1 runs it on the CPU, slowly"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    if capability[0] == 10 and TRITON_VERSION < _TRITON_FOR_SM_100:
        return "it needs Triton 3.9 for compute capability 10.0; the compiler of Triton 3.6 fails on its kernels there"
    return None


def may_synchronize(device: torch.device, state: Tensor | None) -> bool:
    """Whether a call may wait for the device, so as to raise an error that depends on data.

    It may not in a training loop on an accelerator, which passes a warm-start state: there the result is NaN instead.
    """
    return device.type == "cpu" or state is None


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
