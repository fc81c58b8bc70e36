"""The interface of `topk_ortho.backends.base`, for every backend, and the list of them."""

import inspect

import numpy as np
import pytest
import torch

from tests import oracle
from tests.conftest import with_screen
from tests.inputs import EDGES, FLOATING, VIEWS, activations, dyadic, normal, seeded
from tests.tolerances import (
    accumulation_dtype,
    assert_gradient,
    assert_within,
    cosine_bound,
    float64,
    gradient_bound,
    unit_roundoff,
)
from topk_ortho import available_backends, initial_state
from topk_ortho.backends import registry
from topk_ortho.backends.base import Backend, WeightedPairs
from topk_ortho.backends.registry import BACKENDS, resolve_backend
from topk_ortho.definitions import Query

INTERFACE = ["unavailable_reason", "topk_pairs", "max_cosine", "pair_gradient"]


@pytest.mark.parametrize("function", INTERFACE)
@pytest.mark.parametrize("name", BACKENDS)
def test_signatures_are_those_of_the_protocol(name, function):
    wanted = list(inspect.signature(getattr(Backend, function)).parameters.values())[1:]
    assert list(inspect.signature(getattr(BACKENDS[name], function)).parameters.values()) == wanted


@with_screen
class TestTopKPairs:
    """The padded form of a selection."""

    @pytest.mark.parametrize(
        ("tau", "dtype"),
        [(0.25, dtype) for dtype in FLOATING] + [(None, torch.float32), (0.999, torch.float32)],
        ids=[*map(str, FLOATING), "full", "nothing_but_padding"],
    )
    def test_padding_and_dtypes(self, tau, dtype, backend):
        x = dyadic(8, 43, dtype=dtype)
        x[:, 2] = 3 * x[:, 2]  # not dyadic: the pairs of column 2 are not exactly at 1
        k = 300
        expected = oracle.select(float64(x[:, [j for j in range(43) if j != 2]]), k, tau)
        keep = torch.tensor([j for j in range(43) if j != 2])
        selection = BACKENDS[backend].topk_pairs(x[:, keep].contiguous(), Query(k=k, tau=tau), None)
        p = len(expected.rows)
        assert selection.n_selected.dtype == torch.int64
        assert selection.n_selected.shape == ()
        assert selection.n_selected == selection.n_listed == p
        for name, wanted in (("cosines", expected.values), ("rows", expected.rows), ("cols", expected.cols)):
            column = getattr(selection, name)
            assert column.shape == (k,)
            assert column[:p].tolist() == wanted.tolist()
            assert not column[p:].any(), f"padding of {name}"
        assert selection.rows.dtype == selection.cols.dtype == torch.int64
        dtypes = {t.dtype for t in (selection.cosines, selection.threshold, selection.tau, selection.norms)}
        assert dtypes == {accumulation_dtype(x)}
        assert selection.threshold == expected.threshold
        assert selection.tau == (-1 if tau is None else torch.tensor(tau, dtype=selection.tau.dtype))
        assert selection.state.shape == (0,)

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    def test_norms(self, dtype, backend):
        x = normal(12, 43, dtype=dtype)
        expected = np.sqrt((float64(x) ** 2).sum(axis=0))
        bound = 12 * unit_roundoff(accumulation_dtype(x)) * expected
        for norms in (
            BACKENDS[backend].topk_pairs(x, Query(k=3), None).norms,
            BACKENDS[backend].max_cosine(x, None, "highest").norms,
        ):
            assert_within(actual=norms, expected=expected, bound=bound)

    def test_state_is_read_never_written(self, backend):
        state = initial_state()
        selection = BACKENDS[backend].topk_pairs(normal(12, 43), Query(k=30), state)
        assert torch.equal(state, initial_state())
        assert selection.state.shape == (3,)
        assert -1 < selection.state[0] <= selection.threshold


