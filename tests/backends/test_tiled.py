"""The streamed route: tiles, guesses that miss, records that overflow, memory, precision."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.inputs import activations, dyadic, normal, seeded
from tests.tolerances import assert_selection, assert_within, cosine_bound, float64, loss_bound
from topk_ortho import TopKPairs, initial_state, max_cosine_loss, topk_pairs
from topk_ortho.backends import tile_stream
from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.naive import NaiveBackend
from topk_ortho.backends.norms import column_norms
from topk_ortho.backends.survivors import Survivors
from topk_ortho.backends.tile_stream import TileShape, tiles
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.definitions import Query
from topk_ortho.warm_start import SampleSizes

SHAPES = [(5, 7), (16, 32), (8, 8), (1, 1), (1, 50), (9, 200)]
"""Tile shapes; never fewer columns than rows."""


SMALL = TiledBackend(tile=TileShape(48, 64))
WITHOUT_SAMPLE = SampleSizes(least_features=2**30)


@pytest.fixture
def passes(monkeypatch):
    """Records the `Survivors` of every pass in `made`."""

    class Recorded(Survivors):
        made: ClassVar[list[Survivors]] = []

        def __init__(self, query, guess, capacity):
            super().__init__(query, guess, capacity)
            self.first_guess, self.most_records, self.most_added = guess, 0, 0
            Recorded.made.append(self)

        def add(self, cosines, index):
            self.most_added = max(self.most_added, index.numel())
            super().add(cosines, index)
            self.most_records = max(self.most_records, self.n_records)

    monkeypatch.setattr(tile_stream, "Survivors", Recorded)
    return Recorded


def select(x, k, state=None, *, backend=SMALL, **query):
    """A selection of the backend, unpacked."""
    selection = backend.topk_pairs(x, Query(k=k, **query), state)
    p = int(selection.n_selected)
    tau = query.get("tau") if query.get("n_std") is None else selection.tau
    pairs = TopKPairs(
        selection.rows[:p], selection.cols[:p], selection.cosines[:p], selection.threshold, tau, x.shape[1], k
    )
    return pairs, selection


def assert_equals_oracle(pairs, x, k, **arguments):
    expected = oracle.select(float64(x), k, **arguments)
    assert pairs.rows.tolist() == expected.rows.tolist()
    assert pairs.cols.tolist() == expected.cols.tolist()
    assert pairs.values.tolist() == expected.values.tolist()


class TestTiles:
    """The upper triangle, every pair once, later panels with higher indices."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("n", [2, 7, 8, 15, 16, 17, 32, 33, 43])
    def test_cover(self, n, shape):
        x = normal(6, n)
        norms = column_norms(x)
        gram = (x / norms).double().T @ x.double()
        seen = torch.zeros(n, n, dtype=torch.int64)
        highest_of_earlier_panels, panel = -1, 0
        for row, col, products in tiles(x, norms, TileShape(min(shape[0], n), min(shape[1], n))):
            assert row % shape[0] == 0
            n_rows, n_cols = products.shape
            assert n_rows <= shape[0]
            assert n_cols <= shape[1]
            torch.testing.assert_close(
                products.double(),
                gram[row : row + n_rows, col : col + n_cols],
                rtol=1e-5,
                atol=1e-5 * norms.max().item(),
            )
            seen[row : row + n_rows, col : col + n_cols] += 1
            if row > panel:
                highest_of_earlier_panels, panel = row * n - 1, row
            assert row * n + col > highest_of_earlier_panels
        assert (seen.triu(1) == torch.ones(n, n, dtype=torch.int64).triu(1)).all()

    @settings(max_examples=2 * settings().max_examples)
    @given(data=st.data())
    def test_any_shape_any_ties(self, data):
        rows = data.draw(st.integers(1, 20))
        tile = TileShape(rows, data.draw(st.integers(rows, 40)))
        n = data.draw(st.integers(2, 60))
        x = dyadic(6, n, seed=data.draw(st.integers(0, 20)))
        k = data.draw(st.integers(1, n * (n - 1) // 2))
        backend = TiledBackend(tile=tile, capacity=k + data.draw(st.sampled_from([0, 1, 5, 10_000])))
        tau = data.draw(st.sampled_from([None, None, 0.0, 0.25]))
        similarity = data.draw(st.sampled_from(["abs", "positive"]))
        state = data.draw(st.none() | st.sampled_from([0.0, 0.24, 0.25, 0.5, 0.75, 1.0]))
        state = None if state is None else torch.tensor([state, 0.1, 1.0])
        pairs, _ = select(x, k, state, backend=backend, tau=tau, similarity=similarity)
        assert_equals_oracle(pairs, x, k, tau=tau, similarity=similarity)

    @given(data=st.data())
    def test_max_cosine_of_any_shape(self, data):
        rows = data.draw(st.integers(1, 20))
        tile = TileShape(rows, data.draw(st.integers(rows, 40)))
        n = data.draw(st.integers(2, 60))
        x = dyadic(6, n, seed=data.draw(st.integers(0, 20)))
        result = TiledBackend(tile=tile).max_cosine(x, None, "highest")
        values, partners = oracle.max_cosines(float64(x))
        assert result.cosines.tolist() == values.tolist()
        assert result.partners.tolist() == partners.tolist()

    @pytest.mark.parametrize("make", [normal, activations, dyadic])
    def test_real_tile_size(self, make):
        """N = 2,501: three panels, both sides ragged."""
        x = make(32, 2501)
        pairs = topk_pairs(x, backend="tiled")
        assert_selection(pairs, x, k=3126)
        if make is dyadic:
            assert_equals_oracle(pairs, x, 3126)

    def test_real_tile_size_options(self):
        x = normal(32, 2501, seed=1)
        for arguments in ({"tau": "adaptive"}, {"similarity": "positive", "tau": 0.6}):
            assert_selection(topk_pairs(x, k=5000, backend="tiled", **arguments), x, k=5000, **arguments)
        cosine = torch.zeros(2501, 2501, dtype=torch.float64)
        cosine[oracle.all_pairs(2501)] = torch.from_numpy(oracle.cosines(float64(x)))
        expected = (cosine + cosine.T).fill_diagonal_(-torch.inf).amax(dim=0).square().mean().item()
        assert_within(actual=max_cosine_loss(x, backend="tiled"), expected=expected, bound=loss_bound(x, 2501))


ADVERSARIES = {
    "no_ties": normal(12, 200, seed=1),
    "heavy_ties": dyadic(6, 200, seed=1),
    "all_cosines_equal": torch.cat([torch.ones(1, 200), torch.eye(200)]),
    "all_columns_equal": torch.ones(4, 200),
    "all_zero": torch.zeros(4, 200),
    "orthogonal": torch.eye(200),
    "one_cluster_in_noise": torch.cat([torch.eye(200)[:, :180], torch.ones(200, 20)], dim=1),
    "signed_ties": torch.cat([torch.eye(100), -torch.eye(100)], dim=1),
}
adversaries = pytest.mark.parametrize("x", ADVERSARIES.values(), ids=ADVERSARIES)


class TestGuess:
    """Whatever the guess, the selection is exact; a second pass happens when, and only when, it has to."""

    k = 500

    @adversaries
    @pytest.mark.parametrize("guess", [-1.0, 0.0, 0.25, 0.5, 0.999, 2.0], ids=str)
    @pytest.mark.parametrize("similarity", ["abs", "positive"])
    def test_exact(self, x, guess, similarity, passes):
        backend = replace(SMALL, sample=WITHOUT_SAMPLE)
        state = torch.tensor([guess, 0.1, 1.0])
        pairs, selection = select(x, self.k, state, backend=backend, similarity=similarity)
        assert_selection(pairs, x, k=self.k, similarity=similarity)
        assert passes.made[0].first_guess == pytest.approx(max(guess, 0.0 if similarity == "positive" else -1.0))
        assert len(passes.made) == selection.state[2] <= 2

    def test_too_high_takes_a_second_pass(self, passes):
        x = ADVERSARIES["no_ties"]
        pairs, selection = select(x, self.k, state=torch.tensor([0.999, 0.1, 1.0]))
        assert selection.state[2] == 2
        assert [p.first_guess for p in passes.made] == [pytest.approx(0.999), -1.0]
        assert_selection(pairs, x, k=self.k)

    def test_high_guess_below_tau_needs_no_second_pass(self, passes):
        """All pairs above tau have survived: that there are fewer than k is the answer."""
        x = ADVERSARIES["no_ties"]
        pairs, selection = select(x, 19_000, tau=0.6, state=torch.tensor([0.5, 0.1, 1.0]))
        assert len(pairs.rows) < 19_000
        assert selection.state[2] == len(passes.made) == 1
        assert_selection(pairs, x, k=19_000, tau=0.6)

    @pytest.mark.parametrize("n_std", [-0.5, 0.0, 1.0, 2.0])
    def test_guess_on_either_side_of_an_adaptive_tau(self, n_std, passes):
        x = ADVERSARIES["no_ties"]
        for guess in (0.0, 0.1, 0.3, 0.5, 0.9):
            pairs, _ = select(x, 8000, n_std=n_std, state=torch.tensor([guess, 0.1, 1.0]))
            assert_selection(pairs, x, k=8000, tau="adaptive", n_std=n_std)

    def test_sample_finds_a_good_guess(self, passes):
        """One pass, and not many more records than wanted."""
        for seed in range(5):
            x = normal(12, 300, seed=seed)
            passes.made.clear()
            pairs, _ = select(x, 2000)
            assert_selection(pairs, x, k=2000)
            (only,) = passes.made
            assert 0 < only.first_guess <= pairs.threshold
            assert 2000 <= only.most_records < 3000

    def test_misleading_sample(self, passes):
        """The sampled columns are all alike, the others not: the guess is 1, or just below."""
        sampled = torch.randperm(200, generator=seeded(0))[:125]
        x = normal(12, 200, seed=2)
        x[:, sampled] = x[:, sampled[:1]] * torch.arange(1, 126)
        pairs, _ = select(x, 9000)
        assert len(passes.made) == 2
        assert passes.made[0].first_guess > 0.99
        assert_selection(pairs, x, k=9000)

    def test_sample_that_sees_only_zeros(self, passes):
        """The sampled columns are dead: the guess is no help, and records overflow."""
        sampled = torch.randperm(200, generator=seeded(0))[:125]
        x = normal(12, 200, seed=2)
        x[:, sampled] = 0
        pairs, _ = select(x, 500, backend=replace(SMALL, capacity=600))
        assert passes.made[0].first_guess <= 0
        assert passes.made[0].n_overflows > 0
        assert_selection(pairs, x, k=500)

    def test_warm_start_passes_over_less(self, passes):
        x = ADVERSARIES["no_ties"]
        _, cold = select(x, self.k, state=torch.tensor([-1.0, 0.15, 0.0]))
        passes.made.clear()
        pairs, warm = select(x, self.k, state=cold.state)
        assert passes.made[0].first_guess == cold.state[0]
        assert self.k <= passes.made[0].most_records <= 1.2 * self.k
        assert warm.state[2] == 1
        assert_selection(pairs, x, k=self.k)


class TestOverflow:
    """Records in excess of the capacity raise the bound; memory stays bounded, nothing is lost."""

    @adversaries
    @pytest.mark.parametrize("k", [1, 2, 501, 5000])
    @pytest.mark.parametrize("spare", [0, 100])
    def test_bounded_and_exact(self, x, k, spare, passes):
        pairs, _ = select(x, k, backend=replace(SMALL, sample=WITHOUT_SAMPLE, capacity=k + spare))
        assert_selection(pairs, x, k=k)
        (only,) = passes.made
        assert only.n_overflows > 0
        assert only.most_added <= 48 * 64
        assert only.most_records <= k + spare

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("similarity", ["abs", "positive"])
    def test_ties_at_the_bound(self, shape, similarity, passes):
        """The bound rises in mid-panel to a value that pairs to come share, some of lower and some of higher index."""
        x = dyadic(6, 43, seed=3)
        for k in (1, 20, 77, 300):
            backend = TiledBackend(tile=TileShape(*shape), capacity=k)
            pairs, _ = select(x, k, backend=backend, similarity=similarity)
            assert_equals_oracle(pairs, x, k, similarity=similarity)
        assert passes.made[0].n_overflows > 0

    def test_zeros_at_the_bound(self, passes):
        """Zeros are pairs like others, the last of the order."""
        x = torch.eye(43)
        x[:, 30] = x[:, 20]
        for k in (1, 2, 10, 50, 902, 903):
            pairs, _ = select(x, k, backend=TiledBackend(tile=TileShape(5, 7), capacity=k))
            assert_equals_oracle(pairs, x, k)

    @pytest.mark.parametrize("tau", [0.0, 0.2, 0.25])
    def test_with_a_floor(self, tau, passes):
        x = dyadic(6, 43, seed=4)
        for k in (10, 200, 903):
            pairs, _ = select(x, k, backend=TiledBackend(tile=TileShape(5, 7), capacity=k), tau=tau)
            assert_equals_oracle(pairs, x, k, tau=tau)

    def test_moments_count_every_pair(self, passes):
        """An adaptive tau is of all pairs, recorded or not."""
        x = normal(12, 43, seed=5)
        for capacity in (50, 10_000):
            pairs, _ = select(x, 50, backend=TiledBackend(tile=TileShape(5, 7), capacity=capacity), n_std=0.5)
            assert_selection(pairs, x, k=50, tau="adaptive", n_std=0.5)


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave, views aside."""

    def __init__(self):
        super().__init__()
        self.n_elements, self.where = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                n_elements = min(t.numel(), t.untyped_storage().nbytes() // t.element_size())
                if n_elements > self.n_elements:
                    self.n_elements, self.where = n_elements, func
        return out


def test_gradient_of_a_column_shorter_than_eps():
    """It is divided by EPS and not by its length, so its length has a gradient."""
    x = normal(7, 9, dtype=torch.float64)
    x[:, 3] *= 1e-14
    rows, cols = torch.tensor([0, 3, 3, 5]), torch.tensor([3, 4, 8, 6])
    row_weights, col_weights = torch.tensor([[1.0, 2.0, 0.0, -1.0], [3.0, 1.0, 1.5, 2.0]], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    x_hat = torch.nn.functional.normalize(leaf, dim=0, eps=oracle.EPS)
    held = x_hat.detach()
    cosines = (held[:, rows] * held[:, cols]).sum(dim=0)
    of_rows, of_cols = (x_hat[:, rows] * held[:, cols]).sum(dim=0), (held[:, rows] * x_hat[:, cols]).sum(dim=0)
    (row_weights * of_rows + col_weights * of_cols).sum().backward()
    pairs = WeightedPairs(rows, cols, row_weights, col_weights)
    gradient = SMALL.pair_gradient(x, column_norms(x), cosines, pairs)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)


class TestMemory:
    """Neither N x N nor M x k values exist at any time."""

    def test_the_mode_sees_what_the_reference_makes(self):
        with _LargestTensor() as largest:
            NaiveBackend().topk_pairs(normal(8, 300), Query(k=10), None)
        assert largest.n_elements >= 300 * 299 // 2

    @pytest.mark.parametrize(
        ("query", "make"),
        [({}, normal), ({"n_std": 1.0}, normal), ({"similarity": "positive"}, torch.ones)],
        ids=["normal", "adaptive", "all_equal"],
    )
    @pytest.mark.parametrize("screen", [False, True])
    def test_topk_pairs(self, screen, query, make):
        backend = TiledBackend(tile=TileShape(64, 128), screen=screen)
        n, m, k = 1500, 20, 1000
        x = make(m, n)
        with _LargestTensor() as largest:
            backend.topk_pairs(x, Query(k=k, **query), None)
        sample = backend.sample.rows * backend.sample.cols
        most = max(x.numel(), (4 if screen else 2) * k + 2**14 + 64 * 128, sample)
        assert largest.n_elements <= most, largest.where
        assert most < n * n / 2

    def test_max_cosine(self):
        backend = TiledBackend(tile=TileShape(64, 128))
        x = normal(20, 1500)
        with _LargestTensor() as largest:
            backend.max_cosine(x, None, "highest")
            backend.max_cosine(x, torch.arange(1500).tensor_split(3), "highest")
        assert largest.n_elements <= x.numel(), largest.where

    def test_pair_gradient(self):
        n, m, k = 400, 64, 20_000
        x = normal(m, n)
        backend = TiledBackend()
        selection = backend.topk_pairs(x, Query(k=k), None)
        pairs = WeightedPairs(selection.rows, selection.cols, torch.ones(k), torch.ones(k))
        with _LargestTensor() as largest:
            backend.pair_gradient(x, selection.norms, selection.cosines, pairs)
        most = max(x.numel(), 2 * k)
        assert largest.n_elements <= most, largest.where
        assert most < min(n * n / 2, m * k / 10)

    @pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
    def test_process(self):
        """Forward and backward at N = 8,000: the process grows by less than a quarter of N x N float32."""
        code = """
import resource, torch
from topk_ortho import max_cosine_loss, topk_ortho_loss
def step(x):
    x.requires_grad_()
    (topk_ortho_loss(x) + max_cosine_loss(x)).backward()
generator = torch.Generator().manual_seed(0)
step(torch.randn(64, 2600, generator=generator))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(torch.randn(64, 8000, generator=generator))
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert grown < 8000 * 8000, f"{grown / 2**20:.0f} MiB"
"""
        root = Path(__file__).parents[2]
        result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_adaptive_tau_over_whole_tiles():
    """Few large cosines among very many small ones: float32 over a tile of 10**6 would round the small squares away."""
    x = torch.eye(32).repeat(1, 80)
    pairs = topk_pairs(x, k=1000, tau="adaptive", n_std=3.0)
    expected = oracle.tau_of(oracle.cosines(float64(x)), "adaptive", 3.0)
    assert_within(actual=pairs.tau, expected=expected, bound=4 * cosine_bound(x))


@pytest.mark.parametrize("kind", ["sparse", "dead", "duplicates", "dyadic"])
def test_a_tied_threshold_takes_one_pass_when_warm(kind):
    x = {
        "sparse": (torch.rand(64, 600, generator=seeded(0)) < 0.002).float(),
        "dead": torch.cat([normal(16, 200), torch.zeros(16, 400)], dim=1),
        "duplicates": normal(16, 60).repeat(1, 10),
        "dyadic": dyadic(6, 600, seed=1),
    }[kind]
    state = initial_state()
    passes = []
    for _ in range(4):
        topk_pairs(x, fraction=0.5 if kind == "dead" else 0.01, state=state)
        passes.append(int(state[2]))
    assert passes[1:] == [1, 1, 1]


class _MatmulPrecisions(TorchDispatchMode):
    """The oneDNN setting that was in force at each matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul, torch.ops.aten.addmm, torch.ops.aten.bmm):
            setting = torch.backends.mkldnn.matmul.fp32_precision
            self.seen.add("ieee" if setting == "none" else setting)
        return func(*args, **(kwargs or {}))


class TestPrecision:
    """The word decides the products, and is forgotten afterwards."""

    @pytest.mark.parametrize(("word", "setting"), [("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")])
    @pytest.mark.parametrize("op", ["topk_pairs", "max_cosine"])
    def test_of_the_products(self, op, word, setting):
        before = torch.backends.mkldnn.matmul.fp32_precision
        with _MatmulPrecisions() as precisions:
            if op == "topk_pairs":
                TiledBackend().topk_pairs(normal(8, 200), Query(k=10, precision=word), None)
            else:
                TiledBackend().max_cosine(normal(8, 200), torch.arange(200).tensor_split(2), word)
        assert precisions.seen == {setting}
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    @pytest.mark.parametrize("parent", [torch.backends, torch.backends.mkldnn], ids=["all", "mkldnn"])
    def test_an_inherited_setting_stays_inherited(self, parent, monkeypatch):
        own = torch.backends.mkldnn.matmul.fp32_precision
        before = parent.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        try:
            parent.fp32_precision = "bf16"
            TiledBackend().topk_pairs(normal(8, 200), Query(k=10), None)
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            parent.fp32_precision = "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        finally:
            parent.fp32_precision = before
            torch.backends.mkldnn.matmul.fp32_precision = own

    def test_threads_do_not_mix_their_precisions(self):
        x, words = normal(64, 400), ["highest", "medium"] * 8
        expected = {
            word: TiledBackend().topk_pairs(x, Query(k=99, precision=word), None).cosines for word in set(words)
        }
        before = torch.backends.mkldnn.matmul.fp32_precision
        with ThreadPoolExecutor(4) as threads:
            values = list(
                threads.map(lambda w: TiledBackend().topk_pairs(x, Query(k=99, precision=w), None).cosines, words)
            )
        assert all(torch.equal(v, expected[word]) for v, word in zip(values, words, strict=True))
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_is_restored_after_an_error_between_the_products(self, monkeypatch):
        def fail(*_):
            raise MemoryError("no room")

        before = torch.backends.mkldnn.matmul.fp32_precision
        monkeypatch.setattr(Survivors, "add", fail)
        monkeypatch.setattr(TiledBackend, "_max_cosine_of_all", fail)
        with pytest.raises(MemoryError, match="no room"):
            topk_pairs(normal(8, 20), k=3, precision="medium", backend="tiled")
        with pytest.raises(MemoryError, match="no room"):
            max_cosine_loss(normal(8, 20), precision="medium", backend="tiled")
        assert torch.backends.mkldnn.matmul.fp32_precision == before
