"""The public ops against the float64 oracle: selection, values, gradients, and what must not change them.

`backend` runs a test for every backend and every way to cut its work, `small_backend` once for each backend. Two
arguments are crossed only where the code treats them together. Elsewhere every value of each appears at least once, and
the comment beside the cases says which combinations are left out.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import oracle
from tests.conftest import crossed, not_interpreted, on, with_screen
from tests.inputs import EDGES, FLOATING, VIEWS, activations, dyadic, normal, seeded
from tests.tolerances import (
    PLAIN_FACTOR,
    PLAIN_FLOOR,
    accumulation_dtype,
    assert_gradient,
    assert_selection,
    assert_within,
    cosine_bound,
    float64,
    gradient_bound,
    loss_bound,
    unit_roundoff,
)
from topk_ortho import initial_state, max_cosine_loss, nearest_columns, topk_ortho_loss, topk_pairs

N_PAIRS = 43 * 42 // 2  # of N = 43: no multiple of 8, ragged for every tile of tests/conftest.py

# every argument that changes what is selected, in the ways that a backend can tell apart; and the k that it comes to
SELECTIONS = {
    "k_is_one": ({"k": 1}, 1),
    "k_is_odd": ({"k": 77}, 77),
    "k_one_short_of_all": ({"k": N_PAIRS - 1}, N_PAIRS - 1),
    "k_is_all": ({"k": N_PAIRS}, N_PAIRS),
    "tau_zero": ({"k": N_PAIRS, "tau": 0.0}, N_PAIRS),
    "tau_cuts": ({"k": 400, "tau": 0.3}, 400),
    "tau_below_threshold": ({"k": 20, "tau": 0.05}, 20),
    "tau_refuses_all": ({"k": 20, "tau": 0.9999}, 20),
    "adaptive": ({"k": 700, "tau": "adaptive"}, 700),
    "adaptive_low": ({"k": 30, "tau": "adaptive", "n_std": 0.5}, 30),
    "adaptive_refuses_all": ({"k": 700, "tau": "adaptive", "n_std": 50.0}, 700),
    "adaptive_negative": ({"k": N_PAIRS, "tau": "adaptive", "n_std": -10.0}, N_PAIRS),
    "positive": ({"k": 60, "similarity": "positive"}, 60),
    "positive_all": ({"k": N_PAIRS, "similarity": "positive"}, N_PAIRS),
    "positive_tau": ({"k": 400, "similarity": "positive", "tau": 0.2}, 400),
    "positive_adaptive": ({"k": 700, "similarity": "positive", "tau": "adaptive", "n_std": 0.7}, 700),
    "positive_adaptive_negative": (
        {"k": N_PAIRS, "similarity": "positive", "tau": "adaptive", "n_std": -10.0},
        N_PAIRS,
    ),
}
_PARAMETERS = [
    pytest.param(*case, id=name, marks=pytest.mark.quick if name in ("tau_cuts", "positive_adaptive") else ())
    for name, case in SELECTIONS.items()
]
# an adaptive tau is not screened
selections = crossed(
    "arguments, k", _PARAMETERS, triton=SELECTIONS, screened=[name for name in SELECTIONS if "adaptive" not in name]
)
# of what is selected the gradient sees only the pairs: all places taken, padding, or nothing but padding
selections_of_a_loss = crossed(
    "arguments, k",
    _PARAMETERS,
    triton=("k_is_one", "k_is_all", "tau_cuts", "adaptive_refuses_all", "positive_adaptive"),
)

PRECISIONS = [
    pytest.param(torch.float32, "highest", id="float32_highest"),
    pytest.param(torch.float32, "high", id="float32_high"),
    pytest.param(torch.float32, "medium", id="float32_medium"),
    pytest.param(torch.float64, "high", id="float64"),
    pytest.param(torch.bfloat16, "highest", id="bfloat16"),
    pytest.param(torch.float16, "medium", id="float16"),
]

# `fraction` and `k` become one number before a backend sees them
SIZES = {
    "fraction_default": ({}, 1),
    "fraction_tenth": ({"fraction": 0.1}, 90),
    "fraction_odd_entries": ({"fraction": 0.005}, 4),  # 9.03 ordered entries
    "fraction_one": ({"fraction": 1.0}, N_PAIRS),
    "k_replaces_fraction": ({"fraction": 0.9, "k": 30}, 30),
}

PRIORITIES = {
    "distinct_int": torch.randperm(43, generator=seeded(5)),
    "distinct_float": torch.rand(43, generator=seeded(5)),
    "ties_int": torch.randint(0, 3, (43,), generator=seeded(5)),
    "all_equal": torch.ones(43),
    "ascending_holds_cols": torch.arange(43),
    "descending_holds_rows": -torch.arange(43, dtype=torch.float64),
    "infinite": torch.tensor([torch.inf, -torch.inf, 0.0]).repeat(15)[:43],
}


def definition(arguments, k):
    """Arguments of `oracle.select` and `assert_selection`."""
    return {"k": k} | {name: arguments[name] for name in ("tau", "n_std", "similarity") if name in arguments}


def separated_selection(x, arguments, k):
    """The oracle's selection, after a check that rounding cannot change it."""
    selected = oracle.select(float64(x), **definition(arguments, k))
    similarities = oracle.cosines(float64(x))
    if arguments.get("similarity", "abs") == "abs":
        similarities = np.abs(similarities)
    limits = [np.sort(similarities)[::-1][k - 1 : k + 1].mean()] if len(selected.rows) == k < len(similarities) else []
    limits += [] if selected.tau is None else [selected.tau]
    limits += [0.0] if arguments.get("similarity") == "positive" else []
    for limit in limits:
        assert np.abs(similarities - limit).min() > 2 * cosine_bound(x), (
            "take another seed: rounding decides the selection"
        )
    return selected


