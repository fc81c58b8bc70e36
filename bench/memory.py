"""Peak memory of one case beyond its input: python -m bench.memory PROVIDER MODE M N.

A gradient that the case returns counts. Prints bytes, or "out of memory" if the machine's memory does not suffice. A
process measures one case. Linux only.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.providers import make_case


def peak_extra_bytes(provider: str, mode: str, m: int, n: int) -> int:
    """Highest resident size during one call, less the resident size before it."""
    make_case(provider, mode, 8, 64)()  # loads libraries and starts threads
    return peak_extra_bytes_of(make_case(provider, mode, m, n))


def peak_extra_bytes_of(call: Callable[[], object]) -> int:
    """The same of any call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def machine_bytes() -> int:
    """Physical memory that is free to use now."""
    return _bytes_of(Path("/proc/meminfo"), "MemAvailable")


def _status_bytes(field: str) -> int:
    return _bytes_of(Path("/proc/self/status"), field)


def _bytes_of(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    provider, mode, m, n = sys.argv[1:]
    # what exceeds memory fails here by itself, instead of being killed; torch itself maps about 2 GB without using them
    limit = machine_bytes() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_grad_enabled(mode == "forward_backward")
    try:
        print(peak_extra_bytes(provider, mode, int(m), int(n)))
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error) and not isinstance(error, MemoryError):
            raise
        print("out of memory")
