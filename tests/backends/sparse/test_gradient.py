import numpy as np
import torch

from tests import oracle
from tests.inputs import activations, seeded
from tests.tolerances import float64
from topk_ortho import topk_pairs
from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.naive import NaiveBackend
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.coordinates import Coordinates
from topk_ortho.backends.sparse.gradient import pair_gradient
from topk_ortho.backends.sparse.products import Slabs


class TestPairGradient:
    def test_pairs_either_way_round_weighted_apart(self):
        """The gradient equals that of the naive backend wherever x is not 0."""
        x = activations(12, 43, seed=5, dtype=torch.float64)
        rows, cols = torch.randint(0, 43, (2, 300), generator=seeded(6))
        rows, cols = rows[rows != cols], cols[rows != cols]  # some twice
        of_rows, of_cols = torch.randn(2, rows.numel(), generator=seeded(7), dtype=torch.float64)
        pairs = WeightedPairs(rows, cols, of_rows, of_cols)
        x_hat = torch.nn.functional.normalize(x, dim=0)
        values = (x_hat[:, rows] * x_hat[:, cols]).sum(dim=0)
        norms = torch.linalg.vector_norm(x, dim=0)
        expected = NaiveBackend().pair_gradient(x, norms, values, pairs) * (x != 0)
        actual = SparseBackend().structural_gradient(x, pairs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    def test_columns_just_below_eps(self):
        """x_hat = x / eps there: no part of the gradient is removed."""
        x = activations(12, 20, seed=8, dtype=torch.float64)
        x[:, 3] *= 0.9e-12 / x[:, 3].norm()
        coordinates = Coordinates.from_dense(x)
        rows, cols = map(torch.from_numpy, oracle.all_pairs(20))
        values = topk_pairs(x, fraction=1.0, backend="naive")
        expected = oracle.loss_gradient(float64(x), values.rows.numpy(), values.cols.numpy(), "sum")[x.numpy() != 0]
        cosine = torch.from_numpy(oracle.cosines(float64(x)))
        actual = pair_gradient(coordinates, WeightedPairs(rows, cols, 2 * cosine, 2 * cosine), Slabs())
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
