"""The histogram of the sampled pairs, and which pairs those are."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.inputs import VIEWS, activations, dyadic, normal
from tests.kernels.arguments import (
    assert_same,
    copy_of,
    gram_of,
    inverse_of,
    numbers,
    radix_at,
    to_device,
)
from topk_ortho.kernels.gram_sample import gram_sample
from topk_ortho.kernels.radix_select import SAMPLE_DIGIT

SHIFT, BINS = SAMPLE_DIGIT[0], 2 ** SAMPLE_DIGIT[1]
ERROR = 2.0**-6
"""Of a cosine of bf16 columns, twice the worst."""


def columns_of(n: int, n_rows: int, n_cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Sampled columns: multiples of the first number from the golden section of n on that shares no divisor with it."""
    step = max(1, round(n * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, n) != 1:
        step += 1
    columns = np.arange(n_rows + n_cols) * step % n
    return columns[:n_rows], columns[n_rows:]


def sampled(x: Tensor, n_rows: int, n_cols: int, *, is_abs: bool = True, state: float | None = None) -> np.ndarray:
    """Histogram on the CPU, added to one of ones."""
    radix = radix_at(0, x.shape[1])
    radix.sample_histogram.fill_(1)
    before = copy_of(radix)
    state = None if state is None else numbers([state, math.nan, math.nan], torch.float32)
    gram_sample(to_device(x), inverse_of(x), radix, state, n_rows, n_cols, is_abs=is_abs)
    assert_same(actual=radix, expected=before, but=("sample_histogram",))
    return (radix.sample_histogram - 1).cpu().numpy()


def similarities_of(x: Tensor, n_rows: int, n_cols: int, *, is_abs: bool) -> np.ndarray:
    """Of the sampled pairs, in float64."""
    rows, cols = columns_of(x.shape[1], n_rows, n_cols)
    cosine = gram_of(x)[np.ix_(rows, cols)]
    return np.abs(cosine) if is_abs else cosine


def digits_of(similarities: np.ndarray) -> np.ndarray:
    return np.bincount(similarities[similarities >= 0].astype(np.float32).view(np.int32) >> SHIFT, minlength=BINS)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 64, 128, 144, 1000, 1024, 6561, 65536])
def test_sampled_columns_are_distinct(n):
    """The reference, that is; `test_exact` holds the kernel to it."""
    rows, cols = columns_of(n, n // 2, n - n // 2)
    assert sorted([*rows, *cols]) == list(range(n))


@pytest.mark.parametrize(
    ("n", "n_rows", "n_cols", "is_abs"),
    [(16, 2, 8, True), (200, 64, 64, False), (200, 65, 63, True), (131, 1, 130, False), (200, 128, 1, True)],
    ids=str,
)
def test_exact(n, n_rows, n_cols, is_abs):
    """Cosines are multiples of 1/4, exact in bf16."""
    x = dyadic(8, n, seed=n)
    expected = digits_of(similarities_of(x, n_rows, n_cols, is_abs=is_abs) + 0.0)
    assert np.count_nonzero(expected) >= (3 if n_rows * n_cols > 20 else 2)
    assert sampled(x, n_rows, n_cols, is_abs=is_abs).tolist() == expected.tolist()


def assert_close(x: Tensor, *, is_abs: bool) -> None:
    """From every bin on, as many as there are at its lower edge, give or take an error of a cosine."""
    similarities = similarities_of(x, 20, 70, is_abs=is_abs)
    from_bin = sampled(x, 20, 70, is_abs=is_abs)[::-1].cumsum()[::-1]
    edges = (np.arange(BINS) << SHIFT).astype(np.int32).view(np.float32)
    within = (edges > 0) & (edges < 1.1)
    for n_counted, edge in zip(from_bin[within], edges[within], strict=True):
        assert (similarities >= edge + ERROR).sum() <= n_counted <= (similarities >= edge - ERROR).sum(), edge
    if is_abs:
        assert from_bin[0] == similarities.size


@pytest.mark.parametrize(
    ("make", "dtype", "is_abs"),
    [(normal, torch.float32, False), (activations, torch.bfloat16, True), (normal, torch.float16, True)],
    ids=["normal", "sparse_bfloat16", "float16"],
)
def test_any_values(make, dtype, is_abs):
    assert_close(make(70, 150, seed=2, dtype=dtype), is_abs=is_abs)


@pytest.mark.parametrize("view", ["transposed", "strided_both_dims", "expanded_columns"])
def test_layouts(view):
    assert_close(VIEWS[view](normal(33, 150, seed=1)), is_abs=False)


def test_huge_and_dead_columns():
    x = normal(12, 150)
    x[:, ::3] *= 1e30
    x[:, 1::9] = 0
    assert_close(x, is_abs=True)


@pytest.mark.parametrize("columns", [False, True], ids=["rows_far_apart", "columns_far_apart"])
def test_offsets_past_int32(columns, far_apart):
    x = dyadic(7, 3) if columns else normal(3, 7)
    histograms = []
    for view in (to_device(x), far_apart(x, columns=columns)):
        radix = radix_at(0, x.shape[1])
        gram_sample(view, inverse_of(x), radix, None, 1, 2, is_abs=True)
        histograms.append(radix.sample_histogram.tolist())
    assert sum(histograms[0]) == 2
    assert histograms[0] == histograms[1]


@pytest.mark.parametrize(
    ("guess", "samples"),
    [(-1.0, True), (-math.inf, True), (math.nan, True), (-0.99, False), (0.0, False), (0.5, False), (math.inf, False)],
    ids=str,
)
def test_only_without_a_guess(guess, samples):
    x = dyadic(8, 64)
    expected = digits_of(similarities_of(x, 8, 32, is_abs=True)) if samples else np.zeros(BINS)
    assert sampled(x, 8, 32, state=guess).tolist() == expected.tolist()


def test_zeros_are_counted_and_negatives_are_not():
    x = torch.tensor([[1.0, -1.0] * 32, [0.0] * 64])
    x[:, 5::7] = torch.tensor([[0.0], [1.0]])
    similarities = similarities_of(x, 8, 32, is_abs=False)
    counts = sampled(x, 8, 32, is_abs=False)
    assert {-1.0, 0.0, 1.0} == set(similarities.ravel().tolist())
    assert counts[0] == (similarities == 0).sum()
    assert counts.sum() == (similarities >= 0).sum()
