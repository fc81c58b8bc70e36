"""Slabs: that they cover every pair once, in order and within the budget, and what they compute."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import seeded
from tests.kernels.arguments import FEW
from topk_ortho.backends.sparse.coordinates import Coordinates
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.kernels import launch

ENGINES = ["torch", "kernels"] if launch.INTERPRETED else ["torch"]


@pytest.fixture(params=ENGINES)
def slabs(request):
    """Slabs of at most so many products."""
    return lambda n_products=None: Slabs(most_products=n_products, on_kernels=request.param == "kernels")


def coordinates_of(x, dtype=torch.float64):
    """Entries of a matrix [samples, features]."""
    x = Coordinates.from_dense(x)
    return x._replace(values=x.values.to(dtype))


def integers(n_samples, n_features, density, seed=0):
    generator = seeded(seed)
    x = torch.randint(1, 9, (n_samples, n_features), generator=generator)
    return x * (torch.rand(n_samples, n_features, generator=generator) < density)


MATRICES = {
    "sparse": integers(12, 20, 0.3),
    "dense": integers(5, 9, 1.0),
    "one_sample": integers(1, 20, 0.5),
    "one_feature": integers(9, 1, 1.0),
    "two_features": integers(9, 2, 0.9),
    "samples_of_one": torch.eye(7).long(),
    "empty_samples": integers(12, 20, 0.05),
    "all_samples_equal": integers(1, 20, 0.4).repeat(8, 1),
    "nothing": torch.zeros(4, 6, dtype=torch.int64),
    "a_feature_of_every_sample": torch.cat([torch.ones(12, 1).long(), integers(12, 19, 0.2)], dim=1),
}
matrices = pytest.mark.parametrize("x", MATRICES.values(), ids=MATRICES)


class TestSlabs:
    @pytest.mark.quick
    @pytest.mark.parametrize("n_products", [1, 7, 2**20])
    @matrices
    def test_cover_all_pairs(self, x, n_products, slabs):
        coordinates = coordinates_of(x)
        expected = (x.T @ x).triu(1)
        actual = torch.zeros_like(expected)
        last_pair, last_feature, n_done = -1, -1, 0
        for slab in slabs(n_products).of(coordinates):
            met = slab.cosines()
            assert (met.pairs.diff() > 0).all()
            assert met.pairs[0] > last_pair
            assert last_feature < slab.first_feature <= slab.last_feature
            rows, cols = met.pairs // x.shape[1], met.pairs % x.shape[1]
            assert slab.first_feature <= rows.min()
            assert rows.max() <= slab.last_feature
            assert slab.first_feature == slab.last_feature or slab.n_products <= n_products
            assert slab.n_products <= max(n_products, coordinates.samples.numel())
            actual[rows, cols] = met.cosines.long()
            last_pair, last_feature, n_done = met.pairs[-1], slab.last_feature, n_done + slab.n_products
        assert torch.equal(actual, expected)
        n_active = (x != 0).sum(dim=1)
        assert n_done == coordinates.n_products() == (n_active * (n_active - 1) // 2).sum()

    @pytest.mark.parametrize("n_shares", [2, 3, 40])
    @pytest.mark.parametrize("n_products", [7, 2**20])
    @matrices
    def test_shares_cover_all_pairs_once(self, x, n_products, n_shares, slabs):
        coordinates = coordinates_of(x)
        actual, sizes = torch.zeros_like(x.T @ x), []
        for number in range(n_shares):
            share = list(slabs(n_products).of(coordinates, (number, n_shares)))
            sizes.append(sum(slab.n_products for slab in share))
            for met in (slab.cosines() for slab in share):
                actual[met.pairs // x.shape[1], met.pairs % x.shape[1]] += met.cosines.long()
        assert torch.equal(actual, (x.T @ x).triu(1))
        assert sum(sizes) == coordinates.n_products()
        assert max(sizes) <= sum(sizes) / n_shares + coordinates.samples.numel()  # a feature stays in one share

    def test_there_are_as_few_as_the_budget_allows(self, slabs):
        x = integers(12, 20, 0.5)
        sizes = [slab.n_products for slab in slabs(100).of(coordinates_of(x))]
        assert len(sizes) > 2
        assert all(a + b > 100 for a, b in itertools.pairwise(sizes))

    def test_more_entries_than_programs(self):
        """Refused before anything is made of them."""
        entries = torch.zeros(1, dtype=torch.int64).expand(2**31)
        x_hat = Coordinates(entries, entries, torch.ones(1).expand(2**31), 1, 2)
        with pytest.raises(ValueError, match=r"at most 2,147,483,647 non-zeros on a GPU.*; got 2,147,483,648"):
            next(Slabs(on_kernels=True).of(x_hat))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtypes(self, dtype, slabs):
        """Sums of float32 products are rounded once."""
        x = torch.tensor([[2**12, 2**12], [1, 1], [1, 1]])
        (slab,) = slabs().of(coordinates_of(x, dtype))
        cosines = slab.cosines().cosines
        assert cosines.dtype == dtype
        assert cosines.item() == 2**24 + 2


class TestGradient:
    @matrices
    def test_against_loops(self, x, slabs):
        self.check(x, "some", 2**20, slabs)

    @pytest.mark.parametrize(
        ("name", "n_weighted"), [("sparse", "all"), ("sparse", "none"), ("a_feature_of_every_sample", "some")]
    )
    def test_in_many_slabs(self, name, n_weighted, slabs):
        self.check(MATRICES[name], n_weighted, 20, slabs)

    @staticmethod
    def check(x, n_weighted, n_products, slabs):
        coordinates = coordinates_of(x)
        share = {"all": 1.0, "some": 0.3, "none": 0.0}[n_weighted]
        generator = np.random.default_rng(0)
        first, second = generator.integers(1, 9, (2, x.shape[1], x.shape[1]))
        first *= generator.random(first.shape) < share
        second *= generator.random(second.shape) < share
        before = torch.arange(coordinates.samples.numel(), dtype=torch.float64)
        out = before.clone()
        for slab in slabs(n_products).of(coordinates):
            met = slab.cosines()
            rows, cols = met.pairs // x.shape[1], met.pairs % x.shape[1]
            weights = torch.stack([torch.from_numpy(weights)[rows, cols].double() for weights in (first, second)])
            weighted = weights.any(dim=0)
            if weighted.any():
                slab.add_pair_gradient(met.pairs[weighted], weights[:, weighted], out)
        expected = np.zeros(x.shape)
        for g in range(x.shape[0]):
            for i in range(x.shape[1]):
                for j in range(i + 1, x.shape[1]):
                    if x[g, i] and x[g, j]:
                        expected[g, i] += first[i, j] * float(x[g, j])
                        expected[g, j] += second[i, j] * float(x[g, i])
        assert (out - before).tolist() == expected[x.numpy() != 0].tolist()


@FEW
@given(data=st.data())
def test_order_of_products_does_not_depend_on_the_budget(data, slabs):
    """Sums are equal to the bit, however the work is cut."""
    generator = seeded(data.draw(st.integers(0, 99)))
    x = torch.rand(6, 8, generator=generator) * (torch.rand(6, 8, generator=generator) < 0.6)
    results = []
    for n_products in (data.draw(st.integers(1, 30)), 2**20):
        parts = [slab.cosines() for slab in slabs(n_products).of(coordinates_of(x, torch.float32))]
        results.append(
            [torch.cat([getattr(part, name) for part in parts] or [x.new_empty(0)]) for name in ("pairs", "cosines")]
        )
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
