"""The most similar pairs of an x that changes slowly, without comparing all its columns at every call.

A *refresh* selects exactly, as `topk_pairs` does, more pairs than are asked for: the *candidates*. Calls in between
compare the candidates alone, O(k M) in place of O(N**2 M), and take the k most similar of them. What they can miss is a
pair that was no candidate and has become one of the k most similar since. How far columns have moved tells when that is
to be expected. With x_hat the columns divided by their lengths, and r those at the refresh, column i has moved by
d_i = ||x_hat_i - r_i||.

**Adaptive.** A refresh is due when columns have moved by more than `reach` on average, of those that have moved by less
than `JUMP`. Then it is counted how many of the exact pairs are among the old candidates. A pair is missed that was
behind the candidates by a gap and has come closer by more than that. If cosines have changed by normally distributed
amounts, in proportion to how far columns have moved, then the share of pairs that are missed tells how many standard
deviations the gap is, and from this follows the `reach` at which the share that may be missed is expected. Columns that
have moved by more than `JUMP`, such as one that was resampled, are compared with all others at once.

Most calls do not even compare all candidates, but a *shortlist* of those that were the most similar when all of them
were last compared. How many calls a shortlist lasts follows in the same way from the pairs that it had missed in the
end. Candidates and shortlist may each miss a quarter of what may be missed, because what is measured scatters.

**Certified.** As the columns have length 1,

    |x_hat_i . x_hat_j - r_i . r_j| <= d_i + d_j + d_i d_j

No pair that was no candidate was more similar than the last candidate. So where such a pair has overtaken the k-th, one
of its columns has moved far. These columns are compared with all others; if they are more than an eighth of all, it is
time for a refresh. The selection is always exact.
"""

import math
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from topk_ortho import custom_ops
from topk_ortho.backends.listed_pairs import cosines_of
from topk_ortho.backends.norms import column_norms, directions, in_range
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.backends.registry import resolve_backend
from topk_ortho.definitions import (
    BackendName,
    Precision,
    Query,
    Similarity,
    Tau,
    first_in_order,
    first_unsorted,
    floor_of,
    n_pairs,
    similarity_of,
)
from topk_ortho.pairs import TopKPairs
from topk_ortho.selection import Selection
from topk_ortho.sparse_features import SparseFeatures, is_dense
from topk_ortho.validation import check_features, check_number, check_word, in_columns, resolve_priority, resolve_query
from topk_ortho.warm_start import initial_state

Refresh = Literal["adaptive", "certified"]

SHORT = 1.5
"""Size of the shortlist, as a multiple of k"""
JUMP = 0.5
"""How far a column may have moved before an adaptive selection compares it with all others"""
_MOST_MOVED = 0.125
"""Share of the columns up to which those that have moved far are compared with all"""
_PRODUCTS = 2**22
"""Cosines that are held at a time for these"""
_GATHERED_ELEMENTS = 2**25
"""Elements of x that are gathered at a time for the pairs"""
_CACHED_ELEMENTS = 2**18
"""Elements that stay in the cache of a CPU's core"""
_LEAST_STEP = 0.25
"""Share of the distance they have moved that columns may move until the next refresh, however many pairs were missed"""
_SINCE_REFRESH, _BETWEEN_REFRESHES, _AGE, _LIFE, _KIND = 0, 1, 2, 3, 4
"""Places in the schedule, see there; age and life are those of the shortlist"""
_Z = 1.959964  # 97.5% quantile of the normal distribution


_Found = tuple[Tensor, Tensor]
"""Cosines of selected pairs, in any order, and the index ``row * N + col`` of each"""


class _Listed(NamedTuple):
    """Selected pairs."""

    rows: Tensor
    cols: Tensor
    cosines: Tensor
    """[p] float32, float64 for float64 input; differentiable in x"""
    query: Query

    @property
    def threshold(self) -> Tensor:
        """The least similarity [] of them or, where they are fewer than k, the floor that others do not pass."""
        if self.rows.numel() == self.query.k:
            return similarity_of(self.cosines.detach(), self.query.similarity).min()
        return self.cosines.new_tensor(max(0.0, floor_of(self.query)))


