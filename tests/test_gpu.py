"""What only a GPU can show; everywhere else these are skipped. The suite of every backend runs on it too, see conftest.

Run with `pytest -m gpu`. `bench/gpu_check.sh` runs them, then those named `sanitizer` again under compute-sanitizer.
"""

import numpy as np
import pytest
import torch

from tests import oracle
from tests.inputs import activations, dyadic, normal
from tests.tolerances import assert_selection, assert_within, cosine_bound, float64, gradient_bound
from topk_ortho import SparseFeatures, TopKOrthoLoss, initial_state, max_cosine_loss, topk_ortho_loss, topk_pairs
from topk_ortho.backends import registry
from topk_ortho.backends.sparse.backend import SparseBackend
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.triton import TritonBackend
from topk_ortho.definitions import k_from_fraction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


def to_cpu(pairs):
    return pairs._replace(**{name: getattr(pairs, name).cpu() for name in ("rows", "cols", "values", "threshold")})


def check(x, **arguments):
    """Selection of x on the device against the float64 oracle."""
    pairs = to_cpu(topk_pairs(x.cuda(), **arguments, backend="triton"))
    definition = {name: arguments[name] for name in ("tau", "n_std", "similarity", "precision") if name in arguments}
    assert_selection(pairs, x, k=arguments["k"], **definition)
    return pairs


