import pytest
import torch

from tests.inputs import dyadic, seeded
from topk_ortho import topk_pairs
from topk_ortho.backends import registry
from topk_ortho.backends.sparse.cost import is_cheaper


class TestCost:
    """Which route "auto" takes for a dense x on a CPU."""

    def test_activations_of_an_sae(self):
        x = torch.zeros(256, 16384).scatter_(1, torch.randint(0, 16384, (256, 32), generator=seeded(0)), 1.0)
        assert is_cheaper(x)
        assert registry.backend_for("auto", x) is registry.BACKENDS["sparse"]

    def test_a_decoder(self):
        x = torch.ones(1, 1).expand(256, 8192)
        assert not is_cheaper(x)
        assert registry.backend_for("auto", x) is registry.BACKENDS["tiled"]

    def test_a_small_matrix_is_not_looked_at(self):
        x = torch.zeros(16, 43, device="meta")  # has no numbers to look at
        assert not is_cheaper(x)

    def test_nothing_active(self):
        assert is_cheaper(torch.zeros(1, 1).expand(256, 16384))

    @pytest.mark.parametrize("threads", [1, 64])
    def test_more_threads_favour_products_of_matrices(self, threads, monkeypatch):
        x = torch.zeros(256, 16384)
        x[:, :160] = 1
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert is_cheaper(x) == (threads == 1)

    def test_a_screen_favours_products_of_matrices(self, monkeypatch):
        x = torch.zeros(256, 16384)
        x[:, :100] = 1
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
        for is_fast in (False, True):
            monkeypatch.setattr(
                "topk_ortho.backends.screen.multiplies_bfloat16", lambda device, is_fast=is_fast: is_fast
            )
            assert is_cheaper(x, is_selection=True) == (not is_fast)
            assert is_cheaper(x)  # largest cosines and an adaptive tau are not screened

    def test_rows_are_sampled_from_all_of_x(self):
        x = torch.zeros(4096, 4096)
        x[2048:] = 1
        assert not is_cheaper(x)

    @pytest.mark.parametrize("period", [2, 8, 16, 64, 128, 512])
    @pytest.mark.parametrize("value", [0.0, 1.0], ids=["the_others_are_dense", "they_are_dense"])
    def test_rows_in_step_with_sequences_do_not_mislead(self, value, period):
        """The first token of every sequence is unlike all others; dense rows make products enough however few."""
        x = torch.full((4096, 2048), 1 - value)
        x[::period] = value
        assert not is_cheaper(x)

    def test_a_sample_in_step_with_sequences_would_mislead(self):
        """Every 64th row has all the non-zeros: few, but a sample of every 64th row would see nothing else."""
        x = torch.zeros(4096, 2048)
        x[::64, :200] = 1
        assert is_cheaper(x)

    def test_an_explicit_choice_is_kept(self):
        for name in ("tiled", "sparse", "naive"):
            assert registry.backend_for(name, torch.zeros(2, 3)) is registry.BACKENDS[name]

    def test_both_routes_select_the_same(self):
        """Zeros listed, ties broken: nothing tells which was taken."""
        x = torch.zeros(64, 6000)
        x[:, :300] = dyadic(64, 300)
        assert is_cheaper(x)
        for arguments in ({"k": 3000}, {"k": 40000}, {"k": 3000, "tau": 0.1}, {"similarity": "positive"}):
            auto, dense = topk_pairs(x, **arguments), topk_pairs(x, **arguments, backend="tiled")
            for actual, expected in zip(auto[:4], dense[:4], strict=True):
                assert torch.equal(actual, expected)
