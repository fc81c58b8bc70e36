"""Sparse x: every public op in every form against the float64 oracle of the same matrix, dense."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.conftest import use_case
from tests.inputs import EDGES, FLOATING, activations, dyadic, normal, seeded
from tests.test_functional import PRIORITIES, SELECTIONS, definition, separated_selection
from tests.tolerances import (
    accumulation_dtype,
    assert_gradient,
    assert_selection,
    assert_within,
    cosine_bound,
    float64,
    gradient_bound,
    loss_bound,
)
from topk_ortho import (
    MaxCosineLoss,
    SparseFeatures,
    TopKOrthoLoss,
    initial_state,
    max_cosine_loss,
    topk_ortho_loss,
    topk_pairs,
)
from topk_ortho.kernels import launch

N_PAIRS = 43 * 42 // 2


def shuffled(x):
    """SparseFeatures with the entries of a row in any order, and padding between them whose indices mean nothing."""
    indices, values, n_features = SparseFeatures.from_dense(x)
    padding = torch.tensor([-7, 0, 2**40]).expand(x.shape[0], 3)
    indices = torch.cat([indices, padding], dim=1)
    values = torch.cat([values, values.new_zeros(x.shape[0], 3)], dim=1)
    order = torch.rand(indices.shape, generator=seeded(0)).argsort(dim=1)
    return SparseFeatures(indices.gather(1, order), values.gather(1, order), n_features)


def uncoalesced(x):
    """Entries in any order, one of them as two that add up."""
    coo = x.to_sparse().coalesce()
    order = torch.randperm(coo.values().numel(), generator=seeded(0))
    indices, values = coo.indices()[:, order], coo.values()[order]
    if values.numel():
        indices = torch.cat([indices, indices[:, :1]], dim=1)
        values = torch.cat([values[:1] * 0.5, values[1:], values[:1] * 0.5])
    return torch.sparse_coo_tensor(indices, values, x.shape)


FORMS = {
    "features": SparseFeatures.from_dense,
    "features_shuffled_and_padded": shuffled,
    "csr": lambda x: x.to_sparse_csr(),
    "coo": lambda x: x.to_sparse(),
    "coo_uncoalesced": uncoalesced,
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
selections = pytest.mark.parametrize(("arguments", "k"), SELECTIONS.values(), ids=SELECTIONS)


with_kernels = pytest.mark.parametrize(
    "engine", ["sparse", "sparse_kernels"] if launch.INTERPRETED else ["sparse"], indirect=True
)
"""Plain torch and kernels; on a GPU the kernels are tested by tests/test_gpu.py."""


@pytest.fixture(autouse=True)
def engine(request, monkeypatch):
    """Plain torch, in many slabs, unless a test says `with_kernels`."""
    use_case(getattr(request, "param", "sparse"), monkeypatch)


def with_zeros(pairs, x):
    """What a dense x would list: pairs of cosine 0 behind the others, by (row, col), as long as the k last."""
    assert (pairs.values != 0).all(), "a pair of cosine 0 is listed"
    n_features = x.shape[1]
    rows, cols = oracle.all_pairs(n_features)
    listed = (pairs.rows * n_features + pairs.cols).numpy()
    apart = np.setdiff1d(rows * n_features + cols, listed)[: pairs.k - len(listed)]
    return pairs._replace(
        rows=torch.cat([pairs.rows, torch.from_numpy(apart // n_features)]),
        cols=torch.cat([pairs.cols, torch.from_numpy(apart % n_features)]),
        values=torch.cat([pairs.values, torch.zeros(len(apart))]),
    )


def selects_zeros(arguments, tau):
    return arguments.get("similarity", "abs") == "abs" and (tau is None or tau < 0)


def loss_and_gradient(loss, form, x, **arguments):
    """The gradient through the form to the dense x, which is 0 where x is."""
    x = x.detach().requires_grad_()
    value = loss(form(x), **arguments)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


class TestSelection:
    @forms
    @selections
    def test_arguments(self, form, arguments, k):
        x = activations(16, 43, seed=1)
        pairs = topk_pairs(form(x), **arguments)
        if selects_zeros(arguments, pairs.tau):
            pairs = with_zeros(pairs, x)
        assert_selection(pairs, x, **definition(arguments, k))

    @with_kernels
    @selections
    def test_ties_are_broken_by_row_and_col(self, arguments, k):
        x = dyadic(12, 43, seed=2)
        pairs = topk_pairs(SparseFeatures.from_dense(x), **arguments)
        expected = oracle.select(float64(x), **definition(arguments, k))
        meets = expected.values != 0
        assert pairs.rows.tolist() == expected.rows[meets].tolist()
        assert pairs.cols.tolist() == expected.cols[meets].tolist()
        assert pairs.values.tolist() == expected.values[meets].tolist()
        assert pairs.threshold.item() == pytest.approx(expected.threshold, abs=1e-6)

    @pytest.mark.quick
    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
    def test_dtypes(self, dtype, index_dtype):
        x = activations(24, 43, seed=3, dtype=dtype)
        features = SparseFeatures.from_dense(x)
        pairs = topk_pairs(features._replace(indices=features.indices.to(index_dtype)), k=100)
        assert_selection(pairs, x, k=100)

    @pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
    @pytest.mark.parametrize("arguments", [{}, {"tau": 0.3}, {"tau": "adaptive"}, {"similarity": "positive"}], ids=str)
    def test_edges(self, x, arguments):
        n_pairs = x.shape[1] * (x.shape[1] - 1) // 2
        for k in sorted({1, (n_pairs + 1) // 2, n_pairs}):
            pairs = topk_pairs(SparseFeatures.from_dense(x), k=k, **arguments)
            if selects_zeros(arguments, pairs.tau):
                pairs = with_zeros(pairs, x)
            assert_selection(pairs, x, **definition(arguments, k))

    def test_no_active_feature(self):
        for features in (
            SparseFeatures(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0), 5),
            SparseFeatures(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), 5),
        ):
            pairs = topk_pairs(features, k=4)
            assert pairs.rows.numel() == 0
            assert (pairs.threshold, pairs.n_features, pairs.k) == (0, 5, 4)
            assert topk_pairs(features, k=4, tau="adaptive").tau == 0
            values = features.values.requires_grad_()
            for loss in (topk_ortho_loss(features, k=4), max_cosine_loss(features), topk_ortho_loss(features, tau=0.1)):
                assert loss == 0
                (gradient,) = torch.autograd.grad(loss, values)
                assert not gradient.any()

    def test_products_that_cancel_are_zeros(self):
        x = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 1.0]])
        pairs = topk_pairs(SparseFeatures.from_dense(x), k=3)
        assert (pairs.rows.tolist(), pairs.cols.tolist()) == ([0, 1], [2, 2])

    def test_csr_with_int32_indices(self):
        x = activations(16, 43, seed=4)
        csr = x.to_sparse_csr()
        small = torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), x.shape)
        for actual, expected in zip(topk_pairs(small, k=50)[:4], topk_pairs(csr, k=50)[:4], strict=True):
            assert torch.equal(actual, expected)

    @given(data=st.data())
    def test_any_pattern(self, data):
        """Rows of 0, 1, 4 or 16 active features, some of them all equal: integers whose cosines tie in every way."""
        n = data.draw(st.integers(2, 30))
        row = st.lists(st.integers(0, n - 1), max_size=min(n, 6), unique=True)
        rows = data.draw(st.lists(row, min_size=1, max_size=8))
        if data.draw(st.booleans()):
            rows = rows[:1] * len(rows)
        x = torch.zeros(len(rows), n)
        for m, active in enumerate(rows):
            x[m, active] = torch.tensor(data.draw(st.sampled_from([1.0, 2.0, -1.0])))
        arguments = {
            "k": data.draw(st.integers(1, n * (n - 1) // 2)),
            "tau": data.draw(st.sampled_from([None, None, 0.0, 0.3, "adaptive"])),
            "n_std": data.draw(st.sampled_from([-5.0, 0.0, 1.0])),
            "similarity": data.draw(st.sampled_from(["abs", "positive"])),
        }
        form = data.draw(st.sampled_from(list(FORMS.values())))
        pairs = topk_pairs(form(x), **arguments)
        if selects_zeros(arguments, pairs.tau):
            pairs = with_zeros(pairs, x)
        assert_selection(pairs, x, **arguments)


class TestLoss:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @forms
    @selections
    def test_arguments(self, form, arguments, k, reduction):
        x = activations(40, 43, seed=7)
        if arguments.get("similarity") == "positive" or "tau" in arguments:
            x = x * (torch.rand(43, generator=seeded(1)) < 0.5).float().mul(2).sub(1)  # signed: some cosines below 0
        # pairs of cosine 0 tie with each other, and have no gradient
        selected = oracle.select(float64(x), **definition(arguments, k))
        meets = selected.values != 0
        rows, cols = selected.rows[meets], selected.cols[meets]
        value, gradient = loss_and_gradient(topk_ortho_loss, form, x, **arguments, reduction=reduction)
        n_selected = len(selected.rows)
        assert_within(
            actual=value,
            expected=oracle.loss_of(selected.values, reduction),
            bound=loss_bound(x, n_selected, reduction),
        )
        expected = oracle.loss_gradient(float64(x), rows, cols, "sum")
        scale = 1 / max(1, n_selected) if reduction == "mean" else 1
        assert_gradient(
            actual=gradient,
            expected=np.where(float64(x) != 0, expected * scale, 0),
            bound=gradient_bound(x, rows, cols, scale),
            dtype=x.dtype,
        )

    @with_kernels
    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    @pytest.mark.parametrize("arguments", [{"k": 60}, {"k": N_PAIRS}], ids=["some_pairs", "all_pairs"])
    def test_dtypes(self, arguments, dtype):
        x = activations(9, 43, seed=8, dtype=dtype)
        selected = separated_selection(x, arguments, arguments["k"]) if arguments["k"] < N_PAIRS else None
        selected = selected or oracle.select(float64(x), N_PAIRS)
        value, gradient = loss_and_gradient(topk_ortho_loss, SparseFeatures.from_dense, x, **arguments)
        assert value.dtype == accumulation_dtype(x)
        n_selected = len(selected.rows)
        assert_within(actual=value, expected=oracle.loss_of(selected.values, "mean"), bound=loss_bound(x, n_selected))
        expected = oracle.loss_gradient(float64(x), selected.rows, selected.cols, "mean")
        assert_gradient(
            actual=gradient,
            expected=np.where(float64(x) != 0, expected, 0),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / n_selected),
            dtype=dtype,
        )

    @pytest.mark.parametrize("priority", PRIORITIES.values(), ids=PRIORITIES)
    def test_priority(self, priority):
        self.check_priority(priority)

    def test_priority_reaches_the_pairs(self):
        x, priority = activations(16, 43, seed=11), PRIORITIES["ties_int"]

        def loss_of_pairs(x, **options):
            return topk_pairs(x, **options).values.square().mean()

        _, expected = loss_and_gradient(topk_ortho_loss, SparseFeatures.from_dense, x, k=90, priority=priority)
        _, actual = loss_and_gradient(loss_of_pairs, SparseFeatures.from_dense, x, k=90, priority=priority)
        torch.testing.assert_close(actual, expected)

    @with_kernels
    def test_priority_on_kernels(self):
        """They see no priority, only what it makes of the weights of the pairs."""
        self.check_priority(PRIORITIES["ties_int"])

    @staticmethod
    def check_priority(priority):
        x = activations(16, 43, seed=11)
        selected = separated_selection(x, {}, 90)
        value, gradient = loss_and_gradient(topk_ortho_loss, SparseFeatures.from_dense, x, k=90, priority=priority)
        assert_within(actual=value, expected=oracle.loss_of(selected.values, "mean"), bound=loss_bound(x, 90))
        expected = oracle.loss_gradient(float64(x), selected.rows, selected.cols, "mean", priority.numpy())
        assert_gradient(
            actual=gradient,
            expected=np.where(float64(x) != 0, expected, 0),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / 90),
            dtype=x.dtype,
        )

    def test_priority_where_every_pair_is_selected(self):
        """The closed form knows of no priority: it must not be taken."""
        x, priority = activations(3, 43, seed=12), torch.arange(43)
        _, gradient = loss_and_gradient(topk_ortho_loss, FORMS["csr"], x, k=N_PAIRS, priority=priority)
        rows, cols = oracle.all_pairs(43)
        expected = oracle.loss_gradient(float64(x), rows, cols, "mean", priority.numpy())
        assert_gradient(
            actual=gradient,
            expected=np.where(float64(x) != 0, expected, 0),
            bound=gradient_bound(x, rows, cols, 1 / N_PAIRS),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("name", ["tiny_column_1e-15_below_eps", "huge_beside_tiny", "duplicated_columns"])
    @pytest.mark.parametrize("k", [40, 666])
    def test_edges(self, name, k):
        x = EDGES[name]
        pairs = topk_pairs(x, k=k, backend="naive")
        value, gradient = loss_and_gradient(topk_ortho_loss, SparseFeatures.from_dense, x, k=k)
        rows, cols = pairs.rows.numpy(), pairs.cols.numpy()
        assert_within(actual=value, expected=oracle.loss_of(float64(pairs.values), "mean"), bound=loss_bound(x, k))
        expected = oracle.loss_gradient(float64(x), rows, cols, "mean")
        assert_gradient(
            actual=gradient,
            expected=np.where(float64(x) != 0, expected, 0),
            bound=gradient_bound(x, rows, cols, 1 / k),
            dtype=x.dtype,
        )

    def test_padding_has_no_gradient(self):
        features = shuffled(activations(16, 43, seed=13))
        values = features.values.requires_grad_()
        for k in (30, N_PAIRS):
            (gradient,) = torch.autograd.grad(topk_ortho_loss(features, k=k), values)
            assert (gradient[values == 0] == 0).all()
            assert gradient[values != 0].any()

    def test_gradient_of_a_sparse_leaf(self):
        """CSR and COO tensors get gradients of their own layout and pattern."""
        x = activations(16, 43, seed=14)
        _, expected = loss_and_gradient(topk_ortho_loss, SparseFeatures.from_dense, x, k=60)
        for leaf in (x.to_sparse_csr(), x.to_sparse().coalesce()):
            leaf.requires_grad_()
            topk_ortho_loss(leaf, k=60).backward()
            assert leaf.grad.layout == leaf.layout
            assert torch.equal(leaf.grad.to_dense(), expected)

    def test_values_of_pairs_are_differentiable(self):
        x = activations(16, 43, seed=15).requires_grad_()
        (actual,) = torch.autograd.grad(topk_pairs(FORMS["csr"](x), k=60).values.sum(), x)
        (dense,) = torch.autograd.grad(topk_pairs(x, k=60, backend="naive").values.sum(), x)
        torch.testing.assert_close(actual, torch.where(x != 0, dense, 0), rtol=1e-4, atol=1e-5)


class TestMaxCosine:
    @pytest.mark.quick
    @pytest.mark.parametrize("n_chunks", [1, 4, 21])
    @forms
    def test_value_and_gradient(self, form, n_chunks):
        x = activations(20, 43, seed=16)
        permutation = torch.randperm(43, generator=seeded(2))
        chunks = [chunk.tolist() for chunk in permutation.tensor_split(n_chunks)] if n_chunks > 1 else None
        values, partners = oracle.max_cosines(float64(x), chunks)
        value, gradient = loss_and_gradient(max_cosine_loss, form, x, n_chunks=n_chunks, generator=seeded(2))
        assert_within(actual=value, expected=(values**2).mean(), bound=3 * cosine_bound(x))
        expected = oracle.max_cosine_gradient(float64(x), partners)
        assert_gradient(
            actual=gradient,
            expected=np.where(float64(x) != 0, expected, 0),
            bound=gradient_bound(x, np.arange(43), partners, 1 / 43),
            dtype=x.dtype,
        )


class TestModules:
    def test_topk(self):
        x = activations(16, 43, seed=17)
        module = TopKOrthoLoss(k=60, similarity="positive", backend="sparse")
        priority = torch.arange(43)
        for form in FORMS.values():
            expected = topk_ortho_loss(form(x), k=60, similarity="positive", priority=priority)
            assert torch.equal(module(form(x), priority), expected)
        assert torch.equal(module.state, initial_state()), "one pass suffices always"

    def test_max_cosine(self):
        x = activations(16, 43, seed=18)
        assert torch.equal(MaxCosineLoss()(FORMS["csr"](x)), max_cosine_loss(FORMS["csr"](x)))


class TestStructuralZeros:
    """Of a dense x: no gradient where it is 0."""

    @pytest.mark.parametrize("priority", [None, torch.arange(43)], ids=["none", "ascending"])
    @pytest.mark.parametrize("name", ["naive", "tiled", "sparse", "auto"])
    def test_gradient(self, name, priority):
        x = activations(16, 43, seed=19)

        def loss(x, structural_zeros):
            return topk_ortho_loss(x, k=90, priority=priority, backend=name, structural_zeros=structural_zeros)

        value, full = loss_and_gradient(loss, lambda x: x, x, structural_zeros=False)
        masked_value, masked = loss_and_gradient(loss, lambda x: x, x, structural_zeros=True)
        assert torch.equal(value, masked_value)
        assert full[x == 0].any()
        assert not masked[x == 0].any()
        torch.testing.assert_close(masked, torch.where(x != 0, full, 0), rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("name", ["naive", "tiled", "sparse"])
    def test_a_gradient_that_overflows_where_x_is_0(self, name):
        x = torch.eye(4, dtype=torch.float16)
        x[0, 0], x[0, 1], x[1, 2], x[3, 3] = 6e-8, 1, 1, 0
        _, gradient = loss_and_gradient(topk_ortho_loss, lambda x: x, x, k=2, structural_zeros=True, backend=name)
        assert not gradient[x == 0].any()

    def test_module(self):
        x = activations(16, 43, seed=20)
        _, expected = loss_and_gradient(topk_ortho_loss, lambda x: x, x, k=90, structural_zeros=True)
        _, actual = loss_and_gradient(TopKOrthoLoss(k=90, structural_zeros=True), lambda x: x, x)
        assert torch.equal(actual, expected)
        assert "structural_zeros=True" in repr(TopKOrthoLoss(structural_zeros=True))


class TestErrors:
    OPS = pytest.mark.parametrize("op", [topk_pairs, topk_ortho_loss, max_cosine_loss])

    @OPS
    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([[0, 5], [1, 2]], r"x has 1 feature index out of \[0, 5\), where the value is not 0: 5$"),
            ([[0, -1], [7, 2]], r"x has 2 feature indices out of \[0, 5\), where the value is not 0: -1, 7$"),
            ([[0, 1], [3, 3]], r"x names 1 feature more than once in a row: row 1 feature 3$"),
            ([[4, 4], [3, 3]], r"x names 2 features more than once in a row: row 0 feature 4, row 1 feature 3$"),
        ],
    )
    def test_indices(self, op, indices, message):
        with pytest.raises(ValueError, match=message):
            op(SparseFeatures(torch.tensor(indices), torch.ones(2, 2), 5))

    def test_many_are_shortened(self):
        features = SparseFeatures(torch.full((12, 2), 9), torch.ones(12, 2), 5)
        with pytest.raises(ValueError, match=r"x has 24 feature indices out of \[0, 5\).*: (9, ){10}\.\.\.$"):
            topk_pairs(features)
        with pytest.raises(ValueError, match=r"x names 12 features more than once .* row 9 feature 4, \.\.\.$"):
            topk_pairs(features._replace(indices=torch.full((12, 2), 4)))

    @OPS
    def test_repeated_in_csr(self, op):
        x = torch.sparse_csr_tensor(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.ones(2), (1, 4))
        with pytest.raises(ValueError, match=r"x names 1 feature more than once in a row: row 0 feature 1"):
            op(x)

    @OPS
    @forms
    def test_not_finite(self, op, form):
        x = activations(6, 43, seed=21)
        x[2, [3, 17]], x[4, 3] = torch.tensor([torch.nan, torch.inf]), -torch.inf
        with pytest.raises(ValueError, match=r"x has 2 columns with NaN or Inf: 3, 17$"):
            op(form(x))

    @OPS
    def test_norm_too_large(self, op):
        x = activations(6, 43, seed=22)
        x[:, 5] = 2e38
        with pytest.raises(ValueError, match=r"x has 1 column whose norm is too large for torch\.float32: 5; scale x"):
            op(SparseFeatures.from_dense(x))

    @OPS
    @pytest.mark.parametrize("name", ["naive", "tiled", "triton"])
    def test_dense_backends(self, op, name):
        with pytest.raises(ValueError, match=rf'backend must be "auto" or "sparse" where x is sparse, got \'{name}\''):
            op(FORMS["csr"](activations(6, 43)), backend=name)

    INDICES, VALUES = torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3)

    @OPS
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (SparseFeatures(INDICES[0], VALUES[0], 9), ValueError, r"must have the same shape \[B, K\], got \[3\] and"),
            (SparseFeatures(INDICES, VALUES[:2], 9), ValueError, r"same shape \[B, K\], got \[4, 3\] and \[2, 3\]"),
            (SparseFeatures(INDICES.float(), VALUES, 9), TypeError, r"x\.indices must have dtype int32 or int64, got"),
            (SparseFeatures(INDICES, VALUES.long(), 9), TypeError, r"x must have dtype float16, .* got torch\.int64"),
            (SparseFeatures([[0]], VALUES, 9), TypeError, r"x\.indices must be a dense tensor, got list"),
            (SparseFeatures(INDICES, VALUES.to_sparse(), 9), TypeError, r"x\.values must be a dense tensor"),
            (SparseFeatures(INDICES, VALUES, 9.0), TypeError, r"x\.n_features must be an integer, got float"),
            (SparseFeatures(INDICES, VALUES, 1), ValueError, r"at least 1 row and 2 columns, got shape \[4, 1\]"),
            (SparseFeatures(INDICES[:0], VALUES[:0], 9), ValueError, r"at least 1 row and 2 columns, got shape \[0"),
            (SparseFeatures(INDICES, VALUES.to("meta"), 9), ValueError, r"must be on one device, got cpu and meta"),
            (torch.eye(4).to_sparse_csc(), TypeError, r"x must be dense, sparse_coo or sparse_csr, got layout .*csc"),
            (torch.ones(2, 3, 4).to_sparse(2), ValueError, r"x must be 2-D"),
            (torch.ones(3, 4).to_sparse(1), ValueError, r"x must hold one number an entry, got 1 dense dimension"),
            (torch.eye(4).long().to_sparse_csr(), TypeError, r"x must have dtype float16, .* got torch\.int64"),
            (torch.zeros(3, 1).to_sparse(), ValueError, r"at least 1 row and 2 columns, got shape \[3, 1\]"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_form(self, op, x, error, message):
        with pytest.raises(error, match=message):
            op(x)

    def test_priority(self):
        x = SparseFeatures.from_dense(activations(6, 43))
        with pytest.raises(ValueError, match=r"priority has 1 NaN"):
            topk_ortho_loss(x, priority=[torch.nan] + [0.0] * 42)
        with pytest.raises(ValueError, match=r"priority must have shape \[43\]"):
            topk_ortho_loss(x, priority=torch.ones(6))

    @pytest.mark.parametrize("bad", [1, None, "yes"])
    def test_structural_zeros(self, bad):
        with pytest.raises(TypeError, match=r"structural_zeros must be True or False, got"):
            topk_ortho_loss(activations(6, 43), structural_zeros=bad)


class TestConversions:
    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_there_and_back(self, dtype):
        x = activations(9, 31, seed=23, dtype=dtype)
        features = SparseFeatures.from_dense(x)
        assert torch.equal(features.to_dense(), x)
        assert features.shape == x.shape
        assert features.values.dtype == dtype
        assert features.indices.shape[1] == (x != 0).sum(dim=1).max()
        assert torch.equal(shuffled(x).to_dense(), x)

    def test_gradients_pass(self):
        x = activations(9, 31, seed=24, dtype=torch.float64).requires_grad_()
        weights = normal(9, 31, dtype=torch.float64)  # padding gets none of it
        (gradient,) = torch.autograd.grad((SparseFeatures.from_dense(x).to_dense() * weights).sum(), x)
        assert torch.equal(gradient, torch.where(x != 0, weights, 0))

    def test_nothing_active(self):
        features = SparseFeatures.from_dense(torch.zeros(3, 5))
        assert features.indices.shape == (3, 0)
        assert torch.equal(features.to_dense(), torch.zeros(3, 5))


def test_numpy_integers_are_integers():
    features = SparseFeatures.from_dense(activations(16, 43, seed=27))
    for n_features in (np.int32(2**20), np.int64(2**20)):
        assert topk_pairs(features._replace(n_features=n_features)).k == int(2**20 * (2**20 - 1) * 1e-3) // 2
    assert topk_pairs(features._replace(n_features=np.uint8(50)), 0.5).k == 50 * 49 // 4


class TestSize:
    """The cost follows the non-zeros, not N."""

    class Largest(TorchDispatchMode):
        """Elements of the largest tensor that any operation makes."""

        n_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.n_elements = max(self.n_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    @pytest.mark.parametrize("arguments", [{}, {"tau": "adaptive"}, {"similarity": "positive"}, {"k": 500}], ids=str)
    def test_a_million_features(self, arguments):
        """Keys pass 2**31; nothing has more elements than N or the products."""
        n_features, n_samples, n_active = 2**20, 40, 16
        generator = seeded(25)
        pool = torch.randperm(n_features, generator=generator)[:300]  # most features are never active
        indices = pool[torch.rand(n_samples, 300, generator=generator).topk(n_active).indices]
        values = torch.rand(n_samples, n_active, generator=generator).requires_grad_()
        features = SparseFeatures(indices, values, n_features)
        with self.Largest() as largest:
            loss = topk_ortho_loss(features, **arguments)
            loss.backward()
            pairs = topk_pairs(features, **arguments)
            max_cosine_loss(features).backward()
        assert largest.n_elements <= n_features + 1

        # the oracle, of the features that are active at all; the others have cosine 0
        active = indices.unique()
        x = SparseFeatures(torch.searchsorted(active, indices), values.detach(), active.numel()).to_dense()
        cosine = oracle.cosines(float64(x))
        n_pairs = n_features * (n_features - 1) // 2
        tau = None
        if arguments.get("tau") == "adaptive":
            mean = np.abs(cosine).sum() / n_pairs
            tau = mean + np.sqrt((cosine**2).sum() / n_pairs - mean**2)
            assert pairs.tau == pytest.approx(tau, rel=1e-5)
        n_meeting = int((cosine > (tau or 0)).sum())
        n_listed = min(n_meeting, pairs.k)
        assert pairs.rows.numel() == n_listed
        best = np.sort(cosine)[::-1][:n_listed]
        assert_within(actual=pairs.values, expected=best, bound=cosine_bound(x))
        position = torch.searchsorted(active, torch.stack([pairs.rows, pairs.cols]))
        x_hat = torch.nn.functional.normalize(x.double(), dim=0)
        assert_within(
            actual=pairs.values,
            expected=float64((x_hat[:, position[0]] * x_hat[:, position[1]]).sum(dim=0)),
            bound=cosine_bound(x),
        )
        n_selected = n_listed if tau is not None or "similarity" in arguments else pairs.k
        assert loss.item() == pytest.approx((best**2).sum() / n_selected, rel=1e-5)
        assert (values.grad != 0).any()

    def test_padding_costs_nothing(self):
        """One wide row must not make room for pairs in all others."""
        indices = torch.rand(64, 2**12, generator=seeded(28)).topk(100).indices
        values = torch.rand(64, 100, generator=seeded(29))
        values[1:, 2:] = 0
        features = SparseFeatures(indices, values.requires_grad_(), 2**12)
        n_products = 100 * 99 // 2 + 63
        k = 64 * n_products
        with self.Largest() as largest:
            topk_pairs(features, k=k)
            topk_ortho_loss(features, k=k, tau=0.0).backward()
        assert largest.n_elements <= max(n_products, 64 * 100) + 1

    def test_equal_calls_give_equal_bits(self):
        x = activations(60, 43, seed=26)
        for arguments in ({"k": 90}, {"k": N_PAIRS}, {"tau": "adaptive"}):
            first = loss_and_gradient(topk_ortho_loss, SparseFeatures.from_dense, x, **arguments)
            for form in FORMS.values():
                again = loss_and_gradient(topk_ortho_loss, form, x, **arguments)
                assert torch.equal(first[0], again[0])
                assert torch.equal(first[1], again[1])
