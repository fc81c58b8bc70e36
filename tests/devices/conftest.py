"""The second device: a GPU, or its stand-in. `tests/test_devices.py` runs what is here."""

import pytest
import torch

from tests.devices import stand_in
from topk_ortho.backends import registry
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.products import Slabs


@pytest.fixture(scope="session", autouse=True)
def device():
    """The name of the second device."""
    return "cuda" if torch.cuda.is_available() else stand_in.install()


class _PlainSparseBackend(SparseBackend):
    """The sparse route without kernels, on any device."""

    def unavailable_reason(self, device):
        return None


@pytest.fixture(autouse=True)
def _what_the_device_has(device, monkeypatch, _poisoned_memory):
    if device == "cuda":
        torch.use_deterministic_algorithms(False)  # torch has none for some operations
    else:
        plain = _PlainSparseBackend(slabs=Slabs(most_products=5000, on_kernels=False))
        monkeypatch.setitem(registry.BACKENDS, "sparse", plain)
