import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import memory
from bench.providers import _HALF_GEMM_TILE, FORWARD, FORWARD_BACKWARD, half_gemm
from bench.report import table


@pytest.mark.parametrize("n", [64, 1500, 2500], ids=["one_block", "two_blocks", "ragged_blocks"])
def test_all_providers_compute_the_same_loss_and_gradient(n):
    x = torch.randn(24, n, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = {name: provider(x) for name, provider in FORWARD_BACKWARD.items()}
    gradients = {name: torch.autograd.grad(loss, x)[0] for name, loss in losses.items()}
    for name in ("streamed", "chunked", "naive"):
        torch.testing.assert_close(losses[name], losses["naive_autograd"], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients[name], gradients["naive_autograd"], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(FORWARD[name](x.detach()), losses["naive_autograd"].detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [700, 1030, 2500])
def test_half_gemm_is_the_upper_triangle(n):
    x = torch.randn(8, n, generator=torch.Generator().manual_seed(0))
    tile_rows, _ = _HALF_GEMM_TILE
    panels = range(0, n, tile_rows)
    with FlopCounterMode(display=False) as counter:
        last = half_gemm(x)
    assert counter.get_total_flops() == sum(2 * 8 * min(tile_rows, n - row) * (n - row) for row in panels)
    torch.testing.assert_close(last, x[:, panels[-1]] @ x[:, -((n - panels[-1]) % _HALF_GEMM_TILE[1])])


def test_peak_memory_sees_what_is_allocated(monkeypatch):
    n_bytes = 64 * 2**20
    monkeypatch.setattr(memory, "make_case", lambda *arguments: lambda: torch.ones(n_bytes // 4).sum())
    extra = memory.peak_extra_bytes("naive", "forward", 1, 1)
    assert 0.9 * n_bytes < extra < 1.5 * n_bytes


def test_table_names_what_ran_out_of_memory():
    rows = [
        {"provider": p, "mode": "forward", "M": 8, "N": 64, "peak_extra_bytes": 10**6, "time_s": 0.5} for p in FORWARD
    ]
    rows[-1] |= {"peak_extra_bytes": None}
    environment = dict.fromkeys(("cores", "cpu", "capability", "torch", "commit", "utc"), "x") | {"memory_bytes": 2**30}
    text = table(
        json.loads(json.dumps({"rows": rows, "dtype": "float32", "fraction": 1e-3, "environment": environment}))
    )
    assert "| 64 | forward | 0.50 s, 1 MB | 0.50 s, 1 MB | 0.50 s, 1 MB | out of memory |  | 1.00 |  |  |" in text
