"""Settings and fixtures of all tests."""

import os
from collections.abc import Container, Iterator, Sequence
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import HealthCheck, settings

from tests import interpreter
from tests.on_device import OnDevice
from topk_ortho.backends import registry
from topk_ortho.backends.naive import NaiveBackend
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.tile_stream import TileShape
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.backends.triton import TritonBackend
from topk_ortho.kernels import launch, pair_gradient
from topk_ortho.warm_start import SampleSizes

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


if launch.INTERPRETED:
    interpreter.speed_up()


def _triton(least_screened_features: int) -> TritonBackend:
    # without spare records, or all pairs of a small N would fit
    sample, least = SampleSizes(least_features=16), least_screened_features
    return TritonBackend(sample=sample, spare_records=0, least_screened_features=least, least_aligned_features=32)


# each with its work cut so that a small N has many pieces, ragged at both ends
BACKEND_CASES: dict[str, tuple[str, Any]] = {
    "naive": ("naive", NaiveBackend()),
    "tiled_16x32": ("tiled", TiledBackend(tile=TileShape(16, 32))),
    "tiled_11x15": ("tiled", TiledBackend(tile=TileShape(11, 15))),
    "tiled_screened": (
        "tiled",
        TiledBackend(tile=TileShape(16, 32), screen=True, sample=SampleSizes(least_features=16)),
    ),
    "triton": ("triton", _triton(least_screened_features=2**30)),
    "triton_screened": ("triton", _triton(least_screened_features=2)),
    "sparse": ("sparse", SparseBackend(slabs=Slabs(most_products=900))),
    "sparse_kernels": ("sparse", SparseBackend(slabs=Slabs(most_products=2000, on_kernels=True))),
}
"""Where a new backend is added. Kernels run in the interpreter, or on a GPU where there is one."""
_WITH_KERNELS = ("triton", "triton_screened", "sparse_kernels")
# The interpreter takes a millisecond for each program of a launch, and there is one for each non-zero: the suite goes
# through these kernels on a GPU, tests/backends/sparse/ always.
_SUITE = [name for name in BACKEND_CASES if name != "sparse_kernels" or not launch.INTERPRETED]


def _parameters(*names: str) -> list[ParameterSet]:
    on_gpu = [] if launch.INTERPRETED else [pytest.mark.gpu]
    return [pytest.param(name, marks=on_gpu if name in _WITH_KERNELS else []) for name in names]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the tests of the kernels and of their backend are GPU tests like any."""
    for item in items:
        if not launch.INTERPRETED and ("kernels" in item.path.parts or item.path.name == "test_triton.py"):
            item.add_marker(pytest.mark.gpu)


def use_case(name: str, patch: pytest.MonkeyPatch) -> str:
    """Put a backend of `BACKEND_CASES` in the place of the one that its name means."""
    backend_name, backend = BACKEND_CASES[name]
    if backend_name == "triton":
        patch.setattr(pair_gradient, "SEGMENT", 64)
    if name in _WITH_KERNELS and not launch.INTERPRETED:
        backend = OnDevice(backend, "cuda:0")
    elif backend_name == "triton":
        block = 64 if name == "triton_screened" else 32
        config = launch.TileConfig(block=block, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=2)
        for kind in ("half", "tf32", "ieee"):
            patch.setitem(launch.TILE_CONFIGS, ("interpreter", kind), config)
    patch.setitem(registry.BACKENDS, backend_name, backend)
    return backend_name


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test that asks for `backend` on these alone."""
    return pytest.mark.parametrize("backend", _parameters(*names), indirect=True)


def crossed(
    arguments: str, cases: Sequence[ParameterSet], *, triton: Container[str], screened: Container[str] = ()
) -> pytest.MarkDecorator:
    """Run cases that have ids on every backend; in the interpreter, "triton" and its screen run those named alone."""
    interpreted = {"triton": triton, "triton_screened": screened} if launch.INTERPRETED else {}
    return pytest.mark.parametrize(
        f"{arguments}, backend",
        [
            pytest.param(*case.values, *backend.values, id=f"{case.id}-{name}", marks=[*case.marks, *backend.marks])
            for case in cases
            for name, backend in zip(_SUITE, _parameters(*_SUITE), strict=True)
            if name not in interpreted or case.id in interpreted[name]
        ],
        indirect=["backend"],
    )


with_screen = on(*_SUITE)
"""For tests of what is selected: also through the screen of the triton backend, which nothing else goes through."""
not_interpreted = on(*(name for name in _SUITE if name not in _WITH_KERNELS or not launch.INTERPRETED))
"""For tests that say something about kernels on a GPU alone, or whose parts other tests show for them."""
in_float64 = on("naive", "tiled_11x15", "sparse")
"""For tests in float64, for which there are no kernels."""


@pytest.fixture(params=_parameters(*(name for name in _SUITE if name != "triton_screened")))
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
