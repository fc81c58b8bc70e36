import json

import pytest
import torch

from bench import memory
from bench.providers import _HALF_GEMM_TILE, FORWARD, FORWARD_BACKWARD, half_gemm, make_case
from bench.report import table


@pytest.mark.parametrize("n", [64, 1500, 2500], ids=["one_block", "two_blocks", "ragged_blocks"])
def test_all_providers_compute_the_same_loss_and_gradient(n):
    x = torch.randn(24, n, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = {name: provider(x) for name, provider in FORWARD_BACKWARD.items()}
    gradients = {name: torch.autograd.grad(loss, x)[0] for name, loss in losses.items()}
    for name in ("streamed", "chunked"):
        torch.testing.assert_close(losses[name], losses["naive"], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients[name], gradients["naive"], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(FORWARD[name](x.detach()), losses["naive"].detach(), rtol=1e-5, atol=0)


def test_half_gemm_ends_with_the_last_tile():
    x = torch.randn(8, 1030, generator=torch.Generator().manual_seed(0))
    last_panel = 1030 // _HALF_GEMM_TILE[0] * _HALF_GEMM_TILE[0]
    torch.testing.assert_close(half_gemm(x), x[:, last_panel] @ x[:, last_panel])


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_peak_memory_sees_what_is_allocated(mode, monkeypatch):
    n_bytes = 64 * 2**20
    monkeypatch.setattr(memory, "make_case", lambda *arguments: lambda: torch.ones(n_bytes // 4).sum())
    extra = memory.peak_extra_bytes("naive", mode, 1, 1)
    assert 0.9 * n_bytes < extra < 1.5 * n_bytes


def test_cases_run():
    assert isinstance(make_case("streamed", "forward", 8, 32)(), torch.Tensor)
    assert make_case("streamed", "forward_backward", 8, 32)()[0].shape == (8, 32)


def test_table_names_what_ran_out_of_memory():
    rows = [
        {"provider": p, "mode": "forward", "M": 8, "N": 64, "peak_extra_bytes": 10**6, "time_s": 0.5} for p in FORWARD
    ]
    rows[-1] |= {"peak_extra_bytes": None}
    environment = dict.fromkeys(("cores", "cpu", "capability", "torch", "commit", "utc"), "x") | {"memory_bytes": 2**30}
    text = table(
        json.loads(json.dumps({"rows": rows, "dtype": "float32", "fraction": 1e-3, "environment": environment}))
    )
    assert "| 64 | forward | 0.50 s, 1 MB | 0.50 s, 1 MB | 0.50 s, 1 MB | out of memory | 1.00 |  |  |" in text
