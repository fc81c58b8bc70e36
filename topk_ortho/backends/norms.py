"""Column norms that neither overflow nor let a bad value through."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_ortho.definitions import EPS, accumulation_dtype


def column_norms(x: Tensor, slab_elements: int = 2**18) -> Tensor:
    """Euclidean norm of each column of x [M, N], shape [N], float32 (float64 for float64 input).

    Rows of a row-major x are squared in slabs of about so many elements, which with their squares stay in a core's
    cache: 5 x faster than ``torch.linalg.vector_norm(x, dim=0)``.

    Raises
    ------
    ValueError
        If x holds NaN or Inf, or if a norm is too large for its dtype.
    """
    dtype = accumulation_dtype(x)
    if x.stride(0) == 1:
        norms: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=dtype)
    else:
        sum_squares = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        for slab in x.split(max(1, slab_elements // max(1, x.shape[1]))):
            sum_squares += slab.to(dtype).square().sum(dim=0)
        norms = sum_squares.sqrt_()
    overflowed = ~norms.isfinite()
    if overflowed.any():
        norms[overflowed] = _rescaled_norms(x, overflowed.nonzero().squeeze(1), dtype)
    return norms


def inverse_norms(norms: Tensor) -> Tensor:
    """1 / max(norm, EPS), and 0 for a dead column."""
    return torch.where(norms > 0, 1.0 / norms.clamp_min(EPS), 0.0)


def directions(x: Tensor, norms: Tensor) -> Tensor:
    """The columns of x [M, N] divided by their norms, as rows [N, M], contiguous, in the dtype of the norms."""
    x_hat = torch.empty(x.shape[1], x.shape[0], dtype=norms.dtype, device=x.device)
    return torch.mul(x.T, inverse_norms(norms)[:, None], out=x_hat)


class InRange(NamedTuple):
    """x and its norms with columns scaled down whose inverse norm would be a subnormal number."""

    x: Tensor
    """x itself, or a scaled copy in the dtype of the norms"""
    norms: Tensor
    factor: Tensor | None
    """[N] powers of two that columns were scaled by; None if none was"""


def in_range(x: Tensor, norms: Tensor) -> InRange:
    """Scale columns of a norm near the largest down by a power of two, which changes no cosine.

    Subnormal numbers have fewer digits, and a process may be set to take them for 0, as by `torch.set_flush_denormal`:
    the cosines of such columns would then be 0.
    """
    largest = 1 / (4 * torch.finfo(norms.dtype).smallest_normal)
    is_huge = norms > largest
    if not is_huge.any():
        return InRange(x, norms, None)
    factor = torch.where(is_huge, 2.0**-8, 1.0).to(norms.dtype)
    return InRange(x.to(norms.dtype) * factor, norms * factor, factor)


def _rescaled_norms(x: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of a few columns whose sum of squares overflowed: divide by the largest entry first."""
    x = x.index_select(1, columns).to(dtype)
    largest = x.abs().amax(dim=0)
    refuse_not_finite(columns[~largest.isfinite()])
    norms: Tensor = largest * torch.linalg.vector_norm(x / largest, dim=0)
    refuse_too_large(columns[~norms.isfinite()], dtype)
    return norms


def refuse_not_finite(columns: Tensor) -> None:
    """Raise a ValueError that names the columns, if there are any."""
    _refuse(columns, "x has {} with NaN or Inf: {}")


def refuse_too_large(columns: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError that names the columns, if there are any."""
    _refuse(columns, f"x has {{}} whose norm is too large for {dtype}: {{}}; scale x down")


def _refuse(columns: Tensor, message: str) -> None:
    n_columns = columns.numel()
    if n_columns:
        shown = first_ten(columns[:11].tolist())
        raise ValueError(message.format(f"{n_columns} column{'s' if n_columns > 1 else ''}", shown))


def first_ten(items: list[Any]) -> str:
    """The first ten items as text, with dots if there are more. Of a long list, the first eleven are enough."""
    return ", ".join(map(str, items[:10])) + (", ..." if len(items) > 10 else "")
