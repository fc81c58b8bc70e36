"""Fixtures of the kernel tests."""

import pytest

from topk_ortho.kernels.launch import INTERPRETED, TILE_CONFIGS, TileConfig


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 in the interpreter, so that few columns have many, shared by three programs."""
    if INTERPRETED:
        config = TileConfig(block=16, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=3)
        for kind in ("half", "tf32", "ieee"):
            monkeypatch.setitem(TILE_CONFIGS, ("interpreter", kind), config)
