"""Keys that order records, and what is listed in that order, against loops in plain Python."""

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.arguments import DEVICE, assert_same, copy_of, numbers, radix_at
from topk_ortho import warm_start
from topk_ortho.kernels.norms import NOT_FINITE, OUT_OF_RANGE
from topk_ortho.kernels.ordered import Listed, sort_keys, take_ordered
from topk_ortho.kernels.radix_select import CERTIFIED, COLLECT, NO_FAILURE, OVERFLOW, SHORTFALL

NO_RECORD = 2**63 - 1
VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.3, 0.31, 2.0**-149, -(2.0**-149), 1 - 2**-24]
"""Each many times, so that there are ties; 0.3 is one of the floors."""
SIZES = st.sampled_from([1, 2, 1023, 1024, 1025, 2048, 2500])
"""Programs have blocks of 1024 places."""
N_SURVIVORS = ("none", "one", "all_but_one", "all", "one_too_many", "more_than_int32")


class Guarded(TorchDispatchMode):
    """What is allocated holds poison, and nothing is written beyond its ends."""

    ROOM = 2048
    POISON = 77

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] not in ("new_empty", "empty_like") or result.numel() == 0:
            return result
        whole = torch.full((result.numel() + 2 * self.ROOM,), self.POISON, dtype=result.dtype, device=result.device)
        self.made.append(whole)
        return whole[self.ROOM : -self.ROOM].view(result.shape)

    def __exit__(self, *arguments):
        super().__exit__(*arguments)
        assert self.made, "nothing was allocated"
        for whole in self.made:
            assert (whole[: self.ROOM] == self.POISON).all()
            assert (whole[-self.ROOM :] == self.POISON).all()


def survivors_of(name, size):
    return {"none": 0, "one": 1, "all_but_one": size - 1, "all": size, "one_too_many": size + 1}.get(name, 2**32 + 1)


def similarities(values, *, is_abs):
    """In float64."""
    return np.abs(values.astype(np.float64)) if is_abs else values.astype(np.float64)


def to_device(array):
    return torch.from_numpy(np.array(array)).to(DEVICE)


class TestSortKeys:
    """By similarity descending, then by row and column."""

    @staticmethod
    def keys(values, rows, cols, n_survivors, n_features, *, is_abs):
        records = to_device(values), to_device(rows.astype(np.int32)), to_device(cols.astype(np.int32))
        with Guarded():
            keys = sort_keys(numbers([n_survivors], torch.int64), *records, n_features, is_abs=is_abs)
        assert keys.dtype == torch.int64
        assert keys.shape == (len(values),)
        return keys.cpu().numpy()

    @given(data=st.data())
    def test_order(self, data):
        capacity = data.draw(SIZES)
        n_features = data.draw(st.sampled_from([3, 43, 2**17]))
        is_abs = data.draw(st.booleans())
        n_survivors = survivors_of(data.draw(st.sampled_from(N_SURVIVORS)), capacity)
        generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
        values = generator.choice(np.array(VALUES, dtype=np.float32), capacity)
        rows = generator.integers(0, n_features - 1, capacity)
        rows[::7] = n_features - 2
        cols = generator.integers(rows + 1, n_features)
        keys = self.keys(values, rows, cols, n_survivors, n_features, is_abs=is_abs)
        n_records = min(n_survivors, capacity)
        pairs = rows * n_features + cols
        pairs = [(-max(s, 0.0), i) for s, i in zip(similarities(values, is_abs=is_abs), pairs.tolist(), strict=True)]
        assert (keys[n_records:] == NO_RECORD).all()
        assert (keys[:n_records] < NO_RECORD).all()
        assert [pairs[i] for i in keys[:n_records].argsort()] == sorted(pairs[:n_records])

    @pytest.mark.parametrize("is_abs", [True, False])
    def test_the_first_and_the_last_key(self, is_abs):
        """With 2**17 columns, the most that one key can number, the last key is still below that of no record."""
        n = 2**17
        zeros = np.array([1.0, 0.0, -0.0, 1 - 2**-24, -0.25], dtype=np.float32)
        rows, cols = np.array([0, n - 2, n - 2, 0, 0]), np.array([1, n - 1, n - 1, 1, 1])
        keys = self.keys(zeros, rows, cols, 5, n, is_abs=is_abs).tolist()
        assert keys[0] < keys[3] < keys[1] == keys[2] < NO_RECORD
        assert (keys[0] >> 34, keys[0] % 2**34) == (2**29 - 1 - 0x3F800000, 1)
        assert (keys[1] >> 34, keys[1] % 2**34) == (2**29 - 1, (n - 2) * n + n - 1)
        assert keys[4] >> 34 == 2**29 - 1 - (0x3E800000 if is_abs else 0)