class TestExactness:
    """Many real tiles, ragged at the end."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    @pytest.mark.parametrize("layout", ["row_major", "feature_major"])
    @pytest.mark.parametrize("n", [1001, 1024], ids=["ragged", "multiple_of_the_tile"])
    def test_precisions(self, n, layout, precision, dtype):
        x = normal(200, n, seed=1, dtype=dtype)
        check(x.T.contiguous().T if layout == "feature_major" else x, k=1500, precision=precision)

    @pytest.mark.parametrize("screened", [False, True], ids=["plain", "screened"])
    @pytest.mark.parametrize(
        "arguments",
        [{}, {"tau": 0.2}, {"tau": "adaptive", "n_std": 3.0}, {"similarity": "positive"}],
        ids=str,
    )
    @pytest.mark.parametrize("make", [normal, activations])
    def test_arguments(self, make, arguments, screened, monkeypatch):
        backend = TritonBackend(least_screened_features=2 if screened else 2**30)
        monkeypatch.setitem(registry.BACKENDS, "triton", backend)
        check(make(96, 1500, seed=2), k=3000, **arguments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("k", [1, 1000, 100_000], ids=["one", "among_ties", "ties_overflow"])
    def test_ties(self, k, dtype, monkeypatch):
        monkeypatch.setitem(registry.BACKENDS, "triton", TritonBackend(spare_records=0))
        x = dyadic(16, 900, seed=3, dtype=dtype)
        pairs = check(x, k=k)
        expected = oracle.select(float64(x), k)
        assert np.array_equal(pairs.rows.numpy(), expected.rows)
        assert np.array_equal(pairs.cols.numpy(), expected.cols)

    @pytest.mark.parametrize("guess", [-1.0, 0.001, 0.9], ids=["none", "too_low", "too_high"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_repair(self, guess, dtype, monkeypatch):
        monkeypatch.setitem(registry.BACKENDS, "triton", TritonBackend(spare_records=0))
        x = normal(64, 1300, seed=4, dtype=dtype)
        state = torch.tensor([guess, 0.15, 1.0], device="cuda")
        check(x, k=845, state=state)
        assert (state[2] > 1) == (guess > -1)

    def test_gradient(self):
        x = normal(160, 700, seed=5)
        on_device = x.cuda().requires_grad_()
        priority = torch.arange(700).flip(0)
        topk_ortho_loss(on_device, k=900, backend="triton", priority=priority).backward()
        selected = oracle.select(float64(x), 900)
        assert_within(
            actual=on_device.grad.cpu(),
            expected=oracle.loss_gradient(float64(x), selected.rows, selected.cols, "mean", priority.numpy()),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / 900),
        )

    @pytest.mark.parametrize("n_chunks", [1, 7])
    def test_max_cosine(self, n_chunks):
        x = normal(96, 900, seed=6)
        permutation = torch.randperm(900, generator=torch.Generator().manual_seed(0))
        chunks = [c.tolist() for c in permutation.tensor_split(n_chunks)] if n_chunks > 1 else None
        generator = torch.Generator().manual_seed(0)
        value = max_cosine_loss(x.cuda(), n_chunks, generator=generator, backend="triton")
        expected, _ = oracle.max_cosines(float64(x), chunks)
        assert_within(actual=value.cpu(), expected=(expected**2).mean(), bound=3 * cosine_bound(x))


class TestSize:
    """Beyond what an N x N matrix, or an int32 offset, can do."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_n_131072(self, dtype):
        n, m = 131_072, 128
        k = k_from_fraction(n, 1e-3)
        x = torch.randn(m, n, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)
        pairs = topk_pairs(x, backend="triton")
        assert pairs.rows.numel() == k
        index = pairs.rows * n + pairs.cols
        assert index.unique().numel() == k
        assert (pairs.rows < pairs.cols).all()
        e = cosine_bound(x)
        x_hat = torch.nn.functional.normalize(x.double(), dim=0)
        n_above = n_from = 0
        for row in range(0, n, 2048):
            block = (x_hat[:, row : row + 2048].T @ x_hat[:, row:]).abs().triu_(1)
            n_above += int((block > pairs.threshold + e).sum())
            n_from += int((block >= pairs.threshold - e).sum())
        assert n_above <= k <= n_from
        for part in range(0, k, 2**20):
            rows, cols = pairs.rows[part : part + 2**20], pairs.cols[part : part + 2**20]
            exact = (x_hat[:, rows] * x_hat[:, cols]).sum(dim=0)
            assert (exact - pairs.values[part : part + 2**20]).abs().max() <= e + 2**-24
            assert exact.abs().min() >= pairs.threshold - e

    def test_offsets_past_int32(self):
        """The last rows of x lie beyond 2**31 elements: only they are not zero."""
        n, m = 65_536, 33_024
        x = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
        signs = torch.randint(0, 2, (12, n), device="cuda") * 2 - 1
        x[-12:] = signs * (torch.rand(12, n, device="cuda").argsort(dim=0) < 4)  # 4 of 12: exact in any order of sums
        pairs, expected = (topk_pairs(part, k=5000, backend="triton") for part in (x, x[-12:].clone()))
        assert torch.equal(pairs.values, expected.values)
        assert torch.equal(pairs.rows, expected.rows)
        assert torch.equal(pairs.cols, expected.cols)


