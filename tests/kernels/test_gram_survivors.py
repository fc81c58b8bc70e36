"""Which pairs are recorded, how many are counted, and the moments of all."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.inputs import VIEWS, activations, dyadic, normal
from tests.kernels.arguments import (
    DEVICE,
    FEW,
    assert_same,
    copy_of,
    empty_moments,
    exact_products,
    gram_of,
    in_padded_lines,
    inverse_of,
    operand_of,
    radix_at,
    to_device,
)
from tests.kernels.steps import certify
from tests.tolerances import assert_within, cosine_bound
from topk_ortho.kernels import launch
from topk_ortho.kernels.gram_survivors import gram_survivors
from topk_ortho.kernels.launch import (
    DESCRIBED_CONFIGS,
    INTERPRETED,
    LEAN_CONFIGS,
    RESTARTED_CONFIGS,
    TILE_CONFIGS,
    Operand,
    TileConfig,
    aligned,
    current_device,
)
from topk_ortho.kernels.radix_select import CERTIFIED, COLLECT, DIGITS, PASS

POISON = 123456
GUARD = 40


class Records(NamedTuple):
    pairs: dict[tuple[int, int], float]
    """Stored, by (row, col)"""
    n_survivors: int
    radix: object


def select(
    operand: Operand, capacity: int = 2000, *, floor: float = -1.0, is_abs: bool = True, is_first: bool = True, **fields
) -> Records:
    """Run between guard words, check them, and read the records; everything but the count must stay as it was."""
    stage = (PASS if is_first else COLLECT).value
    radix = radix_at(stage, operand.x.shape[1], **fields)
    before = copy_of(radix)
    buffers = [
        torch.full((GUARD + capacity + GUARD,), POISON, dtype=dtype, device=DEVICE)
        for dtype in (torch.float32, torch.int32, torch.int32)
    ]
    values, rows, cols = (b[GUARD:-GUARD] for b in buffers)
    gram_survivors(
        operand, radix, values, rows, cols, None, 1, floor, is_abs=is_abs, is_first=is_first, certifies=False
    )
    assert_same(actual=radix, expected=before, but=("n_survivors",))
    n_survivors = int(radix.n_survivors)
    n_stored = min(n_survivors, capacity)
    for buffer in buffers:
        assert (buffer[:GUARD] == POISON).all(), "written before the records"
        assert (buffer[GUARD + n_stored :] == POISON).all(), "written past the records"
        assert (buffer[GUARD : GUARD + n_stored] != POISON).all(), "a record was left out"
    pairs = dict(zip(zip(rows.tolist(), cols.tolist(), strict=True), values.tolist(), strict=True))
    pairs.pop((POISON, POISON), None)
    assert len(pairs) == n_stored, "a pair is recorded twice"
    return Records(pairs, n_survivors, radix)


def survivors_of(
    cosine: np.ndarray,
    *,
    bound: float = -1.0,
    tie_row: int | None = None,
    floor: float = -1.0,
    slack: float = 0.0,
    is_abs: bool = True,
) -> dict[tuple[int, int], float]:
    """The definition, pair by pair."""
    found = {}
    n = len(cosine)
    for row in range(n):
        for col in range(row + 1, n):
            s = abs(cosine[row, col]) if is_abs else cosine[row, col]
            if slack:
                is_kept = s > max(bound, floor) - slack
            else:
                is_tied = s == bound and (tie_row is None or row <= tie_row)
                is_kept = (s > bound or is_tied) and s > floor
            if is_kept:
                found[row, col] = cosine[row, col]
    return found


def assert_close_records(records: Records, expected: dict[tuple[int, int], float], bound: float) -> None:
    assert records.pairs.keys() == expected.keys()
    assert records.n_survivors == len(expected)
    actual = np.array([records.pairs[pair] for pair in expected])
    assert_within(actual=actual, expected=np.array(list(expected.values())), bound=bound)


def bound_in_a_gap(cosine: np.ndarray, gap: float) -> float:
    """A number that no similarity is nearer to than `gap`, with a third of them above it."""
    s = np.sort(np.abs(cosine[np.triu_indices(len(cosine), 1)]))
    wide = (np.diff(s) > 2 * gap).nonzero()[0]
    at = wide[np.abs(wide - len(s) * 2 // 3).argmin()]
    return float(s[at] + s[at + 1]) / 2


@pytest.mark.usefixtures("small_tiles")
class TestRecords:
    """All pairs above the bound of their row, each once."""

    @FEW
    @given(data=st.data())
    def test_any_shape_any_bound(self, data):
        n = data.draw(st.integers(2, 35))
        if data.draw(st.booleans()):
            operand, cosine = exact_products(n, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([None, 1, 3])))
        else:
            x = dyadic(6, n, seed=data.draw(st.integers(0, 99)))
            operand, cosine = operand_of(x, is_scaled=data.draw(st.booleans())), gram_of(x)
        row = data.draw(st.integers(0, n - 2))
        a_value = float(cosine[row, data.draw(st.integers(row + 1, n - 1))])
        fields = {
            "floor": data.draw(st.sampled_from([-1.0, -1.0, 0.0, 0.25, abs(a_value)])),
            "is_abs": data.draw(st.booleans()),
        }
        bound = abs(a_value) if data.draw(st.booleans()) else data.draw(st.sampled_from([0.1, 0.5, 1.0]))
        fields |= {"bound": bound, "tie_row": data.draw(st.integers(-1, n))}
        if not fields["is_abs"]:
            fields["floor"] = max(0.0, fields["floor"])  # what the backend asks for
        is_first = data.draw(st.booleans())
        expected = survivors_of(cosine, **fields)
        capacity = max(1, len(expected) + data.draw(st.sampled_from([-10, -1, 0, 1, 500])))
        records = select(operand, capacity, is_first=is_first, **fields)
        assert records.n_survivors == len(expected)
        assert records.pairs.items() <= expected.items()

    @pytest.mark.parametrize(("n", "is_abs"), [(2, True), (16, False), (17, True), (33, True)], ids=str)
    def test_all_pairs(self, n, is_abs):
        """No bound: every row of a tile is full."""
        operand, cosine = exact_products(n, seed=n)
        expected = survivors_of(cosine, is_abs=is_abs, floor=-1.0)
        assert len(expected) == n * (n - 1) // 2
        assert select(operand, is_abs=is_abs).pairs == expected

    @pytest.mark.parametrize(("floor", "is_abs"), [(0.0, False), (0.3, True)], ids=str)
    def test_floor_alone(self, floor, is_abs):
        operand, cosine = exact_products(33)
        expected = survivors_of(cosine, floor=np.float32(floor), is_abs=is_abs)
        assert 0 < len(expected) < 528
        assert select(operand, floor=floor, is_abs=is_abs).pairs == expected

    def test_nothing(self):
        operand, _ = exact_products(40)
        assert select(operand, bound=1.0).n_survivors == 0

    @pytest.mark.parametrize("n_missing", [1, 527])
    def test_a_capacity_that_is_too_small(self, n_missing):
        """Guard words are checked by `select`; the count is exact whatever fits."""
        operand, cosine = exact_products(33)
        records = select(operand, 528 - n_missing)
        assert records.n_survivors == 528
        assert records.pairs.items() <= survivors_of(cosine).items()

    @pytest.mark.quick
    @pytest.mark.parametrize("tie_row", [-1, 5, 16])
    def test_ties_up_to_a_row(self, tie_row):
        x = torch.ones(4, 33)
        expected = survivors_of(np.ones((33, 33)), bound=1.0, tie_row=tie_row)
        records = select(operand_of(x), bound=1.0, tie_row=tie_row)
        assert records.n_survivors == len(expected) == sum(32 - row for row in range(tie_row + 1))
        assert records.pairs.keys() == expected.keys()

    def test_slack(self):
        operand, cosine = exact_products(40)
        fields = {"bound": 0.5, "slack": 0.0625}
        expected = survivors_of(cosine, **fields)
        assert len(expected) > len(survivors_of(cosine, bound=0.5))
        assert select(operand, **fields).pairs == expected

    @pytest.mark.parametrize("programs", [1, 99])
    def test_any_number_of_programs(self, programs, monkeypatch):
        """All tiles by one program, or one tile each; several each everywhere else."""
        operand, cosine = exact_products(47)
        if INTERPRETED:
            key = ("interpreter", "ieee")
            config = TILE_CONFIGS[key]
            fields = {name: getattr(config, name) for name in ("block", "block_m", "group", "num_warps", "num_stages")}
            monkeypatch.setitem(TILE_CONFIGS, key, type(config)(**fields, programs_per_sm=programs))
            assert operand.n_programs == min(programs, 6)
        assert select(operand, bound=0.25).pairs == survivors_of(cosine, bound=0.25)

    def test_slots_are_int32(self):
        operand, _ = exact_products(4)
        values, ints = torch.empty(1).expand(2**31), torch.empty(1, dtype=torch.int32).expand(2**31)
        with pytest.raises(AssertionError, match="slots are int32"):
            gram_survivors(
                operand, radix_at(0, 4), values, ints, ints, None, 1, -1.0, is_abs=True, is_first=True, certifies=True
            )


@pytest.mark.usefixtures("small_tiles")
class TestProducts:
    """Against float64, with a bound that rounding does not reach."""

    @staticmethod
    def check(x: Tensor, operand: Operand) -> None:
        cosine, error = gram_of(x), cosine_bound(x)
        bound = bound_in_a_gap(cosine, error)
        expected = survivors_of(cosine, bound=bound)
        assert 10 < len(expected) < 0.9 * x.shape[1] * (x.shape[1] - 1) / 2
        assert_close_records(select(operand, bound=bound), expected, error)

    # `tests/kernels/test_tiles.py` has every layout and dtype, and every way to be ragged, for one tile.

    @pytest.mark.parametrize(("m", "is_scaled"), [(2, False), (33, True)], ids=str)
    def test_ragged(self, m, is_scaled):
        x = normal(m, 37, seed=m)
        self.check(x, operand_of(x, is_scaled=is_scaled))

    @pytest.mark.parametrize(("dtype", "is_scaled"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
    def test_dtypes(self, dtype, is_scaled):
        x = activations(40, 37, dtype=dtype)
        self.check(x, operand_of(x, "half", is_scaled=is_scaled))

    @pytest.mark.parametrize("view", ["transposed", "sliced_out_of_nan"])
    def test_layouts(self, view):
        x = VIEWS[view](normal(33, 37))
        self.check(x, operand_of(x))

    @pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
    def test_padded_lines(self, is_scaled):
        x = in_padded_lines(normal(33, 37))
        operand = operand_of(x, is_scaled=is_scaled)
        assert operand.arguments()["n_loaded"] == 48
        self.check(x, operand)

    @pytest.mark.parametrize("magnitude", [1e-11, 3e37], ids=str)
    def test_scaled_columns_of_any_norm(self, magnitude):
        """Products of the plain columns are not finite, or have no digits left."""
        x = normal(33, 45)
        x[:, ::3] *= magnitude / float(x.abs().max())
        self.check(x, operand_of(x, is_scaled=True))

    def test_dead_columns(self):
        """Cosine 0 to every other, which a bound of 0 keeps."""
        x = torch.eye(20)
        x[:, 7] = x[:, 3]
        x[:, [0, 11, 19]] = 0
        assert set(select(operand_of(x), bound=0.5).pairs) == {(3, 7)}
        assert select(operand_of(x), bound=0.0).n_survivors == 190
        assert select(operand_of(x), bound=0.0, tie_row=-1).n_survivors == 1
        assert select(operand_of(x), bound=0.0, floor=0.0, is_abs=False).n_survivors == 1

    @pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
    def test_offsets_past_int32(self, columns, far_apart):
        x = dyadic(7, 3) if columns else normal(3, 7)
        operand = Operand(x=far_apart(x, columns=columns), factor=inverse_of(x), scale=None, kind="ieee")
        assert_close_records(select(operand), survivors_of(gram_of(x)), cosine_bound(x))

    def test_clamped(self):
        """Cosines of columns that are nearly parallel may round to more than 1."""
        x = torch.ones(70, 33) * torch.linspace(0.1, 3, 33)
        values = np.array(list(select(operand_of(x)).pairs.values()))
        assert len(values) == 528
        assert values.max() <= 1
        operand = Operand(x=to_device(x), factor=2 * inverse_of(x), scale=None, kind="ieee")
        assert set(select(operand).pairs.values()) == {1.0}


class TestRealTiles:
    """The sizes of the table, three tile rows."""

    def test_select(self):
        x = dyadic(8, 150, seed=2)
        expected = survivors_of(gram_of(x), bound=0.5, tie_row=70)
        records = select(operand_of(x), 5000, bound=0.5, tie_row=70)
        assert 1000 < len(expected) < 5000
        assert records.pairs == expected


@pytest.fixture(params=["rows", "columns"])
def _described_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two shapes in the interpreter; on a GPU those of its table, if it has an entry."""
    if INTERPRETED:
        sides = {"block": 32, "block_col": 16} if request.param == "rows" else {"block": 16, "block_col": 32}
        config = TileConfig(block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=3, **sides)
        monkeypatch.setitem(DESCRIBED_CONFIGS, ("interpreter", "half"), config)
    elif (current_device().architecture, "half") not in DESCRIBED_CONFIGS:
        pytest.skip("this GPU has no entry in DESCRIBED_CONFIGS")


