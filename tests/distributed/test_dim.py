"""Features in rows, on several ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

import topk_ortho
from tests.distributed.ranks import Pool
from tests.inputs import normal
from topk_ortho import distributed


def over_ranks(group: Any, W: Tensor, op: str) -> tuple[float, Tensor]:
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    own = W.tensor_split(size)[rank].clone().requires_grad_()
    loss = getattr(distributed, op)(own, dim=0, group=group)
    loss.backward()
    assert own.grad is not None
    features, _ = distributed.largest_cosines(own.detach(), dim=0, group=group)
    assert features.numel() <= len(W)
    pairs = distributed.topk_pairs(own.detach(), 0.1, dim=0, group=group)
    assert pairs.n_features == len(W)
    return loss.item(), own.grad


@pytest.mark.parametrize("op", ["topk_ortho_loss", "max_cosine_loss"])
def test_rows_of_several_ranks(op: str, ranks: Pool):
    W = normal(30, 7).requires_grad_()
    expected = getattr(topk_ortho, op)(W, dim=0)
    expected.backward()
    found = ranks.run(3, over_ranks, W.detach(), op)
    assert [loss for loss, _ in found] == [pytest.approx(expected.item())] * 3
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), W.grad)
