"""Where work can run: whether Triton's kernels can, which GPU is the current one, whether a call may wait for it."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

_TRITON_FOR_SM_100 = (3, 9)  # Triton 3.9 compiles the kernels for sm_100 and 3.6 fails; versions between were not tried


def why_not_imported(error: ImportError | AttributeError) -> str:
    """What is wrong where the kernels could not be imported, and what to do about it."""
    module = (error.name or "") if isinstance(error, ImportError) else ""
    if module.startswith("topk_ortho."):
        folder = Path(__file__).parents[1]
        return (
            f"its kernels are missing or incomplete ({error}): they belong into {folder / 'kernels'}, or in a clone "
            f"into {folder.parent / 'kernels'}; install topk_ortho with pip, or start Python in a complete clone"
        )
    remedy = "`pip install 'triton>=3.6'` (Linux)"
    if isinstance(error, ModuleNotFoundError) and module == "triton":
        return f"Triton is not installed; {remedy}"
    try:
        import triton
    except ImportError:
        return f"Triton is installed and cannot be imported ({error}); install it again, {remedy}"
    installed = getattr(triton, "__version__", None)
    if installed is None:
        return f"`import triton` finds something else of that name, {triton!r}; {remedy}"
    if tuple(int(part) for part in installed.split(".")[:2]) < (3, 6):
        return f"Triton {installed} is too old ({error}); {remedy}"
    return f"the kernels cannot be imported with Triton {installed} ({error}); please report this"


try:
    from topk_ortho.kernels import (  # noqa: F401  # all of them, so that a Triton which lacks something shows here
        coactivation,
        gram_histogram,
        gram_sample,
        gram_survivors,
        max_cosine,
        norms,
        ordered,
        pair_gradient,
        pair_lists,
        radix_select,
        rescore,
        round_columns,
        transpose,
    )
    from topk_ortho.kernels.launch import INTERPRETED, TRITON_VERSION

    IMPORT_ERROR = None
except (ImportError, AttributeError) as error:  # no Triton, one that is too old, or no kernels
    IMPORT_ERROR = why_not_imported(error)


def kernels_unavailable_reason(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`; None if they can.

    There may be no kernels, no Triton, no GPU that it supports, or the tensor may be elsewhere.
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
