"""What torch asks of an op: schema, fake kernels, gradients, compilation, vmap."""

import shutil

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import in_float64
from tests.inputs import EDGES, VIEWS, activations, dyadic, normal, seeded
from topk_ortho import (
    MaxCosineLoss,
    SparseFeatures,
    TopKOrthoLoss,
    custom_ops,
    initial_state,
    max_cosine_loss,
    nearest_columns,
    topk_ortho_loss,
    topk_pairs,
)

in_torch = pytest.mark.parametrize("backend", ["naive", "tiled", "sparse"])
"""What the ops are checked for does not depend on the backend: on the kernels it is checked once."""


@pytest.mark.parametrize("op", [custom_ops.topk_pairs, custom_ops.max_cosine], ids=["topk_pairs", "max_cosine"])
def test_ops_that_read_on_the_host_say_so(op):
    assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


class TestOpcheck:
    """`torch.library.opcheck`: schema, registrations, fake kernels, AOT dispatch with dynamic shapes."""

    # layout and dtype of x have nothing to do with each other, nor with the number of chunks
    @pytest.mark.parametrize(
        ("view", "dtype"),
        [("contiguous", torch.float32), ("transposed", torch.bfloat16), ("strided_both_dims", torch.float64)],
        ids=str,
    )
    @in_torch
    def test_topk_pairs(self, view, dtype, backend):
        x = VIEWS[view](normal(6, 11, dtype=dtype)).requires_grad_()
        opcheck(custom_ops.topk_pairs, (x, 9, None, None, "abs", "highest", backend, None, None, False))

    @pytest.mark.parametrize(
        ("tau", "n_std", "similarity", "priority", "state"),
        [
            pytest.param(0.3, None, "abs", None, None, id="tau"),
            pytest.param(None, 1.0, "positive", None, None, id="adaptive_positive"),
            pytest.param(None, None, "abs", torch.arange(11), None, id="priority"),
            pytest.param(None, None, "abs", None, initial_state(), id="state"),
        ],
    )
    def test_topk_pairs_arguments(self, tau, n_std, similarity, priority, state):
        self.check_topk_pairs(tau, n_std, similarity, priority, state, "tiled")

    @pytest.mark.parametrize(("tau", "n_std"), [(0.999, None), (None, 1.0)], ids=["nothing_selected", "adaptive"])
    def test_topk_pairs_on_every_backend(self, tau, n_std, small_backend):
        priority = torch.rand(11, generator=seeded(0))
        self.check_topk_pairs(tau, n_std, "positive", priority, initial_state(), small_backend)

    @staticmethod
    def check_topk_pairs(tau, n_std, similarity, priority, state, backend):
        x = normal(6, 11).requires_grad_()
        opcheck(custom_ops.topk_pairs, (x, 9, tau, n_std, similarity, "medium", backend, priority, state, False))

    @pytest.mark.parametrize(("view", "n_chunks"), [("contiguous", 1), ("transposed", 3), ("strided_both_dims", 3)])
    @in_torch
    def test_max_cosine(self, view, n_chunks, backend):
        x = VIEWS[view](normal(6, 11)).requires_grad_()
        permutation = torch.randperm(11, generator=seeded(0)) if n_chunks > 1 else None
        opcheck(custom_ops.max_cosine, (x, permutation, n_chunks, "highest", backend))

    @pytest.mark.parametrize(
        ("view", "dtype"),
        [("contiguous", torch.float32), ("transposed", torch.float16), ("strided_both_dims", torch.float32)],
        ids=str,
    )
    @in_torch
    def test_pair_gradient(self, view, dtype, backend):
        x = VIEWS[view](normal(6, 11, dtype=dtype))
        cosines, rows, cols, *_, norms, _state = custom_ops.topk_pairs(
            x, 9, 0.3, None, "abs", "highest", backend, None, None, False
        )
        opcheck(custom_ops.pair_gradient, (x, norms, cosines, rows, cols, 2 * cosines, -cosines, backend, False))


@in_float64
class TestGradcheck:
    """Analytic against numeric gradients, in float64."""

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"reduction": "sum"},
            {"tau": 0.3},
            {"similarity": "positive", "tau": "adaptive", "n_std": 0.5},
            {"priority": torch.ones(13)},
        ],
        ids=["mean", "sum", "tau", "positive_adaptive", "equal_priorities"],
    )
    def test_topk_ortho_loss(self, arguments, backend):
        x = normal(5, 13, seed=1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: topk_ortho_loss(x, k=20, backend=backend, **arguments), x)

    def test_topk_pairs(self, backend):
        x = normal(5, 13, seed=2, dtype=torch.float64).requires_grad_()
        # its values are float32 by definition, too coarse for a numeric gradient: take them from the op below
        arguments = (20, None, None, "abs", "highest", backend, None, None, False)
        assert torch.autograd.gradcheck(lambda x: custom_ops.topk_pairs(x, *arguments)[0], x)

    @pytest.mark.quick
    @pytest.mark.parametrize("n_chunks", [1, 4])
    def test_max_cosine_loss(self, n_chunks, backend):
        x = normal(5, 13, seed=3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: max_cosine_loss(x, n_chunks, generator=seeded(0), backend=backend), x)

    def test_through_a_transpose(self, backend):
        """The decoder of an SAE: x = W_dec.T."""
        w_dec = normal(13, 5, seed=4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda w: topk_ortho_loss(w.T, k=20, backend=backend), w_dec)

    def test_second_derivatives_are_refused(self, backend):
        x = normal(5, 13).requires_grad_()
        (gradient,) = torch.autograd.grad(topk_ortho_loss(x, k=20, backend=backend), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="topk_ortho ops have no second derivatives"):
            torch.autograd.grad(gradient.sum(), x)