def take(
    values, *, k, n_survivors=None, order=None, rows=None, cols=None, tau=-1.0, floor=-1.0, flags=0, is_abs=True,
    state=None, margins=(0.15, 0.05, 0.4), **plan,
) -> Listed:  # fmt: skip
    """What is listed of records that are in order, or have this order; nothing that goes in is written."""
    capacity = len(values)
    places = np.arange(capacity)
    values = np.array(values, dtype=np.float32)
    rows, cols = (places if index is None else index for index in (rows, cols))
    inputs = (
        to_device(places if order is None else order),
        to_device(values),
        to_device(rows.astype(np.int32)),
        to_device(cols.astype(np.int32)),
    )
    radix = radix_at(**({"stage": CERTIFIED.value, "n_features": 5} | plan))
    radix.n_survivors.fill_(capacity if n_survivors is None else n_survivors)
    tau = tau if isinstance(tau, float) else numbers(tau, torch.float32)
    state = None if state is None else numbers(state, torch.float32)
    flags = numbers([flags], torch.int32)
    read = [*inputs, flags, *(t for t in (tau, state) if isinstance(t, torch.Tensor))]
    copies, radix_before = [t.clone() for t in read], copy_of(radix)
    with Guarded():
        listed = take_ordered(*inputs, radix, flags, tau, floor, k, state, margins, is_abs=is_abs)
    for tensor, copy in zip(read, copies, strict=True):
        assert tensor.cpu().numpy().tobytes() == copy.cpu().numpy().tobytes(), "an argument was written"
    assert_same(actual=radix, expected=radix_before)
    returned = [t for t in listed if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in returned}) == len(returned) == 8 + (state is not None)
    for name, dtype in DTYPES.items():
        assert getattr(listed, name).dtype == dtype
        assert getattr(listed, name).shape == ((k,) if name in ("cosines", "rows", "cols") else ()), name
    return Listed(*(None if t is None else t.cpu() for t in listed))


DTYPES = {
    "cosines": torch.float32, "rows": torch.int64, "cols": torch.int64, "n_listed": torch.int64,
    "n_selected": torch.int64, "threshold": torch.float32, "tau": torch.float32, "is_wrong": torch.int32,
}  # fmt: skip


