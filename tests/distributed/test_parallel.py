"""A dictionary and its batches on several processes: every sum and choice is that of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import parallel_tasks as tasks
from tests.together import run_together
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.sae import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, StandardSAE, TopKSAE

GRIDS = [(3, 1), (2, 2), (4, 2)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_the_largest_of_every_row_are_found_among_all_features(count: int, ties: bool, tmp_path: Path):
    values = normal(6, 11)
    if ties:
        values = values.sign()
    masks = run_together(3, 1, tmp_path, tasks.largest_in_rows, values, count)
    mask = torch.cat(masks, dim=1)
    assert mask.shape == values.shape
    assert mask.sum(dim=1).tolist() == [count] * 6
    chosen = values.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True).values[:, :count]
    assert torch.equal(chosen, values.sort(dim=1, descending=True).values[:, :count])


@pytest.mark.parametrize("count", [1, 20, 33, 66])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_of_a_batch_are_found_among_all_rows_and_features(ties: bool, count: int, tmp_path: Path):
    values = normal(6, 11)
    if ties:
        values = values.sign()
    mask = torch.zeros(6, 11, dtype=torch.bool)
    for part, features, own in run_together(4, 2, tmp_path, tasks.largest_of_batch, values, count):
        mask[3 * part : 3 * part + 3, [slice(0, 6), slice(6, 11)][features]] = own
    expected = values[values > 0].sort(descending=True).values[:count]
    assert torch.equal(values[mask].sort(descending=True).values, expected)


def test_numbers_go_to_the_process_that_they_belong_to(tmp_path: Path):
    found = [torch.tensor(numbers, dtype=torch.int64) for numbers in ([9, 4, 2**40], [], [3, 7, 5, 12])]
    assert [own.tolist() for own in run_together(3, 1, tmp_path, tasks.dealt, found)] == [
        [3, 9, 12], [4, 7, 2**40], [5],
    ]  # fmt: skip


@pytest.mark.parametrize(("n_ranks", "n_parts"), GRIDS)
def test_a_batch_is_that_of_one_process_and_no_token_is_held_twice(n_ranks: int, n_parts: int, tmp_path: Path):
    sizes = [7, 11, 1, 13, 9, 30]
    expected, _, n_tokens = tasks.batches(Parallel.alone(), sizes, 8, 20)
    found = run_together(n_ranks, n_parts, tmp_path, tasks.batches, sizes, 8, 20)
    for rank, (parts, shards, _) in enumerate(found):
        assert len(shards) < len(sizes)
        for part, whole in zip(parts, expected, strict=True):
            assert torch.equal(part, whole.split(8 // n_parts)[rank % n_parts])
    assert sum(n_held for _, _, n_held in found) == n_tokens == sum(sizes)


def test_moments_are_those_of_all_tokens(tmp_path: Path):
    tokens = normal(100, 5).half()
    mean, variance = tasks.moments(Parallel.alone(), tokens)
    for found_mean, found_variance in run_together(3, 1, tmp_path, tasks.moments, tokens):
        torch.testing.assert_close(found_mean, mean)
        assert found_variance == pytest.approx(variance)


SAES: dict[str, tuple[Any, dict[str, Any]]] = {
    "standard": (StandardSAE, {}),
    "topk": (TopKSAE, {"l0": 3}),
    "topk_of_more_than_a_part": (TopKSAE, {"l0": 9}),
    "batchtopk": (BatchTopKSAE, {"l0": 3}),
    "jumprelu": (JumpReLUSAE, {"l0": 3, "initial_threshold": 0.2, "bandwidth": 0.3}),
    "matryoshka": (MatryoshkaSAE, {"l0": 3, "widths": (2, 9, 23)}),
}


@pytest.mark.parametrize(("n_ranks", "n_parts"), GRIDS)
@pytest.mark.parametrize("name", SAES)
def test_loss_gradient_and_metrics_are_those_of_one_process(name: str, n_ranks: int, n_parts: int, tmp_path: Path):
    kind, options = SAES[name]
    x = normal(12, 5).double()
    expected = tasks.step_of(Parallel.alone(), kind, options, x)
    for found in run_together(n_ranks, n_parts, tmp_path, tasks.step_of, kind, options, x):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert found["n_active"] == expected["n_active"]
        assert found["gradients"].keys() == expected["gradients"].keys()
        for weights, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][weights], gradient, rtol=1e-10, atol=1e-12)
        for metric in ("explained_variance", "normalized_mse", "l0"):
            assert found["measured"][metric] == pytest.approx(expected["measured"][metric], rel=1e-5)
        assert found["measured"]["density_histogram"] == expected["measured"]["density_histogram"]
        if name == "batchtopk":
            assert found["threshold"] == pytest.approx(expected["threshold"])


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_first_does_for_all_is_known_to_all(fails: bool, tmp_path: Path):
    answers = ["KeyError", "FailedOnFirst", "FailedOnFirst"] if fails else ["of rank 0"] * 3
    assert run_together(3, 1, tmp_path, tasks.on_first, fails) == answers


def test_the_directions_drawn_are_those_of_one_process(tmp_path: Path):
    """More of them than are drawn at a time, of an odd width."""
    whole = tasks.drawn(Parallel.alone(), 2_500, 3)
    at_once = torch.randn(2_500, 3, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(whole, torch.nn.functional.normalize(at_once, dim=1), atol=1e-6)
    assert torch.equal(torch.cat(run_together(3, 1, tmp_path, tasks.drawn, 2_500, 3)), whole)


@pytest.mark.parametrize("dead", ["none", "some", "first", "all"])
@pytest.mark.parametrize(("n_ranks", "n_parts"), GRIDS)
def test_dead_features_are_revived_as_by_one_process(n_ranks: int, n_parts: int, dead: str, tmp_path: Path):
    masks = {"none": [], "some": [1, 4, 5, 9, 17, 21, 22], "first": [0, 2, 3], "all": list(range(23))}
    mask = torch.zeros(23, dtype=torch.bool).index_fill(0, torch.tensor(masks[dead], dtype=torch.int64), True)
    x, residual = normal(12, 5), normal(24, 5)[12:]
    expected = tasks.revived(Parallel.alone(), mask, x, residual)
    assert (int(expected["n_dead"]), int(expected["left"])) == (len(masks[dead]), 0)
    for found in run_together(n_ranks, n_parts, tmp_path, tasks.revived, mask, x, residual):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=name)