@pytest.mark.usefixtures("_described_tiles")
class TestDescribed:
    """The kernel that reads x by descriptors."""

    @staticmethod
    def operand(x: Tensor, *, is_feature_major: bool = False) -> Operand:
        operand = operand_of(x, "half")
        operand = replace(operand, x=aligned(to_device(x.T.contiguous().T if is_feature_major else x)))
        assert operand.is_described
        return operand

    @pytest.mark.parametrize("is_feature_major", [False, True], ids=["row_major", "feature_major"])
    @pytest.mark.parametrize(
        ("m", "n", "dtype"), [(2, 37, torch.bfloat16), (32, 64, torch.float16), (40, 70, torch.bfloat16)], ids=str
    )
    def test_products(self, m, n, dtype, is_feature_major):
        x = normal(m, n, dtype=dtype)
        operand = self.operand(x, is_feature_major=is_feature_major)
        cosine, error = gram_of(x), cosine_bound(x)
        bound = bound_in_a_gap(cosine, error)
        expected = survivors_of(cosine, bound=bound)
        assert 10 < len(expected) < 0.9 * n * (n - 1) / 2
        assert_close_records(select(operand, 6000, bound=bound), expected, error)

    @pytest.mark.parametrize("is_feature_major", [False, True], ids=["row_major", "feature_major"])
    def test_blocked_summation(self, is_feature_major, monkeypatch):
        """The 200 rows of x are summed in three blocks of 64, and one of the 8 that are left."""
        monkeypatch.setattr(launch, "RESTART_ROWS", 64)
        key = current_device().architecture, "half"
        monkeypatch.setitem(RESTARTED_CONFIGS, key, RESTARTED_CONFIGS.get(key, DESCRIBED_CONFIGS[key]))
        x = normal(200, 70, dtype=torch.bfloat16)
        operand = replace(self.operand(x, is_feature_major=is_feature_major), restarts=True)
        cosine, error = gram_of(x), cosine_bound(x)
        bound = bound_in_a_gap(cosine, error)
        assert_close_records(select(operand, 6000, bound=bound), survivors_of(cosine, bound=bound), error)

    @pytest.mark.parametrize("n", [2, 16, 33, 70])
    def test_all_pairs(self, n):
        """Each once, with the right number, on either side of every border of a tile."""
        x = dyadic(8, n, seed=n, dtype=torch.bfloat16)
        assert select(self.operand(x), 3000).pairs == survivors_of(gram_of(x))

    @pytest.mark.parametrize(
        "fields",
        [
            {"bound": 0.5, "tie_row": 20},
            {"bound": 0.5, "tie_row": -1},
            {"bound": 0.5, "slack": 0.125},
            {"bound": 0.0, "floor": 0.25},
            {"bound": 0.25, "floor": 0.0, "is_abs": False},
        ],
        ids=str,
    )
    def test_bounds(self, fields):
        x = dyadic(8, 70, seed=3, dtype=torch.bfloat16)
        expected = survivors_of(gram_of(x), **fields)
        assert 0 < len(expected) < 2415
        assert select(self.operand(x), 3000, **fields).pairs == expected

    def test_a_capacity_that_is_too_small(self):
        x = dyadic(8, 70, dtype=torch.bfloat16)
        records = select(self.operand(x), 2000)
        assert records.n_survivors == 2415
        assert records.pairs.items() <= survivors_of(gram_of(x)).items()

    def test_what_lies_around_x_is_not_read(self):
        x = normal(40, 37, dtype=torch.bfloat16)
        wide = torch.full((48, 64), torch.nan, dtype=torch.bfloat16)
        inner = wide[:40, :37].copy_(x)
        operand = Operand(x=to_device(inner), factor=inverse_of(x), scale=None, kind="half")
        assert operand.is_described
        assert set(select(operand).pairs) == set(survivors_of(gram_of(x)))

    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_only_in_the_first_pass(self, stage):
        operand = self.operand(dyadic(8, 40, dtype=torch.bfloat16))
        radix = radix_at(stage, 40)
        values, ints = torch.empty(900, device=DEVICE), torch.empty(900, dtype=torch.int32, device=DEVICE)
        gram_survivors(operand, radix, values, ints, ints, None, 1, -1.0, is_abs=True, is_first=True, certifies=True)
        assert int(radix.n_survivors) == 0


