"""Which tile a program computes, the product of a tile, its quarters, its cosines, and rounding."""

from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.inputs import VIEWS, normal, seeded
from tests.kernels.arguments import DEVICE, numbers, to_device
from tests.tolerances import assert_within, float64
from topk_ortho.kernels.launch import ALWAYS, IF_FLAGGED, INTERPRETED, LEAN_CONFIGS, NEVER, TILE_CONFIGS
from topk_ortho.kernels.tiles import cosines, gram_tile, n_tiles_of, parts_of, round_to, triangle_tile


@triton.jit
def _triangle_kernel(
    tile_ptr, row_ptr, col_ptr,  # [n] int64, int32 x 2
    n, n_tile_rows,
    GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tile = tl.load(tile_ptr + offs, mask=offs < n, other=0)
    row, col = triangle_tile(tile, n_tile_rows, GROUP)
    tl.store(row_ptr + offs, row, mask=offs < n)
    tl.store(col_ptr + offs, col, mask=offs < n)


def tiles_of(numbers: np.ndarray, n_tile_rows: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cols) of the tiles with these numbers."""
    tile = torch.from_numpy(numbers).to(DEVICE)
    row, col = (torch.empty(len(numbers), dtype=torch.int32, device=DEVICE) for _ in range(2))
    _triangle_kernel[(triton.cdiv(len(numbers), 1024),)](
        tile, row, col, len(numbers), n_tile_rows, GROUP=group, CHUNK=1024
    )
    return row.cpu().numpy(), col.cpu().numpy()


def band(first: int, height: int, n_tile_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cols) of all tiles on or right of the diagonal in tile rows [first, first + height), column by column."""
    triangle = [(first + r, first + c) for c in range(height) for r in range(c + 1)]
    rows, cols = np.array(triangle, dtype=np.int32).T
    right = np.arange(first + height, n_tile_rows, dtype=np.int32)
    rows = np.concatenate([rows, np.tile(np.arange(first, first + height, dtype=np.int32), len(right))])
    return rows, np.concatenate([cols, right.repeat(height)])


def number_of(row: int, col: int, n_tile_rows: int, group: int) -> int:
    """The number of a tile, in Python's integers: what is in the bands above it, then what is before it in its band."""
    first = row // group * group
    height = min(group, n_tile_rows - first)
    above = first * n_tile_rows - first * (first - 1) // 2
    row, col = row - first, col - first
    if col < height:
        return above + col * (col + 1) // 2 + row
    return above + height * (height + 1) // 2 + (col - height) * height + row


def assert_tiles(actual: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], first: int) -> None:
    for name, ours, theirs in zip(("row", "col"), actual, expected, strict=True):
        if not np.array_equal(ours, theirs):
            at = int((ours != theirs).argmax())
            raise AssertionError(f"{name} of tile {first + at} is {ours[at]}, expected {theirs[at]}")


SHIPPED = sorted({
    (c.block, c.group)
    for configs in (TILE_CONFIGS, LEAN_CONFIGS) for (arch, _), c in configs.items() if arch != "interpreter"
})  # fmt: skip


class _TorchAsTriton(SimpleNamespace):
    """The part of triton.language that `triangle_tile` uses, on tensors: five times faster than the interpreter."""

    int32, int64, float32, float64, constexpr = torch.int32, torch.int64, torch.float32, torch.float64, None
    sqrt, where = torch.sqrt, torch.where

    @staticmethod
    def cast(tensor, dtype):
        return tensor.to(dtype)

    @staticmethod
    def minimum(number, tensor):
        return tensor.clamp_max(number)


