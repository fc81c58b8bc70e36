"""Fixtures of the kernel tests."""

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.arguments import DEVICE
from topk_ortho.kernels.launch import INTERPRETED, TILE_CONFIGS, TileConfig


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 in the interpreter, so that few columns have many, shared by three programs."""
    if INTERPRETED:
        config = TileConfig(block=16, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=3)
        for kind in ("half", "tf32", "ieee"):
            monkeypatch.setitem(TILE_CONFIGS, ("interpreter", kind), config)


@pytest.fixture
def far_apart(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Tensor]]:
    """Copies x to the device with its three rows (or columns) 2**30 elements apart.

    An offset that wraps in int32 lands in front of x. In the interpreter that is a hole in a file, which reads as 0; on
    a GPU it is memory that reads as NaN. There the tests of all processes wait for each other, because each takes
    16 GiB if x is float32.
    """

    def copy(x: Tensor, *, columns: bool = False) -> Tensor:
        gap = 2**30
        assert x.shape[int(columns)] == 3, "the last of them is 2**31 elements away"
        n_elements = 2**31 + 2 * gap + x.numel()
        storage = _hole(tmp_path, n_elements, x.dtype) if INTERPRETED else _device_memory(n_elements, x.dtype)
        return storage.as_strided(x.shape, (1, gap) if columns else (gap, 1), 2**31).copy_(x)

    if INTERPRETED:
        yield copy
        return
    # the folder above is that of all workers of pytest-xdist
    with (tmp_path_factory.getbasetemp().parent / "far_apart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield copy
        torch.cuda.empty_cache()


def _hole(folder: Path, n_elements: int, dtype: torch.dtype) -> Tensor:
    """A file that takes no room until something is written."""
    path = folder / "hole"
    with path.open("wb") as file:
        file.truncate(n_elements * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=n_elements, dtype=dtype)


def _device_memory(n_elements: int, dtype: torch.dtype) -> Tensor:
    """Memory of the GPU, which `fill_uninitialized_memory` fills with NaN."""
    needed, (free, _) = n_elements * dtype.itemsize, torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"it takes {needed / 2**30:.1f} GiB of the GPU, where {free / 2**30:.1f} are free")
    return torch.empty(n_elements, dtype=dtype, device=DEVICE)
