"""The ops over 1 to 4 processes against the float64 oracle on all the columns, and against one process."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import topk_ortho
from tests import oracle
from tests.distributed.ranks import Pool
from tests.inputs import EDGES, FLOATING, activations, dyadic, normal, seeded
from tests.tolerances import (
    assert_gradient,
    assert_selection,
    assert_within,
    float64,
    gradient_bound,
    loss_bound,
)
from topk_ortho import SparseFeatures, TopKPairs, distributed, initial_state
from topk_ortho.backends.tile_stream import TileStream
from topk_ortho.definitions import first_in_order

N_RANKS = [1, 2, 3, 4]

# what a rank holds of N columns
SPLITS = {
    "even": lambda n, size: [n * (rank + 1) // size - n * rank // size for rank in range(size)],
    "all_on_the_first": lambda n, size: [n] + [0] * (size - 1),
    "most_on_the_last": lambda n, size: [1] * (size - 1) + [n - size + 1],
}


def columns_of(x: Tensor, group: dist.ProcessGroup, split: str) -> slice:
    sizes = SPLITS[split](x.shape[1], dist.get_world_size(group))
    start = sum(sizes[: dist.get_rank(group)])
    return slice(start, start + sizes[dist.get_rank(group)])


def form_of(x: Tensor, form: str) -> tuple[Any, Tensor]:
    """x in a form that the ops take, and the leaf that gets its gradient."""
    if form == "SparseFeatures":
        sparse = SparseFeatures.from_dense(x)
        values = sparse.values.clone().requires_grad_()
        return sparse._replace(values=values), values
    if form == "sparse_csr":
        leaf = x.to_sparse_csr().requires_grad_()
        return leaf, leaf
    leaf = (x.T.contiguous().T if form == "transposed" else x.clone()).requires_grad_()
    return leaf, leaf


def dense_gradient(x: Any, leaf: Tensor, n: int) -> Tensor:
    if isinstance(x, SparseFeatures):
        return SparseFeatures(x.indices, leaf.grad, n).to_dense()
    return leaf.grad.to_dense()


def loss_and_gradient(
    group: dist.ProcessGroup, x: Tensor, split: str, form: str, priority: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    own = columns_of(x, group, split)
    mine, leaf = form_of(x[:, own], form)
    loss = distributed.topk_ortho_loss(
        mine, group=group, priority=None if priority is None else priority[own], **arguments
    )
    loss.backward()
    return loss.detach(), dense_gradient(mine, leaf, own.stop - own.start)


def selected(group: dist.ProcessGroup, x: Tensor, split: str, form: str, arguments: dict[str, Any]) -> TopKPairs:
    mine, _ = form_of(x[:, columns_of(x, group, split)], form)
    pairs = distributed.topk_pairs(mine, group=group, **arguments)
    return pairs._replace(values=pairs.values.detach())


def max_cosine_and_gradient(
    group: dist.ProcessGroup, x: Tensor, split: str, form: str, n_chunks: int
) -> tuple[Tensor, Tensor]:
    own = columns_of(x, group, split)
    mine, leaf = form_of(x[:, own], form)
    loss = distributed.max_cosine_loss(mine, n_chunks, group=group, generator=seeded(4))
    loss.backward()
    return loss.detach(), dense_gradient(mine, leaf, own.stop - own.start)


def together(parts: list[TopKPairs], similarity: str = "abs") -> TopKPairs:
    """The pairs of all ranks in the order of one."""
    first = parts[0]
    for part in parts:
        assert torch.equal(part.threshold, first.threshold)
        assert part[4:] == first[4:]
        ordered, _ = first_in_order(part.values, part.rows * part.n_features + part.cols, similarity, part.rows.numel())
        assert torch.equal(part.values, ordered)
    values, index = (
        torch.cat([part.values for part in parts]),
        torch.cat([part.rows * part.n_features + part.cols for part in parts]),
    )
    values, index = first_in_order(values, index, similarity, index.numel())
    return first._replace(rows=index // first.n_features, cols=index % first.n_features, values=values)


QUERIES: dict[str, dict[str, Any]] = {
    "fraction": {"fraction": 0.05},
    "odd_k": {"k": 17},
    "one": {"k": 1},
    "all": {"fraction": 1.0},
    "positive": {"fraction": 0.2, "similarity": "positive"},
    "fixed_tau": {"fraction": 0.5, "tau": 0.2},
    "adaptive_tau": {"fraction": 0.5, "tau": "adaptive", "n_std": 0.7},
    "tau_above_all": {"fraction": 0.5, "tau": 0.9999},
    "sum": {"fraction": 0.05, "reduction": "sum"},
}
WIDE = normal(24, 211)


def expected_of(x: Tensor, arguments: dict[str, Any]) -> tuple[oracle.Selected, str]:
    named = dict(arguments)
    fraction, reduction = named.pop("fraction", 1e-3), named.pop("reduction", "mean")
    k = named.pop("k", None) or oracle.k_of(x.shape[1], fraction)
    return oracle.select(float64(x), k, **named), reduction


class TestTopK:
    @pytest.mark.parametrize("form", ["dense", "SparseFeatures"])
    @pytest.mark.parametrize("query", QUERIES)
    @pytest.mark.parametrize("n_ranks", N_RANKS)
    def test_selection_loss_and_gradient(self, ranks: Pool, n_ranks, query, form):
        x = activations(24, 61, dtype=torch.float64) if form == "SparseFeatures" else normal(24, 61)
        arguments = QUERIES[query]
        chosen = {name: value for name, value in arguments.items() if name != "reduction"}
        pairs = together(ranks.run(n_ranks, selected, x, "even", form, chosen), arguments.get("similarity", "abs"))
        expected, reduction = expected_of(x, arguments)
        if form == "dense":
            assert_selection(pairs, x, k=pairs.k, **{n: v for n, v in chosen.items() if n not in ("fraction", "k")})
        else:  # pairs of cosine 0 are not listed
            one = topk_ortho.topk_pairs(SparseFeatures.from_dense(x), **chosen)
            for field in ("rows", "cols"):
                assert torch.equal(getattr(pairs, field), getattr(one, field))
            torch.testing.assert_close(pairs.values, one.values)
            torch.testing.assert_close(pairs.threshold, one.threshold)
            assert pairs.tau == (one.tau and pytest.approx(one.tau, rel=1e-12))

        losses, gradients = zip(*ranks.run(n_ranks, loss_and_gradient, x, "even", form, None, arguments), strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        n = len(expected.rows)
        assert_within(
            actual=losses[0],
            expected=oracle.loss_of(expected.values, reduction),
            bound=loss_bound(x, n, reduction),
        )
        scale = 1.0 if reduction == "sum" else 1 / max(1, n)
        gradient = oracle.loss_gradient(float64(x), expected.rows, expected.cols, reduction)
        if form == "SparseFeatures":
            gradient = np.where(float64(x) == 0, 0, gradient)
        assert_gradient(
            actual=torch.cat(gradients, dim=1),
            expected=gradient,
            bound=gradient_bound(x, expected.rows, expected.cols, scale),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize("n_ranks", [2, 3, 4])
    def test_any_split(self, ranks: Pool, n_ranks, split):
        """Columns come back to the rank that they were given to, and priority goes with its column."""
        priority = torch.arange(211) % 7
        for form, x in (("dense", WIDE), ("transposed", WIDE), ("SparseFeatures", activations(24, 211))):
            losses, gradients = zip(
                *ranks.run(n_ranks, loss_and_gradient, x, split, form, priority, {"fraction": 0.03}), strict=True
            )
            one, leaf = form_of(x, form)
            loss = topk_ortho.topk_ortho_loss(one, 0.03, priority=priority)
            loss.backward()
            torch.testing.assert_close(losses[-1], loss.detach(), rtol=1e-5, atol=0)
            expected = dense_gradient(one, leaf, 211)
            torch.testing.assert_close(torch.cat(gradients, dim=1), expected, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("dtype", FLOATING, ids=str)
    @pytest.mark.parametrize("n_ranks", [2, 3])
    def test_ties_are_decided_as_in_one_process(self, ranks: Pool, n_ranks, dtype):
        """Every cosine is a multiple of 1/4, so that the cut falls among many equal ones."""
        x = dyadic(16, 50, dtype=dtype)
        for k in (1, 40, 333):
            pairs = together(ranks.run(n_ranks, selected, x, "most_on_the_last", "dense", {"k": k}))
            expected = oracle.select(float64(x), k)
            assert pairs.rows.tolist() == expected.rows.tolist()
            assert pairs.cols.tolist() == expected.cols.tolist()
            assert pairs.values.tolist() == expected.values.tolist()

    @pytest.mark.parametrize("edge", EDGES)
    def test_edges(self, ranks: Pool, edge):
        x = EDGES[edge]
        k = max(1, x.shape[1] * (x.shape[1] - 1) // 5)
        pairs = together(ranks.run(3, selected, x, "most_on_the_last", "dense", {"k": k}))
        assert_selection(pairs, x, k=k)
        _, gradients = zip(
            *ranks.run(3, loss_and_gradient, x, "most_on_the_last", "dense", None, {"k": k}), strict=True
        )
        rows, cols = pairs.rows.numpy(), pairs.cols.numpy()
        assert_gradient(
            actual=torch.cat(gradients, dim=1),
            expected=oracle.loss_gradient(float64(x), rows, cols, "mean"),
            bound=gradient_bound(x, rows, cols, 1 / k),
            dtype=x.dtype,
        )

    def test_norms_at_the_ends_of_their_range(self, ranks: Pool):
        """Just below the least that is divided by, and so large that columns are scaled down."""
        x = normal(12, 37)
        for column, norm in ((8, 7e-13), (9, 1.5e38)):
            x[:, column] *= norm / x[:, column].norm()
        k = 300
        pairs = together(ranks.run(3, selected, x, "most_on_the_last", "dense", {"k": k}))
        assert_selection(pairs, x, k=k)
        _, gradients = zip(
            *ranks.run(3, loss_and_gradient, x, "most_on_the_last", "dense", None, {"k": k}), strict=True
        )
        leaf = x.clone().requires_grad_()
        topk_ortho.topk_ortho_loss(leaf, k=k, backend="naive").backward()
        actual, expected = torch.cat(gradients, dim=1).double(), leaf.grad.double()
        scale = expected.abs().amax(dim=0)
        assert (scale > 0).all()
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=2e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision(self, ranks: Pool, dtype):
        x = normal(24, 61, dtype=dtype)
        _, gradients = zip(
            *ranks.run(3, loss_and_gradient, x, "most_on_the_last", "dense", None, {"fraction": 0.05}), strict=True
        )
        expected, reduction = expected_of(x, {"fraction": 0.05})
        assert_gradient(
            actual=torch.cat(gradients, dim=1),
            expected=oracle.loss_gradient(float64(x), expected.rows, expected.cols, reduction),
            bound=gradient_bound(x, expected.rows, expected.cols, 1 / len(expected.rows)),
            dtype=dtype,
        )

    @pytest.mark.parametrize("as_list", [False, True])
    def test_priorities_of_different_dtypes(self, ranks: Pool, as_list):
        """An empty list is floating, whatever the others are."""
        x, priority = normal(24, 61), torch.arange(61) % 3
        _, gradients = zip(*ranks.run(3, _gradient_of_mixed_priorities, x, priority, as_list), strict=True)
        leaf = x.clone().requires_grad_()
        topk_ortho.topk_ortho_loss(leaf, 0.1, priority=priority).backward()
        torch.testing.assert_close(torch.cat(gradients, dim=1), leaf.grad, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("tau", [None, "adaptive"])
    def test_a_wrong_guess_is_repaired(self, ranks: Pool, tau):
        """A state whose guess is above everything leads to a second pass, and to a guess that holds."""
        results = ranks.run(3, _selected_again_and_again, WIDE, [0.999, 0.15, 0.0], {"fraction": 0.05, "tau": tau})
        pairs, states = zip(*results, strict=True)
        assert_selection(together([first for first, _ in pairs]), WIDE, k=oracle.k_of(211, 0.05), tau=tau)
        assert_selection(together([second for _, second in pairs]), WIDE, k=oracle.k_of(211, 0.05), tau=tau)
        assert all(state == states[0] for state in states)
        assert [passes for _, _, passes in states[0]] == [2, 1]

    @pytest.mark.parametrize("n", [20, 211])
    def test_a_state_that_nobody_initialised(self, ranks: Pool, n):
        x = normal(24, n)
        results = ranks.run(2, _selected_again_and_again, x, [float("nan")] * 3, {"k": 15})
        for call in (0, 1):
            assert_selection(together([pairs[call] for pairs, _ in results]), x, k=15)

    def test_states_that_differ(self, ranks: Pool):
        """Restored on the first rank alone: its state counts, or the ranks would part ways."""
        results = ranks.run(4, _selected_again_and_again, WIDE, "own", {"fraction": 0.05})
        assert_selection(together([second for (_, second), _ in results]), WIDE, k=oracle.k_of(211, 0.05))
        assert all(states == results[0][1] for _, states in results)

    def test_without_gradient(self, ranks: Pool):
        pairs = together(ranks.run(3, _selected_without_gradient, WIDE))
        assert_selection(pairs, WIDE, k=oracle.k_of(211, 0.05))

    def test_nothing_is_active(self, ranks: Pool):
        x = torch.zeros(5, 30)
        losses, gradients = zip(
            *ranks.run(3, loss_and_gradient, x, "even", "SparseFeatures", None, {"fraction": 0.1}), strict=True
        )
        assert [loss.item() for loss in losses] == [0.0] * 3
        assert not torch.cat(gradients, dim=1).any()


def _selected_again_and_again(
    group: dist.ProcessGroup, x: Tensor, state: list[float] | str, arguments: dict[str, Any]
) -> tuple[list[TopKPairs], list[list[float]]]:
    """Two calls from a state, or from one that each rank has for itself; the pairs, and the states after them."""
    rank = dist.get_rank(group)
    numbers = [0.1 * rank, 0.1 + 0.2 * rank, 0.0] if state == "own" else state
    tensor, pairs, states = torch.tensor(numbers), [], []
    for _ in range(2):
        pairs.append(distributed.topk_pairs(x[:, columns_of(x, group, "even")], group=group, state=tensor, **arguments))
        states.append(tensor.tolist())
    return pairs, states


def _gradient_of_mixed_priorities(
    group: dist.ProcessGroup, x: Tensor, priority: Tensor, as_list: bool
) -> tuple[None, Tensor]:
    own = columns_of(x, group, "all_on_the_first" if as_list else "even")
    mine: Any = (
        priority[own].tolist()
        if as_list
        else priority[own].to([torch.int64, torch.float32, torch.uint8][dist.get_rank(group)])
    )
    leaf = x[:, own].clone().requires_grad_()
    distributed.topk_ortho_loss(leaf, 0.1, group=group, priority=mine).backward()
    return None, leaf.grad


def _selected_without_gradient(group: dist.ProcessGroup, x: Tensor) -> TopKPairs:
    with torch.no_grad():
        leaf = x[:, columns_of(x, group, "even")].clone().requires_grad_()
        pairs = distributed.topk_pairs(leaf, 0.05, group=group)
    assert not pairs.values.requires_grad
    return pairs


class TestMaxCosine:
    @pytest.mark.parametrize("form", ["dense", "SparseFeatures"])
    @pytest.mark.parametrize("n_chunks", [1, 2, 7])
    @pytest.mark.parametrize("n_ranks", N_RANKS)
    def test_loss_and_gradient(self, ranks: Pool, n_ranks, n_chunks, form):
        x = activations(24, 61) - (form == "dense") * 0.1
        split = "most_on_the_last" if n_ranks == 3 else "even"
        losses, gradients = zip(*ranks.run(n_ranks, max_cosine_and_gradient, x, split, form, n_chunks), strict=True)
        permutation = torch.randperm(61, generator=seeded(4))
        chunks = [chunk.tolist() for chunk in permutation.tensor_split(n_chunks)]
        cosines, partners = oracle.max_cosines(float64(x), chunks if n_chunks > 1 else None)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert_within(actual=losses[0], expected=float(np.mean(cosines**2)), bound=loss_bound(x, 61))
        gradient = oracle.max_cosine_gradient(float64(x), partners)
        if form == "SparseFeatures":
            gradient = np.where(float64(x) == 0, 0, gradient)
        assert_gradient(
            actual=torch.cat(gradients, dim=1),
            expected=gradient,
            bound=gradient_bound(x, np.arange(61), partners, 1 / 61),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("form", ["dense", "SparseFeatures"])
    @pytest.mark.parametrize("n_ranks", N_RANKS)
    def test_the_largest_cosine_of_every_column(self, ranks: Pool, n_ranks, form):
        x = activations(24, 61)
        features, cosines = zip(*ranks.run(n_ranks, _largest_cosines, x, form), strict=True)
        assert sorted(torch.cat(features).tolist()) == list(range(61))
        expected, _ = oracle.max_cosines(float64(x))
        np.testing.assert_allclose(torch.cat(cosines), expected[torch.cat(features)], atol=1e-6)

    @pytest.mark.parametrize("n_ranks", N_RANKS)
    def test_the_lowest_of_equal_partners(self, ranks: Pool, n_ranks):
        x = dyadic(16, 50)
        _, gradients = zip(*ranks.run(n_ranks, max_cosine_and_gradient, x, "even", "dense", 1), strict=True)
        leaf = x.clone().requires_grad_()
        topk_ortho.max_cosine_loss(leaf, backend="naive").backward()
        torch.testing.assert_close(torch.cat(gradients, dim=1), leaf.grad, rtol=1e-5, atol=1e-7)


def _error_of(group: dist.ProcessGroup, op: str, odd_one: dict[str, Any], others: dict[str, Any]) -> str:
    arguments = odd_one if dist.get_rank(group) == 1 else others
    x = arguments.pop("x")
    try:
        getattr(distributed, arguments.pop("op", op))(x, group=group, **arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


NAN = normal(5, 8)
NAN[2, 6] = torch.nan
DIFFERENCES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dtype": ("topk_pairs", {"x": normal(5, 8).double()}, "dtype of x must be the same on all ranks"),
    "rows": (
        "topk_pairs",
        {"x": normal(6, 8)},
        "must be the same on all ranks; rank 0 has 5, rank 1",
    ),
    "fraction": ("topk_pairs", {"x": normal(5, 8), "fraction": 0.5}, "fraction must be the same on all ranks"),
    "state": ("topk_pairs", {"x": normal(5, 8), "state": initial_state()}, "state must be the same on all ranks"),
    "op": ("topk_pairs", {"x": normal(5, 8), "op": "topk_ortho_loss"}, "the op that is called must be the same"),
    "gradient": (
        "topk_ortho_loss",
        {"x": normal(5, 8).requires_grad_()},
        "whether x needs a gradient must be the same",
    ),
    "form": ("topk_pairs", {"x": SparseFeatures.from_dense(normal(5, 8))}, "form of x must be the same on all ranks"),
    "nan": ("topk_pairs", {"x": NAN}, "ValueError: rank 1: x has 1 column with NaN or Inf: 6"),
    "vector": ("topk_pairs", {"x": normal(5, 8)[0]}, "ValueError: rank 1: x must be 2-D"),
    "not_a_tensor": ("topk_pairs", {"x": "x"}, "TypeError: rank 1: x must be a torch.Tensor"),
    "priority": ("topk_pairs", {"x": normal(5, 8), "priority": torch.ones(3)}, "ValueError: rank 1: priority must"),
    "generator": ("max_cosine_loss", {"x": normal(5, 8), "generator": 3}, "TypeError: rank 1: generator must be"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", DIFFERENCES)
    def test_all_ranks_refuse_what_one_does_otherwise(self, ranks: Pool, case):
        op, odd_one, message = DIFFERENCES[case]
        errors = ranks.run(3, _error_of, op, odd_one, {"x": normal(5, 8)})
        assert len(set(errors)) == 1
        assert message in errors[0]

    def test_arguments_are_checked_against_all_columns(self, ranks: Pool):
        same: dict[str, Any] = {"x": normal(5, 8), "k": 277}
        assert set(ranks.run(3, _error_of, "topk_pairs", same, same)) == {
            "ValueError: k must be in [1, 276], the pairs of 24 columns; got 277"
        }
        same = {"x": normal(5, 8), "n_chunks": 13}
        assert "n_chunks must be in [1, 12]" in ranks.run(3, _error_of, "max_cosine_loss", same, same)[0]
        same = {"x": normal(5, 0)}
        assert "at least 2 columns on all ranks together" in ranks.run(3, _error_of, "topk_pairs", same, same)[0]

    def test_a_group_of_others(self, ranks: Pool):
        assert set(ranks.run(4, _error_outside)) == {"none", "ValueError: group must be a process group that this"}

    def test_without_a_process_group(self):
        with pytest.raises(RuntimeError, match="torchrun"):
            distributed.topk_pairs(normal(3, 4))


def _error_outside(group: dist.ProcessGroup) -> str:
    inside = dist.new_group([0])
    try:
        distributed.topk_pairs(normal(5, 8), group=inside)
    except ValueError as error:
        return f"ValueError: {error}"[:51]
    return "none"


def _largest_cosines(group: dist.ProcessGroup, x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    mine, _ = form_of(x[:, columns_of(x, group, "most_on_the_last")], form)
    features, cosines = distributed.largest_cosines(mine, group=group)
    assert not cosines.requires_grad
    return features, cosines


def _pairs_computed(group: dist.ProcessGroup, x: Tensor) -> int:
    """How many pairs this rank has multiplied in one selection."""
    counts, add = [], TileStream.add

    def counted(stream, row, col, products, norms, *, is_diagonal):
        n_rows, n_cols = products.shape
        counts.append(int(torch.ones(n_rows, n_cols).triu(1).sum()) if is_diagonal else n_rows * n_cols)
        add(stream, row, col, products, norms, is_diagonal=is_diagonal)

    TileStream.add = counted
    try:
        distributed.topk_pairs(x[:, columns_of(x, group, "even")], 0.05, group=group, state=initial_state())
    finally:
        TileStream.add = add
    return sum(counts)


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_every_pair_is_multiplied_once_and_ranks_have_equal_shares(n_ranks: int, ranks: Pool):
    """Within 5%, where the columns are many more than the ranks."""
    n = 600
    shares = ranks.run(n_ranks, _pairs_computed, normal(3, n))
    assert sum(shares) == n * (n - 1) // 2
    assert max(shares) <= 1.05 * sum(shares) / n_ranks
