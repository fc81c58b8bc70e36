import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.inputs import dyadic, seeded
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.products import Slabs


class TestMaxCosine:
    """Columns that meet no other, some or all of their chunk, with cosines of either sign."""

    @staticmethod
    def check(x, chunks):
        result = SparseBackend().max_cosine(x, chunks, "highest")
        values, partners = oracle.max_cosines(float64(x), None if chunks is None else [c.tolist() for c in chunks])
        assert_within(actual=result.cosines, expected=values, bound=cosine_bound(x))
        assert result.partners.tolist() == partners.tolist()

    @pytest.mark.parametrize("slab", [1, 2**20])
    @given(data=st.data())
    def test_any_signs(self, data, slab):
        n, m = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 4))
        entries = data.draw(st.lists(st.sampled_from([0, 0, 1, -1]), min_size=n * m, max_size=n * m))
        x = torch.tensor(entries, dtype=torch.float64).view(m, n)
        x = x / x.abs().sum(dim=0).clamp_min(1).sqrt()  # norms are 1, so that cosines are exact
        assert set((x.square().sum(dim=0) * 4).round().tolist()) <= {0.0, 4.0}
        n_chunks = data.draw(st.integers(1, n // 2))
        chunks = None if n_chunks == 1 else torch.randperm(n, generator=seeded(n)).tensor_split(n_chunks)
        result = SparseBackend(slabs=Slabs(most_products=slab)).max_cosine(x, chunks, "highest")
        cosine = float64(x).T @ float64(x)
        values, _ = oracle.max_cosines(float64(x), None if chunks is None else [c.tolist() for c in chunks])
        assert_within(actual=result.cosines, expected=values, bound=1e-12)
        # the lowest of those that tie, but for rounding
        for chunk in chunks or [torch.arange(n)]:
            for j in chunk.tolist():
                partner = int(result.partners[j])
                assert partner in chunk.tolist()
                assert partner != j
                tied = [i for i in chunk.tolist() if i != j and cosine[i, j] > values[j] - 1e-12]
                assert partner in tied
                if values[j] == 0:
                    assert partner == min(i for i in chunk.tolist() if i != j and abs(cosine[i, j]) < 1e-12)

    def test_meets_all_and_all_are_negative(self):
        """No partner of cosine 0 to fall back on."""
        self.check(torch.tensor([[2.0, -1.0], [1.0, -1.0]]), None)
        x = torch.eye(3, dtype=torch.float64) - 1 / 3
        result = SparseBackend().max_cosine(x, None, "highest")
        assert (result.cosines < -0.49).all()

    def test_meets_negative_ones_and_not_all(self):
        """Column 1 meets 0 and 2, both negative: its best is 0, with 3."""
        x = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, -1.0, 1.0, 0.0]])
        self.check(x, None)
        assert SparseBackend().max_cosine(x, None, "highest").partners.tolist() == [2, 3, 0, 0]

    @pytest.mark.parametrize("n_chunks", [None, 3])
    def test_dyadic(self, n_chunks):
        chunks = None if n_chunks is None else torch.randperm(43, generator=seeded(2)).tensor_split(n_chunks)
        self.check(dyadic(12, 43, seed=3), chunks)
