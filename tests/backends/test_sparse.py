"""What is the sparse backend's alone: its cost model, pairs of cosine 0, maxima over what meets, sums of squares."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.inputs import EDGES, activations, dyadic, normal, seeded
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho import topk_pairs
from topk_ortho.backends import coactivation, naive, registry, sparse, tiled
from topk_ortho.backends.base import Query
from topk_ortho.backends.coactivation import Grouped, slabs
from topk_ortho.backends.entries import Coordinates, coordinates_of_dense, entries_of
from topk_ortho.kernels import tiles

needs_interpreter = pytest.mark.skipif(not tiles.INTERPRETED, reason="kernels run on the GPU here, see test_gpu.py")


class TestCost:
    """Which route "auto" takes for a dense x on a CPU."""

    def test_activations_of_an_sae(self):
        x = torch.zeros(256, 16384).scatter_(1, torch.randint(0, 16384, (256, 32), generator=seeded(0)), 1.0)
        assert sparse.is_cheaper(x)
        assert registry.backend_for("auto", x) is sparse

    def test_a_decoder(self):
        x = torch.ones(1, 1).expand(256, 8192)
        assert not sparse.is_cheaper(x)
        assert registry.backend_for("auto", x) is tiled

    def test_a_small_matrix_is_not_looked_at(self):
        x = torch.zeros(16, 43, device="meta")  # has no numbers to look at
        assert not sparse.is_cheaper(x)

    def test_nothing_active(self):
        assert sparse.is_cheaper(torch.zeros(1, 1).expand(256, 16384))

    @pytest.mark.parametrize("threads", [1, 64])
    def test_more_threads_favour_products_of_matrices(self, threads, monkeypatch):
        x = torch.zeros(256, 16384)
        x[:, :160] = 1
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert sparse.is_cheaper(x) == (threads == 1)

    def test_rows_are_sampled_from_all_of_x(self):
        x = torch.zeros(4096, 4096)
        x[2048:] = 1
        assert not sparse.is_cheaper(x)

    @pytest.mark.parametrize("period", [2, 8, 16, 64, 128, 512])
    @pytest.mark.parametrize("value", [0.0, 1.0], ids=["the_others_are_dense", "they_are_dense"])
    def test_rows_in_step_with_sequences_do_not_mislead(self, value, period):
        """The first token of every sequence is unlike all others; dense rows make products enough however few."""
        x = torch.full((4096, 2048), 1 - value)
        x[::period] = value
        assert not sparse.is_cheaper(x)

    def test_a_sample_in_step_with_sequences_would_mislead(self):
        """Every 64th row has all the non-zeros: few, but a sample of every 64th row would see nothing else."""
        x = torch.zeros(4096, 2048)
        x[::64, :200] = 1
        assert sparse.is_cheaper(x)

    def test_an_explicit_choice_is_kept(self):
        for name in ("tiled", "sparse", "naive"):
            assert registry.backend_for(name, torch.zeros(2, 3)) is registry.BACKENDS[name]

    def test_both_routes_select_the_same(self):
        """Zeros listed, ties broken: nothing tells which was taken."""
        x = torch.zeros(64, 6000)
        x[:, :300] = dyadic(64, 300)
        assert sparse.is_cheaper(x)
        for arguments in ({"k": 3000}, {"k": 40000}, {"k": 3000, "tau": 0.1}, {"similarity": "positive"}):
            auto, dense = topk_pairs(x, **arguments), topk_pairs(x, **arguments, backend="tiled")
            for actual, expected in zip(auto[:4], dense[:4], strict=True):
                assert torch.equal(actual, expected)


class TestAvailability:
    def test_cpu(self):
        assert sparse.unavailable_reason(torch.device("cpu")) is None

    def test_elsewhere_as_triton(self, monkeypatch):
        monkeypatch.setattr(sparse.triton, "unavailable_reason", lambda device: f"no kernels on {device}")
        assert sparse.unavailable_reason(torch.device("cuda:1")) == "no kernels on cuda:1"


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
        actual = sparse._first_others(torch.tensor(taken, dtype=torch.int64), count, n)
        assert actual.tolist() == others[:count]

    def test_a_million_features(self):
        n = 2**20
        last = (n - 2) * n + n - 1
        taken = torch.tensor([last, 0 * n + 2, 5])
        assert sparse._first_others(taken, 4, n).tolist() == [1, 3, 4, 6]


class TestRowMax:
    """Columns that meet no other, some or all of their chunk, with cosines of either sign."""

    @staticmethod
    def check(x, chunks):
        result = sparse.row_max(x, chunks, "highest")
        values, partners = oracle.max_cosines(float64(x), None if chunks is None else [c.tolist() for c in chunks])
        assert_within(actual=result.values, expected=values, bound=cosine_bound(x))
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
        before, coactivation._CPU_SLAB = coactivation._CPU_SLAB, slab
        try:
            result = sparse.row_max(x, chunks, "highest")
        finally:
            coactivation._CPU_SLAB = before
        cosine = float64(x).T @ float64(x)
        values, _ = oracle.max_cosines(float64(x), None if chunks is None else [c.tolist() for c in chunks])
        assert_within(actual=result.values, expected=values, bound=1e-12)
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
        result = sparse.row_max(x, None, "highest")
        assert (result.values < -0.49).all()

    def test_meets_negative_ones_and_not_all(self):
        """Column 1 meets 0 and 2, both negative: its best is 0, with 3."""
        x = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, -1.0, 1.0, 0.0]])
        self.check(x, None)
        assert sparse.row_max(x, None, "highest").partners.tolist() == [2, 3, 0, 0]

    @pytest.mark.parametrize("n_chunks", [None, 3])
    def test_dyadic(self, n_chunks):
        chunks = None if n_chunks is None else torch.randperm(43, generator=seeded(2)).tensor_split(n_chunks)
        self.check(dyadic(12, 43, seed=3), chunks)


SHAPES = {"few_samples": (5, 60), "few_features": (60, 5), "square": (20, 20)}


class TestSumOfSquares:
    """Both ways of counting: features that meet in samples, samples that meet in features."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_value(self, shape, dtype):
        x = activations(*shape, seed=1, dtype=dtype)
        expected = (oracle.cosines(float64(x)) ** 2).sum()
        bound = 3 * cosine_bound(x) * shape[1] * (shape[1] - 1) / 2
        assert_within(actual=sparse.sum_of_squares(coordinates_of_dense(x)), expected=expected, bound=bound)

    @pytest.mark.parametrize(("shape", "is_turned"), [((5, 60), True), ((60, 5), False)])
    def test_the_way_with_fewer_products_is_taken(self, shape, is_turned, monkeypatch):
        n_members = []
        monkeypatch.setattr(sparse, "slabs", lambda grouped: n_members.append(grouped.n_members) or slabs(grouped))
        sparse.sum_of_squares(coordinates_of_dense(activations(*shape)))
        assert n_members == [shape[0] if is_turned else shape[1]]

    @pytest.mark.parametrize("way", ["by_sample", "by_feature"])
    @pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
    def test_edges(self, x, way, monkeypatch):
        """Either way gives the same, dead and tiny columns included."""
        monkeypatch.setattr(
            Grouped, "n_products", lambda grouped: int((grouped.n_members == x.shape[0]) != (way == "by_feature"))
        )
        coordinates = coordinates_of_dense(x)
        total = sparse.sum_of_squares(coordinates)
        grad = sparse.sum_of_squares_gradient(coordinates, torch.ones(()))
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
        coordinates = coordinates_of_dense(x)
        entries = entries_of(coordinates)
        assert entries.by_feature()[0].n_products() < entries.by_sample().n_products()
        expected = (oracle.cosines(float64(x)) ** 2).sum()
        tolerance = 16 * torch.finfo(dtype).eps
        assert sparse.sum_of_squares(coordinates).item() == pytest.approx(expected, rel=tolerance)
        gradient = sparse.sum_of_squares_gradient(coordinates, torch.ones(()))
        rows, cols = oracle.all_pairs(100)
        wanted = oracle.loss_gradient(float64(x), rows, cols, "sum")[x.numpy() != 0]
        assert_within(actual=gradient, expected=wanted, bound=tolerance * np.abs(wanted).max())