class TestMoments:
    """(count, mean, sum of squared deviations) of |cosine|, a line for each program."""

    @staticmethod
    def moments(operand, *, bound=1.0, is_abs=True):
        moments = empty_moments(operand, n_std=2.0)
        radix = radix_at(PASS.value, operand.x.shape[1], bound=bound)
        values = torch.empty(5000, device=DEVICE)
        rows, cols = (torch.empty(5000, dtype=torch.int32, device=DEVICE) for _ in range(2))
        gram_survivors(
            operand, radix, values, rows, cols, moments, 1, -1.0, is_abs=is_abs, is_first=True, certifies=True
        )
        return moments.lines.cpu().numpy(), moments.tau.item()

    @staticmethod
    def joined(moments):
        """(count, mean, standard deviation), by the definition of a variance of groups."""
        count, mean, squares = moments.T
        mean_of_all = (count * mean).sum() / count.sum()
        variance = (squares + count * (mean - mean_of_all) ** 2).sum() / count.sum()
        return count.sum(), mean_of_all, variance**0.5

    def check(self, x, error=None, **options):
        operand = operand_of(x)
        moments, tau = self.moments(operand, **options)
        assert len(moments) > 1 or operand.n_tiles == 1, "one program is not the general case"
        magnitude = np.abs(gram_of(x)[np.triu_indices(x.shape[1], 1)])
        count, mean, std = self.joined(moments)
        assert count == magnitude.size
        error = cosine_bound(x) if error is None else error
        assert_within(actual=mean, expected=magnitude.mean(), bound=error)
        assert_within(actual=std, expected=magnitude.std(), bound=error)
        assert_within(actual=tau, expected=magnitude.mean() + 2 * magnitude.std(), bound=3 * error + 2.0**-24)

    @pytest.mark.parametrize(("make", "n"), [(normal, 2), (normal, 17), (activations, 33), (dyadic, 33)])
    def test_against_float64(self, make, n, small_tiles):
        self.check(make(20, n, seed=n))

    @pytest.mark.parametrize(("bound", "is_abs"), [(0.0, True), (0.5, False)])
    def test_of_all_pairs_whatever_is_selected(self, bound, is_abs, small_tiles):
        self.check(normal(20, 33), bound=bound, is_abs=is_abs)

    @pytest.mark.parametrize("cosine", [0.3, 0.999], ids=str)
    def test_all_cosines_equal(self, cosine, small_tiles):
        """The standard deviation is 0, and what rounding leaves of it is no more than a rounding."""
        x = torch.cat([torch.full((1, 40), cosine**0.5), torch.eye(40) * (1 - cosine) ** 0.5])
        self.check(x, error=2.0**-22)

    def test_few_large_among_many_small(self, small_tiles):
        self.check(torch.eye(12).repeat(1, 4))

    def test_tiles_of_different_means(self, small_tiles):
        """Deviations from the mean of a tile, of a program and of all."""
        x = normal(20, 48)
        x[:, :16] += 9
        self.check(x)

    def test_padded_lines(self, small_tiles):
        self.check(in_padded_lines(normal(20, 33)))

    def test_dead_columns_count(self, small_tiles):
        x = normal(20, 33)
        x[:, 10:20] = 0
        self.check(x)


