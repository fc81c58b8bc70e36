"""On a GPU the programs of a launch run in any order: whatever the order, every public op gives the same bits.

The interpreter runs programs from the first to the last. Here it also runs them in other orders.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.conftest import use_case
from tests.inputs import activations, dyadic, normal, seeded
from topk_ortho import max_cosine_loss, topk_ortho_loss, topk_pairs
from topk_ortho.backends.registry import BACKENDS
from topk_ortho.kernels import launch, pair_gradient
from topk_ortho.kernels.radix_select import MOST_DIGITS

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU chooses the order of programs itself")

Order = Callable[[int], list[int]]
N, K = 58, 150


def last_first(n: int) -> list[int]:
    return list(range(n))[::-1]


def shuffled(seed: int, n: int) -> list[int]:
    return random.Random(seed).sample(range(n), n)


ORDERS: dict[str, Order] = {"last_first": last_first} | {f"shuffled_{i}": partial(shuffled, i) for i in range(3)}


@contextmanager
def programs_in(order: Order) -> Iterator[list[int]]:
    """Run the programs of every launch in this order; yields the numbers of programs of the launches."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    set_dim, set_place = builder.set_grid_dim, builder.set_grid_idx
    shape: tuple[int, ...] = ()
    places: list[int] = []
    sizes: list[int] = []

    def begin(self, *dims: int) -> None:
        nonlocal shape, places
        shape, places = dims, order(math.prod(dims))
        sizes.append(len(places))
        set_dim(self, *dims)

    def place(self, x: int, y: int, z: int) -> None:
        _, n_y, n_z = shape
        following = places[(x * n_y + y) * n_z + z]
        set_place(self, following // (n_y * n_z), following // n_z % n_y, following % n_z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", begin)
        patch.setattr(builder, "set_grid_idx", place)
        yield sizes


def assert_same_in_any_order(op: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What the op gives, equal to the bit in all orders."""
    expected = op()
    for order in ORDERS.values():
        with programs_in(order) as sizes:
            actual = op()
        assert max(sizes) > 1, "there is nothing to put in order"
        for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert ours.numpy().tobytes() == theirs.numpy().tobytes(), f"tensor {number}: {ours} is not {theirs}"
    return expected


@triton.jit
def _log_kernel(out_ptr, n_written_ptr):
    place = tl.load(n_written_ptr)
    tl.store(out_ptr + place, 10 * tl.program_id(0) + tl.program_id(1))
    tl.store(n_written_ptr, place + 1)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_programs_run_in_the_order(order):
    """Each of them once."""
    out, n_written = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with programs_in(order) as sizes:
        _log_kernel[(2, 3)](out, n_written)
    assert sizes == [6]
    in_order = [0, 1, 2, 10, 11, 12]
    assert out.tolist() == [in_order[i] for i in order(6)] != in_order


def selection(x: Tensor, k: int = K, guess: float = -1.0, backend: str = "triton", **arguments) -> list[Tensor]:
    """The pairs, and, at the end, the state for the next call."""
    state = torch.tensor([guess, 0.15, 0.0])
    pairs = topk_pairs(x, k=k, state=state, backend=backend, **arguments)
    return [pairs.rows, pairs.cols, pairs.values, pairs.threshold, state]


def with_gradient(op: Callable[..., Tensor], x: Tensor, **arguments) -> list[Tensor]:
    """A loss and its gradient."""
    x = x.clone().requires_grad_()
    loss = op(x, **arguments)
    loss.backward()
    return [loss.detach(), x.grad]


SELECTIONS = {
    "positive_bfloat16": partial(selection, normal(12, N, dtype=torch.bfloat16), guess=0.3, similarity="positive"),
    "adaptive_tau": partial(selection, normal(12, N), guess=0.45, tau="adaptive", n_std=1.5),
    "guess_from_a_sample": partial(selection, normal(12, N)),
    "guess_too_high": partial(selection, normal(12, N), guess=0.99),
    "ties_overflow": partial(selection, dyadic(4, N), k=560, guess=0.001),
    "moments_of_a_repair": partial(selection, normal(12, N), guess=0.001, tau="adaptive"),
    "huge_norms": partial(selection, normal(12, N) * 1e25),
}
"""Those from "guess_too_high" on fail in their first pass, or have none, and are repaired."""
PASSES_WITH_TIES = 3 + MOST_DIGITS
"""The one that failed, one for each digit, one that counts ties, and one that collects."""


@pytest.fixture
def _small_tiles(monkeypatch):
    """Ten tiles, which seven programs share; several programs list the pairs."""
    use_case("triton", monkeypatch)
    config = launch.TileConfig(block=16, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=7)
    for kind in ("half", "tf32", "ieee"):
        monkeypatch.setitem(launch.TILE_CONFIGS, ("interpreter", kind), config)
    monkeypatch.setattr("topk_ortho.kernels.ordered._BLOCK", 16)


@pytest.mark.usefixtures("_small_tiles")
class TestDense:
    """Passes over the gram, as they are and screened, their repair, maxima, and the gradient."""

    @pytest.mark.parametrize("name", SELECTIONS)
    def test_selection(self, name):
        *_, state = assert_same_in_any_order(SELECTIONS[name])
        is_repaired = list(SELECTIONS).index(name) >= list(SELECTIONS).index("guess_too_high")
        assert (state[2] > 1) == is_repaired, "not the passes that the case is about"
        assert (state[2] == PASSES_WITH_TIES) == (name == "ties_overflow")

    @pytest.mark.parametrize("guess", [0.5, 0.001], ids=["certified", "records_overflow"])
    def test_screened_selection(self, guess, monkeypatch):
        monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], least_screened_features=2))
        *_, state = assert_same_in_any_order(partial(selection, normal(12, N), k=80, guess=guess))
        assert (state[2] > 1) == (guess < 0.5)

    @pytest.mark.parametrize("guess", [0.3, 0.001], ids=["certified", "records_overflow"])
    def test_tiles_read_by_descriptors(self, guess, monkeypatch):
        config = replace(launch.TILE_CONFIGS["interpreter", "half"], block_col=8)
        monkeypatch.setitem(launch.DESCRIBED_CONFIGS, ("interpreter", "half"), config)
        x = normal(12, N, dtype=torch.bfloat16)
        *_, state = assert_same_in_any_order(partial(selection, x, guess=guess, similarity="positive"))
        assert (state[2] > 1) == (guess < 0.3)

    @pytest.mark.parametrize("segment", [1, 256], ids=["columns_are_shared", "columns_are_whole"])
    def test_loss(self, segment, monkeypatch):
        monkeypatch.setattr(pair_gradient, "SEGMENT", segment)
        loss = partial(with_gradient, topk_ortho_loss, k=K, backend="triton")
        assert_same_in_any_order(partial(loss, normal(12, N), priority=torch.arange(N).flip(0)))

    @pytest.mark.parametrize(
        ("x", "n_chunks"), [(dyadic(6, N), 3), (normal(12, N) * 1e25, 1)], ids=["ties_in_chunks", "huge_norms"]
    )
    def test_max_cosine(self, x, n_chunks):
        def loss() -> list[Tensor]:
            return with_gradient(max_cosine_loss, x, n_chunks=n_chunks, generator=seeded(0), backend="triton")

        assert_same_in_any_order(loss)


class TestSparse:
    """Products, their sums, also of runs in several blocks, and the way back."""

    X = activations(30, 6, seed=1)
    X[:, 2:4] = 1.0  # two features of every sample

    @pytest.fixture(autouse=True)
    def _on_kernels(self, monkeypatch):
        use_case("sparse_kernels", monkeypatch)
        monkeypatch.setattr("topk_ortho.kernels.coactivation._BLOCK_PRODUCT", 16)

    def test_selection(self):
        assert_same_in_any_order(partial(selection, self.X, k=10, backend="sparse"))

    def test_loss(self):
        loss = partial(with_gradient, topk_ortho_loss, k=10, backend="sparse", structural_zeros=True)
        assert_same_in_any_order(partial(loss, self.X))
