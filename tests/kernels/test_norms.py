"""Norms and what follows from them, over the whole range of a dtype."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.inputs import EDGES, VIEWS, normal
from tests.kernels.arguments import norms_of, to_device
from tests.tolerances import assert_within, float64
from topk_ortho.kernels.norms import NOT_FINITE, OUT_OF_RANGE, Norms, column_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U = 2.0**-24
BOTH = OUT_OF_RANGE.value | NOT_FINITE.value


def norms_on_cpu(x: Tensor) -> Norms:
    return Norms(*(t.cpu() for t in column_norms(to_device(x), oracle.EPS)))


def assert_norms(x: Tensor, flags: int = 0) -> Norms:
    """Every output against float64, for a finite x."""
    actual, expected = norms_on_cpu(x), norms_of(x)
    assert all(t.shape == (x.shape[1],) and t.dtype == torch.float32 for t in actual[:4])
    rounding = U * (4 + x.shape[0] ** 0.5)
    # squares below the smallest normal number lose their digits; such norms are far below EPS
    assert_within(
        actual=actual.norms, expected=expected, bound=rounding * expected + 2 * (x.shape[0] * 2.0**-126) ** 0.5
    )
    floored = np.maximum(float64(actual.norms), float(np.float32(oracle.EPS)))
    inverse = np.where(float64(actual.norms) > 0, 1 / floored, 0)
    assert_within(actual=actual.inverse, expected=inverse, bound=2 * U * inverse + 2.0**-149)
    mantissa, _ = np.frexp(float64(actual.scale))
    assert (mantissa == 0.5).all(), "scale is not a power of two"
    is_huge, scaled = float64(actual.norms) > 2.0**60, floored * float64(actual.scale)
    assert (actual.scale.numpy()[~is_huge] == 1).all()
    assert ((scaled[is_huge] >= 2) & (scaled[is_huge] < 4)).all()
    assert_within(actual=float64(actual.factor) * float64(actual.scale), expected=inverse, bound=2 * U * inverse)
    assert actual.flags.tolist() == [flags]
    return actual


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 2), (1, 33), (127, 31), (128, 32), (129, 65), (300, 2)], ids=str)
def test_shapes(shape):
    assert_norms(normal(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    assert_norms(normal(129, 33, dtype=dtype))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(view):
    assert_norms(view(normal(37, 53)))


@pytest.mark.parametrize(("name", "x"), EDGES.items(), ids=EDGES)
def test_edges(name, x):
    assert_norms(x, OUT_OF_RANGE.value if "huge" in name else 0)


@pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
def test_offsets_past_int32(columns, far_apart):
    x = normal(7, 3) if columns else normal(3, 7)
    actual = column_norms(far_apart(x, columns=columns), oracle.EPS)
    assert_within(actual=actual.norms.cpu(), expected=norms_of(x), bound=6 * U * norms_of(x))


@pytest.mark.parametrize(
    ("dtype", "magnitudes"),
    [
        (torch.float32, [1e-12, 1e-6, 1e6, 1e18, 1.8e19, 2e19, 1e30, 1e38, 2.9e38]),
        (torch.bfloat16, [1e-12, 1e-6, 1e6, 1e19, 1e30, 1e38]),
        (torch.float16, [6e-8, 1e-4, 6e4]),
    ],
    ids=str,
)
def test_range(dtype, magnitudes):
    """Squares of the larger ones overflow, their norms do not; each has company of every other size."""
    x = (torch.tensor(magnitudes, dtype=torch.float64) * torch.tensor([[1.0], [-0.5], [0.25]])).to(dtype)
    assert_norms(x, 0 if dtype == torch.float16 else OUT_OF_RANGE.value)


def test_the_sum_overflows_but_no_square():
    """300 squares of 1e37 each: their sum is beyond float32, in one lane or across lanes."""
    x = torch.full((300, 33), 3e18)
    x[1:, 5] = 0
    actual = assert_norms(x, OUT_OF_RANGE.value)
    assert actual.norms[0] == pytest.approx(3e18 * 300**0.5, rel=2e-6)


def test_a_dead_column_has_inverse_0():
    x = normal(9, 40)
    x[:, [0, 33, 39]] = 0
    actual = assert_norms(x)
    assert actual.norms[[0, 33, 39]].tolist() == [0, 0, 0]
    assert actual.inverse[[0, 33, 39]].tolist() == actual.factor[[0, 33, 39]].tolist() == [0, 0, 0]
    assert actual.inverse.count_nonzero() == 37


@pytest.mark.parametrize("norm", [1e-30, 1e-15, 9.99e-13, 1e-12, 1.01e-12], ids=str)
def test_eps(norm):
    """Below it, and at it, a column is divided by it."""
    x = torch.tensor([[norm * 0.6, 1.0], [norm * 0.8, 0.0]])
    actual = norms_on_cpu(x)
    if norm > 1e-18:  # squares in range
        assert actual.norms[0] == pytest.approx(norm, rel=1e-6)
        assert actual.inverse[0] == pytest.approx(1 / max(norm, 1e-12), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_of_two_are_exact(dtype):
    """2**i x has 2**i times the norm, to the bit; scale and factor have the inverse for their product."""
    x = normal(45, 20, seed=1, dtype=dtype)
    shift = torch.tensor([-9.0, -1, 0, 1, 4] if dtype == torch.float16 else [-20.0, -1, 0, 1, 50, 90]).exp2()
    scaled = (x[:, :, None].double() * shift).flatten(1).to(dtype)
    plain, actual = norms_on_cpu(x), norms_on_cpu(scaled)
    assert torch.equal(actual.norms, (plain.norms[:, None] * shift).flatten())
    assert torch.equal(actual.inverse, (plain.inverse[:, None] / shift).flatten())
    assert torch.equal(actual.factor * actual.scale, actual.inverse)


class TestFlags:
    """One bit for what overflows in products, one more for what nobody can use."""

    @staticmethod
    def flags_of(x):
        return int(norms_on_cpu(x).flags)

    @pytest.mark.parametrize("column", [0, 31, 32, 69], ids=["first", "last_of_program", "first_of_next", "last"])
    def test_of_any_column(self, column):
        x = VIEWS["sliced_out_of_nan"](normal(5, 70))
        x[4, column] = torch.nan
        assert self.flags_of(x) == BOTH

    @pytest.mark.parametrize(
        ("value", "flags"),
        [
            (2.0**60, 0),
            (2.0**60 * (1 + 2.0**-23), OUT_OF_RANGE.value),
            (3e38, OUT_OF_RANGE.value),
            (torch.inf, BOTH),
            (-torch.inf, BOTH),
            (torch.nan, BOTH),
        ],
        ids=["at_the_limit", "just_above", "largest", "inf", "minus_inf", "nan"],
    )
    def test_of_one_value(self, value, flags):
        x = VIEWS["sliced_out_of_nan"](normal(5, 70))
        assert self.flags_of(x) == 0
        x[:, 32] = 0
        x[4, 32] = value
        assert self.flags_of(x) == flags

    def test_a_norm_beyond_float32(self):
        x = torch.ones(4, 70)
        x[:, 69] = 3e38
        assert self.flags_of(x) == BOTH
        assert norms_on_cpu(x).norms[69] == torch.inf

    @pytest.mark.parametrize("order", [(1e30, torch.nan), (torch.nan, 1e30)], ids=["nan_later", "nan_first"])
    def test_bits_of_all_programs_are_joined(self, order):
        x = torch.ones(3, 70)
        x[1, 3], x[1, 60] = order
        assert self.flags_of(x) == BOTH

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_nan_of_half_precision(self, dtype):
        x = torch.ones(3, 70, dtype=dtype)
        x[2, 50] = torch.nan
        assert self.flags_of(x) == BOTH