@pytest.mark.parametrize("is_first", [True, False], ids=["pass", "collect"])
@pytest.mark.parametrize("stage", range(6), ids=["pass", "screen", "digits", "ties", "collect", "certified"])
def test_only_at_its_stage(stage, is_first):
    """Else nothing at all is written."""
    operand = operand_of(normal(5, 30))
    radix = radix_at(stage, 30)
    before = copy_of(radix)
    values = torch.full((500,), POISON, dtype=torch.float32, device=DEVICE)
    rows, cols = (torch.full((500,), POISON, dtype=torch.int32, device=DEVICE) for _ in range(2))
    moments = empty_moments(operand)
    gram_survivors(
        operand, radix, values, rows, cols, moments, 9, -1.0, is_abs=True, is_first=is_first, certifies=is_first
    )
    its_turn = stage == (PASS if is_first else COLLECT).value
    assert (int(radix.n_survivors) == 435) == its_turn
    assert_same(actual=radix, expected=before, but=("n_survivors", "plan")[: 1 + is_first] if its_turn else ())
    for tensor in (values, rows, cols):
        assert (tensor == POISON).all() != its_turn
    assert moments.lines.isnan().all() != its_turn
    assert moments.tau.isnan().all() != (its_turn and is_first)


@pytest.mark.parametrize("kind", ["ieee", "half"])
@pytest.mark.parametrize(
    ("k", "capacity", "floor", "stage"),
    [(200, 300, -1.0, CERTIFIED), (300, 900, -1.0, DIGITS), (300, 900, 0.5, CERTIFIED), (20, 99, -1.0, DIGITS)],
    ids=["enough", "too_few", "all_above_the_floor", "too_many"],
)
def test_a_pass_certifies_itself(k, capacity, floor, stage, kind, small_tiles):
    """With the survivors of all its programs."""
    radix, expected = (radix_at(PASS.value, 40, bound=0.5) for _ in range(2))
    values = torch.empty(capacity, device=DEVICE)
    rows, cols = (torch.empty(capacity, dtype=torch.int32, device=DEVICE) for _ in range(2))
    operand = operand_of(dyadic(8, 40, dtype=torch.float32 if kind == "ieee" else torch.bfloat16), kind)
    gram_survivors(operand, radix, values, rows, cols, None, k, floor, is_abs=True, is_first=True, certifies=True)
    n_survivors = len(survivors_of(gram_of(operand.x.cpu()), bound=0.5, floor=floor))
    assert 0 < n_survivors < 300
    for count in (expected.n_survivors, expected.n_certified):
        count.fill_(n_survivors)
    certify(expected, k, capacity, floor, is_rounded=False)
    assert_same(actual=radix, expected=expected, but=("n_certified",))
    assert radix.plan[0] == stage.value


