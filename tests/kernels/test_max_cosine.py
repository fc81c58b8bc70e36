"""Maxima and the lowest columns that have them, whole and by chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.inputs import EDGES, VIEWS, dyadic, normal, seeded
from tests.kernels.arguments import (
    DEVICE,
    FEW,
    exact_products,
    gram_of,
    in_padded_lines,
    inverse_of,
    operand_of,
)
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho.kernels.launch import Operand
from topk_ortho.kernels.max_cosine import max_cosine

NOTHING = -(2**63)


def run(operand: Operand, sizes: list[int], stride: int) -> Tensor:
    """Packed maxima of chunks of these sizes, the larger ones first, `stride` columns apart; int64 on the CPU."""
    best = torch.full((operand.x.shape[1],), NOTHING, dtype=torch.int64, device=DEVICE)
    n_larger = sizes.count(sizes[0])
    assert set(sizes[n_larger:]) <= {sizes[0] - 1}
    max_cosine(operand, best, len(sizes), stride, sizes[0], n_larger)
    return best.cpu()


def unpacked(best: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(values, partners): the higher half orders as floats do, the lower half counts down."""
    packed = best.numpy()
    ordered = (packed >> 32).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered).astype(np.int32)
    return bits.view(np.float32), 2**32 - 1 - (packed & (2**32 - 1))


def whole(operand: Operand) -> tuple[np.ndarray, np.ndarray]:
    n = operand.x.shape[1]
    return unpacked(run(operand, [n], n))


