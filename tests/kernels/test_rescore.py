"""Cosines of recorded pairs, slab by slab, and how many of them reach the bound."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.inputs import EDGES, dyadic, normal
from tests.kernels.arguments import DEVICE, assert_same, copy_of, gram_of, inverse_of, numbers, radix_at, to_device
from tests.tolerances import assert_within, cosine_bound
from topk_ortho.kernels.radix_select import CERTIFIED, PASS, SCREEN, RadixSelect
from topk_ortho.kernels.rescore import rescore

POISON = 123456.0
GUARD = 50


def records_of(n_features: int, n_records: int, capacity: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(values, rows, cols) [capacity] of random pairs; poison beyond the records, and in all values."""
    generator = np.random.default_rng(seed)
    rows, cols = np.triu_indices(n_features, 1)
    chosen = generator.integers(0, len(rows), min(n_records, capacity))
    padding = (0, capacity - len(chosen))
    poison = int(POISON)  # far out of x
    indices = [np.pad(part[chosen], padding, constant_values=poison).astype(np.int32) for part in (rows, cols)]
    return torch.full((capacity,), POISON, device=DEVICE), *(torch.from_numpy(part).to(DEVICE) for part in indices)


def rescored(
    x: Tensor,
    n_records: int,
    capacity: int,
    *,
    slabs: tuple[int, ...] | None = None,
    bound: float = 0.0,
    is_abs: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, int, RadixSelect]:
    """(values, expected values, certified count, radix) of records between guards; x by slabs of so many rows."""
    radix = radix_at(PASS.value, x.shape[1], bound=bound, slack=0.5)
    radix.n_survivors.fill_(n_records)
    before = copy_of(radix)
    _, rows, cols = records_of(x.shape[1], n_records, capacity, seed)
    guarded = torch.full((GUARD + capacity + GUARD,), POISON, device=DEVICE)
    between = guarded[GUARD:-GUARD]
    parts = to_device(x).split(slabs or x.shape[0])
    for i, slab in enumerate(parts):
        rescore(
            slab.T.contiguous(), inverse_of(x), radix, between, rows, cols, 0, -1.0,
            is_first=i == 0, is_last=i == len(parts) - 1, is_abs=is_abs,
        )  # fmt: skip
    but = ("n_certified", "plan")
    if n_records > capacity:
        assert (radix.plan[0], int(radix.n_survivors)) == (SCREEN.value, 0)
        but += ("n_survivors",)
    assert_same(actual=radix, expected=before, but=but)
    n = min(n_records, capacity)
    assert (guarded[:GUARD] == POISON).all()
    assert (guarded[GUARD + n :] == POISON).all()
    expected = gram_of(x)[rows[:n].cpu().numpy(), cols[:n].cpu().numpy()]
    return between[:n].cpu().numpy(), expected, int(radix.n_certified), radix


def check(x: Tensor, n_records: int, capacity: int | None = None, **options) -> int:
    capacity = n_records + 7 if capacity is None else capacity
    values, expected, n_certified, _ = rescored(x, n_records, capacity, **options)
    assert_within(actual=values, expected=expected, bound=cosine_bound(x))
    s = np.abs(values) if options.get("is_abs", True) else values
    assert n_certified == (n_reaching(s, options.get("bound", 0.0)) if n_records <= capacity else 0)
    return n_certified


def n_reaching(similarity: np.ndarray, bound: float) -> int:
    """Those that reach the bound; a bound of 0 does not let all zeros pass, so none of them counts."""
    return int((similarity > 0).sum() if bound == 0 else (similarity >= np.float32(bound)).sum())


@pytest.mark.parametrize("m", [1, 64, 65])
def test_rows(m):
    check(normal(m, 40, seed=m) if m > 1 else dyadic(4, 40)[:1] + 0.5, 100)


@pytest.mark.parametrize("n_records", [0, 1, 32, 33, 300])
def test_records(n_records):
    """None, a part of a block, more blocks than programs."""
    check(normal(12, 40), n_records, bound=0.3)


@pytest.mark.parametrize(
    ("n_records", "capacity"),
    [(99, 100), (100, 100), (101, 100), (2**33, 100), (5, 1)],
    ids=["one_free", "full", "one_too_many", "more_than_int32", "capacity_of_one"],
)
def test_no_more_than_are_stored(n_records, capacity):
    check(normal(12, 40), n_records, capacity)


@pytest.mark.parametrize(("slabs", "is_abs"), [((12,), False), ((1, 11), True), ((5, 4, 3), True)], ids=str)
def test_slabs(slabs, is_abs):
    """Values add up over slabs; only the last one counts."""
    n_certified = check(normal(12, 40), 300, slabs=slabs, bound=0.3, is_abs=is_abs)
    assert 0 < n_certified < 300