class _NoGradient(torch.autograd.Function):
    """A use of a tensor that sends no gradient back, not even zeros."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class _Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.to_sparse()], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "cosines",
    [lambda x: topk_pairs(x, k=9).values, lambda x: nearest_columns(x).cosines],
    ids=["topk_pairs", "nearest_columns"],
)
class TestOtherOutputs:
    """Only the cosines have a gradient."""

    def test_they_cost_nothing(self, cosines, form):
        """torch would fill zeros for each of them, which is as long as the list of pairs."""
        x = activations(8, 40).requires_grad_()
        loss = cosines(form(x)).square().sum()
        with _Operators() as operators:
            loss.backward()
        assert any("gradient" in name for name in operators.seen), "no backward pass was seen"
        assert "zeros.default" not in operators.seen

    def test_cosines_without_a_gradient(self, cosines, form):
        x = activations(8, 40).requires_grad_()
        loss = _NoGradient.apply(cosines(form(x))).sum()
        assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)


@pytest.mark.parametrize("structural_zeros", [False, True])
def test_zeros_are_counted_once(structural_zeros, monkeypatch):
    """By the forward pass on a CPU, and again by a backward pass if they decide its work."""
    counted = []
    monkeypatch.setattr("topk_ortho.backends.registry.is_cheaper", lambda x, **options: counted.append(x))
    x = activations(8, 40).requires_grad_()
    loss = topk_ortho_loss(x, k=9, structural_zeros=structural_zeros)
    assert len(counted) == 1
    loss.backward()
    assert len(counted) == 1 + structural_zeros


def test_what_zeros_are_counted_for(monkeypatch):
    """A selection without an adaptive tau may be screened, so that products of matrices cost less."""
    counted = []
    monkeypatch.setattr("topk_ortho.backends.registry.is_cheaper", lambda x, **options: counted.append(options))
    x = activations(8, 40)
    topk_pairs(x, k=9)
    topk_pairs(x, k=9, tau="adaptive")
    max_cosine_loss(x)
    assert [options["is_selection"] for options in counted] == [True, False, False]


@pytest.mark.quick
def test_outputs_are_fresh(small_backend):
    """No output shares memory with an input or with another output."""
    x, state = dyadic(6, 11), initial_state()
    outputs = custom_ops.topk_pairs(x, 9, None, None, "abs", "highest", small_backend, None, state, False)
    outputs += custom_ops.max_cosine(x, None, 1, "highest", small_backend)
    storages = [t.untyped_storage().data_ptr() for t in (x, state, *outputs) if t.numel()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("n_chunks", [1, 3])
def test_fake_outputs_are_like_real_ones(n_chunks, small_backend):
    """opcheck covers the shapes that it was given; here also what an edge gives."""
    for x in (EDGES["all_zero"], EDGES["one_row"], activations(6, 12, dtype=torch.bfloat16)):
        permutation = torch.randperm(x.shape[1], generator=seeded(0)) if n_chunks > 1 else None
        for op, arguments in (
            (custom_ops.topk_pairs, (7, 0.5, None, "positive", "highest", small_backend, None, initial_state(), False)),
            (custom_ops.max_cosine, (permutation, n_chunks, "highest", small_backend)),
        ):
            real = op(x, *arguments)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in (x, *arguments)))
            assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


public_ops = pytest.mark.parametrize(
    "function",
    [lambda x: topk_ortho_loss(x, k=3), lambda x: topk_pairs(x, k=3).values, max_cosine_loss],
    ids=["topk_ortho_loss", "topk_pairs", "max_cosine_loss"],
)


@pytest.mark.parametrize(
    "transform",
    [lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), lambda f, x: torch.func.jvp(f, (x,), (x,))],
    ids=["grad", "jvp"],
)
@public_ops
def test_torch_func_is_refused(transform, function):
    with pytest.raises(RuntimeError, match=r"which these ops do not support: use backward\(\)"):
        transform(function, torch.randn(5, 6))


@pytest.mark.parametrize("form", [lambda x: x, SparseFeatures.from_dense], ids=["dense", "sparse"])
def test_a_tangent_is_refused(form):
    """It would come out as 0."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(5, 6), torch.randn(5, 6))
        with pytest.raises(RuntimeError, match="forward-mode tangent, which these ops do not support"):
            topk_ortho_loss(form(x))


