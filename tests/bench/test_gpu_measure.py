from collections import namedtuple

import pytest
import torch

from bench import gpu_measure
from bench.gpu_cases import Case
from bench.gpu_measure import Measurement, measure, rounds_of
from topk_ortho.backends import triton

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(triton.unavailable_reason(CPU) is not None, reason="no TRITON_INTERPRET")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("provider", "mode"),
    [("half_gemm", "forward"), ("cublas", "forward")]
    + [(p, mode) for p in ("tiled", "chunked", "naive") for mode in ("forward", "forward_backward")]
    + [("naive_autograd", "forward_backward")]
    + [pytest.param(p, "forward_backward", marks=needs_interpreter) for p in ("triton", "triton_cold", "kernels")],
)
def test_every_provider_runs(provider, mode, dtype, monkeypatch):
    def event_times_ms(call, before, rounds):
        assert rounds == 3
        before()
        call()
        return [1.0, 4.0, 2.0]

    monkeypatch.setattr(gpu_measure, "_HALF_GEMM_TILE", (64, 128))
    monkeypatch.setattr(gpu_measure, "_seconds_and_peak", lambda call: (0.2, 7))
    monkeypatch.setattr(gpu_measure, "_event_times_ms", event_times_ms)
    monkeypatch.setattr(gpu_measure, "_kernel_times_ms", lambda call: {"gram_select": 1.5, "other": 0.5})
    result = measure(Case(provider, mode, dtype, 16, 48), CPU)
    if provider == "kernels":
        assert result == Measurement(2.0, 2.0, 2.0, 3, 7, {"gram_select": 1.5, "other": 0.5})
    else:
        assert result == pytest.approx(Measurement(2.0, 1.4, 3.2, 3, 7, None))


def test_rounds():
    assert [rounds_of(seconds) for seconds in (1e-6, 0.1, 0.5, 2.9, 3.1)] == [30, 5, 3, 3, 1]


def test_kernels_are_told_by_their_names():
    event = namedtuple("Event", "key self_device_time_total")
    events = [
        event("_gram_select_kernel", 3000.0),
        event("_gram_select_kernel", 6.0),
        event("_column_norms_kernel", 600.0),
        event("void at::native::radixSortKVInPlace_kernel<int>", 30.0),
        event("Memset (Device)", 3.0),
    ]
    times = gpu_measure._by_kernel(events, n_calls=3)
    assert times == pytest.approx({"gram_select": 1.002, "column_norms": 0.2, "other": 0.011})


def test_columns_are_drawn_anew_in_turn():
    x = torch.zeros(4, 128, requires_grad=True)
    redraw = gpu_measure._redraw_of(x)
    for number in range(1, 65):
        before = x.detach().clone()
        redraw()
        changed = (x != before).any(dim=0).nonzero().flatten()
        assert changed.tolist() == [2 * number - 2, 2 * number - 1]
    redraw()
    assert (x != before).any(dim=0).nonzero().flatten().tolist()[:2] == [0, 1]
