"""The steps between passes alone, each in a kernel of its own: in earnest the last program of a pass takes them."""

import triton
from torch import Tensor
from triton import language as tl

from topk_ortho.kernels import radix_select
from topk_ortho.kernels.radix_select import DIGIT_BINS, RadixSelect


@triton.jit
def _certify_kernel(
    plan_ptr, bounds_ptr, n_survivors_ptr, n_certified_ptr, k, capacity, floor, IS_ROUNDED: tl.constexpr
):  # fmt: skip
    radix_select.certify(plan_ptr, bounds_ptr, n_survivors_ptr, n_certified_ptr, k, capacity, floor, IS_ROUNDED)


@triton.jit
def _next_guess_kernel(plan_ptr, bounds_ptr, histograms_ptr, k, capacity, floor, BINS: tl.constexpr):
    radix_select.next_guess(plan_ptr, bounds_ptr, histograms_ptr, k, capacity, floor, BINS)


@triton.jit
def _next_digit_kernel(plan_ptr, bounds_ptr, histogram_ptr, k, capacity, BINS: tl.constexpr):
    radix_select.next_digit(plan_ptr, bounds_ptr, histogram_ptr, k, capacity, BINS)


@triton.jit
def _tie_row_kernel(plan_ptr, row_ties_ptr, k, n_features, BLOCK: tl.constexpr):
    radix_select.tie_row(plan_ptr, row_ties_ptr, k, n_features, BLOCK)


@triton.jit
def _arrive_kernel(arrived_ptr, is_last_ptr):
    tl.store(is_last_ptr + tl.program_id(0), radix_select.is_last_program(arrived_ptr).to(tl.int32))


def certify(radix: RadixSelect, k: int, capacity: int, floor: float, *, is_rounded: bool) -> None:
    """After a pass."""
    counts = radix.n_survivors, radix.n_certified
    _certify_kernel[(1,)](radix.plan, radix.bounds, *counts, k, capacity, floor, IS_ROUNDED=is_rounded)


def next_guess(radix: RadixSelect, k: int, capacity: int, floor: float) -> None:
    """After a digit of a screen was counted."""
    _next_guess_kernel[(1,)](
        radix.plan, radix.bounds, radix.screen_histograms, k, capacity, floor, BINS=DIGIT_BINS.value
    )


def next_digit(radix: RadixSelect, histogram: Tensor, k: int, capacity: int) -> None:
    """After a digit was counted."""
    _next_digit_kernel[(1,)](radix.plan, radix.bounds, histogram, k, capacity, BINS=DIGIT_BINS.value)


def tie_row(radix: RadixSelect, k: int) -> None:
    """After ties were counted."""
    _tie_row_kernel[(1,)](radix.plan, radix.row_ties, k, radix.row_ties.numel(), BLOCK=1024)


def arrive(arrived: Tensor, is_last: Tensor) -> None:
    """Store for each program whether it is the last one; as many programs as `is_last` int32 has entries."""
    _arrive_kernel[(is_last.numel(),)](arrived, is_last)
