"""Mean and standard deviation of |cosine| over all pairs, for the adaptive tau."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Moments:
    """Mean and population standard deviation of |cosine|, gathered tile by tile.

    Every tile is summed as deviations from the mean so far, so that nothing cancels where all cosines are alike
    (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._sum_squares = 0.0

    def add(self, magnitudes: Tensor, count: int, clear: Callable[[Tensor], None] | None = None) -> None:
        """Add `count` magnitudes of a tile [rows, cols], overwriting it; `clear` zeroes the entries that do not count.

        The first tile is summed as deviations from its own mean.
        """
        if clear is not None:
            clear(magnitudes)
        if self.count == 0:
            self.mean = magnitudes.sum().item() / count
        deviations = magnitudes.sub_(self.mean)
        if clear is not None:
            clear(deviations)
        # float64 across the rows: float32 over a whole tile of millions rounds small squares away, always downwards
        total = deviations.sum(dim=1).double().sum().item()
        squares = torch.linalg.vector_norm(deviations, dim=1).double().square().sum().item()
        self.count += count
        self.mean += total / self.count
        self._sum_squares += squares - total * total / self.count

    def add_zeros(self, count: int) -> None:
        """Add `count` magnitudes of 0."""
        self.merge(count, 0.0, 0.0)

    def state(self) -> tuple[int, float, float]:
        """What `merge` takes: how many magnitudes were added, their mean, and the sum of squared deviations from it."""
        return self.count, self.mean, self._sum_squares

    def merge(self, count: int, mean: float, sum_squares: float) -> None:
        """Add magnitudes that were gathered elsewhere."""
        if count:
            total, shift = self.count + count, mean - self.mean
            self._sum_squares += sum_squares + shift * shift * self.count * count / total
            self.mean += shift * count / total
            self.count = total

    def adaptive_tau(self, n_std: float) -> float:
        """mean + n_std * std."""
        return self.mean + n_std * math.sqrt(max(0.0, self._sum_squares / self.count))
