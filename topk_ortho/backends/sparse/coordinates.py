"""The one form of a sparse x: its entries by sample and feature, in order, and scaled to unit columns."""

from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.norms import first_ten, inverse_norms, refuse_not_finite, refuse_too_large
from topk_ortho.definitions import EPS, accumulation_dtype


class Coordinates(NamedTuple):
    """The entries of a sparse x [n_samples, n_features]; whatever is not named is 0.

    `SparseFeatures` and coalesced tensors come in the order of (sample, feature), apart from padding, which are entries
    of value 0 whose feature does not matter. `unit_columns` drops padding and sorts what is not in order.
    """

    samples: Tensor
    """int64 [n], in [0, n_samples)"""
    features: Tensor
    """int64 [n]"""
    values: Tensor
    """floating [n]"""
    n_samples: int
    n_features: int

    @classmethod
    def from_dense(cls, x: Tensor) -> "Coordinates":
        """The non-zeros of a dense x [M, N]."""
        samples, features = x.nonzero(as_tuple=True)
        return cls(samples, features, x[samples, features], *x.shape)

    def take(self, entries: Tensor) -> "Coordinates":
        """Some of the entries, given by their places."""
        samples, features, values = (part.index_select(0, entries) for part in self[:3])
        return self._replace(samples=samples, features=features, values=values)

    def transposed(self) -> tuple["Coordinates", Tensor]:
        """The entries of x.T, in order, and the place that each of them has here."""
        order = self.features.argsort(stable=True)
        x = self.take(order)
        return Coordinates(x.features, x.samples, x.values, self.n_features, self.n_samples), order

    def n_partners(self) -> Tensor:
        """For each entry, how many follow it in its sample, int64 [n]; of entries in order."""
        stops = torch.searchsorted(self.samples, self.samples, right=True)
        return stops.sub_(torch.arange(1, self.samples.numel() + 1, device=stops.device))

    def n_products(self) -> int:
        """How many products the cosines of all pairs take: one for every two entries of a sample."""
        return int(self.n_partners().sum())


class UnitColumns(NamedTuple):
    """A sparse x scaled to columns of unit norm, without its zeros."""

    x_hat: Coordinates
    """In the order of (sample, feature), no feature twice in a sample; float32, or float64 for float64 values"""
    positions: Tensor
    """int64 [n] where each entry was in x"""
    norms: Tensor
    """[n_features] column norms of x, in the dtype of x_hat"""


def unit_columns(x: Coordinates) -> UnitColumns:
    """Drop the zeros, put the rest in order if it is not yet, check it, and divide it by the norms of its columns.

    Raises
    ------
    ValueError
        If a feature is out of range, or named twice in a sample; if x holds NaN or Inf, or if the norm of a column is
        too large for its dtype.
    """
    positions = x.values.nonzero().squeeze(1)
    entries = x.take(positions)
    _refuse_out_of_range(entries.features, x.n_features)
    keys = entries.samples * x.n_features + entries.features
    if not (keys[1:] > keys[:-1]).all():
        keys, order = keys.sort()
        _refuse_repeated(keys, x.n_features)
        entries, positions = entries.take(order), positions[order]
    norms = _column_norms(entries)
    scaled = (entries.values.double() / norms.double().clamp_min(EPS)[entries.features]).to(norms.dtype)
    return UnitColumns(entries._replace(values=scaled), positions, norms)


def gradient_in_values(x: Coordinates, unit: UnitColumns, gradient: Tensor) -> Tensor:
    """Gradient in the values of x, from the float64 gradient in those of x_hat; 0 for padding."""
    features, values = unit.x_hat.features, unit.x_hat.values
    inner = sum_by(features, gradient * values, x.n_features)
    inner *= unit.norms > EPS
    inverse = inverse_norms(unit.norms.double())
    result = torch.zeros_like(x.values)
    result[unit.positions] = ((gradient - values * inner[features]) * inverse[features]).to(result.dtype)
    return result


def sum_by(index: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Sums [size] of the float64 numbers [n] of equal index, each in a fixed order on every device."""
    lengths = torch.bincount(index, minlength=size)
    return torch.segment_reduce(numbers[index.argsort(stable=True)], "sum", lengths=lengths)


def _column_norms(x: Coordinates) -> Tensor:
    """Euclidean norms [n_features], of float64 sums of squares after dividing each column by its largest entry."""
    refuse_not_finite(x.features[~x.values.isfinite()].unique())
    magnitudes, dtype = x.values.double().abs(), accumulation_dtype(x.values)
    largest = magnitudes.new_zeros(x.n_features).scatter_reduce_(0, x.features, magnitudes, "amax")
    squares = (magnitudes / largest[x.features]).square()
    norms = (largest * sum_by(x.features, squares, x.n_features).sqrt()).to(dtype)
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
