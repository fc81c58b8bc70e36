"""Selections and dictionaries made by hand, and sets of Python as the oracle."""

import json
import random

import pytest
import torch

from topk_ortho import TopKPairs
from topk_ortho.activations.true_features import TrueFeatures
from topk_ortho.evaluation.stability import LAGS, PairWindows, mean_stability, pair_relations

N = 40


def selection(pairs):
    rows, cols = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2).unbind(dim=1)
    values = torch.zeros(len(rows))
    return TopKPairs(rows, cols, values, torch.tensor(0.0), None, N, k=len(rows))


def drifting(n_steps, seed=0):
    """Sets of pairs that change a little at each step, and sometimes shrink to nothing."""
    chance = random.Random(seed)
    pairs, sets = set(), {}
    for step in range(1, n_steps + 1):
        pairs = {pair for pair in pairs if chance.random() < 0.97}
        while len(pairs) < 30:
            row, col = sorted(chance.sample(range(N), 2))
            pairs.add((row, col))
        sets[step] = set() if step in (7, 8, 150) else set(pairs)
    return sets


def run(windows, sets, steps, end=None):
    """The lines of all steps; the selection is asked for only where it is due."""
    lines = []
    for step in steps:
        if windows.is_due(step):
            windows.note(step, selection(sets[step]), {"same": 0.25} if windows.begins(step) else {})
        lines += windows.lines(step, is_end=step == end)
    return lines


def oracle(sets, begin, end):
    def ratio(a, b):
        return len(a) / len(b) if b else None

    first = sets[begin]
    later = {lag: sets[begin + lag] for lag in LAGS if begin + lag <= end}
    line = {"step": begin, "until": min(begin + 100, end), "n_pairs": len(first), "same": 0.25}
    for lag in LAGS:
        line[f"jaccard_lag_{lag}"] = ratio(first & later[lag], first | later[lag]) if lag in later else None
    line["turnover"] = ratio(later[1] - first, later[1]) if 1 in later else None
    line["persistent_pairs"] = ratio(first.intersection(*later.values()), first) if 100 in later else None
    return line


@pytest.mark.parametrize("every", [7, 30, 120, 300])
def test_windows_against_sets(every):
    """With 7, windows overlap and one begins where nothing is selected; with 300 the only one has no second step."""
    sets = drifting(300)
    lines = run(PairWindows(every), sets, range(1, 301), end=300)
    begins = range(every, 301, every)
    assert sorted(lines, key=lambda line: line["step"]) == [oracle(sets, begin, 300) for begin in begins]
    json.dumps(lines, allow_nan=False)


def test_only_steps_that_are_compared_are_asked_for():
    windows, due = PairWindows(150), []
    for step in range(1, 300):
        if windows.is_due(step):
            due.append(step)
            windows.note(step, selection([(0, 1)]), {})
        windows.lines(step)
    assert due == [150, *(150 + lag for lag in LAGS)]
    assert not any(PairWindows(0).is_due(step) for step in range(300))


def test_windows_go_on_from_their_state():
    sets = drifting(300)
    windows = PairWindows(30)
    lines = run(windows, sets, range(1, 153))
    state, windows = windows.state_dict(), PairWindows(30)
    windows.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    lines += run(windows, sets, range(153, 301), end=300)
    assert lines == run(PairWindows(30), sets, range(1, 301), end=300)


def test_what_pairs_stand_for():
    """A root 0 with children 1 and 2, a grandchild 3 under 1, and another root 4."""
    truth = TrueFeatures(directions=torch.eye(8)[:5], parent=torch.tensor([-1, 0, 0, 1, -1]))
    # features 0 to 4 are the true ones, of other lengths; 5 leans on 1; 6 is as near to 7 dimensions; 7 is dead
    leaning = torch.eye(8)[1] * 0.8 + torch.eye(8)[0] * 0.6
    W_dec = torch.stack([*(2.0 * torch.eye(8)[:5]), leaning, torch.eye(8)[7] - torch.eye(8)[4], torch.zeros(8)])
    expected = {
        (0, 1): "parent_child", (1, 2): "siblings", (0, 3): "relatives", (2, 3): "relatives", (0, 4): "unrelated",
        (1, 5): "same", (0, 5): "parent_child", (2, 5): "siblings", (4, 6): "unmatched", (6, 7): "unmatched",
        (1, 3): "parent_child",
    }  # fmt: skip
    for pair, relation in expected.items():
        shares = pair_relations(selection([pair]), W_dec, truth)
        assert {name for name, share in shares.items() if share} == {relation}, pair
    shares = pair_relations(selection(expected), W_dec, truth)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["parent_child"] == pytest.approx(3 / 11)
    assert shares["unmatched"] == pytest.approx(2 / 11)


def test_two_roots_are_no_siblings():
    truth = TrueFeatures(directions=torch.eye(3), parent=torch.tensor([-1, -1, -1]))
    assert pair_relations(selection([(0, 1)]), torch.eye(3), truth)["unrelated"] == 1


def test_relations_of_no_pairs_are_not_defined():
    truth = TrueFeatures(directions=torch.eye(3), parent=torch.tensor([-1, 0, 0]))
    windows = PairWindows(10)
    windows.note(10, selection([]), pair_relations(selection([]), torch.eye(3), truth))
    (line,) = windows.lines(10, is_end=True)
    assert line["n_pairs"] == 0
    assert {value for name, value in line.items() if name not in ("step", "until", "n_pairs")} == {None}


def test_means_pass_over_what_is_not_defined():
    lines = [
        {"step": 100, "until": 200, "n_pairs": 4, "jaccard_lag_1": 0.5, "turnover": None, "same": 0.25},
        {"step": 200, "until": 250, "n_pairs": 6, "jaccard_lag_1": None, "turnover": None, "same": 0.75},
    ]
    assert mean_stability(lines) == {
        "pair_stability": {"n_pairs": 5, "jaccard_lag_1": 0.5}, "pair_relations": {"same": 0.5},
    }  # fmt: skip
    assert mean_stability([]) == {}
