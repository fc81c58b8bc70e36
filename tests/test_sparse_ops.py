"""What torch asks of the ops of a sparse x: schema, fake kernels, gradients, compilation, vmap."""

import pytest
import torch
from torch.library import opcheck

from tests.inputs import activations, seeded
from topk_ortho import SparseFeatures, TopKOrthoLoss, max_cosine_loss, sparse_ops, topk_ortho_loss, topk_pairs
from topk_ortho.sparse_features import coordinates_of

OPS = [
    sparse_ops.sparse_topk_pairs,
    sparse_ops.sparse_max_cosine,
    sparse_ops.sparse_pair_gradient,
    sparse_ops.sum_of_squares,
    sparse_ops.sum_of_squares_gradient,
]
FORMS = {
    "features": SparseFeatures.from_dense,
    "csr": lambda x: x.to_sparse_csr(),
    "coo": lambda x: x.to_sparse(),
}


def coordinates(dtype=torch.float32, requires_grad=True):
    found, n_products = coordinates_of(SparseFeatures.from_dense(activations(6, 11, dtype=dtype)))
    return found._replace(values=found.values.detach().requires_grad_(requires_grad)), n_products


@pytest.mark.parametrize("op", OPS, ids=lambda op: op._name)
def test_ops_that_read_on_the_host_say_so(op):
    assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


class TestOpcheck:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize(
        ("k", "tau", "n_std", "similarity", "priority", "is_ordered"),
        [
            pytest.param(9, None, None, "abs", None, True, id="plain"),
            pytest.param(55, None, None, "abs", None, False, id="all_pairs"),
            pytest.param(9, 0.3, None, "abs", torch.arange(11), False, id="tau_priority"),
            pytest.param(50, None, 1.0, "positive", None, True, id="adaptive_positive"),
            pytest.param(9, 0.9999, None, "abs", None, False, id="nothing_selected"),
        ],
    )
    def test_select(self, k, tau, n_std, similarity, priority, is_ordered, dtype):
        x, n_products = coordinates(dtype)
        size = min(k, n_products)
        opcheck(sparse_ops.sparse_topk_pairs, (*x, size, k, tau, n_std, similarity, "highest", priority, is_ordered))

    @pytest.mark.parametrize("n_chunks", [1, 3])
    def test_max_cosine(self, n_chunks):
        x, _ = coordinates()
        permutation = torch.randperm(11, generator=seeded(0)) if n_chunks > 1 else None
        opcheck(sparse_ops.sparse_max_cosine, (*x, permutation, n_chunks))

    def test_sum_of_squares(self):
        x, _ = coordinates()
        opcheck(sparse_ops.sum_of_squares, tuple(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_gradients(self, dtype):
        x, n_products = coordinates(dtype, requires_grad=False)
        cosines, rows, cols, *_ = sparse_ops.sparse_topk_pairs(
            *x, n_products, 55, 0.3, None, "abs", "highest", None, False
        )
        opcheck(sparse_ops.sparse_pair_gradient, (*x, rows, cols, 2 * cosines, -cosines))
        opcheck(sparse_ops.sum_of_squares_gradient, (*x, torch.tensor(0.5)))


class TestGradcheck:
    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    @pytest.mark.parametrize(
        "arguments",
        [{"k": 20}, {"k": 78}, {"k": 20, "tau": 0.2, "reduction": "sum"}, {"k": 78, "priority": torch.ones(13)}],
        ids=["some_pairs", "all_pairs", "tau_sum", "equal_priorities"],
    )
    def test_topk_ortho_loss(self, arguments, form):
        pattern = activations(5, 13, seed=1, dtype=torch.float64) != 0
        values = torch.rand(int(pattern.sum()), generator=seeded(2), dtype=torch.float64).add(0.5).requires_grad_()

        def loss(values):
            x = torch.zeros(5, 13, dtype=torch.float64).masked_scatter(pattern, values)
            return topk_ortho_loss(form(x), **arguments)

        assert torch.autograd.gradcheck(loss, values)

    def test_max_cosine_loss(self):
        features = SparseFeatures.from_dense(activations(5, 13, seed=3, dtype=torch.float64))
        values = features.values.requires_grad_()
        padding = values == 0

        def loss(values):
            return max_cosine_loss(features._replace(values=values.masked_fill(padding, 0)), 2, generator=seeded(0))

        assert torch.autograd.gradcheck(loss, values)

    @pytest.mark.parametrize("k", [20, 78])
    def test_second_derivatives_are_refused(self, k):
        features = SparseFeatures.from_dense(activations(5, 13, seed=4))
        values = features.values.requires_grad_()
        (gradient,) = torch.autograd.grad(topk_ortho_loss(features, k=k), values, create_graph=True)
        with pytest.raises(NotImplementedError, match="topk_ortho ops have no second derivatives"):
            torch.autograd.grad(gradient.sum(), values)


def test_outputs_are_fresh():
    x, n_products = coordinates()
    outputs = sparse_ops.sparse_topk_pairs(*x, n_products, 55, None, None, "abs", "highest", None, False)
    outputs += sparse_ops.sparse_max_cosine(*x, None, 1)
    storages = [t.untyped_storage().data_ptr() for t in (*x[:3], *outputs) if t.numel()]
    assert len(set(storages)) == len(storages)


def test_vmap_is_refused():
    x, _ = coordinates(requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"topk_ortho ops do not support torch\.func\.vmap"):
        torch.func.vmap(lambda values: sparse_ops.sum_of_squares(*x._replace(values=values)))(x.values.expand(4, -1))


class TestCompile:
    """`torch.compile(fullgraph=True)` of a step with SparseFeatures equals eager, bit for bit."""

    @pytest.fixture(autouse=True)
    def _fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def value_and_gradient(function, values):
        values = values.clone().requires_grad_()
        value = function(values)
        value.backward()
        return value.detach(), values.grad

    @pytest.mark.parametrize(
        "loss",
        [
            lambda x: topk_ortho_loss(x, k=60),
            lambda x: topk_ortho_loss(x, k=903),
            lambda x: topk_ortho_loss(x, k=200, tau="adaptive", similarity="positive", priority=torch.arange(43)),
            TopKOrthoLoss(k=60),
            max_cosine_loss,
        ],
        ids=["some_pairs", "all_pairs", "adaptive_positive_priority", "module", "max_cosine"],
    )
    def test_losses(self, loss):
        features = SparseFeatures.from_dense(activations(8, 43, seed=5))
        indices, values = features.indices, features.values

        def step(values):
            return loss(SparseFeatures(indices, values * 2, 43))

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        actual, expected = self.value_and_gradient(compiled, values), self.value_and_gradient(step, values)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)

    @pytest.mark.parametrize("k", [60, 903])
    @pytest.mark.parametrize("form", [FORMS["csr"], FORMS["coo"]], ids=["csr", "coo"])
    def test_layouts_of_torch(self, form, k):
        """Not in one graph: how many entries there are is data."""
        x = form(activations(8, 43, seed=7))
        for loss in (lambda x: topk_ortho_loss(x, k=k), max_cosine_loss):
            assert torch.equal(torch.compile(loss, backend="eager")(x), loss(x))

    def test_pairs(self):
        features = SparseFeatures.from_dense(activations(8, 43, seed=6))
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            compiled = torch.compile(lambda x: topk_pairs(x, k=60), fullgraph=True, backend="aot_eager")(features)
        for actual, expected in zip(compiled[:4], topk_pairs(features, k=60)[:4], strict=True):
            assert torch.equal(actual, expected)