class TestSparse:
    """Against the CPU, whose sparse route the oracle checks; kernels differ from it in nothing but where they run."""

    @staticmethod
    def features(dtype=torch.float32, n_rows=200, n_features=1500):
        x = activations(n_rows, n_features, seed=7, dtype=dtype)
        return SparseFeatures.from_dense(x * (normal(n_rows, n_features, seed=8) > 0.7))

    @staticmethod
    def on_gpu(features):
        return features._replace(indices=features.indices.cuda(), values=features.values.detach().cuda())

    @pytest.mark.parametrize("slab", [3000, 2**24], ids=["many_slabs", "one_slab"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "arguments",
        [{"k": 3000}, {"fraction": 1.0}, {"k": 3000, "tau": "adaptive"}, {"k": 90_000, "similarity": "positive"}],
        ids=str,
    )
    def test_as_on_the_cpu(self, arguments, dtype, slab, monkeypatch):
        monkeypatch.setitem(registry.BACKENDS, "sparse", SparseBackend(slabs=Slabs(most_products=slab)))
        features = self.features(dtype)
        device = self.on_gpu(features)
        for x in (features, device):
            x.values.requires_grad_()
        pairs, expected = to_cpu(topk_pairs(device, **arguments)), topk_pairs(features, **arguments)
        torch.testing.assert_close(pairs.values, expected.values, rtol=0, atol=2.0**-22)
        assert (pairs.rows * 1500 + pairs.cols).unique().numel() == expected.rows.numel()
        losses = [topk_ortho_loss(x, **arguments) for x in (device, features)]
        gradients = [
            torch.autograd.grad(loss, x.values)[0].cpu() for loss, x in zip(losses, (device, features), strict=True)
        ]
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps + 1e-5, "atol": 1e-6}
        torch.testing.assert_close(losses[0].cpu(), losses[1], **tolerance)
        torch.testing.assert_close(*gradients, **tolerance)

    def test_max_cosine(self):
        features = self.features()
        for n_chunks in (1, 5):
            values = [
                max_cosine_loss(x, n_chunks, generator=torch.Generator().manual_seed(0)).cpu()
                for x in (self.on_gpu(features), features)
            ]
            torch.testing.assert_close(*values, rtol=1e-5, atol=0)

    def test_dense_x(self):
        x = self.features().to_dense()
        check_sparse = to_cpu(topk_pairs(x.cuda(), k=3000, backend="sparse"))
        assert_selection(check_sparse, x, k=3000)

    def test_structural_zeros(self):
        x = self.features().to_dense()
        on_device = x.cuda().requires_grad_()
        for backend in ("sparse", "triton"):
            loss = topk_ortho_loss(on_device, k=3000, backend=backend, structural_zeros=True)
            (gradient,) = torch.autograd.grad(loss, on_device)
            assert not gradient[on_device == 0].any()
            x.requires_grad_()
            (expected,) = torch.autograd.grad(topk_ortho_loss(x, k=3000, structural_zeros=True), x)
            torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
    def test_on_a_device_that_is_not_the_current_one(self):
        features = self.features()
        device = features._replace(indices=features.indices.to("cuda:1"), values=features.values.detach().to("cuda:1"))
        torch.testing.assert_close(topk_ortho_loss(device, k=3000).cpu(), topk_ortho_loss(features, k=3000).detach())

    @pytest.mark.parametrize("fraction", [0.01, 1.0], ids=["some_pairs", "all_pairs"])
    def test_deterministic(self, fraction):
        features = self.on_gpu(self.features())
        features.values.requires_grad_()
        losses = [topk_ortho_loss(features, fraction) for _ in range(3)]
        gradients = [torch.autograd.grad(loss, features.values)[0] for loss in losses]
        for loss, gradient in zip(losses, gradients, strict=True):
            assert torch.equal(loss, losses[0])
            assert torch.equal(gradient, gradients[0])

    def test_csr(self):
        x = self.features().to_dense()
        actual, expected = (topk_pairs(csr, k=900).values for csr in (x.cuda().to_sparse_csr(), x.to_sparse_csr()))
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=2.0**-22)

    def test_errors(self):
        features = self.on_gpu(self.features())
        features.values[3, 0] = torch.nan
        with pytest.raises(ValueError, match="x has 1 column with NaN or Inf"):
            topk_ortho_loss(features, state=initial_state("cuda"))