class TestPairGradient:
    def test_pairs_either_way_round_weighted_apart(self):
        """As the reference has it, where x is not 0."""
        x = activations(12, 43, seed=5, dtype=torch.float64)
        rows, cols = torch.randint(0, 43, (2, 300), generator=seeded(6))
        rows, cols = rows[rows != cols], cols[rows != cols]  # some twice
        of_rows, of_cols = torch.randn(2, rows.numel(), generator=seeded(7), dtype=torch.float64)
        x_hat = torch.nn.functional.normalize(x, dim=0)
        values = (x_hat[:, rows] * x_hat[:, cols]).sum(dim=0)
        norms = torch.linalg.vector_norm(x, dim=0)
        expected = naive.pair_gradient(x, norms, rows, cols, values, of_rows, of_cols) * (x != 0)
        actual = sparse.structural_gradient(x, rows, cols, of_rows, of_cols)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    def test_columns_just_below_eps(self):
        """x_hat = x / eps there: no part of the gradient is removed."""
        x = activations(12, 20, seed=8, dtype=torch.float64)
        x[:, 3] *= 0.9e-12 / x[:, 3].norm()
        coordinates = coordinates_of_dense(x)
        rows, cols = map(torch.from_numpy, oracle.all_pairs(20))
        values = topk_pairs(x, fraction=1.0, backend="naive")
        expected = oracle.loss_gradient(float64(x), values.rows.numpy(), values.cols.numpy(), "sum")[x.numpy() != 0]
        cosine = torch.from_numpy(oracle.cosines(float64(x)))
        actual = sparse.sparse_pair_gradient(coordinates, rows, cols, 2 * cosine, 2 * cosine)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@needs_interpreter
