"""The non-zeros of a sparse x, checked, in order, and scaled to unit columns."""

from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.base import EPS, accumulation_dtype
from topk_ortho.backends.coactivation import Grouped
from topk_ortho.backends.norms import first_ten, refuse_not_finite, refuse_too_large


class Coordinates(NamedTuple):
    """A sparse x [n_samples, n_features] as it came, in coordinates; what is not named is 0."""

    samples: Tensor
    """int64 [n], in [0, n_samples)"""
    features: Tensor
    """int64 [n]"""
    values: Tensor
    """floating [n]; where it is 0, the entry is padding and its feature does not matter"""
    n_samples: int
    n_features: int


class Entries(NamedTuple):
    """Non-zeros in the order of (sample, feature)."""

    samples: Tensor
    """int64 [n]"""
    features: Tensor
    """int64 [n]"""
    x_hat: Tensor
    """[n] values divided by the norms of their columns, float32, or float64 for float64 values"""
    positions: Tensor
    """int64 [n] where each was among the coordinates"""
    norms: Tensor
    """[n_features] column norms of x, in the dtype of x_hat"""
    n_samples: int
    n_features: int

    def by_sample(self) -> Grouped:
        """Features that meet in samples."""
        return Grouped(self.samples, self.features, self.x_hat, self.n_features)

    def by_feature(self) -> tuple[Grouped, Tensor]:
        """Samples that meet in features, and the order in which it has the entries."""
        order = self.features.argsort(stable=True)
        return Grouped(self.features[order], self.samples[order], self.x_hat[order], self.n_samples), order


def entries_of(x: Coordinates) -> Entries:
    """Non-zeros of x.

    Raises
    ------
    ValueError
        If a feature is out of range, or named twice in a sample; if x holds NaN or Inf, or if the norm of a column is
        too large for its dtype.
    """
    positions = x.values.nonzero().squeeze(1)
    samples, features, values = x.samples[positions], x.features[positions], x.values[positions]
    _refuse_out_of_range(features, x.n_features)
    keys, order = (samples * x.n_features + features).sort()
    _refuse_repeated(keys, x.n_features)
    samples, features, values, positions = samples[order], features[order], values[order], positions[order]
    norms = _column_norms(features, values, x.n_features)
    x_hat = (values.double() / norms.double().clamp_min(EPS)[features]).to(norms.dtype)
    return Entries(samples, features, x_hat, positions, norms, x.n_samples, x.n_features)


def sum_by(index: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Sums [size] of the float64 numbers [n] of equal index, each in a fixed order on every device."""
    lengths = torch.bincount(index, minlength=size)
    return torch.segment_reduce(numbers[index.argsort(stable=True)], "sum", lengths=lengths)


def coordinates_of_dense(x: Tensor) -> Coordinates:
    """The non-zeros of a dense x [M, N]."""
    samples, features = x.nonzero(as_tuple=True)
    return Coordinates(samples, features, x[samples, features], *x.shape)


def _column_norms(features: Tensor, values: Tensor, n_features: int) -> Tensor:
    """Euclidean norms [n_features], of float64 sums of squares divided by the largest."""
    refuse_not_finite(features[~values.isfinite()].unique())
    magnitudes, dtype = values.double().abs(), accumulation_dtype(values)
    largest = magnitudes.new_zeros(n_features).scatter_reduce_(0, features, magnitudes, "amax")
    squares = (magnitudes / largest[features]).square()
    norms = (largest * sum_by(features, squares, n_features).sqrt()).to(dtype)
    refuse_too_large((~norms.isfinite()).nonzero().squeeze(1), dtype)
    return norms


def _refuse_out_of_range(features: Tensor, n_features: int) -> None:
    outside = features[(features < 0) | (features >= n_features)]
    if outside.numel():
        shown = first_ten(outside[:11].tolist())
        count = f"{outside.numel()} feature ind{'ices' if outside.numel() > 1 else 'ex'}"
        raise ValueError(f"x has {count} out of [0, {n_features}), where the value is not 0: {shown}")


def _refuse_repeated(keys: Tensor, n_features: int) -> None:
    repeated = keys[1:][keys[1:] == keys[:-1]].unique()
    if repeated.numel():
        shown = first_ten([f"row {key // n_features} feature {key % n_features}" for key in repeated[:11].tolist()])
        plural = "s" if repeated.numel() > 1 else ""
        raise ValueError(f"x names {repeated.numel()} feature{plural} more than once in a row: {shown}")