class TestTakeOrdered:
    """The first pairs of the order that are above the floor."""

    @given(data=st.data())
    def test_against_a_loop(self, data):
        capacity = data.draw(SIZES)
        k = min(capacity, data.draw(SIZES))
        is_abs = data.draw(st.booleans())
        name = data.draw(st.sampled_from(N_SURVIVORS))
        n_survivors = survivors_of(name, data.draw(st.sampled_from([k, capacity])))
        n_records = min(n_survivors, capacity)
        floor = data.draw(st.sampled_from([-1.0, 0.0, 0.3] if is_abs else [0.0, 0.3]))
        tau = data.draw(st.sampled_from([-1.0, 0.3, [-1.0], [0.25], [0.3], [math.nan]]))
        generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
        values = generator.choice(np.array(VALUES, dtype=np.float32), capacity)
        values[n_records:] = 0.75  # they would be listed
        rows, cols = generator.integers(0, 2**31 - 1, (2, capacity))
        by_similarity = np.argsort(-similarities(values[:n_records], is_abs=is_abs), kind="stable")
        order = np.concatenate([by_similarity, n_records + generator.permutation(capacity - n_records)])
        actual = take(
            values, k=k, n_survivors=n_survivors, order=order, rows=rows, cols=cols, tau=tau, floor=floor, is_abs=is_abs
        )

        in_force = np.float32(tau if isinstance(tau, float) else tau[0])
        above = in_force if math.isnan(in_force) else max(in_force, np.float32(floor))
        listed = [
            (values[i], rows[i], cols[i])
            for i in by_similarity[:k]
            if (abs(values[i]) if is_abs else values[i]) > above
        ]  # fmt: skip
        expected = np.array(listed + [(0, 0, 0)] * (k - len(listed)), dtype=np.float64).reshape(k, 3)
        threshold = max(above, 0.0) if not math.isnan(above) else above
        if len(listed) == k:
            threshold = min(abs(value) for value, _, _ in listed)
        is_wrong = n_survivors > capacity
        cosines = np.full(k, np.nan) if is_wrong else expected[:, 0]
        np.testing.assert_array_equal(actual.cosines.numpy(), cosines)
        if not is_wrong:
            np.testing.assert_array_equal(np.signbit(actual.cosines.numpy()), np.signbit(expected[:, 0]))
        np.testing.assert_array_equal(actual.rows.numpy(), expected[:, 1])
        np.testing.assert_array_equal(actual.cols.numpy(), expected[:, 2])
        assert actual.n_listed == actual.n_selected == len(listed)
        np.testing.assert_array_equal(actual.threshold.numpy(), np.float32(math.nan if is_wrong else threshold))
        np.testing.assert_array_equal(actual.tau.numpy(), in_force)
        assert actual.is_wrong == is_wrong

    @pytest.mark.parametrize("n_listed", [0, 1, 1023, 1024, 1025, 2047, 2048, 2049])
    @pytest.mark.parametrize("is_short", [False, True], ids=["the_rest_is_below_the_floor", "there_is_no_rest"])
    def test_where_the_list_ends(self, n_listed, is_short):
        """Within the places of a program, or between those of two."""
        values = np.full(2500, 0.5)
        values[n_listed:] = 0.9 if is_short else 0.2
        floor = -1.0 if is_short else 0.2
        listed = take(values, k=2049, n_survivors=n_listed if is_short else None, floor=floor)
        assert listed.n_listed == listed.n_selected == n_listed
        assert listed.cosines.tolist() == [0.5] * n_listed + [0.0] * (2049 - n_listed)
        assert listed.rows.tolist() == listed.cols.tolist() == [*range(n_listed), *[0] * (2049 - n_listed)]
        assert listed.threshold == np.float32(0.5 if n_listed == 2049 else max(floor, 0))

    @pytest.mark.parametrize(
        ("k", "n_survivors", "bound", "flags", "is_wrong"),
        [
            pytest.param(4, 3, 0.3, 0, False, id="all_above_the_floor"),
            pytest.param(4, 3, 0.30001, 0, True, id="too_few"),
            pytest.param(4, 3, 0.1, 0, False, id="bound_below_the_floor"),
            pytest.param(3, 3, 0.9, 0, False, id="enough"),
            pytest.param(4, 5, 0.9, 0, False, id="all_fit"),
            pytest.param(4, 6, 0.9, 0, True, id="one_does_not_fit"),
            pytest.param(4, 6, -1.0, 0, True, id="one_does_not_fit_without_a_bound"),
            pytest.param(4, 5, 0.9, OUT_OF_RANGE.value, False, id="out_of_range"),
            pytest.param(4, 5, 0.9, NOT_FINITE.value, True, id="not_finite"),
            pytest.param(4, 5, 0.9, NOT_FINITE.value + OUT_OF_RANGE.value, True, id="not_finite_and_out_of_range"),
            pytest.param(4, 0, 0.9, 0, True, id="none"),
        ],
    )
    @pytest.mark.parametrize("tau", [0.3, [0.3]], ids=["tau_fixed", "tau_adaptive"])
    def test_certificate(self, k, n_survivors, bound, flags, is_wrong, tau):
        bound = float(np.float32(bound))
        floor = 0.3 if isinstance(tau, float) else 0.0
        listed = take(
            [0.9, -0.8, 0.7, 0.6, 0.1], k=k, n_survivors=n_survivors, bound=bound, flags=flags, tau=tau, floor=floor
        )
        n_listed = min(k, n_survivors)
        assert listed.is_wrong == is_wrong
        assert listed.n_listed == n_listed
        assert listed.rows[:n_listed].tolist() == [*range(n_listed)]
        if is_wrong:
            assert listed.cosines.isnan().all()
            assert listed.threshold.isnan()
        else:
            expected = [0.9, -0.8, 0.7, 0.6][:n_listed] + [0.0] * (k - n_listed)
            assert listed.cosines.tolist() == pytest.approx(expected)
            assert listed.threshold == pytest.approx(abs(expected[-1]) or 0.3)
        assert listed.tau == pytest.approx(0.3)

    def test_negative_similarities_are_never_listed(self):
        listed = take([0.5, 0.2, -0.3, -0.9], k=4, floor=0.0, is_abs=False)
        assert listed.cosines.tolist() == pytest.approx([0.5, 0.2, 0.0, 0.0])
        assert listed.n_listed == 2
        assert listed.threshold == 0.0

    def test_pairs_of_many_columns(self):
        """Columns are numbered up to 2**31."""
        rows, cols = np.array([2**31 - 3, 0, 2**17]), np.array([2**31 - 2, 2**31 - 2, 2**17 + 1])
        listed = take([0.9, 0.8, 0.7], k=3, rows=rows, cols=cols)
        assert listed.rows.tolist() == rows.tolist()
        assert listed.cols.tolist() == cols.tolist()