class TestTheWarmPath:
    """What a training loop relies on."""

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    def test_nothing_is_read_on_the_host(self):
        x = torch.randn(256, 4096, device="cuda", requires_grad=True)
        penalty = TopKOrthoLoss(similarity="positive", backend="triton").cuda()
        priority = torch.rand(4096, device="cuda")
        for _ in range(2):
            penalty(x, priority).backward()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            penalty(x, priority).backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert penalty.state[2] == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_captured_in_a_graph(self, dtype):
        """Replays on other numbers give what calls give, to the bit, the state among it."""
        x = torch.randn(256, 4096, device="cuda").to(dtype).requires_grad_()
        penalties = [TopKOrthoLoss(similarity="positive", backend="triton").cuda() for _ in range(2)]

        def step(penalty):
            loss = penalty(x)
            # without its graph, which would keep alive a node of x that belongs to the stream of a capture
            return loss.detach(), *torch.autograd.grad(loss, x)

        with torch.cuda.stream(torch.cuda.Stream()):  # the calls before a capture compile the kernels
            for _ in range(2):
                step(penalties[0])
        torch.cuda.synchronize()
        penalties[1].state.copy_(penalties[0].state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(penalties[0])
        for seed in range(3):
            with torch.no_grad():
                x.copy_(torch.randn(x.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
            graph.replay()
            for actual, expected in zip(captured, step(penalties[1]), strict=True):
                assert torch.equal(actual, expected)
            assert torch.equal(penalties[0].state, penalties[1].state)

    def test_what_is_not_finite_shows_in_the_loss(self):
        x = torch.randn(64, 512, device="cuda")
        x[3, 7] = torch.nan
        with pytest.raises(ValueError, match="x has 1 column with NaN or Inf: 7"):
            topk_ortho_loss(x, backend="triton")
        assert topk_ortho_loss(x, backend="triton", state=initial_state("cuda")).isnan()

    def test_two_streams(self):
        inputs = [
            torch.randn(128, 3000, device="cuda", generator=torch.Generator("cuda").manual_seed(i)) for i in (0, 1)
        ]
        expected = [topk_pairs(x, backend="triton") for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        results = [[], []]
        for _ in range(5):
            for x, stream, result in zip(inputs, streams, results, strict=True):
                with torch.cuda.stream(stream):
                    result.append(topk_pairs(x, backend="triton"))
        torch.cuda.synchronize()
        for wanted, result in zip(expected, results, strict=True):
            for pairs in result:
                assert torch.equal(pairs.values, wanted.values)
                assert torch.equal(pairs.rows, wanted.rows)
                assert torch.equal(pairs.cols, wanted.cols)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_deterministic(self, dtype):
        x = torch.randn(128, 9000, device="cuda").to(dtype).requires_grad_()
        losses = [topk_ortho_loss(x, tau="adaptive", backend="triton") for _ in range(3)]
        gradients = [torch.autograd.grad(loss, x)[0] for loss in losses]
        for loss, gradient in zip(losses, gradients, strict=True):
            assert torch.equal(loss, losses[0])
            assert torch.equal(gradient, gradients[0])

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
    def test_compiled(self):
        x = torch.randn(128, 2000, device="cuda", requires_grad=True)
        penalty = TopKOrthoLoss(backend="triton").cuda()
        expected = topk_ortho_loss(x, backend="triton")
        (wanted,) = torch.autograd.grad(expected, x)
        compiled = torch.compile(penalty, fullgraph=True)
        for _ in range(2):
            loss = compiled(x)
            (gradient,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the mean is summed in another order
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)

    def test_auto_is_triton(self):
        x = torch.randn(64, 600, device="cuda")
        for actual, expected in zip(topk_pairs(x)[:3], topk_pairs(x, backend="triton")[:3], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sanitizer_every_kernel_once(dtype, monkeypatch):
    """Small enough for compute-sanitizer: a first pass, a repair through all its stages, row maxima and gradients."""
    backend = TritonBackend(spare_records=0, least_screened_features=2, most_sum_error=0.0)
    monkeypatch.setitem(registry.BACKENDS, "triton", backend)
    x = dyadic(16, 333, dtype=dtype).cuda().requires_grad_()
    loss = topk_ortho_loss(x, k=20_000, backend="triton", state=torch.tensor([0.9, 0.15, 1.0], device="cuda"))
    loss += topk_ortho_loss(x, k=500, tau="adaptive", backend="triton") + max_cosine_loss(x, 5, backend="triton")
    for fraction in (0.01, 1.0):
        loss += topk_ortho_loss(SparseFeatures.from_dense(x), fraction)
    loss.backward()
    assert x.grad.isfinite().all()
