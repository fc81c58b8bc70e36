"""The most similar partner of each feature, by the pairs that meet."""

import torch
from torch import Tensor

from topk_ortho.backends.base import MaxCosine
from topk_ortho.backends.sparse.coordinates import Coordinates, unit_columns
from topk_ortho.backends.sparse.products import Slabs


def max_cosine(x: Coordinates, chunks: tuple[Tensor, ...] | None, slabs: Slabs) -> MaxCosine:
    """Largest cosine of each feature: over the pairs that meet, or 0 if it has no positive one and does not meet all.

    Features are renumbered, those of a chunk one after another, and every sample is split by chunk, so that only
    features of one chunk meet.
    """
    x_hat, _, norms = unit_columns(x)
    device = x.values.device
    chunks = chunks or (torch.arange(x.n_features, device=device),)
    members = torch.cat([chunk.sort().values for chunk in chunks])
    sizes = torch.tensor([chunk.numel() for chunk in chunks], device=device)
    chunk = torch.repeat_interleave(sizes)
    number = torch.empty_like(members)
    number[members] = torch.arange(x.n_features, device=device)
    numbers = number[x_hat.features]
    # below 2**63: there are no more chunks than half the features, nor more samples than non-zeros that fit memory
    keys, order = ((x_hat.samples * len(chunks) + chunk[numbers]) * x.n_features + numbers).sort()
    parts = keys.div(x.n_features, rounding_mode="floor")
    renumbered = Coordinates(
        parts, numbers[order], x_hat.values[order], x.n_samples * len(chunks), x.n_features
    )  # fmt: skip
    best = _Best(sizes.cumsum(0)[chunk] - sizes[chunk], sizes[chunk], norms.dtype)
    for slab in slabs.of(renumbered):
        pairs, cosines = slab.cosines().not_zero()
        best.add(pairs.div(x.n_features, rounding_mode="floor"), pairs % x.n_features, cosines)
    best_cosines, best_partners = best.with_zeros()
    cosines, partners = torch.empty_like(best_cosines), torch.empty_like(best_partners)
    cosines[members], partners[members] = best_cosines, members[best_partners]
    return MaxCosine(cosines, partners, norms)


class _Best:
    """Running maximum of each feature over the pairs that meet, added slab by slab, in ascending order of rows.

    Features are numbered such that those of a chunk follow each other.
    """

    def __init__(self, chunk_starts: Tensor, chunk_sizes: Tensor, dtype: torch.dtype):
        self._chunk_starts = chunk_starts
        self._chunk_sizes = chunk_sizes
        self._cosines = torch.full_like(chunk_starts, -torch.inf, dtype=dtype)
        self._partners = torch.zeros_like(chunk_starts)
        # n if the feature meets the first n of the other features of its chunk, and not the one after them
        self._n_leading = torch.zeros_like(chunk_starts)

    def add(self, rows: Tensor, cols: Tensor, cosines: Tensor) -> None:
        """Pairs ordered by (row, col); the partners of a feature come in ascending order, those below it first."""
        if rows.numel() == 0:
            return
        by_col = cols.argsort(stable=True)
        self._add(cols[by_col], rows[by_col], cosines[by_col])
        self._add(rows, cols, cosines)

    def _add(self, features: Tensor, partners: Tensor, cosines: Tensor) -> None:
        owners, run, lengths = features.unique_consecutive(return_inverse=True, return_counts=True)
        places = torch.arange(features.numel(), device=features.device)
        highest = torch.segment_reduce(cosines, "max", lengths=lengths)
        place = torch.where(cosines == highest[run], places, places.numel())
        lowest_place = torch.full_like(owners, places.numel()).scatter_reduce_(0, run, place, "amin")
        improved = highest > self._cosines[owners]
        self._cosines[owners[improved]] = highest[improved]
        self._partners[owners[improved]] = partners[lowest_place[improved]]

        rank = partners - self._chunk_starts[features] - (partners > features).long()  # among the others of its chunk
        in_run = places - (lengths.cumsum(0) - lengths)[run]
        is_leading = rank == self._n_leading[features] + in_run
        self._n_leading.index_add_(0, features, is_leading.long())

    def with_zeros(self) -> tuple[Tensor, Tensor]:
        """(cosines, partners): 0 and the first feature that is not met, where that is better."""
        numbers = torch.arange(self._cosines.numel(), device=self._cosines.device)
        meets_all = self._n_leading == self._chunk_sizes - 1
        is_zero = (self._cosines < 0) & ~meets_all
        first_not_met = self._chunk_starts + self._n_leading
        first_not_met += first_not_met >= numbers
        return torch.where(is_zero, 0.0, self._cosines), torch.where(is_zero, first_not_met, self._partners)
