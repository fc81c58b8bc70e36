"""The gradient of weighted cosines, from pairs in CSR order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.inputs import EDGES, normal
from tests.kernels.arguments import DEVICE, FEW, inverse_of, norms_of, to_device
from tests.tolerances import assert_within, cosine_bound, float64, unit_roundoff
from topk_ortho.kernels import pair_gradient as kernels
from topk_ortho.kernels.pair_gradient import LINE_BYTES, SEGMENT, SegmentSums, pair_gradient, segment_sums

POISON = 12345.0


def csr_of(n: int, counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(offsets, partners, weights, values) of columns with so many partners each, any but themselves."""
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(n), counts)
    partners = (owner + generator.integers(1, n, len(owner))) % n
    return offsets, partners, generator.normal(size=len(owner)), generator.uniform(-1, 1, len(owner))


def expected_gradient(x: Tensor, offsets, partners, weights, values) -> np.ndarray:
    """Column by column, pair by pair; values are taken as given."""
    x64, norms = float64(x), norms_of(x)
    x_hat = oracle.normalized(x64)
    grad = np.zeros_like(x64)
    for j in range(x.shape[1]):
        if norms[j] == 0:
            continue
        for p in range(offsets[j], offsets[j + 1]):
            grad[:, j] += weights[p] * x_hat[:, partners[p]]
            if norms[j] > oracle.EPS:
                grad[:, j] -= weights[p] * values[p] * x_hat[:, j]
        grad[:, j] /= max(norms[j], oracle.EPS)
    return grad