def largest_of(cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, lowest partners) of each column, by looking at all others."""
    values, partners = [], []
    for j in range(len(cosine)):
        others = [i for i in range(len(cosine)) if i != j]
        best = max(others, key=lambda i: (cosine[i, j], -i))
        values.append(cosine[best, j])
        partners.append(best)
    return np.array(values), np.array(partners)


def assert_exact(actual: tuple[np.ndarray, np.ndarray], cosine: np.ndarray) -> None:
    values, partners = largest_of(cosine)
    assert actual[0].tolist() == values.tolist()
    assert actual[1].tolist() == partners.tolist()


def assert_close(actual: tuple[np.ndarray, np.ndarray], x: Tensor) -> None:
    cosine = gram_of(x)
    values, partners = actual
    columns = np.arange(x.shape[1])
    assert (partners != columns).all()
    assert_within(actual=values, expected=largest_of(cosine)[0], bound=cosine_bound(x))
    assert_within(actual=values, expected=cosine[columns, partners], bound=cosine_bound(x))


@pytest.mark.usefixtures("small_tiles")
class TestWhole:
    """One chunk of all columns."""

    @pytest.mark.parametrize("n", [2, 16, 17, 33])
    def test_sizes_around_the_tiles(self, n):
        x = dyadic(6, n, seed=n)
        assert_exact(whole(operand_of(x)), gram_of(x))

    @FEW
    @given(data=st.data())
    def test_to_the_bit(self, data):
        """Maxima of either sign, with and without ties."""
        n = data.draw(st.integers(2, 35))
        operand, cosine = exact_products(n, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([None, 1, 3])))
        assert_exact(whole(operand), cosine)

    @pytest.mark.quick
    def test_ties_go_to_the_lowest_partner(self):
        """Across quarters, tiles and programs, above and below the diagonal."""
        values, partners = whole(operand_of(torch.ones(4, 35)))
        assert set(values.tolist()) == {1.0}
        assert partners.tolist() == [1] + [0] * 34

    def test_negative_maxima(self):
        """Every cosine is negative: corners of a simplex, each a little off."""
        x = torch.eye(40) - 1 / 40 + 0.002 * torch.randn(40, 40, generator=seeded(0))
        assert largest_of(gram_of(x))[0].max() < 0
        assert_close(whole(operand_of(x)), x)

    def test_negative_ties(self):
        """Two opposite columns, and one orthogonal pair of opposites: -1 or 0, never more."""
        x = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        values, partners = whole(operand_of(x))
        assert (values.tolist(), partners.tolist()) == ([-1.0, -1.0], [1, 0])
        x = torch.tensor([[1.0, -0.5, -2.0], [0.0, 0.0, 0.0]])
        values, partners = whole(operand_of(x))
        assert (values.tolist(), partners.tolist()) == ([-1.0, 1.0, 1.0], [1, 2, 1])

    def test_minus_zero_is_zero(self):
        """A negative product that underflows ties with zeros, in whatever tile they are."""
        x = torch.tensor([[1e-5] + [-1e-5] * 20 + [0.0] * 14])
        factor = torch.full((35,), 1e-18, device=DEVICE)
        values, partners = whole(Operand(x=x.to(DEVICE), factor=factor, scale=None, kind="ieee"))
        assert partners.tolist() == [1] + [0] * 34
        assert not values.view(np.int32).any(), "a zero has a sign"

    @pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
    def test_dead_columns(self, is_scaled):
        x = dyadic(6, 40, seed=2)
        x[:, [0, 17, 39]] = 0
        assert_exact(whole(operand_of(x, is_scaled=is_scaled)), gram_of(x))

    # `tests/kernels/test_tiles.py` has every layout and dtype, and every way to be ragged, for one tile.

    @pytest.mark.parametrize(("dtype", "is_scaled"), [(torch.bfloat16, True), (torch.float16, False)], ids=str)
    def test_dtypes(self, dtype, is_scaled):
        x = normal(33, 35, dtype=dtype)
        assert_close(whole(operand_of(x, "half", is_scaled=is_scaled)), x)

    @pytest.mark.parametrize("view", ["transposed", "sliced_out_of_nan", "expanded_columns"])
    def test_layouts(self, view):
        x = VIEWS[view](normal(33, 35))
        assert_close(whole(operand_of(x)), x)

    def test_padded_lines(self):
        x = in_padded_lines(dyadic(6, 35))
        assert_exact(whole(operand_of(x)), gram_of(x))

    @pytest.mark.parametrize("name", ["all_columns_huge", "huge_beside_tiny"])
    def test_huge_columns_are_scaled(self, name):
        assert_close(whole(operand_of(EDGES[name], is_scaled=True)), EDGES[name])

    def test_clamped(self):
        x = torch.ones(7, 20) * torch.linspace(0.1, 3, 20)
        operand = operand_of(x)
        values, _ = whole(Operand(x=operand.x, factor=2 * operand.factor, scale=None, kind="ieee"))
        assert set(values.tolist()) == {1.0}

    @pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
    def test_offsets_past_int32(self, columns, far_apart):
        x = dyadic(7, 3) if columns else normal(3, 7)
        far = Operand(x=far_apart(x, columns=columns), factor=inverse_of(x), scale=None, kind="ieee")
        assert_close(whole(far), x)


def test_real_tiles():
    x = dyadic(8, 150, seed=2)
    assert_exact(whole(operand_of(x)), gram_of(x))


@pytest.mark.usefixtures("small_tiles")
class TestChunks:
    """Runs of columns that know nothing of each other, partners counted from the start of each."""

    @staticmethod
    def check(sizes: list[int], stride: int, *, is_scaled: bool = False, view: str = "contiguous") -> None:
        """Columns between chunks are similar to all others, and must not count."""
        n_columns = len(sizes) * stride
        x = dyadic(6, n_columns, seed=n_columns)
        chunks = [range(i * stride, i * stride + size) for i, size in enumerate(sizes)]
        between = sorted(set(range(n_columns)) - {j for chunk in chunks for j in chunk})
        x[:, between] = x[:, :1]
        x = VIEWS[view](x)
        best = run(operand_of(x, is_scaled=is_scaled), sizes, stride)
        values, partners = unpacked(best)
        for chunk in chunks:
            part = slice(chunk.start, chunk.stop)
            assert_exact((values[part], partners[part]), gram_of(x[:, part]))
        assert (best[between] == NOTHING).all()

    @pytest.mark.parametrize(
        ("sizes", "stride"),
        [
            ([2, 2], 2),
            ([3, 2], 16),
            ([17, 16, 16], 32),  # the smaller ones have a tile row less
            ([34, 34, 33], 48),
        ],
        ids=str,
    )
    def test_sizes(self, sizes, stride):
        self.check(sizes, stride)

    def test_the_last_chunk_is_not_loaded_beyond_x(self):
        """Chunks of 17 columns, 18 apart: the last one has no room for 32, though the first has."""
        loaded = []

        class Kernel:
            def __getitem__(self, grid):
                return lambda **arguments: loaded.append(arguments["n_loaded"])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("topk_ortho.kernels.max_cosine._max_cosine_kernel", Kernel())
            run(operand_of(dyadic(6, 54)), [17, 17, 16], 18)
        assert loaded == [18]
        self.check([17, 17, 16], 18)

    @pytest.mark.parametrize("view", ["transposed", "sliced_out_of_nan"])
    def test_layouts(self, view):
        self.check([18, 17], 32, is_scaled=True, view=view)

    @FEW
    @given(data=st.data())
    def test_any_sizes(self, data):
        size, n_larger, n_smaller = (
            data.draw(st.integers(3, 20)),
            data.draw(st.integers(1, 2)),
            data.draw(st.integers(0, 2)),
        )
        self.check([size] * n_larger + [size - 1] * n_smaller, size + data.draw(st.integers(0, 9)))

    def test_against_the_oracle_of_the_op(self):
        x = normal(12, 32)
        values, _ = unpacked(run(operand_of(x), [11, 10], 16))
        expected, _ = oracle.max_cosines(float64(x), [range(11), range(16, 26)])
        for part in (slice(0, 11), slice(16, 26)):
            assert_within(actual=values[part], expected=expected[part], bound=cosine_bound(x))


def test_what_is_larger_already_stays(small_tiles):
    operand = operand_of(torch.eye(20))
    best = torch.full((20,), 7 << 32, dtype=torch.int64, device=DEVICE)
    max_cosine(operand, best, 1, 20, 20, 1)
    assert (best == 7 << 32).all()
