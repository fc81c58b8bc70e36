"""Lists of pairs in order of their columns, to the bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.kernels.arguments import DEVICE, FEW
from topk_ortho.backends.norms import inverse_norms
from topk_ortho.kernels import pair_lists as kernels
from topk_ortho.kernels.pair_lists import PairLists, pair_lists, pair_targets

BLOCK = 16
POISON = 77
N_GUARDS = 300
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pairs_of(
    rows: object, cols: object, row_weights: object = None, col_weights: object = None, seed: int = 0
) -> Pairs:
    """(rows, cols, row weights, col weights, cosines); weights that are not given are random."""
    rows, cols = np.asarray(rows, dtype=np.int64), np.asarray(cols, dtype=np.int64)
    drawn = np.random.default_rng(seed).uniform(-1, 1, (3, len(rows)))
    weights = (drawn[i] if given is None else given for i, given in enumerate((row_weights, col_weights)))
    return rows, cols, *(np.asarray(part, dtype=np.float32) for part in (*weights, drawn[2]))


def random_pairs(n: int, p: int, seed: int = 0) -> Pairs:
    """Pairs of random columns, of which every third weight is 0."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, n, p)
    weights = generator.normal(size=(2, p)) * (generator.integers(0, 3, (2, p)) > 0)
    return pairs_of(rows, (rows + generator.integers(1, n, p)) % n, *weights, seed=seed)


def expected_targets(n: int, pairs: Pairs) -> np.ndarray:
    rows, cols, row_weights, col_weights, _ = pairs
    return np.array(
        [
            n if weight == 0 else column
            for columns, weights in ((rows, row_weights), (cols, col_weights))
            for column, weight in zip(columns.tolist(), weights.tolist(), strict=True)
        ],
        dtype=np.int64,
    )


def expected_lists(targets: np.ndarray, pairs: Pairs, norms: np.ndarray) -> list[np.ndarray]:
    """Fields of `PairLists`; `targets` are not sorted."""
    rows, cols, row_weights, col_weights, cosines = pairs
    n = len(norms)
    order = sorted(range(len(targets)), key=targets.tolist().__getitem__)  # stable
    partners, weights, values = (
        np.concatenate(both)[order] for both in ((cols, rows), (row_weights, col_weights), (cosines, cosines))
    )
    inverse = np.array(
        [np.float32(1) / max(norm, np.float32(oracle.EPS)) if norm > 0 else 0 for norm in norms], dtype=np.float32
    )
    offsets = np.array([(targets < j).sum() for j in range(n + 1)])
    return [inverse, offsets, partners, weights, values]


def on_device(arrays) -> list[Tensor]:
    return [torch.from_numpy(array).to(DEVICE) for array in arrays]


