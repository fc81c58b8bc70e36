"""Screening in bfloat16: no pair is lost, and what is found does not depend on the guess."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.inputs import dyadic, normal, seeded
from tests.tolerances import float64
from topk_ortho import initial_state
from topk_ortho.backends import screen, tiled
from topk_ortho.backends.screen import multiplies_bfloat16, pairs_that_may_reach
from topk_ortho.backends.tile_stream import TileShape
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.definitions import Query
from topk_ortho.warm_start import SampleSizes

TILE = TileShape(13, 27)
SCREENED = TiledBackend(tile=TILE, screen=True, sample=SampleSizes(least_features=16))


def directions(m, n, seed=0, dtype=torch.float32):
    return normalize(normal(m, n, seed, dtype).T, dim=1)


def reaching(x_hat, least, similarity):
    """Index of the pairs, from all cosines in float64."""
    d = float64(x_hat)
    gram = d @ d.T
    row, col = np.nonzero(np.triu((np.abs(gram) if similarity == "abs" else gram) >= least, 1))
    return (row * len(d) + col).tolist()


def far_from_bfloat16():
    """Two equal directions whose entries lie above numbers in bfloat16 by nearly as much as they can, 2**-8 of them."""
    x_hat = torch.zeros(2, 1024)
    x_hat[:, :1017] = 2**-5 * (1 + 2**-8 - 2**-20)
    return x_hat


class TestPairsThatMayReach:
    @pytest.mark.quick
    @pytest.mark.parametrize("similarity", ["abs", "positive"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("m", "n"), [(1, 9), (3, 40), (16, 61), (64, 64), (40, 200)])
    def test_none_is_lost(self, m, n, dtype, similarity):
        x_hat = directions(m, n, dtype=dtype)
        for least in (0.05, 0.2, 0.5, 0.9, 1 - 1e-6):
            found = pairs_that_may_reach(least, x_hat, similarity, TILE, n * n)
            assert found is not None
            listed = found.tolist()
            assert listed == sorted(set(listed))
            assert all(index // n < index % n for index in listed)
            assert set(listed) >= set(reaching(x_hat, least, similarity))
            assert set(listed) <= set(reaching(x_hat, least - 0.02, similarity))

    def test_rounding_that_adds_up(self):
        """Each entry is cut by as much as it can be, so the product in bfloat16 is less by two such cuts."""
        x_hat = far_from_bfloat16()
        least = (x_hat[0] * x_hat[1]).sum().item()
        assert (x_hat.bfloat16() @ x_hat.bfloat16().T)[0, 1].item() < least - 2**-8
        assert pairs_that_may_reach(least, x_hat, "abs", TILE, 9).tolist() == [1]

    def test_the_furthest_rounding_decides(self, monkeypatch):
        """Whichever of the slabs it is in that are rounded one after the other."""
        monkeypatch.setattr(screen, "_SLAB_ELEMENTS", 1024)
        exact = torch.eye(4, 1024)
        for x_hat in (torch.cat([far_from_bfloat16(), exact]), torch.cat([exact, far_from_bfloat16()])):
            assert reaching(x_hat, 0.999, "abs") == pairs_that_may_reach(0.999, x_hat, "abs", TILE, 9).tolist() != []

    def test_product_that_is_rounded_down(self):
        """Entries that bfloat16 has, and a product that it has not."""
        x_hat = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 2**-9]])
        least = 0.75 + 2**-10
        assert (x_hat.bfloat16() @ x_hat.bfloat16().T)[0, 1].item() == 0.75
        assert pairs_that_may_reach(least, x_hat, "abs", TILE, 9).tolist() == [1]

    def test_negative_and_dead(self):
        x_hat = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        assert pairs_that_may_reach(0.5, x_hat, "abs", TILE, 9).tolist() == [1]
        assert pairs_that_may_reach(0.5, x_hat, "positive", TILE, 9).tolist() == []

    def test_gives_up(self):
        """With more pairs than are to be held, and where a similarity is within the rounding of 0."""
        x_hat = directions(8, 50)
        n_found = pairs_that_may_reach(0.5, x_hat, "abs", TILE, 2500).numel()
        assert pairs_that_may_reach(0.5, x_hat, "abs", TILE, n_found) is not None
        assert pairs_that_may_reach(0.5, x_hat, "abs", TILE, n_found - 1) is None
        for least in (-1.0, 0.0, 1e-3):
            assert pairs_that_may_reach(least, x_hat, "abs", TILE, 2500) is None


class TestSelection:
    @pytest.mark.parametrize("make", [normal, dyadic])
    @pytest.mark.parametrize("similarity", ["abs", "positive"])
    def test_the_guess_changes_no_bit(self, make, similarity):
        x = make(24, 130, 3)
        query = Query(k=200, similarity=similarity)
        cosines = SCREENED.topk_pairs(x, query, None).cosines.abs()
        states = [initial_state() for _ in range(5)]
        for state, guess in zip(states[1:], (0.0, 1e-3, cosines[-1].item(), 0.9999), strict=True):
            state[0] = guess
        selections = [SCREENED.topk_pairs(x, query, state) for state in states]
        for selection in selections[1:]:
            for part in ("rows", "cols", "cosines", "threshold"):
                assert torch.equal(getattr(selection, part), getattr(selections[0], part)), part

    def test_passes(self, monkeypatch):
        """One from a good guess, none of it in float32; two where the guess is too high or too many pairs are found."""
        streamed = []
        stream = TiledBackend._stream
        monkeypatch.setattr(TiledBackend, "_stream", lambda *a: streamed.append(a[-1]) or stream(*a))
        x, query = normal(24, 130), Query(k=200)
        least = SCREENED.topk_pairs(x, query, None).cosines[-1].abs().item()
        for guess, passes, bounds in (
            (least, 1, []),
            (least - 1e-3, 1, []),
            (0.9, 2, [-1.0]),
            (1e-3, 1, [pytest.approx(1e-3)]),
        ):
            streamed.clear()
            state = initial_state()
            state[0] = guess
            assert SCREENED.topk_pairs(x, query, state).state[2] == passes
            assert streamed == bounds

    def test_a_guess_that_is_far_too_low_is_mended(self, monkeypatch):
        """After a call that gave up the screen, and found the pairs by other passes, the next screens in one."""
        x, query = normal(24, 130), Query(k=200)
        backend = TiledBackend(tile=TILE, screen=True, capacity=600)
        state = torch.tensor([0.1, 1.0, 2.0])
        for _ in range(3):
            state = backend.topk_pairs(x, query, state).state
        monkeypatch.setattr(TiledBackend, "_stream", None)
        backend.topk_pairs(x, query, state)

    @pytest.mark.parametrize("screened", [False, True])
    def test_precision(self, screened, monkeypatch):
        """Passes that decide what a screen finds are made at full precision, whatever is asked for."""
        asked = []
        monkeypatch.setattr(tiled, "matmul_precision", lambda device, word: asked.append(word) or nullcontext())
        TiledBackend(tile=TILE, screen=screened).topk_pairs(normal(24, 130), Query(k=200, precision="medium"), None)
        assert asked == ["highest" if screened else "medium"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_default_dtype(self, dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            selection = SCREENED.topk_pairs(normal(24, 130), Query(k=200), None)
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(selection.rows, SCREENED.topk_pairs(normal(24, 130), Query(k=200), None).rows)

    def test_what_a_screen_does_not_find(self):
        """More equal pairs than it holds, and pairs of cosine 0."""
        x = torch.ones(4, 60)
        few = TiledBackend(tile=TILE, screen=True, capacity=100, sample=SampleSizes(least_features=16))
        assert few.topk_pairs(x, Query(k=70), None).cols[-5:].tolist() == [8, 9, 10, 11, 12]
        x = torch.eye(40).repeat(1, 2)
        selection = SCREENED.topk_pairs(x, Query(k=100), None)
        assert selection.cosines.tolist() == [1.0] * 40 + [0.0] * 60
        assert selection.cols[40:].tolist() == [*range(1, 40), *range(41, 62)]

    def test_tau_above_the_guess(self):
        x = normal(24, 130)
        selection = SCREENED.topk_pairs(x, Query(k=5000, tau=0.5), initial_state())
        expected = TiledBackend(tile=TILE, screen=False).topk_pairs(x, Query(k=5000, tau=0.5), None)
        assert int(selection.n_selected) == int(expected.n_selected) < 5000
        assert selection.state[2] == 1

    def test_columns_of_any_length(self):
        """Norms from 1e-30 to 1e30, and float64 below the range of float32."""
        x = directions(24, 130).T * torch.logspace(-30, 30, 130)[torch.randperm(130, generator=seeded(0))]
        of_lengths = SCREENED.topk_pairs(x, Query(k=200), None)
        assert of_lengths.rows.tolist() == SCREENED.topk_pairs(x.double(), Query(k=200), None).rows.tolist()
        tiny = SCREENED.topk_pairs(x.double() * 1e-100, Query(k=200), None)
        assert int(tiny.n_selected) == 200


class TestWhere:
    def test_only_large_ones_on_such_cpus(self, monkeypatch):
        calls = []
        monkeypatch.setattr(tiled, "pairs_that_may_reach", lambda *a: calls.append(a))
        for is_fast, shape, n_calls in (
            (True, (8, 1024), 1), (True, (4096, 1024), 1), (True, (8, 1023), 0), (True, (4097, 1024), 0),
            (False, (8, 1024), 0),
        ):  # fmt: skip
            monkeypatch.setattr(screen, "multiplies_bfloat16", lambda device, is_fast=is_fast: is_fast)
            calls.clear()
            TiledBackend().topk_pairs(normal(*shape), Query(k=10), None)
            assert bool(calls) == bool(n_calls), shape

    def test_adaptive_tau_needs_all_cosines(self, monkeypatch):
        monkeypatch.setattr(tiled, "pairs_that_may_reach", None)
        monkeypatch.setattr(screen, "multiplies_bfloat16", lambda device: True)
        for backend in (SCREENED, TiledBackend()):
            backend.topk_pairs(normal(8, 1100), Query(k=10, n_std=1.0), None)

    def test_multiplies_bfloat16(self, monkeypatch):
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
        has = {"avx512_bf16": True, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        assert multiplies_bfloat16(torch.device("cpu"))
        assert not multiplies_bfloat16(torch.device("cuda"))
        has["avx512_bf16"] = False
        assert not multiplies_bfloat16(torch.device("cpu"))
        has["amx_bf16"] = True
        assert multiplies_bfloat16(torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.mkldnn, "enabled", False)
            assert not multiplies_bfloat16(torch.device("cpu"))
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        assert not multiplies_bfloat16(torch.device("cpu"))
