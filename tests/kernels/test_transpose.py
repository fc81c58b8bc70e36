"""Transposes of any shape, dtype and strides, to the bit."""

import pytest
import torch

from tests.inputs import VIEWS, normal
from tests.kernels.arguments import DEVICE, radix_at, to_device
from topk_ortho.kernels.radix_select import PASS
from topk_ortho.kernels.transpose import transpose

POISON = 12345.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 130), (64, 64), (65, 127), (200, 3)], ids=str)
def test_shapes(m, n, dtype):
    """Into a slab between guards."""
    x = normal(m, n, dtype=dtype).to(DEVICE)
    holder = torch.full((n + 2, m + 7), POISON, dtype=dtype, device=DEVICE)
    out = holder[1:-1, 3 : 3 + m]
    transpose(x, out)
    assert torch.equal(out, x.T)
    out.fill_(POISON)
    assert (holder == torch.tensor(POISON, dtype=dtype)).all(), "written outside"


@pytest.mark.parametrize("view", VIEWS)
def test_layouts(view):
    x = to_device(VIEWS[view](normal(66, 70)))
    for out in (torch.empty(70, 66, device=DEVICE), torch.empty(66, 70, device=DEVICE).T):
        transpose(x, out)
        assert torch.equal(out, x.T)


@pytest.mark.parametrize("stage", range(6), ids=["pass", "screen", "digits", "ties", "collect", "certified"])
def test_only_for_a_pass(stage):
    """What is transposed for the records of a pass."""
    x = normal(66, 70).to(DEVICE)
    out = torch.full((70, 66), POISON, device=DEVICE)
    transpose(x, out, radix_at(stage, 70).plan)
    if stage == PASS.value:
        assert torch.equal(out, x.T)
    else:
        assert (out == POISON).all()