# In float64 the square of a huge column does not overflow and that of a tiny one does not vanish. The other columns are
# the same to it as to float32.
edges = pytest.mark.parametrize(
    ("x", "dtype"),
    [pytest.param(x, torch.float32, id=name) for name, x in EDGES.items()]
    + [
        pytest.param(EDGES[name], torch.float64, id=f"{name}_in_float64")
        for name in ("one_dead_column", "huge_beside_tiny", "tiny_column_1e-15_below_eps")
    ],
)


def loss_and_gradient(loss, x, **arguments):
    x = x.detach().requires_grad_()
    value = loss(x, **arguments)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


class TestSelection:
    """`topk_pairs` is exact."""

    @selections
    def test_arguments(self, arguments, k, backend):
        """On non-negative columns, many of which never meet; TestLoss has the same for columns of any sign."""
        x = activations(16, 43, seed=1)
        assert_selection(topk_pairs(x, **arguments, backend=backend), x, **definition(arguments, k))

    @selections
    def test_ties_are_broken_by_row_and_col(self, arguments, k, backend):
        x = dyadic(8, 43, seed=2)
        pairs = topk_pairs(x, **arguments, backend=backend)
        expected = oracle.select(float64(x), **definition(arguments, k))
        assert pairs.rows.tolist() == expected.rows.tolist()
        assert pairs.cols.tolist() == expected.cols.tolist()
        assert pairs.values.tolist() == expected.values.tolist()

    @pytest.mark.parametrize(("arguments", "k"), SIZES.values(), ids=SIZES)
    def test_fraction_and_k(self, arguments, k):
        x = activations(16, 43, seed=1)
        assert_selection(topk_pairs(x, **arguments), x, k=k)

    # Only products of float32 have a choice of precision: the other dtypes see each word once between them. Those of
    # float32 at "highest" alone are screened.
    @crossed(
        "dtype, precision",
        PRECISIONS,
        triton=[case.id for case in PRECISIONS],
        screened=["float32_highest"],
    )
    def test_dtypes_and_precisions(self, dtype, precision, backend):
        x = normal(24, 43, seed=3, dtype=dtype)
        pairs = topk_pairs(x, k=100, backend=backend, precision=precision)
        assert_selection(pairs, x, k=100, precision=precision)
        x = dyadic(8, 43, seed=3, dtype=dtype)
        pairs = topk_pairs(x, k=100, tau=0.25, backend=backend, precision=precision)
        expected = oracle.select(float64(x), k=100, tau=0.25)
        assert (pairs.rows.tolist(), pairs.cols.tolist()) == (expected.rows.tolist(), expected.cols.tolist())

    @pytest.mark.parametrize("requires_grad", [False, True], ids=["leaf", "requires_grad"])
    def test_values_carry_the_gradient(self, requires_grad, small_backend):
        x = normal(16, 43, seed=4).requires_grad_(requires_grad)
        pairs = topk_pairs(x, k=50, backend=small_backend)
        assert pairs.values.requires_grad == requires_grad
        assert not pairs.threshold.requires_grad

    @pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
    @on("naive", "tiled_16x32", "tiled_11x15", "triton_screened", "sparse")  # "triton" selects in TestLoss.test_edges
    def test_edges(self, x, backend):
        n_pairs = x.shape[1] * (x.shape[1] - 1) // 2
        for arguments in (
            {"k": n_pairs, "tau": 0.3},
            {"k": n_pairs, "tau": "adaptive"},
            {"k": (n_pairs + 1) // 2, "similarity": "positive"},
        ):
            assert_selection(topk_pairs(x, **arguments, backend=backend), x, **arguments)

    @pytest.mark.parametrize("n", [2, 3, 9, 15, 16, 17, 32, 33, 64, 65])
    @with_screen
    def test_sizes_around_the_tiles(self, n, backend):
        x = dyadic(6, n, seed=n)
        k = max(1, n * (n - 1) // 6)
        pairs = topk_pairs(x, k=k, backend=backend)
        expected = oracle.select(float64(x), k=k)
        assert (pairs.rows.tolist(), pairs.cols.tolist()) == (expected.rows.tolist(), expected.cols.tolist())

    @with_screen
    def test_floor_at_the_only_cosine(self, backend):
        """Every cosine is 1/2 and so is an adaptive tau: no pair is above it."""
        x = torch.cat([torch.ones(2, 21), torch.eye(21).repeat(2, 1)])
        for tau in (0.5, "adaptive"):
            pairs = topk_pairs(x, k=10, tau=tau, backend=backend)
            assert pairs.rows.numel() == 0
            assert pairs.threshold == 0.5
        assert topk_pairs(x, k=10, tau=0.4999999, backend=backend).rows.numel() == 10

    # float64 differs in nothing but its bound
    @pytest.mark.parametrize(
        ("spread", "dtype"),
        [
            pytest.param(0.0, torch.float32, id="all_equal"),
            pytest.param(1e-6, torch.float32, id="spread_of_a_millionth"),
            pytest.param(1e-3, torch.float32, id="spread_of_a_thousandth"),
            pytest.param(1e-3, torch.float64, id="spread_of_a_thousandth_in_float64"),
            pytest.param(1.0, torch.float32, id="spread_of_one"),
        ],
    )
    def test_adaptive_tau(self, spread, dtype, backend):
        """mean + n_std * std, also where the std is tiny beside the mean and a difference of sums would cancel."""
        x = (torch.ones(16, 1) + spread * normal(16, 43, seed=29)).to(dtype)
        for n_std in (-1.0, 3.0):
            pairs = topk_pairs(x, k=10, tau="adaptive", n_std=n_std, backend=backend)
            expected = oracle.tau_of(oracle.cosines(float64(x)), "adaptive", n_std)
            assert_within(actual=pairs.tau, expected=expected, bound=(1 + abs(n_std)) * cosine_bound(x))

    @with_screen
    def test_positive_does_not_list_zeros(self, backend):
        x = torch.eye(19)
        x[:, 7], x[:, 11] = x[:, 3], -x[:, 5]
        pairs = topk_pairs(x, k=50, similarity="positive", backend=backend)
        assert (pairs.rows.tolist(), pairs.cols.tolist(), pairs.threshold.item()) == ([3], [7], 0.0)

    @settings(max_examples=10)  # tests/backends/ has more, where they take less time
    @given(data=st.data())
    @with_screen
    def test_any_small_integers(self, data, backend):
        """Columns of 1, 4 or 16 equal entries: exact cosines, so equal to the oracle whatever ties."""
        m = data.draw(st.sampled_from([16, 20]))
        n = data.draw(st.integers(2, 40))
        x = np.zeros((m, n))
        for j in range(n):
            support = data.draw(st.sampled_from([0, 1, 4, 4, 4, 16]))
            first = data.draw(st.integers(0, m - support))
            sign = data.draw(hnp.arrays(np.int8, support, elements=st.sampled_from([-1, 1])))
            x[first : first + support, j] = sign * 2.0 ** data.draw(st.integers(-2, 2))
        n_pairs = n * (n - 1) // 2
        arguments = {
            "tau": data.draw(st.sampled_from([None, None, 0.0, 0.125, 0.25, 0.5, 0.75])),
            "similarity": data.draw(st.sampled_from(["abs", "positive"])),
            "k": data.draw(st.integers(1, n_pairs)),
        }
        pairs = topk_pairs(torch.tensor(x, dtype=torch.float32), **arguments, backend=backend)
        expected = oracle.select(x, **arguments)
        assert pairs.rows.tolist() == expected.rows.tolist()
        assert pairs.cols.tolist() == expected.cols.tolist()
        assert pairs.values.tolist() == expected.values.tolist()
        assert pairs.threshold.item() == expected.threshold

    @settings(max_examples=10)  # tests/backends/ has more, where they take less time
    @given(data=st.data())
    @with_screen
    def test_any_floats(self, data, backend):
        dtype = data.draw(st.sampled_from([np.float32, np.float64]))
        shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=24))
        elements = st.floats(-1e6, 1e6, width=np.dtype(dtype).itemsize * 8) | st.sampled_from([0.0, 1e-9, 1e18])
        x = torch.from_numpy(data.draw(hnp.arrays(dtype, shape, elements=elements)))
        k = data.draw(st.integers(1, shape[1] * (shape[1] - 1) // 2))
        arguments = {
            "tau": data.draw(st.sampled_from([None, 0.0, 0.4, "adaptive"])),
            "n_std": data.draw(st.sampled_from([-1.0, 0.0, 1.0, 2.0])),
            "similarity": data.draw(st.sampled_from(["abs", "positive"])),
        }
        assert_selection(topk_pairs(x, k=k, **arguments, backend=backend), x, k=k, **arguments)


class TestLoss:
    """`topk_ortho_loss`: its value and its gradient."""

    @selections_of_a_loss
    def test_arguments(self, arguments, k, backend):
        self.check(normal(16, 43, seed=6), arguments, k, "mean", backend)

    def test_sum(self, small_backend):
        self.check(normal(16, 43, seed=6), *SELECTIONS["tau_cuts"], "sum", small_backend)

    @staticmethod
    def check(x, arguments, k, reduction, backend):
        selected = separated_selection(x, arguments, k)
        value, gradient = loss_and_gradient(topk_ortho_loss, x, **arguments, reduction=reduction, backend=backend)
        n_selected = len(selected.rows)
        expected = oracle.loss_of(selected.values, reduction)
        assert_within(actual=value, expected=expected, bound=loss_bound(x, n_selected, reduction))
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), selected.rows, selected.cols, reduction),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / max(1, n_selected) if reduction == "mean" else 1),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_dtypes(self, dtype, backend):
        x = normal(24, 43, seed=8, dtype=dtype)
        selected = separated_selection(x, {}, 60)
        value, gradient = loss_and_gradient(topk_ortho_loss, x, k=60, backend=backend)
        assert value.dtype == accumulation_dtype(x)
        assert_within(actual=value, expected=oracle.loss_of(selected.values, "mean"), bound=loss_bound(x, 60))
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), selected.rows, selected.cols, "mean"),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / 60),
            dtype=dtype,
        )

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_precision_words_bound_the_value(self, precision, backend):
        x = normal(24, 43, seed=9)
        expected = oracle.loss_of(oracle.select(float64(x), k=60).values, "mean")
        value = topk_ortho_loss(x, k=60, precision=precision, backend=backend)
        assert_within(actual=value, expected=expected, bound=loss_bound(x, 60, precision=precision))

    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    def test_layouts(self, view, backend):
        x = view(normal(16, 43, seed=10))
        pairs = topk_pairs(x, k=50, backend=backend)  # expanded views tie everywhere
        assert_selection(pairs, x, k=50)
        value, gradient = loss_and_gradient(topk_ortho_loss, x, k=50, backend=backend)
        assert_within(actual=value, expected=oracle.loss_of(float64(pairs.values), "mean"), bound=loss_bound(x, 50))
        rows, cols = pairs.rows.numpy(), pairs.cols.numpy()
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), rows, cols, "mean"),
            bound=gradient_bound(x, rows, cols, 1 / 50),
            dtype=x.dtype,
        )

    # backends see no priority, only what it makes of the weights of the pairs
    @pytest.mark.parametrize(
        ("priority", "reduction"),
        [(priority, "sum" if name == "ties_int" else "mean") for name, priority in PRIORITIES.items()],
        ids=PRIORITIES,
    )
    def test_priority(self, priority, reduction):
        self.check_priority(priority, reduction, "auto")

    def test_priority_on_every_backend(self, small_backend):
        self.check_priority(PRIORITIES["ties_int"], "mean", small_backend)

    @staticmethod
    def check_priority(priority, reduction, backend):
        x = normal(16, 43, seed=11)
        selected = separated_selection(x, {}, 90)
        value, gradient = loss_and_gradient(
            topk_ortho_loss, x, k=90, reduction=reduction, priority=priority, backend=backend
        )
        assert torch.equal(value, topk_ortho_loss(x, k=90, reduction=reduction, backend=backend))
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), selected.rows, selected.cols, reduction, priority.numpy()),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / 90 if reduction == "mean" else 1),
            dtype=x.dtype,
        )

    def test_priority_reaches_the_pairs(self, small_backend):
        """The gradient of the values goes where that of the loss does; the pairs are the same."""
        x, priority = normal(16, 43, seed=11), PRIORITIES["ties_int"]
        pairs = []

        def loss_of_pairs(x, **options):
            pairs.append(topk_pairs(x, k=90, backend=small_backend, **options))
            return pairs[-1].values.square().mean()

        _, expected = loss_and_gradient(topk_ortho_loss, x, k=90, priority=priority, backend=small_backend)
        _, actual = loss_and_gradient(loss_of_pairs, x, priority=priority)
        _, without = loss_and_gradient(loss_of_pairs, x)
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(actual, without)
        assert torch.equal(pairs[0].rows, pairs[1].rows)
        assert torch.equal(pairs[0].values, pairs[1].values)

    def test_priority_with_tau(self, small_backend):
        """Padding names pair (0, 0), whose priorities are equal: it must not carry gradient."""
        x, priority = normal(16, 43, seed=12), torch.arange(43)
        selected = separated_selection(x, {"tau": 0.4}, 300)
        assert 0 < len(selected.rows) < 300
        _, gradient = loss_and_gradient(topk_ortho_loss, x, k=300, tau=0.4, priority=priority, backend=small_backend)
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), selected.rows, selected.cols, "mean", priority.numpy()),
            bound=gradient_bound(x, selected.rows, selected.cols, 1 / len(selected.rows)),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize(
        "priority", [[3, 1, 2], (3.0, 1.0, 2.0), np.array([3, 1, 2])], ids=["list", "tuple", "numpy"]
    )
    def test_priority_of_other_types(self, priority):
        x = normal(5, 3)
        _, expected = loss_and_gradient(topk_ortho_loss, x, k=3, priority=torch.tensor([3, 1, 2]))
        _, actual = loss_and_gradient(topk_ortho_loss, x, k=3, priority=priority)
        assert torch.equal(actual, expected)

    @edges
    @not_interpreted
    def test_edges(self, x, dtype, backend):
        """TestSelection and tests/backends/ have the same edges for the kernels, each by itself."""
        x = x.to(dtype)
        k = (x.shape[1] * (x.shape[1] - 1) // 2 + 1) // 2
        pairs = topk_pairs(x, k=k, backend=backend)
        assert_selection(pairs, x, k=k)
        value, gradient = loss_and_gradient(topk_ortho_loss, x, k=k, backend=backend)
        expected = oracle.loss_of(oracle.select(float64(x), k=k).values, "mean")
        assert_within(actual=value, expected=expected, bound=loss_bound(x, k))
        rows, cols = pairs.rows.numpy(), pairs.cols.numpy()
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), rows, cols, "mean"),
            bound=gradient_bound(x, rows, cols, 1 / k),
            dtype=dtype,
        )
        assert not gradient[:, ~x.any(dim=0)].any(), "a dead column has a gradient"

    def test_no_pair_passes(self, small_backend):
        for reduction in ("mean", "sum"):
            value, gradient = loss_and_gradient(
                topk_ortho_loss, normal(16, 43), k=9, tau=0.99999, reduction=reduction, backend=small_backend
            )
            assert value == 0
            assert not gradient.any()

    def test_gradient_scales_with_what_comes_in(self, small_backend):
        x = normal(16, 43, seed=13).requires_grad_()
        (once,) = torch.autograd.grad(topk_ortho_loss(x, k=40, backend=small_backend), x)
        (scaled,) = torch.autograd.grad(-4 * topk_ortho_loss(x, k=40, backend=small_backend), x)
        assert torch.equal(scaled, -4 * once)

    def test_a_small_step_against_the_gradient_lowers_the_loss(self, small_backend):
        x = normal(16, 43, seed=14)
        value, gradient = loss_and_gradient(topk_ortho_loss, x, k=40, backend=small_backend)
        step = 1e-2 * value / gradient.square().sum()
        assert topk_ortho_loss(x - step * gradient, k=40, backend=small_backend) < value