def bound_of(x: Tensor, offsets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N], as in `tests.tolerances.gradient_bound`, by the weights of each column."""
    total = np.array([np.abs(weights[a:b]).sum() for a, b in pairwise(offsets)])
    return 3 * cosine_bound(x) * total / np.maximum(norms_of(x), oracle.EPS)


N_BEHIND = 64
"""Pairs behind all others, which no column owns."""


def pairs_on_device(n: int, offsets, partners, weights, values) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(targets, partners, weights, values); the pairs behind all others are poison."""
    targets, behind = np.repeat(np.arange(n), np.diff(offsets)), np.ones(N_BEHIND)
    integers = [np.concatenate(both).astype(np.int32) for both in ((targets, n * behind), (partners, 0 * behind))]
    floats = [np.concatenate([part, np.nan * behind]).astype(np.float32) for part in (weights, values)]
    return tuple(torch.from_numpy(part).to(DEVICE) for part in (*integers, *floats))


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 8 pairs: the columns of these tests have many of them."""
    monkeypatch.setattr(kernels, "SEGMENT", 8)


def gradient(
    x: Tensor, offsets, partners, weights, values, *, lines: Tensor | None = None, has_sums: bool = True
) -> Tensor:
    """[M, N] on the CPU, through a poisoned slab between guards; without `has_sums`, those of segments are set to 0."""
    m, n = x.shape
    lines = to_device(x).T.contiguous() if lines is None else lines
    holder = torch.full((n + 2, m + 70), POISON, dtype=x.dtype, device=DEVICE)
    slab = holder[1:-1, 3 : 3 + m]
    norms, inverse = torch.from_numpy(norms_of(x)).float().to(DEVICE), inverse_of(x)
    targets, *pairs = pairs_on_device(n, offsets, partners, weights, values)
    sums = segment_sums(lines, inverse, targets, *pairs)
    if not has_sums:
        sums = SegmentSums(*map(torch.zeros_like, sums))
    offsets = torch.from_numpy(np.asarray(offsets, dtype=np.int64)).to(DEVICE)
    pair_gradient(lines, norms, inverse, offsets, *pairs, sums, slab, oracle.EPS)
    result = slab.T.cpu().clone()
    slab.fill_(POISON)
    assert (holder == torch.tensor(POISON, dtype=x.dtype)).all(), "written outside the slab"
    return result


def check(x: Tensor, offsets, partners, weights, values, **options) -> Tensor:
    actual = gradient(x, offsets, partners, weights, values, **options)
    expected = expected_gradient(x, offsets, partners, weights, values)
    rounding = (
        unit_roundoff(x.dtype) * np.abs(expected) + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    )
    assert actual.dtype == x.dtype
    assert_within(actual=actual, expected=expected, bound=bound_of(x, offsets, weights) + rounding)
    return actual


HUB = [0, 100, 0, 3, 32, 33, 31, 64, 65, 1, 0]
"""Partners of a column: none at either end, a block of them, one more, one fewer."""


@pytest.mark.parametrize(
    ("m", "dtype"),
    [(1, torch.float32), (64, torch.float32), (130, torch.float32), (63, torch.bfloat16), (65, torch.float16)],
    ids=str,
)
@pytest.mark.usefixtures("short_segments")
def test_hubs_and_empty_columns(m, dtype):
    actual = check(normal(m, len(HUB), seed=m, dtype=dtype), *csr_of(len(HUB), HUB))
    assert not actual[:, [0, 2, 10]].any()
    assert actual[:, 1].any()


@FEW
@given(data=st.data())
def test_any_counts(data):
    counts = data.draw(st.lists(st.integers(0, 70), min_size=2, max_size=6))
    x = normal(data.draw(st.integers(1, 70)), len(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SEGMENT", data.draw(st.sampled_from([1, 4, 10, 32])))
        check(x, *csr_of(len(counts), counts))


@pytest.mark.parametrize(
    "counts",
    [[SEGMENT, 2 * SEGMENT, 1], [1, 3 * SEGMENT - 1, 0], [7, 3 * SEGMENT - 7, 7], [255, 2 * SEGMENT - 1, 0]],
    ids=["segments_are_columns", "begins_behind_one", "ends_with_one", "none_lies_within"],
)
def test_segments_of_the_real_size(counts):
    check(normal(3, 3), *csr_of(3, counts))


def test_segment_sums(short_segments):
    """Only the segments that lie within one column have sums, in each block of entries."""
    x, counts = normal(130, 5), [10, 0, 30, 4, 4]
    offsets, partners, weights, values = csr_of(5, counts)
    pairs = pairs_on_device(5, offsets, partners, weights, values)
    # what no column owns is left out because of its target
    sums = segment_sums(to_device(x).T, inverse_of(x), *(part.nan_to_num(1.0) for part in pairs))
    x_hat = oracle.normalized(float64(x))
    is_within = [True, False, True, True, True, False] + [False] * 8
    assert sums.lines.shape == (2, len(is_within), LINE_BYTES // 4)
    assert (sums.own.isfinite().cpu() == torch.tensor(is_within)).all()
    lines = sums.lines.transpose(0, 1).flatten(1).cpu()
    assert (lines.isfinite().all(dim=1) == torch.tensor(is_within)).all()
    for segment in np.flatnonzero(is_within):
        part = slice(8 * segment, 8 * segment + 8)
        expected = x_hat[:, partners[part]] @ weights[part]
        bound = cosine_bound(x) * np.abs(weights[part]).sum()
        assert_within(actual=lines[segment, :130], expected=expected, bound=bound)
        assert_within(actual=sums.own[:, segment], expected=np.full(2, weights[part] @ values[part]), bound=bound)


def test_a_column_with_many_pairs_is_shared():
    """Its own programs gather fewer than two segments of it, at its ends."""
    x, (offsets, partners, weights, values) = normal(3, 3), csr_of(3, [5, 4 * SEGMENT, 5])
    actual = gradient(x, offsets, partners, weights, values, has_sums=False)
    is_within = np.arange(len(weights)) // SEGMENT % 4 > 0
    expected = expected_gradient(x, offsets, partners, np.where(is_within, 0, weights), values)
    assert_within(actual=actual, expected=expected, bound=bound_of(x, offsets, weights))


def test_no_pair_at_all():
    assert not check(normal(70, 5), *csr_of(5, [0] * 5)).any()


@pytest.mark.parametrize("view", ["transposed", "strided", "sliced"])
@pytest.mark.usefixtures("short_segments")
def test_layouts(view):
    """Features in rows, any strides."""
    x = normal(70, 9)
    holder = torch.full((20, 300), torch.nan)
    lines = {
        "transposed": lambda: x.T,
        "strided": lambda: holder[1:19:2, 5:215:3].copy_(x.T),
        "sliced": lambda: holder[1:10, 5:75].copy_(x.T),
    }[view]()
    assert lines.stride(1) == {"transposed": 9, "strided": 3, "sliced": 1}[view]
    check(x, *csr_of(9, [25] * 9), lines=to_device(lines))


@pytest.mark.parametrize("columns", [False, True], ids=["entries_far_apart", "lines_far_apart"])
@pytest.mark.usefixtures("short_segments")
def test_offsets_past_int32(columns, far_apart):
    x = normal(7, 3) if columns else normal(3, 7)
    n = x.shape[1]
    check(x, *csr_of(n, [12] * n), lines=far_apart(x, columns=columns).T)


@pytest.mark.parametrize("name", ["one_row", "all_columns_huge", "huge_beside_tiny", "tiny_column_1e-15_below_eps"])
def test_edges(name):
    x = EDGES[name]
    n = x.shape[1]
    norms = norms_of(x)
    live = (norms == 0) | (norms > 1e-18)  # else float32 squares are lost
    counts = [3 if is_live else 0 for is_live in live]
    check(x, *csr_of(n, counts))


@pytest.mark.parametrize(("norm", "is_projected"), [(0.9e-12, False), (1.1e-12, True)], ids=["below_eps", "above_eps"])
def test_eps(norm, is_projected):
    """A column that is divided by eps keeps the part of its gradient along itself."""
    x = torch.tensor([[norm, 1.0], [0.0, 0.5]])
    offsets, partners, weights, values = (
        np.array([0, 1, 2]),
        np.array([1, 0]),
        np.array([2.0, 3.0]),
        np.array([0.5, 0.5]),
    )
    actual = check(x, offsets, partners, weights, values)
    partner = 1 / 1.25**0.5
    along = 2 * (partner - (0.5 if is_projected else 0)) / max(norm, 1e-12)
    assert actual[0, 0] == pytest.approx(along, rel=1e-5)


def test_a_dead_column_gets_no_gradient_and_gives_none():
    x = normal(12, 4)
    x[:, 2] = 0
    offsets, partners = np.array([0, 1, 2, 4, 4]), np.array([2, 2, 0, 1])
    actual = check(x, offsets, partners, np.ones(4), np.zeros(4))
    assert not actual.any()


@pytest.mark.usefixtures("short_segments")
def test_two_runs_are_equal():
    x, csr = normal(130, len(HUB)), csr_of(len(HUB), HUB)
    assert torch.equal(gradient(x, *csr), gradient(x, *csr))


def test_weights_add_up():
    """A pair listed twice counts twice."""
    x = normal(12, 3)
    once = gradient(x, np.array([0, 1, 1, 1]), np.array([2]), np.array([1.5]), np.array([0.25]))
    twice = gradient(x, np.array([0, 2, 2, 2]), np.array([2, 2]), np.array([0.5, 1.0]), np.array([0.25, 0.25]))
    assert_within(actual=twice, expected=float64(once), bound=2.0**-20)
    assert once[:, 0].any()
