"""Small kernels with and without a race. ``python -m tests.bench.racing_kernels`` prints what is found in each.

It has a process of its own, because kernels may be interpreted in that of the tests.
"""

import json

import torch
import triton
import triton.language as tl

from bench.compile_report import AbsentDevice
from bench.races import races


@triton.jit
def clears_what_it_has_read(a_ptr, b_ptr, n):
    bins = tl.arange(0, 128)
    counts = tl.load(a_ptr + bins)
    tl.store(a_ptr + bins, tl.zeros((128,), tl.int64))
    tl.store(b_ptr, tl.sum(counts, axis=0))


@triton.jit
def replaces_a_number(a_ptr, b_ptr, n):
    if tl.load(a_ptr) == 1:
        tl.store(a_ptr + 1, tl.load(b_ptr))


@triton.jit
def waits(a_ptr, b_ptr, n):
    if tl.load(a_ptr) == 1:
        number = tl.load(b_ptr)
        tl.debug_barrier()
        tl.store(a_ptr, number)
        tl.store(b_ptr, number)


@triton.jit
def waits_too_early(a_ptr, b_ptr, n):
    tl.debug_barrier()
    tl.store(a_ptr, tl.load(a_ptr))


@triton.jit
def waits_on_one_way(a_ptr, b_ptr, n):
    number = tl.load(a_ptr)
    if n > 5:
        tl.debug_barrier()
    tl.store(a_ptr, number + 1)


@triton.jit
def loads_on_one_way(a_ptr, b_ptr, n):
    number = tl.zeros((), tl.int64)
    if n > 5:
        number = tl.load(a_ptr)
    else:
        number = tl.load(b_ptr)
        tl.debug_barrier()
    tl.store(a_ptr, number)
    tl.store(b_ptr, number)


@triton.jit
def returns_early(a_ptr, b_ptr, n):
    if tl.load(a_ptr) == 1:
        return
    tl.store(a_ptr, tl.load(b_ptr))


@triton.jit
def stores_before_it_loads(a_ptr, b_ptr, n):
    tl.store(a_ptr, 1)
    tl.store(b_ptr, tl.load(a_ptr))


@triton.jit
def stores_at_the_next_step(a_ptr, b_ptr, n):
    number = tl.zeros((), tl.int64)
    for i in range(n):
        tl.store(a_ptr + i, number)
        number += tl.load(a_ptr + i + 1)


@triton.jit
def waits_at_every_step(a_ptr, b_ptr, n):
    for i in range(n):
        for j in range(i, n):
            number = tl.load(a_ptr + j)
            tl.debug_barrier()
            tl.store(a_ptr + j, number + 1)


@triton.jit
def stores_at_the_next_step_of_the_outer_loop(a_ptr, b_ptr, n):
    number = tl.zeros((), tl.int64)
    for i in range(n):
        tl.store(a_ptr + i, number)
        for j in range(i, n):
            number += tl.load(b_ptr + j)
            if number > 0:
                number += tl.load(a_ptr + j)


@triton.jit
def stores_at_the_next_step_of_a_while_loop(a_ptr, b_ptr, n):
    number = tl.load(b_ptr)
    while number < n:
        tl.store(a_ptr, number)
        number += tl.load(a_ptr + number)


@triton.jit
def carries_pointers(a_ptr, b_ptr, n):
    from_ptr, to_ptr = a_ptr, b_ptr
    for _ in range(n):
        tl.store(to_ptr, tl.load(from_ptr))
        from_ptr += 2
        to_ptr += 2


@triton.jit
def computes_an_offset(a_ptr, b_ptr, n):
    from_ptr, offset = a_ptr, tl.zeros((), tl.int64)
    for _ in range(n):
        offset += tl.load(from_ptr)
        from_ptr += 2
    tl.store(b_ptr + offset, 1)


@triton.jit
def chooses_a_pointer(a_ptr, b_ptr, n):
    chosen = a_ptr + 1
    if n > 5:
        chosen = b_ptr + tl.load(b_ptr)
    tl.store(chosen, 1)


@triton.jit
def adds_atomically(a_ptr, b_ptr, n):
    tl.atomic_add(a_ptr + 1, tl.load(a_ptr))


KERNELS = (
    clears_what_it_has_read, replaces_a_number, waits, waits_too_early, waits_on_one_way, loads_on_one_way,
    returns_early, stores_before_it_loads, stores_at_the_next_step, waits_at_every_step,
    stores_at_the_next_step_of_the_outer_loop, stores_at_the_next_step_of_a_while_loop, carries_pointers,
    computes_an_offset, chooses_a_pointer, adds_atomically,
)  # fmt: skip


def main() -> None:
    device, found = AbsentDevice("sm_90"), {}
    a, b = (torch.empty(1000, dtype=torch.int64, device="meta") for _ in range(2))
    for kernel in KERNELS:
        kernel[(1,)](a, b, 7, num_warps=8)
        found[kernel.__name__] = races(device.binary.asm["ttir"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
