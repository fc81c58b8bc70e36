"""Slabs: that they cover every pair once, in order and within the budget, and what they compute."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import seeded
from topk_ortho.backends import coactivation
from topk_ortho.backends.coactivation import Grouped, slabs
from topk_ortho.kernels import tiles

ENGINES = ["torch", "kernels"] if tiles.INTERPRETED else ["torch"]


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request, monkeypatch):
    if request.param == "kernels":
        monkeypatch.setattr(coactivation, "_KERNEL_DEVICES", ("cpu",))


@pytest.fixture
def budget(monkeypatch):
    def set_budget(n_products):
        for name in ("_CPU_SLAB", "_GPU_SLAB"):
            monkeypatch.setattr(coactivation, name, n_products)

    return set_budget


def grouped_of(x, dtype=torch.float64):
    """Entries of a matrix [groups, members]."""
    groups, members = x.nonzero(as_tuple=True)
    return Grouped(groups, members, x[groups, members].to(dtype), x.shape[1])


def integers(n_groups, n_members, density, seed=0):
    generator = seeded(seed)
    x = torch.randint(1, 9, (n_groups, n_members), generator=generator)
    return x * (torch.rand(n_groups, n_members, generator=generator) < density)


MATRICES = {
    "sparse": integers(12, 20, 0.3),
    "dense": integers(5, 9, 1.0),
    "one_group": integers(1, 20, 0.5),
    "one_member": integers(9, 1, 1.0),
    "two_members": integers(9, 2, 0.9),
    "groups_of_one": torch.eye(7).long(),
    "empty_groups": integers(12, 20, 0.05),
    "all_groups_equal": integers(1, 20, 0.4).repeat(8, 1),
    "nothing": torch.zeros(4, 6, dtype=torch.int64),
    "a_member_of_every_group": torch.cat([torch.ones(12, 1).long(), integers(12, 19, 0.2)], dim=1),
}
matrices = pytest.mark.parametrize("x", MATRICES.values(), ids=MATRICES)


class TestSlabs:
    @pytest.mark.parametrize("n_products", [1, 7, 50, 2**20])
    @matrices
    def test_cover_all_pairs(self, x, n_products, budget):
        budget(n_products)
        grouped = grouped_of(x)
        expected = (x.T @ x).triu(1)
        actual = torch.zeros_like(expected)
        last_pair, last_member, n_done = -1, -1, 0
        for slab in slabs(grouped):
            sums = slab.sums()
            assert (sums.pairs.diff() > 0).all()
            assert sums.pairs[0] > last_pair
            assert last_member < slab.first_member <= slab.last_member
            rows, cols = sums.pairs // x.shape[1], sums.pairs % x.shape[1]
            assert slab.first_member <= rows.min()
            assert rows.max() <= slab.last_member
            assert slab.first_member == slab.last_member or slab.n_products <= n_products
            assert slab.n_products <= max(n_products, grouped.groups.numel())
            actual[rows, cols] = sums.sums.long()
            last_pair, last_member, n_done = sums.pairs[-1], slab.last_member, n_done + slab.n_products
        assert torch.equal(actual, expected)
        n_active = (x != 0).sum(dim=1)
        assert n_done == grouped.n_products() == (n_active * (n_active - 1) // 2).sum()

    def test_there_are_as_few_as_the_budget_allows(self, budget):
        budget(100)
        x = integers(12, 20, 0.5)
        sizes = [slab.n_products for slab in slabs(grouped_of(x))]
        assert len(sizes) > 2
        assert all(a + b > 100 for a, b in itertools.pairwise(sizes))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtypes(self, dtype):
        """Sums of float32 products are rounded once."""
        x = torch.tensor([[2**12, 2**12], [1, 1], [1, 1]])
        (slab,) = slabs(grouped_of(x, dtype))
        sums = slab.sums().sums
        assert sums.dtype == dtype
        assert sums.item() == 2**24 + 2


class TestSpread:
    @pytest.mark.parametrize("n_products", [7, 2**20])
    @pytest.mark.parametrize("n_weighted", ["all", "some", "none"])
    @matrices
    def test_against_loops(self, x, n_weighted, n_products, budget):
        budget(n_products)
        grouped = grouped_of(x)
        share = {"all": 1.0, "some": 0.3, "none": 0.0}[n_weighted]
        generator = np.random.default_rng(0)
        first, second = generator.integers(1, 9, (2, x.shape[1], x.shape[1]))
        first *= generator.random(first.shape) < share
        second *= generator.random(second.shape) < share
        before = torch.arange(grouped.groups.numel(), dtype=torch.float64)
        out = before.clone()
        for slab in slabs(grouped):
            sums = slab.sums()
            rows, cols = sums.pairs // x.shape[1], sums.pairs % x.shape[1]
            of_rows, of_cols = (torch.from_numpy(weights)[rows, cols].double() for weights in (first, second))
            sums.spread(of_rows, of_cols, out)
        expected = np.zeros(x.shape)
        for g in range(x.shape[0]):
            for i in range(x.shape[1]):
                for j in range(i + 1, x.shape[1]):
                    if x[g, i] and x[g, j]:
                        expected[g, i] += first[i, j] * float(x[g, j])
                        expected[g, j] += second[i, j] * float(x[g, i])
        assert (out - before).tolist() == expected[x.numpy() != 0].tolist()


@given(data=st.data())
def test_order_of_products_does_not_depend_on_the_budget(data, budget):
    """Sums are equal to the bit, however the work is cut."""
    generator = seeded(data.draw(st.integers(0, 99)))
    x = torch.rand(6, 8, generator=generator) * (torch.rand(6, 8, generator=generator) < 0.6)
    results = []
    for n_products in (data.draw(st.integers(1, 30)), 2**20):
        budget(n_products)
        parts = [slab.sums() for slab in slabs(grouped_of(x, torch.float32))]
        results.append(
            [torch.cat([getattr(part, name) for part in parts] or [x.new_empty(0)]) for name in ("pairs", "sums")]
        )
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
