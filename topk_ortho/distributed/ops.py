"""The public ops over a process group: check together, select, attach the gradient."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.device import device_guard
from topk_ortho.custom_ops import refuse_nan
from topk_ortho.definitions import Precision, Query, Reduction, Similarity, Tau
from topk_ortho.distributed.dense import DenseColumns
from topk_ortho.distributed.gradient import sum_over_ranks
from topk_ortho.distributed.ranks import Facts, Ranks
from topk_ortho.distributed.sparse import SparseColumns
from topk_ortho.distributed.topk import SelectedHere
from topk_ortho.pairs import TopKPairs
from topk_ortho.sparse_features import SparseFeatures, is_dense
from topk_ortho.validation import (
    check_features,
    check_generator,
    check_n_chunks,
    check_state,
    check_word,
    in_columns,
    resolve_priority,
    resolve_query,
)


def topk_pairs(
    x: Tensor | SparseFeatures,
    fraction: float = 1e-3,
    *,
    dim: int = 1,
    group: Any = None,
    k: int | None = None,
    tau: Tau = None,
    n_std: float = 1.0,
    similarity: Similarity = "abs",
    priority: Tensor | None = None,
    precision: Precision = "highest",
    state: Tensor | None = None,
) -> TopKPairs:
    """`topk_ortho.topk_pairs` among the columns that the ranks of a process group hold together.

    Parameters
    ----------
    x : Tensor or SparseFeatures, shape [M, N_local], float16, bfloat16, float32 or float64
        The columns of this rank, dense or sparse as in `topk_ortho.topk_pairs`: those of rank 0 come first, then those
        of rank 1. The ranks may hold different numbers of columns, none too. Features of a sparse x are numbered in
        [0, N_local) on every rank.
    fraction : float, default 1e-3
        Share of the pairs of all columns, as in `topk_ortho.topk_pairs`.
    dim : {1, 0}
        Whether the features of this rank are columns of x or rows, as in `topk_ortho.topk_pairs`.
    group : ProcessGroup, optional
        The ranks; by default all processes.
    k, tau, n_std, similarity
        As in `topk_ortho.topk_pairs`, the same on all ranks. k is a number of pairs of all columns.
    priority : Tensor, shape [N_local], optional
        Of the columns of this rank, as in `topk_ortho.topk_pairs`.
    precision, state
        As in `topk_ortho.topk_pairs`. If states differ, that of rank 0 counts.

    Returns
    -------
    TopKPairs
        The selected pairs that this rank has found, by the numbers of their columns among all; every selected pair is
        listed by one rank. ``threshold``, ``tau``, ``n_features`` and ``k`` are those of all columns. ``values`` are
        differentiable: the backward pass, which all ranks must run, gives each the gradient of the sum over ranks.

    Raises
    ------
    RuntimeError
        If torch.distributed is not initialised.
    TypeError, ValueError
        As in `topk_ortho.topk_pairs`, on all ranks if on any; also if they call with different arguments, dtypes or
        numbers of rows, or if this process does not belong to the group.

    Notes
    -----
    The columns of a dense x are dealt out evenly and go round in a ring while the ranks compute. In a call a rank makes
    N**2 M / (2 R) multiply-adds and sends about N M / 2 numbers; in the backward pass it sends N M. It holds three
    shards of N / R columns beside its own part of x, with copies in float32 of two of them for bfloat16 and float16;
    the norms of all columns; and the pairs that it keeps, usually about 1.15 k / R, never more than 2 k + 2**14. The
    threshold is found by counting, so no rank gathers the pairs of all.

    The entries of a sparse x are few, and every rank gets all of them. Each makes a share of the products.
    """
    with _device_of(x):
        call, query, selected, cosines = _select(
            "topk_pairs", x, dim, group, priority, state,
            fraction=fraction, k=k, tau=tau, n_std=n_std, similarity=similarity, precision=precision,
        )  # fmt: skip
    threshold = selected.threshold.float()
    return TopKPairs(selected.rows, selected.cols, cosines.float(), threshold, selected.tau, call.n_features, query.k)


def topk_ortho_loss(
    x: Tensor | SparseFeatures,
    fraction: float = 1e-3,
    *,
    dim: int = 1,
    group: Any = None,
    k: int | None = None,
    tau: Tau = None,
    n_std: float = 1.0,
    similarity: Similarity = "abs",
    reduction: Reduction = "mean",
    priority: Tensor | None = None,
    precision: Precision = "highest",
    state: Tensor | None = None,
) -> Tensor:
    """`topk_ortho.topk_ortho_loss` of the columns that the ranks of a process group hold together.

    Parameters
    ----------
    x, fraction, dim, group, k, tau, n_std, similarity
        As in `topk_pairs`.
    reduction : {"mean", "sum"}
        As in `topk_ortho.topk_ortho_loss`.
    priority, precision, state
        As in `topk_pairs`.

    Returns
    -------
    Tensor, shape []
        The loss of all columns, the same on every rank; float32, float64 for float64 input. Its backward pass, which
        all ranks must run, gives each of them the gradient of the loss in its own columns. It is not to be summed or
        averaged over ranks.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `topk_pairs`.
    """
    with _device_of(x):
        call, _, selected, cosines = _select(
            "topk_ortho_loss", x, dim, group, priority, state, reduction,
            fraction=fraction, k=k, tau=tau, n_std=n_std, similarity=similarity, precision=precision,
        )  # fmt: skip
        loss = sum_over_ranks(cosines.square().sum(), call.ranks)
    return loss / selected.n_selected.clamp_min(1) if reduction == "mean" else loss


def max_cosine_loss(
    x: Tensor | SparseFeatures,
    n_chunks: int = 1,
    *,
    dim: int = 1,
    group: Any = None,
    generator: torch.Generator | None = None,
    precision: Precision = "highest",
) -> Tensor:
    """`topk_ortho.max_cosine_loss` of the columns that the ranks of a process group hold together.

    Parameters
    ----------
    x : Tensor or SparseFeatures, shape [M, N_local]
        As in `topk_pairs`.
    n_chunks : int, default 1
        Random chunks of all columns, as in `topk_ortho.max_cosine_loss`; a column meets the others of its chunk on
        whichever rank they are.
    dim : {1, 0}
        As in `topk_pairs`.
    group : ProcessGroup, optional
        As in `topk_pairs`.
    generator : torch.Generator, optional
        Draws the chunks; that of rank 0 counts, and the others advance like it.
    precision : {"highest", "high", "medium"}
        As in `topk_pairs`.

    Returns
    -------
    Tensor, shape []
        The loss of all columns, the same on every rank, with a backward pass as in `topk_ortho_loss`.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `topk_pairs`; also if `n_chunks` is out of range or `generator` is not a `torch.Generator`.

    Notes
    -----
    Chunks follow one another on the ranks. With fewer chunks than ranks, but more than one, some ranks compute more
    than others. For a sparse x every rank computes all.
    """
    with _device_of(x):
        call, places, partners, cosines = _nearest("max_cosine_loss", x, dim, n_chunks, group, generator, precision)
        cosines = call.columns.attach(places, partners, cosines)
        return sum_over_ranks(cosines.square().sum(), call.ranks) / call.n_features


def largest_cosines(
    x: Tensor | SparseFeatures, *, dim: int = 1, group: Any = None, precision: Precision = "highest"
) -> tuple[Tensor, Tensor]:
    """The largest signed cosine of every column to another one, where ranks hold the columns together.

    Parameters
    ----------
    x : Tensor or SparseFeatures, shape [M, N_local]
        As in `topk_pairs`.
    dim, group, precision
        As in `topk_pairs`.

    Returns
    -------
    features : Tensor, shape [n], int64
        Some columns by their numbers among all. Every column is listed by one rank, not always by the one that has it.
    cosines : Tensor, shape [n]
        The largest cosine of each; float32, float64 for float64 input. No gradient goes through them.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `topk_pairs`.
    """
    with _device_of(x):
        _, features, _, cosines = _nearest("largest_cosines", x, dim, 1, group, None, precision)
        return features, cosines


def _nearest(
    op: str,
    x: Tensor | SparseFeatures,
    dim: int,
    n_chunks: int,
    group: Any,
    generator: torch.Generator | None,
    precision: Precision,
) -> tuple["_Call", Tensor, Tensor, Tensor]:
    """The call, and (places, partners, cosines) of the most similar other column of the columns of this rank."""

    def check() -> Facts:
        check_generator(generator)
        return {}

    arguments = {"n_chunks": n_chunks, "precision": precision, "generator": _whether_given(generator)}
    call = _Call.of(op, x, dim, group, arguments, check)
    check_n_chunks(n_chunks, call.n_features)
    check_word("precision", precision, Precision)
    chunks = None
    if n_chunks > 1:
        device = x.device if generator is None else generator.device
        permutation = torch.randperm(call.n_features, generator=generator, device=device).to(x.device)
        call.ranks.broadcast(permutation)
        chunks = [chunk.sort().values for chunk in permutation.tensor_split(n_chunks)]
    call.columns.join(call.ranks, call.facts, chunks)
    with torch.no_grad():
        return call, *call.columns.nearest(precision)


class _Call(NamedTuple):
    """A call that all ranks make in the same way."""

    ranks: Ranks
    columns: DenseColumns | SparseColumns
    facts: list[Facts]
    """What the ranks have told of themselves"""
    n_features: int
    """Columns of all ranks"""

    @classmethod
    def of(
        cls,
        op: str,
        x: Tensor | SparseFeatures,
        dim: int,
        group: Any,
        arguments: dict[str, Any],
        check: Callable[[], Facts],
    ) -> "_Call":
        """Check what this rank passes, and that all ranks pass the same."""
        ranks = Ranks(group)
        columns: DenseColumns | SparseColumns | None = None

        def describe() -> tuple[Facts, Facts]:
            nonlocal columns
            check_features(x, dim, least_features=0)
            own = check()
            columns = DenseColumns(in_columns(x, dim)) if is_dense(x) else SparseColumns(x)
            values = x.values if isinstance(x, SparseFeatures) else x
            shared = {
                "the op that is called": op,
                "dtype of x": values.dtype,
                "form of x": "dense" if is_dense(x) else "sparse",
                "number of rows of x, or of its columns with dim=0,": in_columns(x, dim).shape[0],
                "type of the device of x": x.device.type,
                "whether x needs a gradient": torch.is_grad_enabled() and values.requires_grad,
                **{name: arg if isinstance(arg, (Number, str)) else repr(arg) for name, arg in arguments.items()},
            }
            return shared, own | columns.facts()

        facts = ranks.agree(describe)
        assert columns is not None
        n_features = sum(fact["columns"] for fact in facts)
        if n_features < 2:
            raise ValueError(f"x must have at least 2 columns on all ranks together, got {n_features}")
        return cls(ranks, columns, facts, n_features)


class _Answer(NamedTuple):
    """What a selection is made of and for."""

    call: _Call
    query: Query
    selected: SelectedHere
    cosines: Tensor
    """[p] of the selected pairs of this rank, differentiable in x"""


def _select(
    op: str,
    x: Tensor | SparseFeatures,
    dim: int,
    group: Any,
    priority: Tensor | None,
    state: Tensor | None,
    reduction: Reduction = "mean",
    **arguments: Any,
) -> _Answer:
    """Check, and select among the columns of all ranks."""
    own_priority = None

    def check() -> Facts:
        nonlocal own_priority
        check_word("reduction", reduction, Reduction)
        own_priority = resolve_priority(priority, x.shape[dim], x.device)
        refuse_nan(own_priority)
        check_state(state, x.device)
        return {"floating priority": own_priority is not None and own_priority.is_floating_point()}

    given = {"priority": _whether_given(priority), "state": _whether_given(state)}
    call = _Call.of(op, x, dim, group, arguments | given | {"reduction": reduction}, check)
    query = resolve_query(call.n_features, **arguments)
    call.columns.join(call.ranks, call.facts)
    with torch.no_grad():
        selected = call.columns.select(query, state)
        of_all = None
        if own_priority is not None:
            is_floating = any(fact["floating priority"] for fact in call.facts)
            wide = own_priority.double() if is_floating else own_priority.long()
            of_all = call.ranks.gather(wide, call.columns.first_given, call.n_features)
    cosines = call.columns.attach(selected.rows, selected.cols, selected.cosines, of_all)
    return _Answer(call, query, selected, cosines)


def _whether_given(argument: Any) -> str:
    return "none" if argument is None else "given"


def _device_of(x: Any) -> AbstractContextManager[object]:
    """Make the GPU of x the current one, if it is on one: collectives of objects go there."""
    return device_guard(x.device) if isinstance(x, (Tensor, SparseFeatures)) else nullcontext()