class TestMaxCosine:
    """Maxima, partners and chunks."""

    @pytest.mark.parametrize(
        ("n_chunks", "dtype"),
        [(5, dtype) for dtype in FLOATING] + [(n_chunks, torch.float32) for n_chunks in (None, 2, 21)],
        ids=str,
    )
    def test_the_lowest_partner_among_equals(self, n_chunks, dtype, backend):
        x = dyadic(6, 43, seed=1, dtype=dtype)
        chunks = None if n_chunks is None else torch.randperm(43, generator=seeded(2)).tensor_split(n_chunks)
        result = BACKENDS[backend].max_cosine(x, chunks, "highest")
        values, partners = oracle.max_cosines(float64(x), None if chunks is None else [c.tolist() for c in chunks])
        assert result.cosines.dtype == accumulation_dtype(x)
        assert result.cosines.tolist() == values.tolist()
        assert result.partners.tolist() == partners.tolist()

    @pytest.mark.parametrize("n", [2, 3, 10, 11, 12, 15, 16, 17, 31, 32, 33, 47, 48, 49])
    def test_sizes_around_the_tiles(self, n, backend):
        x = dyadic(6, n, seed=n)
        result = BACKENDS[backend].max_cosine(x, None, "highest")
        values, partners = oracle.max_cosines(float64(x))
        assert result.cosines.tolist() == values.tolist()
        assert result.partners.tolist() == partners.tolist()

    @pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
    def test_edges(self, x, backend):
        result = BACKENDS[backend].max_cosine(x, None, "highest")
        cosine = np.zeros((x.shape[1], x.shape[1]))
        cosine[oracle.all_pairs(x.shape[1])] = oracle.cosines(float64(x))
        cosine += cosine.T
        columns = np.arange(x.shape[1])
        assert (result.partners.numpy() != columns).all()
        assert_within(actual=result.cosines, expected=cosine[columns, result.partners.numpy()], bound=cosine_bound(x))
        assert_within(actual=result.cosines, expected=oracle.max_cosines(float64(x))[0], bound=cosine_bound(x))


