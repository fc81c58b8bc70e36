"""What is set before anything is imported, and the names that doctests use without importing them."""

import os
from typing import Any

import pytest

# at the sizes of the tests a second thread only waits, and the workers of pytest-xdist share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # on the CPU, in NumPy
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms on a GPU

import topk_ortho


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace.update({name: getattr(topk_ortho, name) for name in topk_ortho.__all__})
