"""The deviation bounds what rounding the columns does to any cosine."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.inputs import EDGES, VIEWS, activations, normal
from tests.kernels.arguments import gram_of, inverse_of, to_device
from tests.tolerances import float64
from topk_ortho.kernels.round_columns import SCALE, round_columns

ROUNDING = 2.0**-20
"""Of float32 norms and of the deviation, far above what they err by and far below any deviation."""


def rounded_on_cpu(x: Tensor) -> tuple[Tensor, float]:
    """(unit columns in float64, without the scale that fp16 wants; the deviation)."""
    rounded, deviation = round_columns(to_device(x), inverse_of(x))
    assert rounded.shape == x.shape
    assert rounded.dtype == torch.float16
    assert deviation.shape == (2,)
    assert deviation.dtype == torch.float32
    return rounded.cpu().double() / SCALE.value, deviation[0].item()


def moved(x: Tensor, rounded: Tensor) -> np.ndarray:
    """How far each column was moved, in float64; the kernel moves the float32 product, another 2**-24."""
    return np.sqrt(((float64(rounded) - float64(x) * float64(inverse_of(x).cpu())) ** 2).sum(axis=0))


def excess(x: Tensor) -> tuple[np.ndarray, float]:
    """By how much rounding changed each cosine, and the bound on it."""
    rounded, deviation = rounded_on_cpu(x)
    change = np.abs(float64(rounded).T @ float64(rounded) - gram_of(x))
    return change, 2 * deviation + deviation**2


def aligned(m: int, n: int) -> Tensor:
    """Columns of equal entries, which all round the same way: of many sizes."""
    return torch.cat([torch.ones(m, n), torch.zeros(m, n)]) + torch.eye(2 * m)[:, :n] * torch.linspace(0, 2, n)


CASES = {
    "normal": normal(40, 50),
    "sparse": activations(40, 50),
    "nearly_parallel": normal(40, 1).repeat(1, 50) + 1e-3 * normal(40, 50, seed=1),
    "one_row": normal(1, 50),
    "equal_entries": torch.ones(3, 50),
    "rounding_is_aligned": aligned(20, 40),
    "ragged_rows": normal(130, 33),
} | {f"edge_{name}": x for name, x in EDGES.items()}


@pytest.mark.parametrize("x", CASES.values(), ids=CASES)
def test_bound(x):
    change, bound = excess(x)
    assert change.max() <= bound + ROUNDING


@pytest.mark.parametrize("m", [3, 9, 12, 14, 15, 50, 59], ids="rows={}".format)
def test_bound_is_attained(m):
    """Two columns moved alike, along themselves: 2 d - d**2 or 2 d + d**2 of it is real, so no smaller one would do."""
    change, bound = excess(torch.ones(m, 2))
    assert bound > 2.0**-12
    assert 0.99 * bound <= change[0, 1] <= bound + ROUNDING


@pytest.mark.parametrize("x", CASES.values(), ids=CASES)
def test_deviation_is_the_largest(x):
    rounded, deviation = rounded_on_cpu(x)
    assert deviation == pytest.approx(moved(x, rounded).max(), rel=2.0**-18, abs=2.0**-23)


@pytest.mark.parametrize("column", [0, 31, 32, 69], ids=["first", "last_of_program", "first_of_next", "last"])
def test_any_column_may_be_the_worst(column):
    """All others are exact in fp16."""
    x = torch.eye(130)[:, :70].contiguous()
    x[129, column] = 1.0
    x[128, column] = 1 + 2.0**-8
    rounded, deviation = rounded_on_cpu(x)
    assert (moved(x, rounded) > 2.0**-22).nonzero()[0].tolist() == [column]
    assert deviation == pytest.approx(moved(x, rounded)[column], rel=2.0**-18, abs=2.0**-23)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(view):
    x = view(normal(137, 53))
    rounded, deviation = rounded_on_cpu(x)
    unit = float64(x) * float64(inverse_of(x).cpu())
    assert (np.abs(float64(rounded) - unit) <= 2.0**-11 * np.abs(unit) + 2.0**-29).all()
    assert deviation == pytest.approx(moved(x, rounded).max(), rel=2.0**-18, abs=2.0**-23)


@pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
def test_offsets_past_int32(columns, far_apart):
    x = normal(7, 3) if columns else normal(3, 7)
    rounded, _ = round_columns(far_apart(x, columns=columns), inverse_of(x))
    assert torch.equal(rounded.cpu().double() / SCALE.value, rounded_on_cpu(x)[0])


def test_dead_columns_stay_zero():
    x = normal(9, 40)
    x[:, [0, 39]] = 0
    rounded, _ = rounded_on_cpu(x)
    assert not rounded[:, [0, 39]].any()
    assert rounded.any(dim=0).sum() == 38


def test_no_entry_becomes_zero():
    """Nor subnormal, which some matrix units take for 0; it keeps its sign, and the deviation has its move."""
    tiny = torch.tensor([2.0**-28, 2.0**-29, 2.0**-30, 2.0**-45, 2.0**-100, 2.0**-149, 0.0])
    x = torch.stack([torch.ones(7), tiny, -tiny])
    rounded, deviation = rounded_on_cpu(x)
    expected = np.array([2.0**-28, *[2.0**-29] * 5, 0.0])
    assert rounded[1].tolist() == expected.tolist()
    assert rounded[2].tolist() == (-expected).tolist()
    assert deviation == pytest.approx(2.0**-29 * 2**0.5)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (136, 32), (127, 52)], ids=str)
@pytest.mark.parametrize("entry", [-2.0, -(2.0**-60), -0.0, 0.0], ids=str)
def test_negative_entries(entry, row, column):
    """The largest of them in magnitude is known, wherever it is."""
    x = normal(137, 53).abs()
    x[row, column] = entry
    _, numbers = round_columns(to_device(x), inverse_of(x))
    assert float(numbers[1]) == pytest.approx(-entry * float(inverse_of(x)[column]))
    assert (numbers[1] > 0) == (entry < 0)
