"""Columns whose inverse norm is a subnormal number, in a process that takes such numbers for 0."""

import pytest
import torch

from tests import oracle
from tests.conftest import on
from tests.inputs import normal
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho import max_cosine_loss, topk_ortho_loss, topk_pairs
from topk_ortho.backends.norms import in_range

HUGE = 9e37
"""1 / HUGE is below the smallest normal float32."""


@pytest.fixture(autouse=True)
def _subnormal_numbers_are_0():
    assert torch.set_flush_denormal(True)
    assert torch.tensor(1 / HUGE) * 1 == 0
    yield
    torch.set_flush_denormal(False)


def columns():
    """Columns of norms from 1 to above 2**127, in float32."""
    x = normal(6, 40, seed=3)
    return x / x.norm(dim=0) * torch.tensor([1.0, HUGE, 3e38, 1e30]).repeat(10)


def test_values(small_backend):
    x = columns()
    pairs = topk_pairs(x, fraction=1.0, backend=small_backend)
    expected = oracle.select(float64(x), 780, None)
    dense = torch.zeros(2, 40, 40, dtype=torch.float64)
    dense[0, pairs.rows, pairs.cols] = pairs.values.double()
    dense[1, expected.rows, expected.cols] = torch.as_tensor(expected.values)
    assert_within(actual=dense[0], expected=dense[1].numpy(), bound=cosine_bound(x))
    largest, _ = oracle.max_cosines(float64(x))
    assert max_cosine_loss(x, backend=small_backend).item() == pytest.approx((largest**2).mean(), rel=1e-5)
    in_chunks = max_cosine_loss(x, n_chunks=4, generator=torch.Generator().manual_seed(0), backend=small_backend)
    assert in_chunks > 0.1


@on("naive", "tiled_11x15", "sparse")  # a GPU keeps subnormal numbers, so its kernels need no care
@pytest.mark.parametrize(
    "loss", [lambda x, b: topk_ortho_loss(x, 1.0, backend=b), lambda x, b: max_cosine_loss(x, backend=b)]
)
def test_gradient(loss, backend):
    """It is as small as the norms are large, but a loss may have a large weight."""
    x = columns().requires_grad_()
    exact = x.detach().double().requires_grad_()
    for y in (x, exact):
        (1e10 * loss(y, backend)).backward()
    norms = exact.detach().norm(dim=0)
    actual, expected = x.grad.double() * norms, exact.grad * norms
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_other_columns_keep_their_bits():
    x = columns()
    scaled, norms, factor = in_range(x, x.norm(dim=0))
    is_huge = x.norm(dim=0) > 1e37
    assert torch.equal(scaled[:, ~is_huge], x[:, ~is_huge])
    assert torch.equal(norms, x.norm(dim=0) * factor)
    small = x[:, ~is_huge]
    assert in_range(small, small.norm(dim=0)).x is small
