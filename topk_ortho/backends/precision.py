"""Matrix products in the precision that was asked for, whatever the process is set to."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from topk_ortho.definitions import Precision

_lock = threading.RLock()


@contextlib.contextmanager
def matmul_precision(device: torch.device, precision: Precision) -> Iterator[None]:
    """Products at `precision`, whatever the process-wide setting and autocast say, as far as the hardware has it.

    torch has one setting for the whole process. It is written only if it differs, by one thread at a time, and put
    back; meanwhile the products of other threads see it.
    """
    on_cpu = device.type == "cpu"
    setting: Any = torch.backends.mkldnn.matmul if on_cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    parent: Any = torch.backends.mkldnn if on_cpu else torch.backends.cudnn
    wanted = {"highest": "ieee", "high": "tf32", "medium": "bf16" if on_cpu else "tf32"}[precision]
    with _lock, torch.autocast(device.type, enabled=False):
        before = setting.fp32_precision
        if before == wanted or (before, wanted) == ("none", "ieee"):
            yield
            return
        inherited = before == parent.fp32_precision
        setting.fp32_precision = wanted
        try:
            yield
        finally:
            setting.fp32_precision = "none" if inherited else before