class RefreshedPairs(nn.Module):
    """`topk_pairs` of an x that changes slowly from call to call, such as a decoder in training.

    Parameters
    ----------
    fraction : float, default 1e-3
        As in `topk_pairs`, like `dim`, `k`, `similarity`, `backend` and `precision`; checked at the first call.
    dim : {1, 0}
        Whether features are columns of x or rows.
    k : int, optional
        Number of pairs; replaces `fraction`.
    tau : None or float in [0, 1)
        A pair counts only if its similarity is above it. An adaptive tau depends on all pairs, so it is refused.
    similarity : {"abs", "positive"}
        How pairs are ordered.
    refresh : {"adaptive", "certified"}
        When all pairs are compared: as often as the measured recall asks for, or wherever it cannot be excluded that
        the selection has changed beyond the candidates, so that it is always exact.
    recall : float in (0, 1), default 0.99
        The share of the exact selection that "adaptive" is to give. The next refresh is planned, by what was measured
        at the last one, for when half of what may be missed is expected to be missed. This is no guarantee for the
        calls in between. The attribute `recall` is what was measured.
    margin : float, at least 1, default 4.0
        Number of candidates, as a multiple of k. More of them last longer, and take more time to compare.
    backend, precision
        As in `topk_pairs`, for the refreshes.

    Attributes
    ----------
    recall : float
        Share of the exact selection that was found, at the last refresh that was due, by what would have been compared
        in its place: the shortlist, or all candidates.
    recall_interval : (float, float)
        Its 95% interval.
    interval : int
        Calls from one refresh to the next.
    candidates : Tensor, int64 [c]
        The candidates, each as ``row * N + col``, ascending. This and what follows are buffers, which are saved with
        the module.
    shortlist : Tensor, int64 [s]
        Those of them that "adaptive" compares at most calls, ascending.
    reference : Tensor, shape [N, M]
        The columns at the refresh, divided by their lengths.
    cut : Tensor, shape []
        Similarity that no other pair exceeded then.
    reach : Tensor, shape []
        How far columns may move on average until the next refresh ("adaptive").
    schedule : Tensor, int64 [6]
        Calls since the refresh; calls between the last two; calls since the shortlist was made; calls after which
        there is to be another; how many candidates were asked for; 1 if `similarity` was "abs" then, else 0.
    audit : Tensor, int64 [2]
        Pairs of the exact selection that were found at the last refresh that was due, and how many there were.
    state : Tensor, float32 [3]
        Warm-start state of the refreshes.

    Notes
    -----
    A refresh takes the time of `topk_pairs` for ``margin * k`` pairs. Every other call takes ``margin * k * M``
    multiply-adds, with a shortlist ``1.5 * k * M``, a few passes over x, and the products with all others of the
    columns that have moved far. Memory is up to five copies of x, in the dtype of its products, one of them between the
    calls, beside some twenty bytes for every candidate.

    Examples
    --------
    >>> select = RefreshedPairs(k=1, refresh="certified")
    >>> pairs = select(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    >>> pairs.rows.tolist(), pairs.cols.tolist()
    ([0], [2])
    """

    candidates: Tensor
    shortlist: Tensor
    reference: Tensor
    cut: Tensor
    reach: Tensor
    schedule: Tensor
    audit: Tensor
    state: Tensor

    def __init__(
        self,
        fraction: float = 1e-3,
        *,
        dim: int = 1,
        k: int | None = None,
        tau: Tau = None,
        similarity: Similarity = "abs",
        refresh: Refresh = "adaptive",
        recall: float = 0.99,
        margin: float = 4.0,
        backend: BackendName = "auto",
        precision: Precision = "highest",
    ):
        super().__init__()
        check_word("refresh", refresh, Refresh)
        check_number("recall", recall)
        check_number("margin", margin)
        if not 0 < recall < 1:
            raise ValueError(f"recall must be in (0, 1), got {recall}")
        if not 1 <= margin < math.inf:
            raise ValueError(f"margin must be at least 1, got {margin}")
        _refuse_adaptive(tau)
        self.fraction = fraction
        self.dim = dim
        self.k = k
        self.tau = tau
        self.similarity = similarity
        self.refresh = refresh
        self.recall_target = recall
        self.margin = margin
        self.backend = backend
        self.precision = precision
        self.register_buffer("candidates", torch.empty(0, dtype=torch.int64))
        self.register_buffer("shortlist", torch.empty(0, dtype=torch.int64))
        self.register_buffer("reference", torch.empty(0, 0))
        self.register_buffer("cut", torch.tensor(0.0))
        self.register_buffer("reach", torch.tensor(0.0))
        self.register_buffer("schedule", torch.tensor([0, 0, 0, 1, 0, 0]))
        self.register_buffer("audit", torch.tensor([0, 0]))
        self.register_buffer("state", initial_state())

    @property
    def interval(self) -> int:
        """Calls from one refresh to the next: between the last two or, if these are more, since the last one."""
        return int(self.schedule[: _BETWEEN_REFRESHES + 1].max())

    @property
    def recall(self) -> float:
        """Share of the exact selection that would have been found without the last refresh; NaN before the second."""
        if self.refresh == "certified":
            return 1.0
        found, of = self.audit.tolist()
        return found / of if of else math.nan

    @property
    def recall_interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the recall, as if each pair was found or missed by itself."""
        if self.refresh == "certified":
            return 1.0, 1.0
        of = int(self.audit[1])
        if not of:
            return math.nan, math.nan
        p, z = self.recall, _Z**2 / of
        half = _Z * math.sqrt(p * (1 - p) / of + z / (4 * of))
        low, high = (p + z / 2 - half) / (1 + z), (p + z / 2 + half) / (1 + z)
        return max(0.0, min(low, p)), min(1.0, max(high, p))  # at 0 and 1 but for rounding

    def forward(self, x: Tensor | SparseFeatures, priority: Tensor | None = None) -> TopKPairs:
        """The pairs of x [M, N], or [N, M] with ``dim=0``, dense; `priority` [N] as in `topk_pairs`.

        Raises
        ------
        TypeError, ValueError
            As in `topk_pairs`; also if x is sparse.
        """
        listed = self.listed(x, priority, in_order=True)
        query, n_features = listed.query, x.shape[self.dim]
        return TopKPairs(
            listed.rows, listed.cols, listed.cosines.float(), listed.threshold.float(), query.tau, n_features, query.k
        )

    def listed(self, x: Tensor | SparseFeatures, priority: Tensor | None = None, *, in_order: bool = False) -> _Listed:
        """The pairs, in the order of `topk_pairs` or in any, with cosines in the dtype that products are summed in."""
        check_features(x, self.dim)
        if not is_dense(x):
            raise TypeError("x must be dense: a selection among the entries of a sparse x is not kept")
        x = in_columns(x, self.dim)
        query = resolve_query(
            x.shape[1], fraction=self.fraction, k=self.k, tau=self.tau, n_std=1.0, similarity=self.similarity,
            precision=self.precision,
        )  # fmt: skip
        _refuse_adaptive(self.tau)
        priority = resolve_priority(priority, x.shape[1], x.device)
        custom_ops.refuse_nan(priority)
        backend = resolve_backend(self.backend, x.device)
        with torch.no_grad():
            norms = column_norms(x)
            scaled, scaled_norms, _ = in_range(x, norms)
            x_hat = directions(scaled, scaled_norms)
            cosines, index = self._select(x.detach(), x_hat, query)
        if in_order:
            cosines, index = first_in_order(cosines, index, query.similarity, query.k)
        rows = index.div(x.shape[1], rounding_mode="floor")
        cols = index - rows * x.shape[1]
        if x.requires_grad and torch.is_grad_enabled():
            cosines = _Cosines.apply(x, norms, cosines, rows, cols, priority, backend)
        return _Listed(rows, cols, cosines, query)

    def reset(self) -> None:
        """Forget the candidates and what was measured, so that the next call is a refresh."""
        self.candidates, self.shortlist = self.candidates.new_empty(0), self.shortlist.new_empty(0)
        self.reference = self.reference.new_empty(0, 0)
        for buffer in (self.cut, self.reach, self.schedule, self.audit):
            buffer.zero_()
        self.schedule[_LIFE] = 1
        self.state.copy_(initial_state())

    def _select(self, x: Tensor, x_hat: Tensor, query: Query) -> _Found:
        """Cosines and index of the selected pairs."""
        size = min(n_pairs(x.shape[1]), math.ceil(min(self.margin * query.k, n_pairs(x.shape[1]))))
        kind = [size, int(query.similarity == "abs")]
        is_same = self.reference.shape == x_hat.shape and self.reference.dtype == x_hat.dtype
        if not is_same or self.schedule[_KIND:].tolist() != kind:
            self.reset()
            self.schedule[_KIND:] = torch.tensor(kind)
            return self._refreshed(x, x_hat, query)
        self.schedule[_SINCE_REFRESH] += 1
        self.schedule[_AGE] += 1
        drift = _drift(x_hat, self.reference)
        if self.refresh == "certified":
            return self._certified(x, x_hat, drift, query)
        is_short = self._has_shortlist(query) and bool(self.schedule[_AGE] < self.schedule[_LIFE])
        listed = self.shortlist if is_short else self.candidates
        jumped = drift >= JUMP
        moved = drift[~jumped].mean()  # NaN if all have jumped
        if int(jumped.sum()) > _MOST_MOVED * x.shape[1]:
            return self._refreshed(x, x_hat, query)
        if moved > self.reach:
            return self._audited(x, x_hat, moved, jumped, listed, query)
        cosines = cosines_of(x_hat, listed)
        found = _selected(cosines, listed, query)
        if not is_short:
            if self._has_shortlist(query):
                n_found, n_exact = int(_is_in(found[1], self.shortlist).sum()), found[1].numel()
                self.schedule[_LIFE] = self._life(int(self.schedule[_AGE]), n_found, n_exact)
            self._make_shortlist(cosines, query)
        return self._completed(x_hat, jumped, listed, found, query)

    def _certified(self, x: Tensor, x_hat: Tensor, drift: Tensor, query: Query) -> _Found:
        """The exact selection: among the candidates and columns that have moved far, or of all pairs."""
        found = _selected(cosines_of(x_hat, self.candidates), self.candidates, query)
        moved = drift >= self._certified_drift(found[0], query, x.shape[0])
        if int(moved.sum()) > _MOST_MOVED * x.shape[1]:
            return self._refreshed(x, x_hat, query)
        return self._completed(x_hat, moved, self.candidates, found, query)

    def _refreshed(self, x: Tensor, x_hat: Tensor, query: Query) -> _Found:
        """Compare all pairs, and keep the first of the order as candidates, whether they pass tau or not."""
        size = int(self.schedule[_KIND])
        wanted = Query(size, similarity=query.similarity, precision=query.precision)
        backend = resolve_backend(self.backend, x.device)
        selection = Selection(*custom_ops.topk_pairs(x, *wanted, backend, None, self.state, False))
        self.state.copy_(selection.state)
        n_listed = int(selection.n_listed)
        index = selection.rows[:n_listed] * x.shape[1] + selection.cols[:n_listed]
        cosines = selection.cosines[:n_listed]
        self.reference = x_hat
        if n_listed == n_pairs(x.shape[1]):
            self.cut = x_hat.new_tensor(-math.inf)
        else:  # if they are fewer than asked for, no others are above 0
            self.cut = selection.threshold
        self.schedule[_BETWEEN_REFRESHES] = self.schedule[_SINCE_REFRESH]
        self.schedule[_SINCE_REFRESH] = 0
        found = _passing(cosines[: query.k], index[: query.k], query)
        self.candidates, order = index.sort()
        self._make_shortlist(cosines[order], query)
        return found

    def _audited(self, x: Tensor, x_hat: Tensor, moved: Tensor, jumped: Tensor, listed: Tensor, query: Query) -> _Found:
        """Refresh, and count how many pairs of the exact selection had been listed, and how many were candidates.

        What was listed would have been found. So would be a pair of which a column has jumped.
        """
        candidates, age = self.candidates, int(self.schedule[_AGE])
        exact = self._refreshed(x, x_hat, query)
        index = exact[1]
        rows = index.div(x.shape[1], rounding_mode="floor")
        is_compared = jumped[rows] | jumped[index - rows * x.shape[1]]
        n_found, n_candidates = (int((_is_in(index, known) | is_compared).sum()) for known in (listed, candidates))
        self._plan(n_candidates, index.numel(), moved)
        life = self._life(age, n_found, n_candidates)
        if listed is not candidates and life <= age:  # the shortlist has missed more than it may
            self.schedule[_LIFE] = life
        self.audit.copy_(torch.tensor([n_found, index.numel()]))
        return exact

    def _plan(self, n_found: int, n_exact: int, moved: Tensor) -> None:
        """Plan the next refresh by what was found of the exact selection when columns had moved so far."""
        self.reach = (self._longer(n_found, n_exact) * moved).clamp_max(JUMP / 2)  # beyond JUMP none would ever be due

    def _life(self, age: int, n_found: int, n_exact: int) -> int:
        """Calls that a shortlist should last, by what one of that age had of the selection among all candidates."""
        longer = round(age * self._longer(n_found, n_exact))
        return max(1, longer, age + 1 if n_found == n_exact else 0)

    def _has_shortlist(self, query: Query) -> bool:
        """Whether the shortlist has enough pairs for this k: it may be empty, or made for a smaller k."""
        return self.shortlist.numel() >= math.ceil(SHORT * query.k)

    def _make_shortlist(self, cosines: Tensor, query: Query) -> None:
        """Make a shortlist of the candidates by their cosines, an empty one where it is not used or would be all."""
        size = math.ceil(SHORT * query.k)
        if self.refresh == "adaptive" and size < self.candidates.numel():
            _, self.shortlist = first_unsorted(cosines, self.candidates, query.similarity, size)
        else:
            self.shortlist = self.shortlist.new_empty(0)
        self.schedule[_AGE] = 0

    def _longer(self, n_found: int, n_exact: int) -> float:
        """By which factor columns may move further until the share of pairs is missed that is expected to be."""
        if not n_exact:  # there was nothing to miss
            return 2.0
        aim = (1 - self.recall_target) / 4
        missed = (n_exact - n_found + min(0.5, aim * n_exact / 2)) / n_exact  # 0 of few does not mean none
        return max(_LEAST_STEP, _deviations(missed) / _deviations(aim))

    def _certified_drift(self, cosines: Tensor, query: Query, n_rows: int) -> float:
        """How far one column of every pair must have moved that was no candidate and is selected now.

        Where it came closer by a gap, one of its columns has moved by h or more, with 2 h + h**2 = gap.
        """
        least = floor_of(query)
        if cosines.numel() == query.k:
            least = similarity_of(cosines, query.similarity).min().item()
        rounding = 4 * (n_rows + 8) * torch.finfo(cosines.dtype).eps  # of sums of so many products
        return math.sqrt(1 + max(0.0, least - self.cut.item() - rounding)) - 1

    def _completed(self, x_hat: Tensor, moved: Tensor, listed: Tensor, found: _Found, query: Query) -> _Found:
        """The selection among the pairs that were listed and all pairs of columns that have moved far."""
        columns = moved.nonzero().squeeze(1)
        if not columns.numel():
            return found
        cosines, index = found
        n_features = x_hat.shape[0]
        least = floor_of(query)
        if index.numel() == query.k:
            least = similarity_of(cosines, query.similarity).min().item()
        others = torch.arange(n_features, device=moved.device)
        for part in columns.split(max(1, _PRODUCTS // n_features)):
            with matmul_precision(x_hat.device, "highest"):
                products = (x_hat[part] @ x_hat.T).clamp_(-1, 1)
            similar = similarity_of(products, query.similarity) >= least
            similar &= ~moved | (others > part[:, None])  # each pair once, and no column with itself
            row, col = similar.nonzero().unbind(1)
            first, second = part[row], col
            pairs = torch.minimum(first, second) * n_features + torch.maximum(first, second)
            is_new = ~_is_in(pairs, listed)
            cosines = torch.cat([cosines, products[row, col][is_new]])
            index = torch.cat([index, pairs[is_new]])
        return _selected(cosines, index, query)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take buffers of whatever size they were saved in; without any, those before the first call."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update({prefix + name: buffer for name, buffer in RefreshedPairs().state_dict().items()})
        for name in ("candidates", "shortlist", "reference", "cut", "reach"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Arguments, for repr."""
        size = f"fraction={self.fraction}" if self.k is None else f"k={self.k}"
        return (
            f"{size}, dim={self.dim}, tau={self.tau}, similarity={self.similarity!r}, refresh={self.refresh!r}, "
            f"recall={self.recall_target}, margin={self.margin}, backend={self.backend!r}, precision={self.precision!r}"
        )


