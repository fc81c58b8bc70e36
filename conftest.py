"""Names that the doctests of topk_ortho use without importing them."""

from typing import Any

import pytest
import torch

import topk_ortho


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace.update({name: getattr(topk_ortho, name) for name in topk_ortho.__all__})
