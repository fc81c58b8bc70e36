"""How stable a selection of pairs is through training, and what its features stand for where the truth is known.

`PairStability` compares each evaluation with the one before. `PairWindows` looks closer: every so many steps a window
begins, and the pairs that are selected in its first step are compared with those of 1, 2, 5, 10, 20, 50 and 100 steps
later. There a selection is kept as one tensor of pair numbers, ``row * N + col``.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from topk_ortho import TopKPairs
from topk_ortho.activations.true_features import TrueFeatures
from topk_ortho.distributed.parallel import Parallel

LAGS = (1, 2, 5, 10, 20, 50, 100)
"""Steps from the beginning of a window to the selections that its first one is compared with"""
RELATIONS = ("unmatched", "same", "parent_child", "siblings", "relatives", "unrelated")
"""What the two features of a pair may be to each other, see `pair_relations`"""


class PairStability:
    """How many of the most similar pairs stay the same from one evaluation to the next.

    Parameters
    ----------
    parallel : Parallel, optional
        The processes that each find some of the pairs; this one alone by default.
    """

    def __init__(self, parallel: Parallel | None = None) -> None:
        self._parallel = Parallel.alone() if parallel is None else parallel
        self._last: Tensor | None = None  # pair numbers, those that belong to this process

    def jaccard_with_last(self, pairs: TopKPairs) -> float | None:
        """The pairs shared with the last call over those of either call; None at the first, and if neither has any."""
        index = self._parallel.deal((pairs.rows * pairs.n_features + pairs.cols).cpu())
        last, self._last = self._last, index
        if last is None:
            return None
        n_union = torch.cat([last, index]).unique().numel()
        counts = torch.tensor([n_union, last.numel() + index.numel() - n_union])
        n_union, n_common = self._parallel.world.sum(counts).tolist()
        return n_common / n_union if n_union else None

    def state_dict(self) -> dict[str, Tensor]:
        """The last pairs as a tensor by name, on the first process; empty on others and before the first call."""
        index = None if self._last is None else self._parallel.world.gather_on_first(self._last)
        return {} if index is None else {"index": index}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the last pairs, of all processes."""
        if state:
            self._last = self._parallel.dealt_here(state["index"])


@dataclass
class _Window:
    first: Tensor
    """Pair numbers of the first selection, int64"""
    persistent: Tensor
    """Those among them that were in every selection so far"""
    measured: dict[str, float] = field(default_factory=dict)
    """What is known so far, by the names of `PairWindows.lines`; NaN where it is not defined"""