def tiles_from(first: int, n: int, n_tile_rows: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cols) of n tiles from number `first` on."""
    tile = torch.arange(first, first + n)
    if not INTERPRETED:
        return tiles_of(tile.numpy(), n_tile_rows, group)
    plain = FunctionType(triangle_tile.fn.__code__, {"tl": _TorchAsTriton})
    row, col = plain(tile, torch.tensor(n_tile_rows, dtype=torch.int32), group)
    return row.numpy(), col.numpy()


@pytest.fixture
def one_thread():
    """Work of a few milliseconds a call: two threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestTriangle:
    """Every tile on or above the diagonal has one number: band by band, column by column."""

    @pytest.mark.parametrize(("block", "group"), SHIPPED, ids=lambda n: str(n))
    def test_every_tile_of_a_million_columns(self, block, group, one_thread):
        n_tile_rows = 2**20 // block
        n_checked = 0
        for first in range(0, n_tile_rows, 2 * group):
            bands = [band(f, min(group, n_tile_rows - f), n_tile_rows) for f in (first, first + group)]
            expected = tuple(np.concatenate(part) for part in zip(*bands, strict=True))
            n = len(expected[0])
            assert_tiles(tiles_from(n_checked, n, n_tile_rows, group), expected, n_checked)
            n_checked += n
        assert n_checked == n_tile_rows * (n_tile_rows + 1) // 2

    @pytest.mark.parametrize("group", [1, 3, 8])
    def test_every_small_triangle(self, group):
        """Bands that are cut short by the diagonal, one tile row, fewer tile rows than a band."""
        for n_tile_rows in range(1, 30):
            n_tiles = n_tile_rows * (n_tile_rows + 1) // 2
            rows, cols = tiles_of(np.arange(n_tiles), n_tile_rows, group)
            assert (rows >= 0).all()
            assert (cols < n_tile_rows).all()
            assert (rows <= cols).all()
            assert len(np.unique(rows.astype(np.int64) * n_tile_rows + cols)) == n_tiles, "a tile is computed twice"
            assert (np.diff(rows // group) >= 0).all(), "bands are not one after the other"

    @pytest.mark.skipif(not INTERPRETED.value, reason="the square root of NumPy is replaced")
    @pytest.mark.parametrize("error", [-(2.0**-22), 2.0**-22], ids=["low", "high"])
    @pytest.mark.parametrize(("block", "group"), SHIPPED, ids=lambda n: str(n))
    def test_inexact_square_root(self, block, group, error, monkeypatch):
        """The square root of a GPU errs by 2**-23 of itself: tiles around the ends of every row, triangle and band."""
        builder = triton.runtime.interpreter.InterpreterBuilder
        monkeypatch.setattr(
            builder, "create_sqrt", lambda self, x: self.unary_op(x, lambda x: np.sqrt(x) * np.float32(1 + error))
        )
        n_tile_rows = 2**20 // block
        row = np.arange(n_tile_rows, dtype=np.int64)
        starts = row * n_tile_rows - row * (row - 1) // 2
        numbers = np.unique(np.concatenate([starts + i for i in (-2, -1, 0, 1, 2, group * (group + 1) // 2)]))
        numbers = numbers[(numbers >= 0) & (numbers < n_tile_rows * (n_tile_rows + 1) // 2)]
        skewed = tiles_of(numbers, n_tile_rows, group)
        monkeypatch.undo()
        assert_tiles(skewed, tiles_of(numbers, n_tile_rows, group), 0)

    @pytest.mark.parametrize(
        "n_tile_rows", [2**31 // 64, 2**31 // 128, 4_000_000 // 128, 46_341], ids=["64", "128", "4_million", "46341"]
    )
    @pytest.mark.parametrize("group", sorted({1, 3} | {group for _, group in SHIPPED}))
    def test_more_tiles_than_int32_numbers(self, n_tile_rows, group):
        """The first and the last tile, those at both ends of a band and of a row, and others."""
        generator = np.random.default_rng(group)
        rows = generator.integers(0, n_tile_rows, 100)
        rows = sorted({0, n_tile_rows - 1, *rows.tolist(), *(rows // group * group).tolist()})
        places = {
            (row, col) for row in rows for col in (row, n_tile_rows - 1, int(generator.integers(row, n_tile_rows)))
        }
        places |= {(row - 1, n_tile_rows - 1) for row in rows[1:]}  # the last tile of a band, if row begins the next
        expected = np.array(sorted(places), dtype=np.int32).T
        numbers = np.array([number_of(row, col, n_tile_rows, group) for row, col in sorted(places)])
        assert numbers[0] == 0
        assert n_tile_rows * (n_tile_rows + 1) // 2 - 1 in numbers
        actual = tiles_of(numbers, n_tile_rows, group)
        for ours, theirs in zip(actual, expected, strict=True):
            wrong = np.flatnonzero(ours != theirs)
            assert not wrong.size, f"tile {numbers[wrong[0]]} of {n_tile_rows} tile rows is at another place"


@triton.jit
def _n_tiles_kernel(n_tiles_ptr, n_tile_rows):
    tl.store(n_tiles_ptr, n_tiles_of(n_tile_rows))


@pytest.mark.parametrize("n_tile_rows", [1, 2, 46_340, 46_341, 65_536, 2**25])
def test_number_of_tiles(n_tile_rows):
    """Past int32: the product from 46,341 tile rows on, half of it from 65,536 on."""
    n_tiles = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _n_tiles_kernel[(1,)](n_tiles, n_tile_rows)
    assert n_tiles.item() == n_tile_rows * (n_tile_rows + 1) // 2


@triton.jit
def _tile_kernel(
    x_ptr, stride_xm, stride_xn,       # [M, N]
    scale_ptr, flags_ptr,              # [N] float32, [1] int32
    tile_ptr, quarter_ptr,             # [BLOCK, BLOCK] float32, [4, BLOCK, BLOCK // 4] float32
    M, N, n_loaded, first_row, first_col,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, RESTART: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    tile = gram_tile(
        x_ptr, stride_xm, stride_xn, scale_ptr, flags_ptr, M, N, n_loaded, first_row, first_col,
        BLOCK, BLOCK_M, RESTART, PRECISION, SCALED, TRANSPOSED,
    )  # fmt: skip
    line = tl.arange(0, BLOCK)[:, None]
    tl.store(tile_ptr + line * BLOCK + tl.arange(0, BLOCK)[None, :], tile)
    parts = parts_of(tile, 4)
    quarter_ptrs = quarter_ptr + line * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    for part in tl.static_range(4):
        tl.store(quarter_ptrs + part * BLOCK * (BLOCK // 4), parts[part])


BLOCK, BLOCK_M = 32, 16


def tile_at(
    x: Tensor, first_row: int, first_col: int, scale: Tensor | None = None, *,
    flags: int | None = None, restart: int = 0, n_loaded: int | None = None, is_transposed: bool = False,
):  # fmt: skip
    """(tile, quarters) of x on the device; with flags they decide whether it is scaled."""
    scaled = NEVER if scale is None else ALWAYS if flags is None else IF_FLAGGED
    tile = torch.empty(BLOCK, BLOCK, device=DEVICE)
    parts = torch.empty(4, BLOCK, BLOCK // 4, device=DEVICE)
    _tile_kernel[(1,)](
        x, x.stride(0), x.stride(1), x if scale is None else scale, numbers([flags or 0], torch.int32), tile, parts,
        *x.shape, x.shape[1] if n_loaded is None else n_loaded, first_row, first_col,
        BLOCK=BLOCK, BLOCK_M=BLOCK_M, RESTART=restart, PRECISION="ieee", SCALED=scaled.value, TRANSPOSED=is_transposed,
    )  # fmt: skip
    return tile.cpu(), parts.cpu()


def assert_tile(actual: Tensor, x: Tensor, first_row: int, first_col: int, side: int = BLOCK) -> None:
    """Against float64; 0 outside N. x [M, N] is what is multiplied."""
    gram = np.zeros((2, side, side))  # the products, and the sums of their magnitudes
    for plane, a in zip(gram, (float64(x.cpu()), np.abs(float64(x.cpu()))), strict=True):
        part = a[:, first_row : first_row + side].T @ a[:, first_col : first_col + side]
        plane[: part.shape[0], : part.shape[1]] = part
    assert_within(actual=actual, expected=gram[0], bound=x.shape[0] * 2.0**-23 * gram[1])


class TestGramTile:
    """Products of a square of columns, whatever M, N, layout and dtype, and whichever way a tile of rows is loaded."""

    IS_TRANSPOSED = pytest.mark.parametrize("is_transposed", [False, True], ids=["data", "addresses"])
    CORNERS = ((0, 0), (0, 32), (32, 32))

    @IS_TRANSPOSED
    @pytest.mark.parametrize(("m", "n"), [(1, 2), (15, 31), (16, 64), (17, 33), (40, 50)], ids=str)
    def test_ragged(self, m, n, is_transposed):
        x = VIEWS["sliced_out_of_nan"](normal(m, n, seed=1))
        for corner in self.CORNERS:
            tile, _ = tile_at(to_device(x), *corner, is_transposed=is_transposed)
            assert_tile(tile, x, *corner)

    @pytest.mark.parametrize(
        ("view", "dtype"),
        [*((view, torch.float32) for view in VIEWS), ("transposed", torch.bfloat16), ("contiguous", torch.float16)],
        ids=str,
    )
    def test_layouts_and_dtypes(self, view, dtype):
        x = VIEWS[view](normal(21, 50, dtype=dtype))
        tile, _ = tile_at(to_device(x), 0, 32, is_transposed=view != "transposed")
        assert_tile(tile, x, 0, 32)

    @IS_TRANSPOSED
    @pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
    def test_nan_in_columns_that_are_loaded_beyond_the_last(self, is_scaled, is_transposed):
        """It stays in the lines of the tile that are of those columns."""
        x = torch.full((21, 64), torch.nan)
        x[:, :50] = normal(21, 50)
        scale = torch.cat([2.0 ** torch.randint(-3, 4, (50,), generator=seeded(0)), torch.full((14,), torch.nan)])
        arguments = {"scale": scale.to(DEVICE) if is_scaled else None, "is_transposed": is_transposed}
        tile, _ = tile_at(to_device(x)[:, :50], 32, 32, n_loaded=64, **arguments)
        assert tile[18:].isnan().all()
        assert tile[:, 18:].isnan().all()
        expected = (x * scale if is_scaled else x)[:, 32:50].double()
        assert_tile(tile[:18, :18], expected, 0, 0, side=18)

    @IS_TRANSPOSED
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_scaled(self, dtype, is_transposed):
        """Each side by the scale of its own columns, rounded to the dtype: exact for powers of two."""
        x = VIEWS["sliced_out_of_nan"](normal(21, 50, dtype=dtype))
        scale = 2.0 ** torch.randint(-3, 4, (50,), generator=seeded(0))
        tile, _ = tile_at(to_device(x), 0, 32, scale.to(DEVICE), is_transposed=is_transposed)
        assert_tile(tile, (x.double() * scale).to(dtype), 0, 32)

    @IS_TRANSPOSED
    @pytest.mark.parametrize("flags", [0, 1, 3])
    def test_flags_decide(self, flags, is_transposed):
        x, scale = normal(21, 50), 2.0 ** torch.randint(-3, 4, (50,), generator=seeded(0))
        tile, _ = tile_at(to_device(x), 0, 32, scale.to(DEVICE), flags=flags, is_transposed=is_transposed)
        assert_tile(tile, x * scale if flags else x, 0, 32)

    @pytest.mark.parametrize("m", [1, 31, 32, 33, 64, 85])
    def test_blocked_summation(self, m):
        x = VIEWS["sliced_out_of_nan"](normal(m, 50, seed=1))
        for corner in self.CORNERS:
            tile, _ = tile_at(to_device(x), *corner, restart=32)
            assert_tile(tile, x, *corner)

    def test_what_a_long_sum_would_drop(self):
        """2**24 + 1 + 1 is 2**24 in float32, 2**24 + (1 + 1) is not."""
        x = torch.zeros(64, 50)
        x[0], x[32], x[48] = 2.0**12, 1, 1
        for restart, expected in ((0, 2.0**24), (32, 2.0**24 + 2)):
            tile, _ = tile_at(to_device(x), 0, 0, restart=restart)
            assert (tile == expected).all()

    def test_scale_keeps_huge_columns_in_range(self):
        x = normal(21, 50) * 1e30
        scale = torch.full((50,), 2.0**-100)
        tile, _ = tile_at(to_device(x), 0, 0, scale.to(DEVICE))
        assert_tile(tile, x * scale, 0, 0)

    @IS_TRANSPOSED
    @pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
    def test_offsets_past_int32(self, columns, is_transposed, far_apart):
        x = normal(7, 3) if columns else normal(3, 7)
        tile, _ = tile_at(far_apart(x, columns=columns), 0, 0, is_transposed=is_transposed)
        assert_tile(tile, x, 0, 0)

    def test_quarters_go_left_to_right(self):
        tile, parts = tile_at(to_device(normal(21, 64)), 0, 32)
        assert tile.unique().numel() == tile.numel()
        assert torch.equal(torch.cat(list(parts), dim=1), tile)


@triton.jit
def _round_kernel(x_ptr, rounded_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(rounded_ptr + offs, round_to(x, rounded_ptr.dtype.element_ty), mask=offs < n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_round_to(dtype):
    """To nearest, ties to even, as torch does."""
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=seeded(0))
    bits[:1000] = bits[:1000] & -65536 | 0x8000  # half way between two bfloat16
    bits[1000:2000] = bits[1000:2000] & -8192 | 0x1000  # half way between two float16
    x = bits.int().view(torch.float32)
    x = x[x.isfinite() & (x.abs() >= 2.0**-126)]  # the interpreter gets subnormal numbers wrong
    x = torch.cat([x, normal(1, 500)[0], torch.tensor([0.0, -0.0, 1.0, -1.0, 3.4e38])])
    rounded = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    _round_kernel[(triton.cdiv(x.numel(), 1024),)](x.to(DEVICE), rounded, x.numel(), BLOCK=1024)
    assert torch.equal(rounded.cpu(), x.to(dtype))


@triton.jit
def _cosines_kernel(
    gram_ptr, factor_ptr, cosine_ptr,  # [ROWS, COLS], [N], [ROWS, COLS] float32
    N, first_row, first_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, NO_PAIR: tl.constexpr,
):  # fmt: skip
    offs_row, offs_col = tl.arange(0, ROWS), tl.arange(0, COLS)
    offs = offs_row[:, None] * COLS + offs_col[None, :]
    cosine = cosines(tl.load(gram_ptr + offs), factor_ptr, first_row + offs_row, first_col + offs_col, N, NO_PAIR)
    tl.store(cosine_ptr + offs, cosine)


@pytest.mark.parametrize(("first_row", "first_col"), [(0, 0), (16, 16), (0, 32), (32, 32), (32, 36)])
@pytest.mark.parametrize("n", [20, 39, 64])
def test_cosines(n, first_row, first_col):
    """The product of three numbers, clamped; a number of the caller's on the diagonal, below it, and outside N."""
    generator = seeded(n)
    gram = torch.randn(16, 8, generator=generator) * 10
    factor = torch.rand(n, generator=generator) + 0.2
    poisoned = torch.cat([factor, torch.full((64,), torch.nan)]).to(DEVICE)
    actual, with_number = torch.empty(2, 16, 8, device=DEVICE)
    for result, no_pair in ((actual, float("nan")), (with_number, -2.0)):
        _cosines_kernel[(1,)](
            gram.to(DEVICE), poisoned, result, n, first_row, first_col, ROWS=16, COLS=8, NO_PAIR=no_pair
        )
    assert torch.equal(actual.nan_to_num(-2.0), with_number)
    row, col = np.arange(first_row, first_row + 16), np.arange(first_col, first_col + 8)
    is_pair = (row[:, None] < col) & (col < n)
    assert (actual.isnan().cpu().numpy() != is_pair).all()
    padded = np.pad(float64(factor), (0, 64))
    expected = np.clip(float64(gram) * padded[row][:, None] * padded[col], -1, 1)
    assert_within(actual=actual.cpu().numpy()[is_pair], expected=expected[is_pair], bound=2.0**-22)
    if is_pair.sum() > 20:
        assert {-1.0, 1.0} < set(actual.cpu().numpy()[is_pair].tolist())
