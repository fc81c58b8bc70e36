import pytest
import torch

from bench import measurement
from bench.cases import Benchmark, Case
from bench.measurement import Measurement, failure, groups_of, measure, peak_extra_bytes, rounds_of

CPU = torch.device("cpu")
CASES = [Case("toy", provider, "step", "float32", 8, 64) for provider in ("a", "b", "c")]


def benchmark_of(make_call, **options):
    return Benchmark(lambda device: CASES, make_call, {}, None, {}, **options)


def test_cases_take_turns():
    called = []
    benchmark = benchmark_of(lambda case, device: lambda: called.append(case.provider), rounds=3, n_warmup=2)
    measured = measure(benchmark, CASES, CPU)
    assert "".join(called) == "aabbcc" + 3 * "abc"  # two warm-up calls, then the rounds
    for m in measured.values():
        assert (m.status, m.rounds) == ("ok", 3)
        assert 0 < m.time_q1_s <= m.time_s <= m.time_q3_s


def test_the_first_round_decides_how_many_a_case_has(monkeypatch):
    called, rounds = [], iter([3, 1, 2])
    monkeypatch.setattr(measurement, "rounds_of", lambda seconds: next(rounds))
    measured = measure(benchmark_of(lambda case, device: lambda: called.append(case.provider)), CASES, CPU)
    assert "".join(called) == "abc" + "abc" + "ac" + "a"
    assert [m.rounds for m in measured.values()] == [3, 1, 2]


def test_a_case_that_fails_does_not_stop_the_others():
    def make_call(case, device):
        if case.provider == "a":
            raise ValueError("boom")
        return lambda: torch.empty(2**60) if case.provider == "b" else None

    measured = measure(benchmark_of(make_call), CASES, CPU)
    assert [m.status for m in measured.values()] == ["error", "out of memory", "ok"]
    assert measured[CASES[0]].note == "ValueError('boom')"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError('File "a.py"\nRuntimeError: std::bad_alloc'), "out of memory"),
        # as the process of a case on the CPU ends
        (RuntimeError('File "a.py"\nRuntimeError: DefaultCPUAllocator: can\'t allocate memory'), "out of memory"),
        (RuntimeError("Traceback\nnumpy._core._exceptions._ArrayMemoryError: Unable to allocate"), "out of memory"),
        (RuntimeError("out of resource: shared memory"), "error"),
    ],
)
def test_failures_are_told_apart(error, status):
    assert failure(error) == Measurement(status, note=repr(error))


def test_what_is_long_is_timed_once():
    assert [rounds_of(seconds) for seconds in (1e-6, 0.1, 1.0, 9.0, 11.0)] == [30, 10, 5, 5, 1]


def test_peak_memory_is_what_a_call_allocates():
    n_bytes = 64 * 2**20
    extra = peak_extra_bytes(lambda: torch.ones(n_bytes // 4).sum())
    assert 0.9 * n_bytes < extra < 1.5 * n_bytes


def test_cases_are_grouped_by_all_but_the_provider():
    cases = [CASES[0], CASES[0]._replace(N=128), CASES[1]]
    assert groups_of(cases) == [[CASES[0], CASES[1]], [cases[1]]]
