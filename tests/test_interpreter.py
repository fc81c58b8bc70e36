"""What a faster interpreter must still do: see an integer that overflows, and give the numbers that Triton gives."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from topk_ortho.kernels import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, result_ptr, OPERATION: tl.constexpr):
    a, b = tl.load(a_ptr + tl.arange(0, 4)), tl.load(b_ptr + tl.arange(0, 2))
    b = tl.reshape(b[:, None] + tl.zeros((2, 2), b.dtype), (4,))  # each number twice
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    else:
        result = a * b
    tl.store(result_ptr + tl.arange(0, 4), result)


def arithmetic(operation, a, b, dtype=torch.int32):
    a, b = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    result = torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, result, OPERATION=operation)
    return result.tolist()


MOST, LEAST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    ("operation", "a", "b", "result"),
    [
        ("add", [MOST - 1, 1, LEAST + 7, 2], [1, -7], [MOST, 2, LEAST, -5]),
        ("sub", [LEAST + 1, 1, MOST, 2], [1, 7], [LEAST, 0, MOST - 7, -5]),
        ("mul", [2**15, 1, -(2**30), 3], [65_535, 2], [2**15 * 65_535, 65_535, LEAST, 6]),
    ],
)
def test_numbers_that_fit(operation, a, b, result):
    assert arithmetic(operation, a, b) == result


@pytest.mark.parametrize(
    ("operation", "a", "b"),
    [("add", [0, 0, MOST, 0], [0, 1]), ("sub", [0, LEAST, 0, 0], [1, 0]), ("mul", [2**16, 0, 0, 0], [2**15, 0])],
)
def test_an_integer_that_overflows_is_refused(operation, a, b):
    with pytest.raises(InterpreterError, match=f"int32 overflow detected for operation {operation}"):
        arithmetic(operation, a, b)
    assert len(arithmetic(operation, a, b, torch.int64)) == 4
