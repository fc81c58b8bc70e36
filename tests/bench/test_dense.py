import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import Case
from bench.dense import DENSE
from bench.providers import half_gemm

GPU_CASES = DENSE.cases("cuda")


def test_the_goals_of_a_gpu_come_first_and_large_n_last():
    place = {case: number for number, case in enumerate(GPU_CASES)}
    assert len(place) == len(GPU_CASES), "a case is there twice"
    stages = [
        Case("dense", "topk_ortho_warm", "forward", "bfloat16", 4096, 65536),
        Case("dense", "topk_ortho_warm", "forward_backward", "bfloat16", 4096, 32768),
        Case("dense", "topk_ortho_warm", "forward", "float32", 4096, 65536),
        Case("dense", "topk_ortho_warm", "forward_backward", "float32", 4096, 32768),
        Case("dense", "topk_ortho_warm", "forward", "bfloat16", 4096, 16384),
        Case("dense", "topk_ortho_warm", "forward", "bfloat16", 16384, 32768),
        Case("dense", "topk_ortho_warm", "forward", "bfloat16", 4096, 262144),
    ]
    assert sorted(stages, key=place.__getitem__) == stages
    assert {case.N for case in GPU_CASES} == {2**i for i in range(13, 19)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_ratio_has_its_denominator(device):
    cases = DENSE.cases(device)
    ours = {"cpu": "topk_ortho", "cuda": "topk_ortho_warm"}[device]
    assert {c._replace(provider=ours) for c in cases if c.provider != "cublas"} <= set(cases)
    assert {c._replace(provider="half_gemm") for c in cases if (c.provider, c.mode) == (ours, "forward")} <= set(cases)
    if device == "cuda":
        assert {(c.dtype, c.M) for c in cases} == {(c.dtype, c.M) for c in cases if c.provider == "cublas"}


def test_torch_topk_is_not_asked_for_more_than_it_can():
    assert max(c.N**2 for c in GPU_CASES if c.provider.startswith("naive")) < 2**31


@pytest.mark.parametrize("n", [700, 1030])
def test_half_gemm_is_the_upper_triangle(n):
    x = torch.randn(8, n, generator=torch.Generator().manual_seed(0))
    tile_rows, tile_cols = 256, 512
    panels = range(0, n, tile_rows)
    with FlopCounterMode(display=False) as counter:
        last = half_gemm(x, (tile_rows, tile_cols))
    assert counter.get_total_flops() == sum(2 * 8 * min(tile_rows, n - row) * (n - row) for row in panels)
    first_of_last_tile = x[:, panels[-1]] @ x[:, -((n - panels[-1] - 1) % tile_cols + 1)]
    torch.testing.assert_close(last, first_of_last_tile)
