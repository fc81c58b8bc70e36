import pytest
import torch

from bench.cases import Case
from bench.measurement import Measurement
from bench.results import Result, append, environment_of, finished, latest, read

CASES = [Case("dense", provider, "forward", "float32", 8, 64) for provider in ("a", "b", "c")]
ENVIRONMENT = {"cpu": "one", "torch": "2.13.0", "source": "0123", "commit": "abc"}


def result_of(case, environment=ENVIRONMENT, **fields):
    measurement = Measurement("ok", time_s=0.2, rounds=5)._replace(**fields)
    return Result(case, measurement, {"fraction": 1e-3}, environment, "2026-01-02 03:04")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "cpu.jsonl"


def test_results_survive_the_file(path):
    results = [
        result_of(CASES[0], peak_extra_bytes=7),
        result_of(CASES[1]._replace(L0=3), status="error", time_s=None, note='ValueError("a\nb")'),
    ]
    assert read(path) == []
    for result in results:
        append(path, result)
    assert read(path) == results


@pytest.mark.parametrize("n_bytes", [1, 40], ids=["only_the_line_end_is_missing", "half_a_line"])
def test_a_torn_line_does_not_count_and_is_replaced(path, n_bytes):
    for case in CASES[:2]:
        append(path, result_of(case))
    path.write_bytes(path.read_bytes()[:-n_bytes])
    assert [result.case for result in read(path)] == CASES[:1]
    append(path, result_of(CASES[2]))
    assert [result.case for result in read(path)] == [CASES[0], CASES[2]]


def test_finished_is_what_ran_in_the_same_environment():
    results = [
        result_of(CASES[0]),
        result_of(CASES[1], status="out of memory"),
        result_of(CASES[2], status="error"),
    ]
    assert finished(results, ENVIRONMENT | {"commit": "other"}) == set(CASES[:2])  # the digest tells what it changed
    for name in ("cpu", "torch", "source"):
        assert finished(results, ENVIRONMENT | {name: "other"}) == set()


def test_latest():
    """What is compared has the same sources, and all of a benchmark the same machine and versions."""
    other = ENVIRONMENT | {"source": "4567", "commit": "new"}
    training, larger = Case("training", "a", "step", "float32", 8, 64), CASES[0]._replace(N=2 * CASES[0].N)
    assert CASES[0]._replace(provider="") == CASES[1]._replace(provider="")
    elsewhere = result_of(larger, ENVIRONMENT | {"torch": "older"})
    old = [result_of(training), result_of(CASES[0]), result_of(CASES[1]), result_of(larger)]
    new = [result_of(CASES[1], other, time_s=9.0), result_of(CASES[1], other, time_s=3.0)]
    assert latest([elsewhere, *old, *new]) == [old[0], old[3], new[1]]
    assert latest([*old, elsewhere]) == [old[0], elsewhere]


def test_the_environment_tells_which_code_ran():
    environment = environment_of(torch.device("cpu"))
    assert environment["torch"] == torch.__version__
    assert len(environment["source"]) == 12
    assert all(environment[name] is not None for name in ("cpu", "cores", "memory_bytes", "python", "commit", "numpy"))
