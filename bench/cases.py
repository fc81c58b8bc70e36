"""What a benchmark consists of: the one `Case` type, and how a benchmark makes and runs its cases."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_ortho.definitions import k_from_fraction, n_pairs

FRACTION = 1e-3
"""Share of the pairs that every benchmark selects, unless its mode says otherwise."""
FIXED_K = k_from_fraction(16384, FRACTION)
"""Number of pairs that the mode "pairs_fixed_k" selects."""

Call = Callable[[], object]


class Case(NamedTuple):
    """One thing that is measured."""

    benchmark: str
    provider: str
    """The way to compute the result. Cases that differ by nothing else are compared, and measured in turns."""
    mode: str
    """What is computed, such as "forward" (the loss), "forward_backward" (its gradient) or "step" (of training)."""
    dtype: str
    M: int
    """Rows of x: the batch, or the width of a decoder."""
    N: int
    """Features."""
    L0: int | None = None
    """Active features in a row of x, None where x is dense."""

    def __str__(self) -> str:
        active = "" if self.L0 is None else f", L0 = {self.L0:,}"
        words = f"{self.benchmark}: {self.provider}, {self.mode}, {self.dtype}"
        return f"{words}, M = {self.M:,}, N = {self.N:,}{active}"

    @property
    def k(self) -> int:
        """How many pairs are selected."""
        return min(FIXED_K, n_pairs(self.N)) if self.mode == "pairs_fixed_k" else k_from_fraction(self.N, FRACTION)


class Benchmark(NamedTuple):
    """A family of cases."""

    cases: Callable[[str], list[Case]]
    """The cases for a device type ("cpu" or "cuda"), the most important first."""
    make_call: Callable[[Case, torch.device], Call]
    """Prepares a case, compilation included; the result runs it once."""
    small: dict[str, Any]
    """Fields of a case that takes milliseconds, for warming up and for checking results."""
    inputs: Callable[[Case, torch.device], tuple[Tensor, Tensor | None]] | None
    """The x [M, N] of a case's first call and, where only some entries of a row are active, which they are [M, L0].
    None if results cannot be checked."""
    setting: dict[str, Any]
    """What else the figures depend on; it is stored with every result."""
    rounds: int | None = None
    """Timed calls of each case; None lets the time of a call decide."""
    n_warmup: int = 1
    """Calls of each case before the timed ones."""

    def small_cases(self, device_type: str) -> list[Case]:
        """Every provider, mode and dtype for a device type, at the small size."""
        return list(dict.fromkeys(case._replace(**self.small) for case in self.cases(device_type)))