class TestPairsGradient:
    """`topk_pairs(...).values` is differentiable."""

    @pytest.mark.parametrize(
        ("arguments", "dtype"),
        [
            pytest.param({}, torch.float32, id="plain"),
            pytest.param({}, torch.float64, id="float64"),
            pytest.param({"tau": 0.3}, torch.float32, id="tau"),
            pytest.param({"similarity": "positive", "tau": "adaptive"}, torch.float32, id="positive_adaptive"),
        ],
    )
    def test_weighted_values(self, arguments, dtype, backend):
        x = normal(16, 43, seed=15, dtype=dtype).requires_grad_()
        selected = separated_selection(x, arguments, 200)
        pairs = topk_pairs(x, k=200, **arguments, backend=backend)
        weights = torch.linspace(-1, 2, len(selected.rows))
        (gradient,) = torch.autograd.grad(pairs.values @ weights, x)
        x64 = x.detach().double().requires_grad_()
        (oracle.pair_values(x64, selected.rows, selected.cols) @ weights.double()).backward()
        assert_gradient(
            actual=gradient,
            expected=x64.grad.numpy(),
            bound=2 * gradient_bound(x, selected.rows, selected.cols, 1.0),
            dtype=dtype,
        )

    def test_dead_column_gets_none(self, small_backend):
        x = EDGES["one_dead_column"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(topk_pairs(x, fraction=1.0, backend=small_backend).values.sum(), x)
        assert not gradient[:, 5].any()
        assert gradient[:, 4].any()


class TestMaxCosine:
    """`max_cosine_loss`: its value, its gradient and its chunks."""

    # zeros in x and its dtype have nothing to do with each other
    @pytest.mark.parametrize(
        ("make", "dtype"),
        [
            pytest.param(normal, torch.float32, id="float32", marks=pytest.mark.quick),
            pytest.param(activations, torch.float32, id="activations"),
            pytest.param(normal, torch.float64, id="float64"),
            pytest.param(normal, torch.bfloat16, id="bfloat16"),
            pytest.param(activations, torch.float16, id="float16_activations"),
        ],
    )
    def test_all_in_one_chunk(self, make, dtype, backend):
        x = make(24, 43, seed=16, dtype=dtype)
        values, partners = oracle.max_cosines(float64(x))
        value, gradient = loss_and_gradient(max_cosine_loss, x, backend=backend)
        assert value.dtype == accumulation_dtype(x)
        assert_within(actual=value, expected=oracle.loss_of(values, "mean"), bound=loss_bound(x, 43))
        assert_gradient(
            actual=gradient,
            expected=oracle.max_cosine_gradient(float64(x), partners),
            bound=gradient_bound(x, np.arange(43), partners, 1 / 43),
            dtype=dtype,
        )

    @pytest.mark.parametrize("n_chunks", [1, 4])
    def test_nearest_columns(self, n_chunks, backend):
        x = normal(24, 43, seed=16)
        chunks = torch.randperm(43, generator=seeded(7)).tensor_split(n_chunks)
        values, partners = oracle.max_cosines(float64(x), None if n_chunks == 1 else [c.tolist() for c in chunks])
        x.requires_grad_()
        nearest = nearest_columns(x, n_chunks, generator=seeded(7), backend=backend)
        assert nearest.partners.tolist() == partners.tolist()
        np.testing.assert_allclose(nearest.cosines.detach().numpy(), values, atol=1e-6)
        (gradient,) = torch.autograd.grad(nearest.cosines.square().mean(), x)
        assert_gradient(
            actual=gradient,
            expected=oracle.max_cosine_gradient(float64(x.detach()), partners),
            bound=gradient_bound(x.detach(), np.arange(43), partners, 1 / 43),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_precision_words_bound_the_value(self, precision, backend):
        x = normal(24, 43, seed=17)
        expected = oracle.loss_of(oracle.max_cosines(float64(x))[0], "mean")
        value = max_cosine_loss(x, precision=precision, backend=backend)
        assert_within(actual=value, expected=expected, bound=loss_bound(x, 43, precision=precision))

    @pytest.mark.parametrize("n_chunks", [2, 4, 21], ids=["halves", "ragged_quarters", "pairs_and_a_triple"])
    def test_chunks(self, n_chunks, backend):
        x = normal(24, 43, seed=18)
        chunks = torch.randperm(43, generator=seeded(7)).tensor_split(n_chunks)
        values, partners = oracle.max_cosines(float64(x), [chunk.tolist() for chunk in chunks])
        value, gradient = loss_and_gradient(max_cosine_loss, x, n_chunks=n_chunks, generator=seeded(7), backend=backend)
        assert_within(actual=value, expected=oracle.loss_of(values, "mean"), bound=loss_bound(x, 43))
        assert_gradient(
            actual=gradient,
            expected=oracle.max_cosine_gradient(float64(x), partners),
            bound=gradient_bound(x, np.arange(43), partners, 1 / 43),
            dtype=x.dtype,
        )

    def test_chunks_are_drawn_anew(self):
        x, generator = normal(24, 43, seed=18), seeded(7)
        first, second = (max_cosine_loss(x, 4, generator=generator) for _ in range(2))
        assert first != second
        assert torch.equal(first, max_cosine_loss(x, 4, generator=seeded(7)))

    def test_without_a_generator_the_default_one_draws(self):
        x = normal(24, 43, seed=18)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            value = max_cosine_loss(x, 4)
        assert torch.equal(value, max_cosine_loss(x, 4, generator=seeded(7)))

    def test_one_chunk_draws_nothing(self):
        generator = seeded(7)
        max_cosine_loss(normal(8, 9), generator=generator)
        assert torch.equal(generator.get_state(), seeded(7).get_state())

    # chunks copy their columns, whatever the layout was: two layouts show it
    @pytest.mark.parametrize(
        ("view", "n_chunks"),
        [pytest.param(view, 1, id=name) for name, view in VIEWS.items()]
        + [pytest.param(VIEWS[name], 5, id=f"{name}_chunks") for name in ("transposed", "strided_both_dims")],
    )
    def test_layouts(self, view, n_chunks, small_backend):
        x = view(normal(24, 43, seed=19))
        arguments = {"n_chunks": n_chunks, "backend": small_backend}
        value, gradient = loss_and_gradient(max_cosine_loss, x, **arguments, generator=seeded(1))
        same_value, same_gradient = loss_and_gradient(
            max_cosine_loss, x.clone(memory_format=torch.contiguous_format), **arguments, generator=seeded(1)
        )
        assert_within(actual=value, expected=float64(same_value), bound=loss_bound(x, 43))
        columns = np.arange(43)
        assert_gradient(
            actual=gradient,
            expected=float64(same_gradient),
            bound=2 * gradient_bound(x, columns, columns, 1 / 43),
            dtype=x.dtype,
        )

    @edges
    def test_edges(self, x, dtype, small_backend):
        x = x.to(dtype)
        value, gradient = loss_and_gradient(max_cosine_loss, x, backend=small_backend)
        expected = oracle.loss_of(oracle.max_cosines(float64(x))[0], "mean")
        assert_within(actual=value, expected=expected, bound=loss_bound(x, x.shape[1]))
        assert gradient.isfinite().all()
        assert not gradient[:, ~x.any(dim=0)].any(), "a dead column has a gradient"

    def test_a_column_may_face_only_negative_cosines(self, backend):
        x = torch.tensor([[1.0, -1.0, -1.0], [0.0, 1.0, -1.0]])  # cosines: -s, -s, 0 with s = 1/sqrt(2)
        assert_within(actual=max_cosine_loss(x, backend=backend), expected=0.5 / 3, bound=loss_bound(x, 3))


def naive_loss(x, k):
    """The expression that the docstring of topk_ortho_loss says it replaces."""
    x_hat = torch.nn.functional.normalize(x, dim=0)
    n_features = x.shape[1]
    cosine = (x_hat.T @ x_hat)[tuple(torch.triu_indices(n_features, n_features, 1))]
    return cosine.square().topk(k).values.mean()


# values come in float32, so that float64 shows at one size what it shows at all
@pytest.mark.parametrize(
    ("make", "m", "dtype"),
    [
        pytest.param(normal, 1, torch.float32, id="one_row"),
        pytest.param(normal, 2, torch.float32, id="two_rows"),
        pytest.param(activations, 64, torch.float32, id="activations"),
        pytest.param(normal, 512, torch.float32, id="many_rows"),
        pytest.param(normal, 64, torch.float64, id="float64"),
    ],
)
def test_as_accurate_as_plain_torch(make, m, dtype, backend):
    x = make(m, 43, seed=20, dtype=dtype)
    rows, cols = oracle.all_pairs(43)
    pairs = topk_pairs(x.double() if dtype == torch.float64 else x, fraction=1.0, backend=backend)
    expected = oracle.cosines(float64(x))
    ours = np.empty_like(expected)
    ours[np.searchsorted(rows * 43 + cols, (pairs.rows * 43 + pairs.cols).numpy())] = float64(pairs.values)
    x_hat = torch.nn.functional.normalize(x, dim=0)
    plain = float64(x_hat.T @ x_hat)[rows, cols]
    roundoff = unit_roundoff(torch.float32)  # values come in float32
    bound = PLAIN_FACTOR * np.abs(plain - expected).max() + PLAIN_FLOOR * roundoff
    assert_within(actual=ours, expected=expected, bound=bound)


def test_equals_the_expression_it_replaces(backend):
    x = normal(32, 43, seed=21, dtype=torch.float64)
    actual = loss_and_gradient(topk_ortho_loss, x, k=45, backend=backend)
    expected = loss_and_gradient(naive_loss, x, k=45)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


class TestDeterminism:
    """Nothing but x and the arguments decides a bit of the result."""

    @pytest.fixture(autouse=True)
    def _as_users_run_it(self):
        torch.use_deterministic_algorithms(False)

    @pytest.fixture
    def _threads(self):
        """Sums that threads share may come in any order."""
        n_threads = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(n_threads)

    @pytest.mark.parametrize(
        ("make", "arguments"),
        [
            pytest.param(normal, {}, id="plain"),
            pytest.param(dyadic, {"tau": 0.3}, id="ties_tau"),
            pytest.param(activations, {"tau": "adaptive"}, id="activations_adaptive"),
            pytest.param(activations, {"similarity": "positive"}, id="activations_positive"),
        ],
    )
    @pytest.mark.usefixtures("_threads")
    @not_interpreted
    def test_two_runs(self, make, arguments, backend):
        x = make(16, 43, seed=22)
        for first, second in zip(
            *(topk_pairs(x, k=300, **arguments, backend=backend)[:4] for _ in range(2)), strict=True
        ):
            assert torch.equal(first, second)
        for loss, its_arguments in ((topk_ortho_loss, {"k": 300, **arguments}), (max_cosine_loss, {})):
            (value, gradient), (value_again, gradient_again) = (
                loss_and_gradient(loss, x, **its_arguments, backend=backend) for _ in range(2)
            )
            assert torch.equal(value, value_again)
            assert torch.equal(gradient, gradient_again)

    # Cosines of `dyadic` are multiples of 1/4: a guess may hit ties, in the middle or at either end. Of the kernels
    # tests/kernels/test_repair.py has every kind of guess.
    @crossed(
        "make, arguments, first_guess",
        [
            pytest.param(dyadic, {}, -1.0, id="no_guess"),
            pytest.param(normal, {}, 0.05, id="far_too_low"),
            pytest.param(dyadic, {}, 0.0, id="at_the_least_similarity"),
            pytest.param(dyadic, {}, 0.5, id="at_a_tie"),
            pytest.param(dyadic, {}, 1.0, id="at_the_largest_similarity"),
            pytest.param(normal, {}, 0.3, id="near"),
            pytest.param(normal, {}, 0.999, id="far_too_high"),
            pytest.param(activations, {}, 7.0, id="impossible"),
            pytest.param(normal, {"tau": 0.3}, 0.05, id="below_tau"),
            pytest.param(normal, {"tau": 0.3}, 0.3, id="at_tau"),
            pytest.param(normal, {"tau": 0.3}, 0.5, id="above_tau"),
            pytest.param(normal, {"tau": 0.999}, 0.5, id="below_a_tau_that_refuses_all"),
            pytest.param(activations, {"tau": "adaptive"}, 0.05, id="below_an_adaptive_tau"),
            pytest.param(activations, {"tau": "adaptive"}, 0.999, id="above_an_adaptive_tau"),
            pytest.param(activations, {"similarity": "positive"}, 0.0, id="positive_at_its_floor"),
            pytest.param(normal, {"similarity": "positive"}, 0.999, id="positive_far_too_high"),
            pytest.param(dyadic, {"similarity": "positive", "tau": 0.3}, 0.5, id="positive_tau_at_a_tie"),
        ],
        triton=("far_too_low", "at_a_tie", "far_too_high", "at_tau", "above_an_adaptive_tau", "positive_tau_at_a_tie"),
    )
    def test_warm_start_changes_no_bit(self, make, arguments, first_guess, backend):
        x = make(16, 43, seed=23)
        cold = topk_pairs(x, k=300, **arguments, backend=backend)
        state = torch.tensor([first_guess, 0.15, 1.0])
        warm = topk_pairs(x, k=300, **arguments, backend=backend, state=state)
        for field in ("rows", "cols", "values", "threshold"):
            assert torch.equal(getattr(cold, field), getattr(warm, field)), field

    @with_screen
    def test_a_guess_that_leaves_one_pair_too_few_is_repaired(self, backend):
        x = normal(16, 67, seed=23)
        cold = topk_pairs(x, k=300, backend=backend)
        state = torch.stack([cold.threshold.nextafter(torch.tensor(1.0)), torch.tensor(0.15), torch.tensor(1.0)])
        warm = topk_pairs(x, k=300, backend=backend, state=state)
        assert_selection(warm, x, k=300)
        assert (warm.rows.tolist(), warm.cols.tolist()) == (cold.rows.tolist(), cold.cols.tolist())

    @with_screen
    def test_state_follows_a_moving_matrix(self, backend):
        generator, state = seeded(0), initial_state()
        x = normal(16, 67, seed=24)
        for _ in range(7):
            x = x + 0.05 * torch.randn(x.shape, generator=generator)
            pairs = topk_pairs(x, k=150, backend=backend, state=state)
            assert_selection(pairs, x, k=150)
            assert -1 < state[0] < pairs.threshold
            assert 0.05 <= state[1] <= 1.0
            assert 1 <= state[2] <= 7

    def test_state_stays_without_gradient(self, small_backend):
        x, state = normal(16, 43).requires_grad_(), initial_state()
        topk_ortho_loss(x, k=40, backend=small_backend, state=state).backward()
        assert not state.requires_grad
        assert state[0] > -1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_state_of_other_dtypes(self, dtype, small_backend):
        """A module may be cast as a whole; the rounded guess is still only a guess."""
        x, state = normal(16, 43, seed=25), initial_state().to(dtype)
        cold = topk_pairs(x, k=40, backend=small_backend)
        for _ in range(3):
            warm = topk_pairs(x, k=40, backend=small_backend, state=state)
            assert torch.equal(cold.values, warm.values)
        assert state.dtype == dtype


class TestSurroundings:
    """Process-wide settings change nothing, and are left as they were."""

    @pytest.fixture(autouse=True)
    def _restore_matmul_precision(self):
        before = torch.backends.mkldnn.matmul.fp32_precision
        yield
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before

    # autocast would change products of float32 and float64
    @pytest.mark.parametrize(
        ("dtype", "backward_inside"),
        [
            pytest.param(torch.float32, False, id="float32"),
            pytest.param(torch.float32, True, id="float32_backward_inside"),
            pytest.param(torch.float64, True, id="float64_backward_inside"),
            pytest.param(torch.bfloat16, False, id="bfloat16"),
        ],
    )
    @not_interpreted
    def test_autocast(self, dtype, backward_inside, backend):
        self.check_autocast(normal(64, 43, seed=26, dtype=dtype), backward_inside, backend)

    @on("triton")
    def test_autocast_around_kernels(self, backend):
        self.check_autocast(normal(16, 43, seed=26), True, backend)

    @staticmethod
    def check_autocast(x, backward_inside, backend):
        for loss in (
            lambda x: topk_ortho_loss(x, k=60, tau="adaptive", backend=backend),
            lambda x: max_cosine_loss(x, 3, generator=seeded(0), backend=backend),
        ):
            expected = loss_and_gradient(loss, x)
            x.requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(x)
                if backward_inside:
                    (gradient,) = torch.autograd.grad(value, x)
            if not backward_inside:
                (gradient,) = torch.autograd.grad(value, x)
            assert torch.equal(value.detach(), expected[0])
            assert torch.equal(gradient, expected[1])

    @pytest.mark.parametrize(
        ("word", "precision"),
        [("highest", "medium"), ("high", "highest"), ("medium", "high"), ("medium", "medium")],
        ids=["raised_from_medium", "lowered_to_high", "lowered_to_medium", "equal"],
    )
    @not_interpreted
    def test_matmul_precision_is_left_alone(self, word, precision, backend):
        x = normal(64, 43, seed=27)
        expected = topk_pairs(x, k=50, precision=precision, backend=backend).values
        torch.set_float32_matmul_precision(word)
        before = torch.backends.mkldnn.matmul.fp32_precision
        actual = topk_pairs(x, k=50, precision=precision, backend=backend).values
        max_cosine_loss(x, precision=precision, backend=backend)
        assert torch.get_float32_matmul_precision() == word
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert torch.equal(actual, expected)

    def test_matmul_precision_is_restored_after_an_error(self, small_backend):
        torch.set_float32_matmul_precision("high")
        before = torch.backends.mkldnn.matmul.fp32_precision
        for op in (topk_pairs, max_cosine_loss):
            with pytest.raises(ValueError, match="NaN or Inf"):
                op(torch.full((3, 4), torch.nan), backend=small_backend)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_x_is_not_written(self, small_backend):
        for dtype in FLOATING:
            x = normal(16, 43, dtype=dtype)
            before = x.clone()
            loss_and_gradient(topk_ortho_loss, x, k=40, backend=small_backend)
            loss_and_gradient(max_cosine_loss, x, n_chunks=3, backend=small_backend)
            assert torch.equal(x, before)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_without_autograd(self, mode, small_backend):
        x = normal(16, 43, seed=28).requires_grad_()
        expected = topk_ortho_loss(x, k=40, backend=small_backend)
        with mode():
            value = topk_ortho_loss(x, k=40, backend=small_backend, state=initial_state())
        assert not value.requires_grad
        assert torch.equal(value, expected)