@pytest.mark.parametrize(
    ("bound", "is_abs"), [(-1.0, False), (0.0, False), (0.25, True), (0.5, False), (1.0, True), (2.0, True)], ids=str
)
def test_pairs_at_the_bound_are_certified(bound, is_abs):
    """Cosines are multiples of 1/4: to the bit."""
    values, expected, n_certified, _ = rescored(dyadic(6, 40), 200, 200, bound=bound, is_abs=is_abs, slabs=(2, 4))
    assert values.tolist() == expected.tolist()
    similarity = np.abs(expected) if is_abs else expected
    assert (similarity == 0).any()
    assert n_certified == n_reaching(similarity, bound)


def test_a_sum_is_clamped_at_the_end_only():
    """A slab may be beyond 1 where a later one takes it back."""
    radix = radix_at(PASS.value, 2)
    radix.n_survivors.fill_(1)
    x = torch.tensor([[3.0, 1.0], [2.0, -1.0]], device=DEVICE)
    values, rows, cols = torch.empty(1, device=DEVICE), numbers([0], torch.int32), numbers([1], torch.int32)
    ones = torch.ones(2, device=DEVICE)
    for i, expected in ((0, 3.0), (1, 1.0)):
        slab = x[i : i + 1].T.contiguous()
        rescore(slab, ones, radix, values, rows, cols, 0, -1.0, is_first=i == 0, is_last=i == 1, is_abs=True)
        assert values.tolist() == [expected]
    for sign in (1.0, -1.0):
        radix.plan[0] = PASS.value
        slab = (x[:1] * torch.tensor([sign, 1.0], device=DEVICE)).T.contiguous()
        rescore(slab, ones, radix, values, rows, cols, 0, -1.0, is_first=True, is_last=True, is_abs=True)
        assert values.tolist() == [sign]


@pytest.mark.parametrize("name", ["one_dead_column", "all_zero", "huge_beside_tiny", "all_columns_huge", "one_row"])
def test_edges(name):
    check(EDGES[name], 100)


def test_a_view_of_contiguous_columns():
    """What the backend passes where columns of x lie contiguous."""
    holder = torch.full((41, 80), torch.nan)
    x = holder[:40, 3:73].copy_(normal(70, 40).T).T
    radix = radix_at(PASS.value, 40)
    radix.n_survivors.fill_(90)
    values, rows, cols = records_of(40, 90, 90)
    lines = to_device(x).T
    assert lines.stride() == (80, 1)
    rescore(lines, inverse_of(x), radix, values, rows, cols, 0, -1.0, is_first=True, is_last=True, is_abs=True)
    expected = gram_of(x)[rows.cpu().numpy(), cols.cpu().numpy()]
    assert_within(actual=values, expected=expected, bound=cosine_bound(x))


def test_offsets_past_int32(far_apart):
    """Lines are far apart, their entries are not."""
    x = normal(7, 3)
    radix = radix_at(PASS.value, 3)
    radix.n_survivors.fill_(3)
    rows, cols = numbers([0, 0, 1], torch.int32), numbers([1, 2, 2], torch.int32)
    values = torch.full((3,), POISON, device=DEVICE)
    lines = far_apart(x, columns=True).T
    rescore(lines, inverse_of(x), radix, values, rows, cols, 0, -1.0, is_first=True, is_last=True, is_abs=True)
    assert_within(actual=values, expected=gram_of(x)[[0, 0, 1], [1, 2, 2]], bound=cosine_bound(x))


@pytest.mark.parametrize("stage", range(1, 6), ids=["screen", "digits", "ties", "collect", "certified"])
def test_only_after_a_pass(stage):
    x = normal(12, 40)
    radix = radix_at(stage, 40)
    radix.n_survivors.fill_(50)
    before = copy_of(radix)
    values, rows, cols = records_of(40, 50, 50)
    rescore(
        to_device(x).T.contiguous(), inverse_of(x), radix, values, rows, cols, 0, -1.0,
        is_first=True, is_last=True, is_abs=True,
    )  # fmt: skip
    assert (values == POISON).all()
    assert_same(actual=radix, expected=before)


@pytest.mark.parametrize(("n_missing", "stage"), [(0, CERTIFIED), (1, SCREEN)], ids=["enough", "one_short"])
def test_the_last_slab_certifies_the_pass(n_missing, stage):
    """By what was computed again, and not before."""
    x = dyadic(6, 40)
    radix = radix_at(PASS.value, 40, bound=0.25, slack=0.5)
    radix.n_survivors.fill_(200)
    values, rows, cols = records_of(40, 200, 200)
    n_certified = n_reaching(np.abs(gram_of(x)[rows.cpu().numpy(), cols.cpu().numpy()]), 0.25)
    assert 0 < n_certified < 200
    for i, slab in enumerate(to_device(x).split(3)):
        assert radix.plan[0] == PASS.value
        rescore(
            slab.T.contiguous(), inverse_of(x), radix, values, rows, cols, n_certified + n_missing, -1.0,
            is_first=i == 0, is_last=i == 1, is_abs=True,
        )  # fmt: skip
    assert radix.plan[0] == stage.value
