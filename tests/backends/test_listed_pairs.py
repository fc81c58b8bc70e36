"""Cosines of listed pairs, by torch's sampled product and by gathering."""

import pytest
import torch

from tests.inputs import normal
from topk_ortho.backends import listed_pairs
from topk_ortho.backends.listed_pairs import cosines_of

M, N = 12, 90


@pytest.mark.quick
@pytest.mark.parametrize("has_mkl", sorted({False, torch.backends.mkl.is_available()}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines(has_mkl, dtype, monkeypatch):
    """All of them, a few that are gathered at a time, and none."""
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: has_mkl)
    monkeypatch.setattr(listed_pairs, "_GATHERED_ELEMENTS", 7 * M)
    x_hat = torch.nn.functional.normalize(normal(M, N, dtype=dtype).T, dim=1)
    for index in (torch.tensor([1, 3, 5 * N + 7, 80 * N + 89]), torch.arange(2 * N, 3 * N), torch.empty(0).long()):
        expected = (x_hat[index // N] * x_hat[index % N]).double().sum(dim=1).clamp(-1, 1)
        actual = cosines_of(x_hat, index)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)
