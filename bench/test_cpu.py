"""Timed by pytest-benchmark; `python -m bench.run` chooses the cases and gathers the results.

A process runs every provider in turn: one untimed call, then the timed rounds; one timed call of what takes seconds.
"""

import os
from typing import Any

import pytest

from bench.providers import make_case

CASES = [case.split(":") for case in os.environ.get("BENCH_CASES", "").split() if case]


@pytest.mark.parametrize(("provider", "mode", "m", "n"), CASES)
def test_time(benchmark: Any, provider: str, mode: str, m: str, n: str) -> None:
    call = make_case(provider, mode, int(m), int(n))
    benchmark.extra_info |= {"provider": provider, "mode": mode, "M": int(m), "N": int(n)}
    slow = provider not in ("half_gemm", "streamed") and int(n) > 8192  # too long for noise of milliseconds to matter
    benchmark.pedantic(call, rounds=1 if slow else 3, iterations=1, warmup_rounds=0 if slow else 1)