class TestPairGradient:
    """Gradient of a weighted sum of cosines, the row and the col of a pair weighted apart."""

    @staticmethod
    def arguments(x, n_pairs, seed=0, n_padding=0):
        """Random pairs, some twice, with their cosines; padding is pair (0, 0) of weight 0."""
        generator = seeded(seed)
        all_rows, all_cols = map(torch.from_numpy, oracle.all_pairs(x.shape[1]))
        chosen = torch.randint(0, len(all_rows), (n_pairs,), generator=generator)
        rows, cols = all_rows[chosen], all_cols[chosen]
        dtype = accumulation_dtype(x)
        values = torch.from_numpy(oracle.cosines(float64(x)))[chosen].to(dtype)
        weights = torch.randn(2, n_pairs, generator=generator, dtype=torch.float64).to(dtype)
        norms = torch.linalg.vector_norm(x.double(), dim=0).to(dtype)
        padded = [torch.nn.functional.pad(t, (0, n_padding)) for t in (rows, cols, values, *weights)]
        return norms, *padded

    @staticmethod
    def expected(x, rows, cols, grad_rows, grad_cols):
        x64 = x.detach().double().requires_grad_()
        x_hat = torch.nn.functional.normalize(x64, dim=0, eps=oracle.EPS)
        a, b = x_hat[:, rows], x_hat[:, cols]
        moves_rows, moves_cols = (a * b.detach()).sum(dim=0), (a.detach() * b).sum(dim=0)
        (moves_rows @ grad_rows.double() + moves_cols @ grad_cols.double()).backward()
        return x64.grad.numpy()

    def check(self, backend, x, n_pairs, **options):
        norms, rows, cols, values, grad_rows, grad_cols = self.arguments(x, n_pairs, **options)
        actual = BACKENDS[backend].pair_gradient(x, norms, values, WeightedPairs(rows, cols, grad_rows, grad_cols))
        largest_weight = float(torch.stack([grad_rows, grad_cols]).abs().max())
        assert_gradient(
            actual=actual,
            expected=self.expected(x, rows[:n_pairs], cols[:n_pairs], grad_rows[:n_pairs], grad_cols[:n_pairs]),
            bound=gradient_bound(x, rows[:n_pairs].numpy(), cols[:n_pairs].numpy(), largest_weight),
            dtype=x.dtype,
        )
        return actual

    @pytest.mark.parametrize(
        ("n_pairs", "n_padding", "dtype"),
        [(60, 40, dtype) for dtype in FLOATING]
        + [(n_pairs, n_padding, torch.float32) for n_pairs, n_padding in ((1, 0), (1, 9), (60, 0), (2000, 0))],
        ids=str,
    )
    def test_against_autograd(self, n_pairs, n_padding, dtype, backend):
        self.check(backend, normal(12, 43, dtype=dtype), n_pairs, n_padding=n_padding)

    @pytest.mark.parametrize("view", ["transposed", "strided_both_dims", "sliced_out_of_nan", "expanded_rows"])
    def test_layouts(self, view, backend):
        self.check(backend, VIEWS[view](normal(12, 43)), 60)

    @pytest.mark.parametrize(
        "x", [x for x in EDGES.values() if x.any()], ids=[name for name, x in EDGES.items() if x.any()]
    )
    def test_edges(self, x, backend):
        """Away from eps: the norm of tiny columns has a gradient of its own, see TestLoss.test_edges."""
        norms = np.abs(float64(x)).max(axis=0)
        live = torch.from_numpy((norms > 1e-9).nonzero()[0])
        if len(live) > 1:
            self.check(backend, x[:, live].contiguous(), 30)

    @pytest.mark.parametrize("norm", [1e-15, 8e-13])
    def test_columns_below_eps(self, norm, backend):
        """x_hat = x / eps there: no part of the gradient is removed, which shows most just below eps."""
        x = normal(20, 43, seed=3)
        x[:, 8] *= norm / x[:, 8].norm()
        norms, rows, cols, values, grad_rows, grad_cols = self.arguments(x, 300)
        actual = BACKENDS[backend].pair_gradient(x, norms, values, WeightedPairs(rows, cols, grad_rows, grad_cols))
        expected = self.expected(x, rows, cols, grad_rows, grad_cols)
        assert np.abs(expected[:, 8]).max() > 1e11
        assert_gradient(
            actual=actual,
            expected=expected,
            bound=gradient_bound(x, rows.numpy(), cols.numpy(), float(grad_rows.abs().max())),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("rows_of_x", [1, 15, 16, 17, 40])
    def test_slabs(self, rows_of_x, backend):
        """The tiled gradient goes through x by slabs of 16 rows or more."""
        self.check(backend, normal(rows_of_x, 43), 60)


def test_backends_agree(backend):
    """Across backends only rounding differs: same pairs where cosines are exact."""
    x = activations(20, 43, seed=5)
    ours, naive = (BACKENDS[name].topk_pairs(x, Query(k=903), None) for name in (backend, "naive"))
    dense = torch.zeros(2, 43, 43)
    for plane, selection in zip(dense, (ours, naive), strict=True):
        plane[selection.rows, selection.cols] = selection.cosines
    assert_within(actual=dense[0], expected=float64(dense[1]), bound=2 * cosine_bound(x))


class TestRegistry:
    """Names, and why a name does not work."""

    def test_available_here(self):
        assert [name for name in available_backends() if name != "triton"] == ["naive", "tiled", "sparse"]
        assert set(available_backends()) <= {"naive", "tiled", "triton", "sparse"}

    def test_auto_on_cpu_waits_for_the_data(self):
        """See tests/backends/sparse/test_cost.py for what it then does."""
        assert resolve_backend("auto", torch.device("cpu")) == "auto"

    def test_auto_is_sparse_for_a_sparse_x(self):
        for name in ("auto", "sparse"):
            assert resolve_backend(name, torch.device("cpu"), is_sparse=True) == "sparse"

    @pytest.mark.parametrize("name", ["naive", "tiled", "sparse"])
    def test_an_explicit_choice_is_kept(self, name):
        assert resolve_backend(name, torch.device("cpu")) == name

    def test_the_reason_of_a_backend_is_quoted(self, monkeypatch):
        class Broken:
            @staticmethod
            def unavailable_reason(device):
                return f"the moon is full over {device}"

        monkeypatch.setitem(registry.BACKENDS, "broken", Broken)
        assert "broken" not in available_backends()
        with pytest.raises(ValueError, match=r"got 'broken': the moon is full over cpu"):
            resolve_backend("broken", torch.device("cpu"))

    def test_a_probe_that_raises_is_not_hidden(self, monkeypatch):
        class Raises:
            @staticmethod
            def unavailable_reason(device):
                raise OSError("driver")

        monkeypatch.setitem(registry.BACKENDS, "raises", Raises)
        with pytest.raises(OSError, match="driver"):
            available_backends()