def targets_and_lists(n: int, pairs: Pairs, norms: np.ndarray, block: int = BLOCK) -> tuple[Tensor, PairLists]:
    """What the kernels write of n columns, the targets not yet sorted; all of it between guards."""
    holders = []

    def between_guards(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        holders.append(torch.full((size + 2 * N_GUARDS,), POISON, dtype=dtype, device=device))
        return holders[-1][N_GUARDS : N_GUARDS + size]

    *listed, cosines = on_device(pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK", block)
        patch.setattr(kernels, "torch", SimpleNamespace(**vars(torch) | {"empty": between_guards}))
        targets = pair_targets(*listed, n)
        in_order, order = targets.sort(stable=True)
        lists = pair_lists(in_order, order, *listed, cosines, *on_device([norms]), oracle.EPS)
    for holder in holders:
        guards = torch.cat([holder[:N_GUARDS], holder[-N_GUARDS:]])
        assert (guards == POISON).all(), "written outside"
    return targets, lists


def check(n: int, pairs: Pairs, norms: np.ndarray | None = None, block: int = BLOCK) -> PairLists:
    norms = np.linspace(0, 3, n, dtype=np.float32) if norms is None else norms
    targets, lists = targets_and_lists(n, pairs, norms, block)
    wanted = expected_targets(n, pairs)
    assert targets.dtype == torch.int32
    assert targets.tolist() == wanted.tolist()
    dtypes = (torch.float32, torch.int64, torch.int32, torch.float32, torch.float32)
    for name, dtype, expected in zip(PairLists._fields, dtypes, expected_lists(wanted, pairs, norms), strict=True):
        actual = getattr(lists, name)
        assert actual.dtype == dtype, name
        np.testing.assert_array_equal(actual.cpu().numpy(), expected, name)  # NaN equals NaN
    return lists


@pytest.mark.parametrize(("n", "p"), [(2, 1), (14, 8), (15, 16), (16, 17), (17, 33), (100, 7), (3, 200)], ids=str)
def test_sizes_around_the_blocks(n, p):
    check(n, random_pairs(n, p, seed=n))


@pytest.mark.parametrize("p", [1, 255, 257])
def test_blocks_of_the_real_size(p):
    check(300, random_pairs(300, p), block=kernels._BLOCK)


@pytest.mark.parametrize("n", [2, 15, 16, 40])
def test_no_pair_at_all(n):
    lists = check(n, pairs_of([], []))
    assert not lists.offsets.any()


@pytest.mark.parametrize("hub", [0, 20, 39])
def test_one_column_is_in_all_pairs(hub):
    others = np.delete(np.arange(40), hub)
    lists = check(40, pairs_of(np.minimum(hub, others), np.maximum(hub, others)))
    assert lists.offsets[hub + 1] - lists.offsets[hub] == 39


@pytest.mark.parametrize(
    ("rows", "cols"),
    [([20, 25], [38, 39]), ([0, 0], [1, 39]), ([0, 1], [2, 3])],
    ids=["at_the_start", "in_the_middle", "at_the_end"],
)
def test_columns_without_pairs(rows, cols):
    check(40, pairs_of(rows, cols))


def test_equal_targets_stay_in_order():
    """The pair's row comes before its column, and the earlier pair before the later one."""
    lists = check(8, pairs_of([5, 4, 3, 5] * 10, [6, 5, 5, 6] * 10))
    assert lists.partners[lists.offsets[5] : lists.offsets[6]].tolist() == [6] * 20 + [4, 3] * 10


def test_weights_of_zero():
    """They belong to no column; of a pair, one weight may be 0 and the other not."""
    zeros, weights = np.zeros(20), [0.0, -0.0, 1e-45, -1e-45, 1.0] * 4
    for row_weights, col_weights, n_left in ((zeros, weights, 12), (weights, zeros, 12), (zeros, zeros, 0)):
        lists = check(40, pairs_of(np.arange(20), np.arange(20) + 20, row_weights, col_weights))
        assert lists.offsets[-1] == n_left


def test_weights_that_are_not_numbers():
    """NaN is not 0."""
    weights = [np.nan, np.inf, -np.inf, 0.0]
    lists = check(10, pairs_of([0, 1, 2, 3], [6, 7, 8, 9], weights, weights[::-1]))
    assert lists.offsets[-1] == 6
    assert lists.weights[:6].isnan().sum() == 2


@FEW
@given(data=st.data())
def test_any_pairs(data):
    n = data.draw(st.integers(2, 40))
    column, weight = st.integers(0, n - 1), st.sampled_from([0.0, -0.0, 1.0, -2.5, float("nan")])
    pairs = data.draw(st.lists(st.tuples(column, column, weight, weight), max_size=40))
    columns_and_weights = zip(*pairs, strict=True) if pairs else [[]] * 4
    check(n, pairs_of(*columns_and_weights), block=data.draw(st.sampled_from([2, 16, 64])))


def test_largest_columns():
    """As many columns as the backend takes: they are numbered in int32."""
    n = 2**31 - 2**10
    rows, cols = n - np.arange(20, 0, -1), n - np.arange(1, 21)
    pairs = pairs_of(rows, cols, [0.0, 1.0] * 10)
    *listed, cosines = on_device(pairs)
    targets, norms = pair_targets(*listed, n), np.ones(5, dtype=np.float32)
    wanted = expected_targets(n, pairs)
    assert targets.tolist() == wanted.tolist()
    in_order, order = targets.sort(stable=True)
    lists = pair_lists(in_order, order, *listed, cosines, *on_device([norms]), oracle.EPS)
    for actual, expected in zip(lists, expected_lists(wanted, pairs, norms), strict=True):
        np.testing.assert_array_equal(actual.cpu().numpy(), expected)


def test_inverse_norms():
    """To the bit those of torch; a dead column has 0, and one whose norm is not a number too."""
    eps = np.float32(oracle.EPS)
    special = [0.0, np.nan, np.inf, 1e-45, 1e-38, eps, np.nextafter(eps, 1), np.nextafter(eps, 0), 3e38, 2.0**127]
    norms = np.array([*special, *np.random.default_rng(0).lognormal(0, 30, 200)], dtype=np.float32)
    lists = check(len(norms), random_pairs(len(norms), 3), norms)
    expected = inverse_norms(torch.from_numpy(norms).to(DEVICE))
    assert torch.equal(lists.inverse.view(torch.int32), expected.view(torch.int32))
