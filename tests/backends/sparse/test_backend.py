"""The sparse route: where it runs, pairs of cosine 0, and that kernels do what plain torch does."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.inputs import activations, seeded
from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.sparse import backend
from topk_ortho.backends.sparse.backend import SparseBackend, first_others
from topk_ortho.backends.sparse.closed_form import sum_of_squares, sum_of_squares_gradient
from topk_ortho.backends.sparse.coordinates import Coordinates
from topk_ortho.backends.sparse.gradient import pair_gradient
from topk_ortho.backends.sparse.max_cosine import max_cosine
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.sparse.selection import topk_pairs
from topk_ortho.definitions import Query
from topk_ortho.kernels import launch


class TestAvailability:
    def test_cpu(self):
        assert SparseBackend().unavailable_reason(torch.device("cpu")) is None

    def test_elsewhere_as_triton(self, monkeypatch):
        monkeypatch.setattr(backend, "kernels_unavailable_reason", lambda device: f"no kernels on {device}")
        assert SparseBackend().unavailable_reason(torch.device("cuda:1")) == "no kernels on cuda:1"


class TestFirstOthers:
    """Pairs of cosine 0, by (row, col)."""

    @given(data=st.data())
    def test_against_a_list(self, data):
        n = data.draw(st.integers(2, 12))
        rows, cols = oracle.all_pairs(n)
        index = (rows * n + cols).tolist()
        taken = data.draw(st.lists(st.sampled_from(index), unique=True))
        others = [i for i in index if i not in taken]
        count = data.draw(st.integers(0, len(others)))
        actual = first_others(torch.tensor(taken, dtype=torch.int64), count, n)
        assert actual.tolist() == others[:count]

    def test_a_million_features(self):
        n = 2**20
        last = (n - 2) * n + n - 1
        taken = torch.tensor([last, 0 * n + 2, 5])
        assert first_others(taken, 4, n).tolist() == [1, 3, 4, 6]


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels run on the GPU here, see test_gpu.py")
class TestKernels:
    """The backend on kernels equals the backend in plain torch, to the bit where sums are exact."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_all_functions(self, dtype):
        x = activations(12, 43, seed=5, dtype=dtype)
        coordinates = Coordinates.from_dense(x)
        rows, cols = torch.randint(0, 43, (2, 200), generator=seeded(6))
        rows, cols = rows[rows != cols], cols[rows != cols]  # some twice, some either way round
        weights = torch.randn(2, rows.numel(), generator=seeded(7), dtype=torch.float64)
        pairs = WeightedPairs(rows, cols, *weights)
        for function in (
            partial(topk_pairs, coordinates, 300, Query(k=300, n_std=0.5), is_ordered=True),
            partial(max_cosine, coordinates, torch.arange(43).tensor_split(3)),
            partial(pair_gradient, coordinates, pairs),
            partial(sum_of_squares, coordinates),
            partial(sum_of_squares_gradient, coordinates, torch.ones(())),
        ):
            actual = function(slabs=Slabs(most_products=200, on_kernels=True))
            expected = function(slabs=Slabs(on_kernels=False))
            actual, expected = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (actual, expected))
            for a, e in zip(actual, expected, strict=True):
                assert a.dtype == e.dtype
                torch.testing.assert_close(a, e, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6)