@pytest.mark.parametrize(("n_std", "is_certified"), [(0.0, False), (3.0, True)])
def test_an_adaptive_tau_is_a_floor(n_std, is_certified):
    """Where the bound is not above it, all that count were recorded."""
    x = normal(20, 33)
    magnitude = np.abs(gram_of(x)[np.triu_indices(33, 1)])
    assert magnitude.mean() < 0.5 < magnitude.mean() + 3 * magnitude.std()
    operand = operand_of(x)
    radix, moments = radix_at(PASS.value, 33, bound=0.5), empty_moments(operand, n_std=n_std)
    values = torch.empty(900, device=DEVICE)
    rows, cols = (torch.empty(900, dtype=torch.int32, device=DEVICE) for _ in range(2))
    gram_survivors(operand, radix, values, rows, cols, moments, 800, -1.0, is_abs=True, is_first=True, certifies=True)
    assert (radix.plan[0] == CERTIFIED.value) == is_certified


@pytest.mark.parametrize(
    ("is_first", "has_moments", "is_scaled", "is_lean"),
    [(True, False, False, True), (True, True, False, False), (True, False, True, False), (False, False, False, False)],
    ids=["first", "moments", "scaled", "collect"],
)
def test_only_a_plain_first_pass_is_lean(is_first, has_moments, is_scaled, is_lean, monkeypatch):
    """The others share block sizes: a line of moments belongs to a program, and COLLECT repeats what was counted."""
    monkeypatch.setitem(LEAN_CONFIGS, ("interpreter", "ieee"), TileConfig(
        block=32, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=5
    ))  # fmt: skip
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append((grid, arguments["BLOCK"]))

    monkeypatch.setattr("topk_ortho.kernels.gram_survivors._gram_survivors_kernel", Kernel())
    monkeypatch.setattr(launch, "current_device", lambda: launch.Device("interpreter", 1, True, None))
    operand = operand_of(torch.ones(3, 200), is_scaled=is_scaled)
    moments = empty_moments(operand) if has_moments else None
    values, ints = torch.empty(9, device=DEVICE), torch.empty(9, dtype=torch.int32, device=DEVICE)
    radix = radix_at(PASS.value, 200)
    gram_survivors(
        operand, radix, values, ints, ints, moments, 1, -1.0, is_abs=True, is_first=is_first, certifies=False
    )
    assert launches == [((5,), 32) if is_lean else ((operand.n_programs,), operand.config.block)]
