import numpy as np
import pytest
import torch

from tests import oracle
from tests.inputs import EDGES, activations, seeded
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho.backends.sparse.closed_form import sum_of_squares, sum_of_squares_gradient
from topk_ortho.backends.sparse.coordinates import Coordinates
from topk_ortho.backends.sparse.products import Slabs

SHAPES = {"few_samples": (5, 60), "few_features": (60, 5), "square": (20, 20)}


class TestSumOfSquares:
    """The sum is right whether features that share samples are paired, or samples that share features."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_value(self, shape, dtype):
        x = activations(*shape, seed=1, dtype=dtype)
        expected = (oracle.cosines(float64(x)) ** 2).sum()
        bound = 3 * cosine_bound(x) * shape[1] * (shape[1] - 1) / 2
        assert_within(actual=sum_of_squares(Coordinates.from_dense(x), Slabs()), expected=expected, bound=bound)

    @pytest.mark.parametrize(("shape", "is_turned"), [((5, 60), True), ((60, 5), False)])
    def test_the_way_with_fewer_products_is_taken(self, shape, is_turned):
        class Recorder(Slabs):
            def of(self, x_hat):
                seen.append(x_hat.n_features)
                return super().of(x_hat)

        seen = []
        sum_of_squares(Coordinates.from_dense(activations(*shape)), Recorder())
        assert seen == [shape[0] if is_turned else shape[1]]

    @pytest.mark.parametrize("way", ["by_sample", "by_feature"])
    @pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
    def test_edges(self, x, way, monkeypatch):
        """Either way gives the same, dead and tiny columns included."""
        monkeypatch.setattr(
            Coordinates, "n_products", lambda entries: int((entries.n_features == x.shape[0]) != (way == "by_feature"))
        )
        coordinates = Coordinates.from_dense(x)
        total = sum_of_squares(coordinates, Slabs())
        grad = sum_of_squares_gradient(coordinates, torch.ones(()), Slabs())
        expected = (oracle.cosines(float64(x)) ** 2).sum()
        rows, cols = oracle.all_pairs(x.shape[1])
        gradient = oracle.loss_gradient(float64(x), rows, cols, "sum")[x.numpy() != 0]
        norms = np.maximum(np.sqrt((float64(x) ** 2).sum(axis=0)), oracle.EPS)
        bound = 6 * cosine_bound(x) * x.shape[1] / np.broadcast_to(norms, x.shape)[x.numpy() != 0]
        assert_within(actual=total, expected=expected, bound=3 * cosine_bound(x) * len(rows))
        assert_within(actual=grad, expected=gradient, bound=bound + 2.0**-24 * np.abs(gradient))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shared", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
    def test_small_sums_are_no_difference_of_large_ones(self, shared, dtype):
        """100 columns, each with two entries of its own and a small one that all have: cosines of about shared**2."""
        x = torch.zeros(201, 100, dtype=dtype)
        x[torch.arange(200), torch.arange(200) // 2] = 1.0  # all alike, so that their rounding does not cancel
        x[200] = shared * (torch.rand(100, generator=seeded(5), dtype=dtype) + 0.5)
        coordinates = Coordinates.from_dense(x)
        assert coordinates.transposed()[0].n_products() < coordinates.n_products()
        expected = (oracle.cosines(float64(x)) ** 2).sum()
        tolerance = 16 * torch.finfo(dtype).eps
        assert sum_of_squares(coordinates, Slabs()).item() == pytest.approx(expected, rel=tolerance)
        gradient = sum_of_squares_gradient(coordinates, torch.ones(()), Slabs())
        rows, cols = oracle.all_pairs(100)
        wanted = oracle.loss_gradient(float64(x), rows, cols, "sum")[x.numpy() != 0]
        assert_within(actual=gradient, expected=wanted, bound=tolerance * np.abs(wanted).max())
