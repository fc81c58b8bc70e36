"""Matrices that the tests share; each is a function of its arguments alone."""

from collections.abc import Callable

import torch
from torch import Tensor

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian columns of uneven norms."""
    generator = seeded(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return (x * torch.rand(n, generator=generator, dtype=torch.float64).mul(3).exp()).to(dtype)


def activations(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """What an SAE encoder gives: non-negative, four fifths zeros."""
    generator = seeded(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64).relu()
    return (x * (torch.rand(m, n, generator=generator) < 0.4)).to(dtype)


def dyadic(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns with 4 entries +-2**i: every cosine is a multiple of 1/4, exact in any dtype, and ties abound."""
    generator = seeded(seed)
    x = torch.zeros(m, n, dtype=torch.float64)
    for j in range(n):
        signs = torch.randint(0, 2, (4,), generator=generator, dtype=torch.float64) * 2 - 1
        scale = 2.0 ** int(torch.randint(-3, 4, (1,), generator=generator))
        x[torch.randperm(m, generator=generator)[:4], j] = signs * scale
    return x.to(dtype)


def _strided(x: Tensor) -> Tensor:
    holder = torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)
    view = holder[1::2, ::3]
    view.copy_(x)
    return view


def _sliced(x: Tensor) -> Tensor:
    holder = torch.full((x.shape[0] + 3, x.shape[1] + 5), torch.nan, dtype=x.dtype)
    view = holder[1:-2, 2:-3]
    view.copy_(x)
    return view


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "transposed": lambda x: x.T.contiguous().T,
    "strided_both_dims": _strided,
    "sliced_out_of_nan": _sliced,
    "expanded_rows": lambda x: x[:1].expand(x.shape),
    "expanded_columns": lambda x: x[:, :1].expand(x.shape),
    "negative_step_by_flip": lambda x: x.flip(0).flip(0),
}
"""Layouts of x: the first six are views with the values of x, or of one of its rows or columns."""


def _with_columns(columns: dict[int, Callable[[Tensor], Tensor]], m: int = 12, n: int = 37, seed: int = 3) -> Tensor:
    x = normal(m, n, seed)
    for j, change in columns.items():
        x[:, j] = change(x)
    return x


EDGES: dict[str, Tensor] = {
    "one_dead_column": _with_columns({5: lambda x: 0 * x[:, 5]}),
    "dead_first_and_last": _with_columns({0: lambda x: 0 * x[:, 0], 36: lambda x: 0 * x[:, 36]}),
    "all_zero": torch.zeros(4, 21),
    "one_live_column": torch.zeros(4, 21).index_fill(1, torch.tensor([7]), 1.0),
    "duplicated_columns": _with_columns({9: lambda x: x[:, 4], 30: lambda x: 3 * x[:, 4]}),
    "antiparallel_columns": _with_columns({9: lambda x: -x[:, 4], 30: lambda x: -0.1 * x[:, 9]}),
    "all_columns_equal": torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None].repeat(1, 23),
    "all_cosines_equal": torch.cat([torch.ones(1, 20), torch.eye(20)]),
    "two_columns": normal(6, 2),
    "two_equal_columns": torch.ones(3, 2),
    "one_row": normal(1, 19),
    "one_row_with_zeros": torch.tensor([[0.0, 2.0, -3.0, 0.0, 1.0]]),
    "one_row_two_columns": torch.tensor([[2.0, -3.0]]),
    "huge_column_1e30": _with_columns({8: lambda x: 1e30 * x[:, 8].sign()}),
    "huge_columns_1e19_to_1e25": _with_columns({j: lambda x, j=j: 10.0 ** (19 + j) * x[:, j].sign() for j in range(7)}),
    "all_columns_huge": normal(12, 37) * 1e30,
    "tiny_column_1e-6": _with_columns({8: lambda x: 1e-6 * x[:, 8]}),
    "tiny_column_1e-15_below_eps": _with_columns({8: lambda x: 1e-15 * x[:, 8]}),
    "tiny_column_1e-30": _with_columns({8: lambda x: 1e-30 * x[:, 8]}),
    "huge_beside_tiny": _with_columns({8: lambda x: 1e30 * x[:, 8].sign(), 9: lambda x: 1e-30 * x[:, 9]}),
}
