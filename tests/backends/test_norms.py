"""Column norms against float64, over the whole range of a dtype."""

import numpy as np
import pytest
import torch

from tests import oracle
from tests.inputs import EDGES, FLOATING, VIEWS, normal
from tests.tolerances import accumulation_dtype, assert_within, float64, unit_roundoff
from topk_ortho.backends import norms as norms_module
from topk_ortho.backends.norms import column_norms, inverse_norms


def expected_norms(x):
    x = float64(x)
    largest = np.abs(x).max(axis=0)
    scale = np.where(largest > 0, largest, 1)
    return scale * np.sqrt(((x / scale) ** 2).sum(axis=0))


def assert_norms(x, **sizes):
    norms, expected = column_norms(x, **sizes), expected_norms(x)
    assert norms.dtype == accumulation_dtype(x)
    u, smallest = unit_roundoff(norms.dtype), torch.finfo(norms.dtype).smallest_normal
    # squares below the smallest normal number lose their digits; such norms are far below EPS
    bound = u * (4 + x.shape[0] ** 0.5) * expected + 2 * np.sqrt(x.shape[0] * smallest)
    assert_within(actual=norms, expected=expected, bound=bound)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (1, 300), (300, 2), (37, 53)], ids=str)
def test_shapes_and_dtypes(shape, dtype):
    assert_norms(normal(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(view, dtype):
    assert_norms(view(normal(37, 53, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
def test_edges(x, dtype):
    assert_norms(x.to(dtype))


@pytest.mark.parametrize("slab_elements", [1, 53, 54, 53 * 5, 53 * 36, 53 * 37, 53 * 38])
def test_slabs(slab_elements):
    assert_norms(normal(37, 53), slab_elements=slab_elements)


@pytest.mark.parametrize(
    ("dtype", "magnitudes"),
    [
        (torch.float32, [1e-12, 1e-6, 1e6, 1e18, 1.8e19, 2e19, 1e30, 1e38]),
        (torch.bfloat16, [1e-12, 1e-6, 1e6, 1e19, 1e30, 1e38]),
        (torch.float16, [6e-8, 1e-4, 6e4]),
        (torch.float64, [1e-100, 1e100, 1e160, 1e200, 1e307]),
    ],
    ids=str,
)
def test_range(dtype, magnitudes):
    """Squares of the larger ones overflow, their norms do not; each has company of every other size."""
    assert_norms((torch.tensor(magnitudes, dtype=torch.float64) * torch.tensor([[1.0], [-0.5], [0.25]])).to(dtype))


def test_fp32_norms_of_half_precision_sums():
    """65,504 is the largest float16, and 1 + 2**-8 rounds in bfloat16: sums are not kept in them."""
    assert column_norms(torch.full((100, 2), 60_000.0, dtype=torch.float16)).tolist() == [pytest.approx(6e5)] * 2
    assert column_norms(torch.ones(1024, 2, dtype=torch.bfloat16)).tolist() == [32.0, 32.0]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        pytest.param(0.0, 0.0, id="dead"),
        pytest.param(1e-30, 1e12, id="below_eps"),
        pytest.param(1e-12, 1e12, id="eps"),
        pytest.param(1e-6, 1e6, id="small"),
        pytest.param(4.0, 0.25, id="ordinary"),
        pytest.param(1e38, 1e-38, id="huge"),
    ],
)
def test_inverse_norms(norm, expected):
    inverse = inverse_norms(torch.tensor([norm, 2.0]))
    assert inverse.tolist() == [pytest.approx(expected, rel=1e-6), 0.5]


def test_eps_is_that_of_normalize():
    assert norms_module.EPS == oracle.EPS


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("row", [0, 20, 36], ids=["first_row", "inner_row", "last_row"])
def test_non_finite(value, dtype, row):
    x = normal(37, 53, dtype=dtype)
    x[row, [4, 50]] = value
    with pytest.raises(ValueError, match=r"^x has 2 columns with NaN or Inf: 4, 50$"):
        column_norms(x, slab_elements=53 * 5)


def test_norm_too_large():
    x = torch.ones(4, 3)
    x[:, 1] = 3e38
    with pytest.raises(
        ValueError, match=r"^x has 1 column whose norm is too large for torch\.float32: 1; scale x down$"
    ):
        column_norms(x)


def test_large_but_not_too_large():
    assert column_norms(torch.full((4, 2), 1.5e38)).tolist() == [pytest.approx(3e38)] * 2
