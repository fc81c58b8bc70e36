"""Settings and fixtures of all tests."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from topk_ortho.backends import tiled

_COMMON = {
    "deadline": None,
    "database": None,
    "max_examples": 30,
    # the `backend` fixture is the same for every example
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("dev", **_COMMON)
settings.register_profile("ci", derandomize=True, **_COMMON)
settings.register_profile("thorough", parent=settings.get_profile("dev"), max_examples=1000)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(2)


class _Case(NamedTuple):
    backend: str
    tile: tuple[int, int] | None = None
    """Tile shape of the CPU, so that a small N has many tiles, ragged at both ends; None for the real one."""


BACKEND_CASES = {
    "naive": _Case("naive"),
    "tiled_16x32": _Case("tiled", (16, 32)),
    "tiled_11x15": _Case("tiled", (11, 15)),
}
"""Where a new backend is added."""


def use_case(case: _Case, monkeypatch: pytest.MonkeyPatch) -> str:
    if case.tile is not None:
        monkeypatch.setattr(tiled, "_CPU_TILE", tiled._TileShape(*case.tile))
    return case.backend


@pytest.fixture(params=BACKEND_CASES.values(), ids=BACKEND_CASES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of each backend, and of each way to cut its work."""
    return use_case(request.param, monkeypatch)


@pytest.fixture(params=["naive", "tiled_11x15"])
def small_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One case for each backend, where the cut of the work is not the point."""
    return use_case(BACKEND_CASES[request.param], monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty comes filled with NaN or the largest integer: reading it before writing shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