@public_ops
def test_vmap_is_refused(function):
    with pytest.raises(
        NotImplementedError, match=r"topk_ortho ops do not support torch\.func\.vmap.*loop over the batch"
    ):
        torch.func.vmap(function)(torch.randn(2, 5, 6))


def value_and_gradient(function, x):
    x = x.detach().clone().requires_grad_()
    value = function(x)
    value.square().sum().backward()
    return value.detach(), x.grad


class TestCompile:
    """`torch.compile(fullgraph=True)`: forward and backward equal eager, bit for bit."""

    @pytest.fixture(autouse=True)
    def _fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def check(self, function, x, compiler="aot_eager", **options):
        compiled = torch.compile(function, fullgraph=True, backend=compiler, **options)
        actual, expected = value_and_gradient(compiled, x), value_and_gradient(function, x)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        return compiled

    @in_torch
    def test_topk_ortho_loss(self, backend):
        self.check(lambda x: topk_ortho_loss(x, 0.1, backend=backend), normal(16, 43))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"tau": 0.3, "reduction": "sum"},
            {"tau": "adaptive", "similarity": "positive", "precision": "medium"},
            {"priority": torch.arange(43), "tau": 0.3},
        ],
        ids=["tau_sum", "adaptive_positive_medium", "priority"],
    )
    def test_arguments(self, arguments):
        self.check(lambda x: topk_ortho_loss(x, 0.1, backend="tiled", **arguments), normal(16, 43))

    def test_topk_pairs(self, small_backend):
        self.check(lambda x: topk_pairs(x, k=40, backend=small_backend).values, normal(16, 43))

    def test_all_of_topk_pairs(self):
        x = normal(16, 43)
        actual = torch.compile(lambda x: topk_pairs(x, k=40), fullgraph=True, backend="aot_eager")(x)
        expected = topk_pairs(x, k=40)
        assert all(torch.equal(a, e) for a, e in zip(actual[:4], expected[:4], strict=True))
        assert actual[4:] == expected[4:]

    def test_topk_pairs_of_unknown_number(self):
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            self.check(lambda x: topk_pairs(x, k=400, tau=0.3).values, normal(16, 43))

    def test_max_cosine_loss(self, small_backend):
        self.check_max_cosine_loss(3, small_backend)

    def test_max_cosine_loss_of_one_chunk(self):
        self.check_max_cosine_loss(1, "tiled")

    @staticmethod
    def check_max_cosine_loss(n_chunks, backend):
        def seeded_loss(x):
            torch.manual_seed(5)
            return max_cosine_loss(x, n_chunks, backend=backend)

        with torch.random.fork_rng():
            compiled = torch.compile(
                lambda x: max_cosine_loss(x, n_chunks, backend=backend), fullgraph=True, backend="aot_eager"
            )
            torch.manual_seed(5)
            actual, expected = (
                value_and_gradient(compiled, normal(16, 43)),
                value_and_gradient(seeded_loss, normal(16, 43)),
            )
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    def test_topk_module_keeps_its_state(self):
        x = normal(16, 43)
        module, twin = TopKOrthoLoss(0.1), TopKOrthoLoss(0.1)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for step in range(3):
            assert torch.equal(compiled(x + 0.01 * step), twin(x + 0.01 * step))
            assert torch.equal(module.state, twin.state)
        assert module.state[0] > -1

    def test_dynamic_number_of_rows_and_columns(self):
        compiled = self.check(lambda x: topk_ortho_loss(x, 0.1), normal(16, 43), dynamic=True)
        for m, n in ((16, 50), (9, 31)):
            x = normal(m, n, seed=n)
            for a, e in zip(
                value_and_gradient(compiled, x), value_and_gradient(lambda x: topk_ortho_loss(x, 0.1), x), strict=True
            ):
                assert torch.equal(a, e)

    @pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    )  # torch's own, in inductor
    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    def test_inductor(self):
        """Both modules in one graph, as a training step has them; inductor may round the final sums differently."""
        topk, max_cosine = TopKOrthoLoss(0.1, tau=0.1), MaxCosineLoss()

        def step(w_dec):
            return topk(w_dec.T) + 0.5 * max_cosine(w_dec.T)

        w_dec = normal(43, 16)
        actual = value_and_gradient(torch.compile(step, fullgraph=True), w_dec)
        for a, e in zip(actual, value_and_gradient(step, w_dec), strict=True):
            torch.testing.assert_close(a, e, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-9)

    def test_errors_come_through(self):
        compiled = torch.compile(lambda x: topk_ortho_loss(x, 0.1), fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match=r"x has 1 column with NaN or Inf: 7"):
            compiled(normal(16, 43).index_fill(1, torch.tensor([7]), torch.nan))
