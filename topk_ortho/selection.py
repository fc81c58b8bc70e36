"""When a streamed selection is exact, and what it returns.

**Certificate.** A backend streams the gram once and records *survivors*: pairs whose similarity exceeds a *bound*. The
bound starts at a guess, hoped to lie just under the k-th similarity, and rises whenever the records overflow: the k-th
of the pairs seen so far never exceeds the k-th of all, so what falls below it is not selected whatever follows. After
the pass the selection is exact if k pairs survived, or if the guess was no higher than the floor that the user asked
for. If neither holds, the guess was wrong: a second pass starts from the floor itself and cannot fail. Memory is
bounded by the capacity of the records plus one tile either way. The backend "triton" does not raise the bound in a
pass: where the guess was too high or too low, a radix select finds a bound that holds, in place of the second pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_ortho.definitions import Query, floor_of, similarity_of


class Selection(NamedTuple):
    """The selected pairs, padded with zeros to a size that the arguments of a call decide.

    The size is k. For a sparse x it is smaller where fewer pairs of features can meet; pairs of cosine 0 are then
    counted, and not listed.
    """

    cosines: Tensor
    """[size] signed cosines, float32, or float64 for float64 input"""
    rows: Tensor
    """int64 [size]"""
    cols: Tensor
    """int64 [size], rows < cols"""
    n_listed: Tensor
    """int64 [], how many of these are pairs and not padding"""
    n_selected: Tensor
    """int64 [], how many pairs are selected, those that are not listed among them"""
    threshold: Tensor
    """[] the k-th similarity; the floor in force, at least 0, if fewer than k listed pairs passed it"""
    tau: Tensor
    """[] the tau in force, -1 if there is none"""
    norms: Tensor
    """[N] column norms of x"""
    state: Tensor
    """[3] warm-start state for the next call; empty if none came in, or for a sparse x"""


def finish(
    cosines: Tensor,
    index: Tensor,
    query: Query,
    *,
    tau: float | Tensor | None,
    norms: Tensor,
    state: Tensor | None = None,
    size: int | None = None,
    n_zeros: int = 0,
) -> Selection:
    """Make a `Selection` of what a certified pass has kept, without waiting for the device.

    Parameters
    ----------
    cosines : Tensor, shape [n]
        Signed cosines, those of the first k pairs of the order before any others. A pair that is not above the floor
        becomes padding; NaN marks a place that holds no pair.
    index : Tensor, shape [n], int64
        ``row * N + col`` of each pair.
    query : Query
        What was asked for.
    tau : float, Tensor [] or None
        The tau in force.
    norms : Tensor, shape [N]
        Column norms of x.
    state : Tensor, optional
        Warm-start state for the next call.
    size : int, optional
        Size of the lists, k by default.
    n_zeros : int, default 0
        Pairs of cosine 0 that count, and are neither among the others nor to be listed.
    """
    size = query.k if size is None else size
    n_features = norms.numel()

    def number(value: float) -> Tensor:
        return torch.full((), value, dtype=cosines.dtype, device=cosines.device)

    if isinstance(tau, Tensor):
        tau_in_force, floor = tau.clone(), tau.clamp_min(floor_of(query))
    else:
        tau_in_force, floor = number(-1.0 if tau is None else tau), number(floor_of(query, tau))
    cosines, index = cosines[:size], index[:size]
    similarity = similarity_of(cosines, query.similarity)
    is_listed = similarity > floor
    n_listed = is_listed.sum()
    index = torch.where(is_listed, index, 0)
    rows = index.div(n_features, rounding_mode="floor")
    least = floor.clamp_min(0.0)
    padding = (0, size - cosines.numel())
    return Selection(
        cosines=pad(torch.where(is_listed, cosines, 0.0), padding),
        rows=pad(rows, padding),
        cols=pad(index - rows * n_features, padding),
        n_listed=n_listed,
        n_selected=(n_listed + n_zeros).clamp_max(query.k),
        threshold=torch.where(n_listed == query.k, similarity.min(), least) if cosines.numel() else least.clone(),
        tau=tau_in_force,
        norms=norms,
        state=norms.new_empty(0) if state is None else state,
    )