class TestNextState:
    """The warm start of the next call; see `topk_ortho.warm_start.next_state` for the one on the host."""

    MARGINS = (warm_start.MARGIN_START, warm_start.MARGIN_LEAST, warm_start.MARGIN_MOST)
    FACTORS: ClassVar = {NO_FAILURE.value: 0.98, SHORTFALL.value: 2.0, OVERFLOW.value: 0.5}
    """Of the margin: a guess that was too high doubles it, one that was too low halves it."""

    @staticmethod
    def state_after(state, similarity, n_ordered, k, *, margins=MARGINS, is_abs=True, is_certified=True, **plan):
        """The records are elsewhere than in the order of their similarities; every other one is negative."""
        order = np.random.default_rng(0).permutation(len(similarity))
        values = np.empty_like(similarity)
        values[order] = similarity
        if is_abs:
            values[::2] *= -1
        stage = (CERTIFIED if is_certified else COLLECT).value
        listed = take(
            values, k=k, n_survivors=n_ordered, order=order, is_abs=is_abs, state=state, margins=margins, stage=stage,
            **plan,
        )  # fmt: skip
        assert listed.state.dtype == torch.float32
        return listed.state

    @given(data=st.data())
    def test_against_plain_python(self, data):
        k = data.draw(st.integers(1, 3000))
        odd = [0.0, 0.0499, 0.05, 0.051, 0.6, 1.0, 1.1, -1.0, math.inf, math.nan]
        margin = data.draw(st.floats(0.0625, 1, width=32) | st.sampled_from(odd))
        failure = data.draw(st.sampled_from(sorted(self.FACTORS)))
        start, least, most = self.MARGINS
        used = min(most, max(least, self.FACTORS[failure] * (margin if least <= margin <= most else start)))
        for rank in ((1 + used) * k, (1 - used) * k):
            assume(abs(rank - round(rank)) > 1e-6 * k)  # float32 may go the other way
        rank, inner_rank = math.ceil((1 + used) * k), max(1, math.floor((1 - used) * k))
        n_ordered = data.draw(st.sampled_from([0, k - 1, k, k + 1, rank - 1, rank, rank + 1, 2 * rank]))
        similarity = -np.sort(-np.random.default_rng(k).random(2 * rank + 1, dtype=np.float32))
        similarity[n_ordered:] = np.nan
        guess = -1.0
        if n_ordered >= rank:
            guess = similarity[rank - 1]
        elif n_ordered >= k:
            guess = max(0, 2 * similarity[k - 1] - similarity[inner_rank - 1])
        n_passes = data.draw(st.integers(1, 6)) if failure else 1
        actual = self.state_after(
            [0.5, margin, 2.0], similarity, n_ordered, k, is_certified=not failure, n_passes=n_passes, failure=failure
        )
        assert actual.tolist() == pytest.approx([guess, used, n_passes + (failure > 0)], rel=1e-6, abs=1e-6)

    @pytest.mark.parametrize("n_ordered", [0, 99, 100, 110, 119, 120, 300])
    @pytest.mark.parametrize("failure", [NO_FAILURE.value, SHORTFALL.value], ids=["certified", "repaired"])
    def test_as_on_the_host(self, failure, n_ordered):
        similarity = np.linspace(1, 0, 500, dtype=np.float32)
        actual = self.state_after(
            [0.5, 0.21, 2.0], similarity, n_ordered, 100, is_certified=not failure, failure=failure
        )
        ordered = torch.from_numpy(similarity[:n_ordered])
        expected = warm_start.next_state(torch.tensor([0.5, 0.21, 2.0]), ordered, 100, 2 if failure else 1)
        assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-6)

    @pytest.mark.parametrize(("least", "guess"), [(0.125, 0.0), (0.0, -0.5), (0.3, 0.1)], ids=str)
    def test_a_line_that_falls_below_zero(self, least, guess):
        """The guess is 0, unless the k-th similarity itself is 0 and zeros are needed; as on the host."""
        similarity = np.full(500, 0.5, dtype=np.float32)
        similarity[90:] = least
        actual = self.state_after([0.5, 0.2, 2.0], similarity, 100, 100)
        assert actual[0] == pytest.approx(guess)
        expected = warm_start.next_state(torch.tensor([0.5, 0.2, 2.0]), torch.from_numpy(similarity[:100]), 100, 1)
        assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-6)

    @pytest.mark.parametrize(
        ("before", "failure", "after"),
        [(0.3, SHORTFALL, 0.4), (0.1, SHORTFALL, 0.2), (0.3, OVERFLOW, 0.15), (0.08, OVERFLOW, 0.05),
         (0.3, NO_FAILURE, 0.294), (0.05, NO_FAILURE, 0.05), (0.5, SHORTFALL, 0.24), (0.01, OVERFLOW, 0.06)],
        ids=lambda part: str(part) if isinstance(part, float) else ("none", "shortfall", "overflow")[part.value],
    )  # fmt: skip
    def test_margin_stays_within(self, before, failure, after):
        """0.05 to 0.4 here; what is not starts anew at 0.12."""
        similarity = np.linspace(1, 0, 500, dtype=np.float32)
        actual = self.state_after(
            [0.5, before, 1.0],
            similarity,
            500,
            100,
            margins=(0.12, 0.05, 0.4),
            is_certified=False,
            failure=failure.value,
        )
        assert actual[1] == pytest.approx(after)

    def test_a_radix_select_without_a_first_pass(self):
        """Nothing failed: the margin shrinks as after a success."""
        similarity = np.linspace(1, 0, 500, dtype=np.float32)
        actual = self.state_after([-1.0, 0.2, 0.0], similarity, 300, 100, is_certified=False, n_passes=2)
        assert actual.tolist() == pytest.approx([similarity[119], 0.196, 3.0])

    @pytest.mark.parametrize("n_ordered", [0, 1, 2, 3])
    def test_one_pair(self, n_ordered):
        """K = 1 has no rank between."""
        similarity = np.array([0.9, 0.8, 0.7, 0.6, 0.5], dtype=np.float32)
        actual = self.state_after([0.5, 0.2, 2.0], similarity, n_ordered, 1)
        expected = [-1.0, 0.9, 0.8, 0.8][n_ordered]
        assert actual.tolist() == pytest.approx([expected, 0.196, 1.0])

    def test_records_that_do_not_fit_are_unknown(self):
        """Rank 120 is beyond the capacity, whatever the count says: the guess lies on a line."""
        similarity = np.linspace(1, 0.5, 110, dtype=np.float32)
        actual = self.state_after([0.5, 0.2, 2.0], similarity, 500, 100)
        assert actual[0] == pytest.approx(2 * similarity[99] - similarity[79])

    @pytest.mark.parametrize("is_abs", [True, False])
    def test_the_guess_is_a_similarity(self, is_abs):
        """Where tau has excluded most records, that of a rank may be a negative one."""
        similarity = np.linspace(1, 0, 500, dtype=np.float32) if is_abs else np.linspace(1, -1, 500, dtype=np.float32)
        actual = self.state_after([0.5, 0.2, 2.0], similarity, 500, 400, is_abs=is_abs)
        assert actual[0] == similarity[math.ceil(400 * (1 + actual[1].item())) - 1]
        assert (actual[0] < 0) == (not is_abs)