class TestKernels:
    """The backend on kernels equals the backend in plain torch, to the bit where sums are exact."""

    @pytest.fixture
    def on_kernels(self, monkeypatch):
        monkeypatch.setattr(coactivation, "_GPU_SLAB", 200)

        def run(function, *arguments):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(coactivation, "_KERNEL_DEVICES", ("cpu",))
                return function(*arguments)

        return run

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_all_functions(self, dtype, on_kernels):
        x = activations(12, 43, seed=5, dtype=dtype)
        coordinates = coordinates_of_dense(x)
        rows, cols = torch.randint(0, 43, (2, 200), generator=seeded(6))
        rows, cols = rows[rows != cols], cols[rows != cols]  # some twice, some either way round
        weights = torch.randn(2, rows.numel(), generator=seeded(7), dtype=torch.float64)
        for function, arguments in (
            (sparse.select_sparse_pairs, (coordinates, 300, Query(k=300, n_std=0.5), True)),
            (sparse.sparse_row_max, (coordinates, torch.arange(43).tensor_split(3))),
            (sparse.sparse_pair_gradient, (coordinates, rows, cols, *weights)),
            (sparse.sum_of_squares, (coordinates,)),
            (sparse.sum_of_squares_gradient, (coordinates, torch.ones(()))),
        ):
            actual, expected = on_kernels(function, *arguments), function(*arguments)
            actual, expected = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (actual, expected))
            for a, e in zip(actual, expected, strict=True):
                assert a.dtype == e.dtype
                torch.testing.assert_close(a, e, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6)


class TestCoordinates:
    def test_order_and_padding_do_not_matter(self):
        x = normal(6, 20) * (torch.rand(6, 20, generator=seeded(8)) < 0.4)
        plain = coordinates_of_dense(x)
        order = torch.randperm(plain.values.numel() + 3, generator=seeded(9))
        pad = torch.nn.functional.pad
        mixed = Coordinates(*(pad(t, (0, 3))[order] for t in plain[:3]), 6, 20)
        once, again = entries_of(plain), entries_of(mixed)
        for name in ("samples", "features", "x_hat", "norms"):
            assert torch.equal(getattr(once, name), getattr(again, name))
        assert torch.equal(mixed.values[again.positions], plain.values[once.positions])

    def test_unit_columns(self):
        x = EDGES["huge_beside_tiny"]
        entries = entries_of(coordinates_of_dense(x))
        dense = torch.zeros(x.shape)
        dense[entries.samples, entries.features] = entries.x_hat
        assert_within(actual=dense, expected=oracle.normalized(float64(x)), bound=cosine_bound(x))