class PairWindows:
    """Compares the pairs that are selected in training with those of later steps.

    Parameters
    ----------
    every : int
        Steps between the beginnings of two windows; 0 begins none. Windows may overlap.
    """

    def __init__(self, every: int):
        self._every = every
        self._windows: dict[int, _Window] = {}

    def begins(self, step: int) -> bool:
        """True if a window begins at this step: pairs of its later steps are compared with those selected here."""
        return self._every > 0 and step % self._every == 0

    def is_due(self, step: int) -> bool:
        """Whether `note` is to be called at a step."""
        return self.begins(step) or any(step - begin in LAGS for begin in self._windows)

    def note(self, step: int, pairs: TopKPairs, relations: Mapping[str, float]) -> None:
        """Take in the pairs of a step; their relations are used if a window begins here."""
        index = (pairs.rows * pairs.n_features + pairs.cols).cpu()
        for begin, window in self._windows.items():
            if step - begin in LAGS:
                _compare(window, step - begin, index)
        if self.begins(step):
            self._windows[step] = _Window(index, index.clone(), dict(relations))

    def lines(self, step: int, *, is_end: bool = False) -> list[dict[str, Any]]:
        """The windows that are over, each as a line of pairs.jsonl, once; at the end also those that are cut short.

        Parameters
        ----------
        step : int
            The step that was noted last, or passed.
        is_end : bool
            Whether it is the last step of the run.

        Returns
        -------
        list of dict
            Values are None where they are not defined, or a window was too short:

            - ``step``, ``until``: first step of the window, and the step at which it was over;
            - ``n_pairs``: number of pairs that were selected in its first step;
            - ``jaccard_lag_1``, ``jaccard_lag_2`` and so on: pairs that are in the first selection and in the one so
              many steps later, over those that are in either;
            - ``turnover``: share of the pairs of its second step that were not selected in its first;
            - ``persistent_pairs``: share of the first pairs that are in all of these selections;
            - the shares of `pair_relations` in the first step, if the truth is known.
        """
        over = [begin for begin in self._windows if is_end or step - begin >= LAGS[-1]]
        always = [*(f"jaccard_lag_{lag}" for lag in LAGS), "turnover", "persistent_pairs"]
        lines = []
        for begin in over:
            window = self._windows.pop(begin)
            names = always + [name for name in RELATIONS if name in window.measured]
            values = {name: window.measured.get(name, math.nan) for name in names}
            measured = {name: None if math.isnan(value) else value for name, value in values.items()}
            lines.append({"step": begin, "until": step, "n_pairs": window.first.numel(), **measured})
        return lines

    def state_dict(self) -> dict[str, Tensor]:
        """The windows that are not over, as tensors by name."""
        state: dict[str, Tensor] = {}
        for begin, window in self._windows.items():
            state |= {f"{begin}.first": window.first, f"{begin}.persistent": window.persistent}
            for name, value in window.measured.items():
                state[f"{begin}.measured.{name}"] = torch.tensor(value, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the windows of `state_dict`."""
        for begin in sorted({int(name.split(".")[0]) for name in state}):
            prefix = f"{begin}.measured."
            measured = {n.removeprefix(prefix): value.item() for n, value in state.items() if n.startswith(prefix)}
            self._windows[begin] = _Window(state[f"{begin}.first"], state[f"{begin}.persistent"], measured)


def pair_relations(
    pairs: TopKPairs, W_dec: Tensor, truth: TrueFeatures, *, min_cosine: float = 0.5
) -> dict[str, float]:
    """What the features of the pairs stand for, as shares of all pairs.

    A feature stands for the true feature whose direction is closest to its own, if their cosine is at least
    `min_cosine`; several features may stand for the same one.

    Parameters
    ----------
    pairs : TopKPairs
        Pairs of features.
    W_dec : Tensor, shape [n_features, d_in]
        Decoder directions, of any length.
    truth : TrueFeatures
        The true features, on the CPU.
    min_cosine : float, default 0.5
        Least cosine with which a feature stands for a true one.

    Returns
    -------
    dict of str to float
        Shares that add up to 1, NaN if there are no pairs: ``unmatched`` (one of the two or both stand for nothing),
        ``same`` (both for the same true feature), ``parent_child``, ``siblings``, ``relatives`` (otherwise of one tree,
        such as a grandparent or a cousin), ``unrelated``.
    """
    cosine = normalize(W_dec.detach().cpu().float(), dim=1) @ normalize(truth.directions, dim=1).T
    largest, stands_for = cosine.max(dim=1)
    rows, cols = pairs.rows.cpu(), pairs.cols.cpu()
    a, b = stands_for[rows], stands_for[cols]
    parent, root = truth.parent, truth.root
    holds = torch.stack(  # in the order of RELATIONS; the first that holds counts
        [
            torch.minimum(largest[rows], largest[cols]) < min_cosine,
            a == b,
            (parent[a] == b) | (parent[b] == a),
            (parent[a] == parent[b]) & (parent[a] >= 0),
            root[a] == root[b],
            torch.ones_like(a, dtype=torch.bool),
        ]
    )
    counts = holds.int().argmax(dim=0).bincount(minlength=len(RELATIONS)).double()
    return dict(zip(RELATIONS, (counts / counts.sum()).tolist(), strict=True))


def mean_stability(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the lines of pairs.jsonl: ``pair_stability`` and, if the truth is known, ``pair_relations``.

    A value that no line has, because it is never defined, is left out; so is a group without any value.
    """
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "until") and value is not None:
                values.setdefault(name, []).append(value)
    means = {name: sum(found) / len(found) for name, found in values.items()}
    groups = {
        "pair_stability": {name: mean for name, mean in means.items() if name not in RELATIONS},
        "pair_relations": {name: mean for name, mean in means.items() if name in RELATIONS},
    }
    return {name: group for name, group in groups.items() if group}


def _compare(window: _Window, lag: int, index: Tensor) -> None:
    """Measure what a window's first selection has in common with the one so many steps later."""
    n_first, n_later = window.first.numel(), index.numel()
    n_union = torch.cat([window.first, index]).unique().numel()
    n_common = n_first + n_later - n_union
    window.persistent = window.persistent[torch.isin(window.persistent, index)]
    window.measured[f"jaccard_lag_{lag}"] = n_common / n_union if n_union else math.nan
    if lag == 1:
        window.measured["turnover"] = (n_later - n_common) / n_later if n_later else math.nan
    if lag == LAGS[-1]:
        window.measured["persistent_pairs"] = window.persistent.numel() / n_first if n_first else math.nan
