"""Settings and fixtures of all tests."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.on_device import OnDevice
from topk_ortho.backends import coactivation, registry, sparse, tiled, triton
from topk_ortho.kernels import tiles

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


if tiles.INTERPRETED:
    # At every call of a device function the interpreter searches Triton's modules for what it has to patch, which takes
    # longer than the call. What it finds at the first search does not change.
    from triton.runtime import interpreter

    @functools.cache
    def _builtins_of(package: Any) -> list[tuple[str, Any]]:
        return [item for item in inspect.getmembers(package) if interpreter.tl.core.is_builtin(item[1])]

    def _patch_builtin(package: Any, *arguments: Any) -> None:
        for name, member in _builtins_of(package):
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, *arguments)

    interpreter._patch_builtin = _patch_builtin


class _Case(NamedTuple):
    backend: str
    prepare: Callable[[pytest.MonkeyPatch], None]
    """Cuts its work so that a small N has many pieces, ragged at both ends."""


def _tiled(*shape: int) -> _Case:
    return _Case("tiled", lambda patch: patch.setattr(tiled, "_CPU_TILE", tiled._TileShape(*shape)))


def _triton(*, block: int, smallest_screened: int) -> _Case:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(triton, "_SLACK", 0)  # or all pairs of a small N would fit
        patch.setattr(triton, "_SMALLEST_SAMPLED", 16)
        patch.setattr(triton, "_SMALLEST_SCREENED", smallest_screened)
        if tiles.INTERPRETED:
            config = tiles.TileConfig(block=block, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=2)
            for kind in ("half", "tf32", "ieee"):
                patch.setitem(tiles.TILE_CONFIGS, ("interpreter", kind), config)
        else:
            patch.setitem(registry.BACKENDS, "triton", OnDevice(triton, "cuda"))

    return _Case("triton", prepare)


def _sparse(*, slab: int, on_kernels: bool) -> _Case:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(coactivation, "_GPU_SLAB" if on_kernels else "_CPU_SLAB", slab)
        if on_kernels and tiles.INTERPRETED:
            patch.setattr(coactivation, "_KERNEL_DEVICES", ("cpu",))
        elif on_kernels:
            patch.setitem(registry.BACKENDS, "sparse", OnDevice(sparse, "cuda"))

    return _Case("sparse", prepare)


BACKEND_CASES = {
    "naive": _Case("naive", lambda patch: None),
    "tiled_16x32": _tiled(16, 32),
    "tiled_11x15": _tiled(11, 15),
    "triton": _triton(block=32, smallest_screened=2**30),
    "triton_screened": _triton(block=64, smallest_screened=2),
    "sparse": _sparse(slab=300, on_kernels=False),
    "sparse_kernels": _sparse(slab=2000, on_kernels=True),
}
"""Where a new backend is added. Kernels run in the interpreter, or on a GPU where there is one."""
_WITH_KERNELS = ("triton", "triton_screened", "sparse_kernels")
# The interpreter takes a millisecond for each program of a launch, and there is one for each non-zero: the suite goes
# through these kernels on a GPU, tests/backends/test_sparse.py always.
_SUITE = [name for name in BACKEND_CASES if name != "sparse_kernels" or not tiles.INTERPRETED]


def _parameters(*names: str) -> list[object]:
    on_gpu = [] if tiles.INTERPRETED else [pytest.mark.gpu]
    return [pytest.param(name, marks=on_gpu if name in _WITH_KERNELS else []) for name in names]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the tests of the kernels and of their backend are GPU tests like any."""
    for item in items:
        if not tiles.INTERPRETED and ("kernels" in item.path.parts or item.path.name == "test_triton.py"):
            item.add_marker(pytest.mark.gpu)


def use_case(name: str, patch: pytest.MonkeyPatch) -> str:
    case = BACKEND_CASES[name]
    case.prepare(patch)
    return case.backend


@pytest.fixture(params=_parameters(*_SUITE))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of each backend, and of each way to cut its work."""
    return use_case(request.param, monkeypatch)


@pytest.fixture(params=_parameters("naive", "tiled_11x15", "triton", "sparse"))
def small_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One case for each backend, where the cut of the work is not the point."""
    return use_case(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty comes filled with NaN or the largest integer: reading it before writing shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
