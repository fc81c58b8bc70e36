"""Products, sums of runs and the way back, against plain loops over entries."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.arguments import DEVICE, numbers
from tests.tolerances import assert_within
from topk_ortho.kernels import coactivation
from topk_ortho.kernels.coactivation import (
    _BLOCK_ENTRY,
    _BLOCK_PRODUCT,
    coactivation_long_sums,
    coactivation_products,
    coactivation_spread,
    coactivation_sums,
)

POISON = 12345
INT = torch.int64


class Groups:
    """Entries of groups of given sizes: members at random, values exact in float32 with their products."""

    def __init__(self, sizes: list[int], n_members: int, seed: int = 0):
        generator = np.random.default_rng(seed)
        chosen = [np.sort(generator.choice(n_members, size, replace=False)) for size in sizes]
        self.members = np.concatenate([*chosen, np.empty(0, dtype=np.int64)]).astype(np.int64)
        self.values = generator.integers(-64, 65, len(self.members)) / 8
        self.ends = np.repeat(np.cumsum(sizes), sizes)
        self.begins = self.ends - np.repeat(sizes, sizes)
        self.n_members = n_members

    def products(self, entries: list[int]) -> list[tuple[int, int]]:
        """(entry, one that follows it) in the order in which they are written."""
        return [(i, j) for i in entries for j in range(i + 1, self.ends[i])]

    def starts(self, entries: list[int]) -> list[int]:
        """First product of each entry, and behind the last."""
        return np.concatenate([[0], np.cumsum([self.ends[i] - i - 1 for i in entries])]).astype(int).tolist()


SIZES = {
    "one_group": [5],
    "groups_of_one": [1, 1, 1],
    "ragged": [3, 1, 7, 2],
    "larger_than_a_block": [_BLOCK_ENTRY + 3, 4],  # its entries meet every number of others up to that
}
sizes_of_groups = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


class TestProducts:
    def run(self, groups, entries, dtype, key_dtype=INT, first_member=0):
        n = len(groups.products(entries))
        keys = torch.full((n + 2,), POISON, dtype=key_dtype, device=DEVICE)
        products = torch.full((n + 2,), float(POISON), dtype=dtype, device=DEVICE)
        coactivation_products(
            numbers(entries, INT), numbers(groups.starts(entries), INT), numbers(groups.members, INT),
            numbers(groups.values, dtype), first_member, groups.n_members, keys[1:-1], products[1:-1],
        )  # fmt: skip
        for written in (keys, products):
            assert written[[0, -1]].tolist() == [POISON] * 2, "written outside"
        return keys[1:-1].cpu(), products[1:-1].cpu()

    def check(self, groups, entries, dtype, key_dtype=INT, first_member=0):
        keys, products = self.run(groups, entries, dtype, key_dtype, first_member)
        expected = groups.products(entries)
        members = groups.members.tolist()
        assert keys.tolist() == [(members[i] - first_member) * groups.n_members + members[j] for i, j in expected]
        assert products.tolist() == [groups.values[i] * groups.values[j] for i, j in expected]

    @sizes_of_groups
    def test_all_entries(self, sizes):
        self.check(Groups(sizes, 300), list(range(sum(sizes))), torch.float32)

    @pytest.mark.quick
    def test_float64(self):
        self.check(Groups([3, 1, 7, 2], 300), list(range(13)), torch.float64)

    def test_some_entries_in_another_order(self):
        self.check(Groups([3, 1, 7, 2], 20), [4, 11, 0, 3, 8, 9], torch.float32)

    @pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("first_member", [1, 3])
    def test_keys_from_a_first_member_on(self, first_member, key_dtype):
        self.check(Groups([3, 1, 7, 2], 20), [4, 5, 6, 7, 8, 9], torch.float32, key_dtype, first_member)

    def test_keys_past_int32(self):
        groups = Groups([4], 2**20)
        keys, _ = self.run(groups, [0, 1, 2, 3], torch.float32)
        assert keys.max() > 2**31
        self.check(groups, [0, 1, 2, 3], torch.float32)


class TestSums:
    def run(self, keys, products, dtype, key_dtype=INT):
        n = len(keys)
        # what lies around the runs has the keys of the first and the last
        around = [keys[0], *keys, keys[-1]]
        sums = torch.full((n + 2,), float(POISON), dtype=dtype, device=DEVICE)
        runs = numbers(around, key_dtype)[1:-1], numbers([7.0, *products, 7.0], dtype)[1:-1]
        coactivation_long_sums(*runs, coactivation_sums(*runs, sums[1:-1]), sums[1:-1])
        assert sums[[0, -1]].tolist() == [POISON] * 2, "written outside"
        return sums[1:-1].cpu().tolist()

    @staticmethod
    def expected(keys, products):
        sums = [0.0] * len(keys)
        for first in range(len(keys)):
            if first == 0 or keys[first - 1] != keys[first]:
                run = [p for k, p in zip(keys, products, strict=True) if k == keys[first]]
                sums[first] = float(sum(run))
        return sums

    @pytest.mark.parametrize(
        ("lengths", "dtype"),
        [
            ([1], torch.float32),
            ([1, 2, 3, 1], torch.float64),
            ([1] * (_BLOCK_PRODUCT + 1), torch.float32),
            ([_BLOCK_PRODUCT - 1, 3], torch.float64),
            ([5, _BLOCK_PRODUCT + 2, 2], torch.float32),
            ([_BLOCK_PRODUCT] * 2, torch.float32),
            ([5, 3 * _BLOCK_PRODUCT - 5, 1], torch.float32),
            ([5, 3 * _BLOCK_PRODUCT - 5], torch.float64),
            ([_BLOCK_PRODUCT - 1, 1, 3 * _BLOCK_PRODUCT + 1], torch.float64),
        ],
        ids=[
            "one", "several", "more_than_a_block", "across_blocks", "a_run_longer_than_a_block", "exactly_a_block",
            "up_to_the_end_of_a_block", "up_to_the_end_of_the_last_block", "many_blocks_and_the_end",
        ],
    )  # fmt: skip
    def test_runs(self, lengths, dtype):
        generator = np.random.default_rng(0)
        keys = np.repeat(np.sort(generator.choice(2**41, len(lengths), replace=False)), lengths).tolist()
        products = (generator.integers(-64, 65, len(keys)) / 8).tolist()
        assert self.run(keys, products, dtype) == self.expected(keys, products)

    @pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64], ids=str)
    def test_mixtures(self, key_dtype, monkeypatch):
        """Runs of 1 to 100 in blocks of 8, so that the second kernel goes on after 8 blocks that it adds at once."""
        monkeypatch.setattr(coactivation, "_BLOCK_PRODUCT", 8)
        generator = np.random.default_rng(0)
        lengths = generator.permutation([1] * 20 + [2, 3, 5, 7, 8, 9, 15, 16, 17, 64, 65, 72, 73, 100])
        keys = np.repeat(np.arange(len(lengths)), lengths)
        products = generator.standard_normal(len(keys))
        actual = np.array(self.run(keys.tolist(), products.tolist(), torch.float64, key_dtype))
        starts = np.cumsum(lengths) - lengths
        expected = np.zeros(len(keys))
        expected[starts] = np.add.reduceat(products, starts)
        assert (actual[expected == 0] == 0).all()
        assert_within(actual=actual, expected=expected, bound=100 * 2.0**-53 * np.abs(products).sum())

    @pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64], ids=str)
    def test_key_zero(self, key_dtype):
        assert self.run([0, 0, 1], [0.5, 0.25, 2.0], torch.float32, key_dtype) == [0.75, 0.0, 2.0]

    def test_sums_are_float64(self):
        """Float32 would lose every 1 beside 2**24."""
        assert self.run([3] * 4, [2.0**24, 1.0, 1.0, -(2.0**24)], torch.float32) == [2.0, 0, 0, 0]

    def test_sums_across_blocks_are_float64(self, monkeypatch):
        """What a block adds to a run of another one is not rounded either."""
        monkeypatch.setattr(coactivation, "_BLOCK_PRODUCT", 2)
        products = [1.0, 2.0**24, 1.0, 2.0**24, 1.0, -(2.0**24), 1.0, -(2.0**24)]
        assert self.run([3] * 8, products, torch.float32) == [4.0, 0, 0, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize("block", [_BLOCK_PRODUCT, 4])
    @given(keys=st.lists(st.integers(0, 4), min_size=1, max_size=40).map(sorted))
    def test_any_runs(self, keys, block):
        products = [float(i % 7 - 3) for i in range(len(keys))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coactivation, "_BLOCK_PRODUCT", block)
            assert self.run(keys, products, torch.float32) == self.expected(keys, products)


class TestSpread:
    def run(self, groups, entries, first_weights, second_weights, dtype):
        """Products of `entries` alone have weights, as in a slab; in a group they follow each other."""
        n = len(groups.members)
        first_product = np.full(n, -1)
        first_product[entries] = groups.starts(entries)[:-1]
        begins, stops = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
        for i in range(n):
            before = [j for j in range(groups.begins[i], i) if j in entries]
            assert before == list(range(before[0], before[-1] + 1) if before else [])
            begins[i], stops[i] = (before[0], before[-1] + 1) if before else (i, i)
        given = torch.arange(n, dtype=torch.float64) / 4
        out = given.clone().to(DEVICE)
        coactivation_spread(
            numbers(first_product, INT), numbers(first_weights, dtype), numbers(second_weights, dtype),
            numbers(begins, INT), numbers(stops, INT), numbers(groups.ends, INT), numbers(groups.values, dtype), out,
        )  # fmt: skip
        return (out.cpu() - given).tolist()

    def check(self, groups, entries, dtype, seed=0):
        pairs = groups.products(entries)
        first, second = np.random.default_rng(seed).integers(-8, 9, (2, len(pairs))) / 4
        expected = np.zeros(len(groups.members))
        for (i, j), of_first, of_second in zip(pairs, first, second, strict=True):
            expected[i] += of_first * groups.values[j]
            expected[j] += of_second * groups.values[i]
        assert self.run(groups, entries, first, second, dtype) == expected.tolist()

    @sizes_of_groups
    def test_all_entries(self, sizes):
        self.check(Groups(sizes, 300), list(range(sum(sizes))), torch.float32)

    def test_float64(self):
        self.check(Groups([3, 1, 7, 2], 300), list(range(13)), torch.float64)

    @pytest.mark.parametrize("entries", [[4], [5, 1, 6, 11, 2], [12]], ids=str)
    def test_a_slab_of_some(self, entries):
        self.check(Groups([3, 1, 7, 2], 20), entries, torch.float32)