class _Cosines(torch.autograd.Function):
    """Cosines that were computed already, differentiable in x; the column of higher priority gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Tensor, cosines: Tensor, *listed: Any) -> Tensor:
        *pairs, ctx.backend = listed
        ctx.save_for_backward(x, norms, cosines, *pairs)
        return cosines.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norms, cosines, rows, cols, priority = ctx.saved_tensors
        pairs = custom_ops.weighted_pairs(rows, cols, grads[0], priority)
        return custom_ops.pair_gradient(x, norms, cosines, *pairs, ctx.backend, False), *[None] * 6


def _deviations(share: float) -> float:
    """Standard deviations that a normally distributed number exceeds with this probability."""
    return -NormalDist().inv_cdf(share) if share < 1 else -math.inf


def _refuse_adaptive(tau: object) -> None:
    if tau == "adaptive":
        raise ValueError('tau cannot be "adaptive", which depends on all pairs; give a number or None')


def _drift(x_hat: Tensor, reference: Tensor) -> Tensor:
    """Distance [N] of each row of x_hat [N, M] from that of the reference, some rows at a time."""
    drift = x_hat.new_empty(len(x_hat))
    n_elements = _CACHED_ELEMENTS if x_hat.device.type == "cpu" else _GATHERED_ELEMENTS
    n_rows = max(1, n_elements // x_hat.shape[1])
    for rows, before, out in zip(*(each.split(n_rows) for each in (x_hat, reference, drift)), strict=True):
        torch.linalg.vector_norm(rows - before, dim=1, out=out)
    return drift


def _is_in(index: Tensor, ascending: Tensor) -> Tensor:
    """Which numbers are among others that ascend, and each of which is there once."""
    return torch.searchsorted(ascending, index) != torch.searchsorted(ascending, index, right=True)


def _selected(cosines: Tensor, index: Tensor, query: Query) -> _Found:
    """The first k pairs of the order that pass the floor, as they came."""
    return _passing(*first_unsorted(cosines, index, query.similarity, query.k), query)


def _passing(cosines: Tensor, index: Tensor, query: Query) -> _Found:
    """Those of some pairs that pass the floor."""
    floor = floor_of(query)
    if floor < 0:
        return cosines, index
    passed = (similarity_of(cosines, query.similarity) > floor).nonzero().squeeze(1)
    return cosines.index_select(0, passed), index.index_select(0, passed)
