"""Matrix products in the precision that was asked for, whatever the process is set to."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from topk_ortho.backends.base import Precision


@contextlib.contextmanager
def matmul_precision(device: torch.device, precision: Precision) -> Iterator[None]:
    """Products at `precision`, whatever the process-wide setting and autocast say, as far as the hardware has it."""
    on_cpu = device.type == "cpu"
    setting: Any = torch.backends.mkldnn.matmul if on_cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = {"highest": "ieee", "high": "tf32", "medium": "bf16" if on_cpu else "tf32"}[precision]
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setting.fp32_precision = before
