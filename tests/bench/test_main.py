import math
import time

import pytest
import torch

import bench.__main__ as main_module
from bench.__main__ import BENCHMARKS, main, run
from bench.cases import Benchmark, Case
from bench.results import read

CPU = torch.device("cpu")
CASES = [Case("training", "saelens", "step", "float32", 8, n) for n in (64, 128, 256)]
"""Three groups; the mode "step" has no memory measured, so that no process is started."""


def benchmark_of(make_call):
    return {"training": Benchmark(lambda device: CASES, make_call, {}, None, {"d_in": 8})}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "cpu.jsonl"


class TestResume:
    def test_a_run_that_is_killed_goes_on(self, out):
        prepared = []

        def make_call(case, device):
            prepared.append(case)
            if len(prepared) == 2:
                raise KeyboardInterrupt
            return lambda: None

        benchmarks = benchmark_of(make_call)
        with pytest.raises(KeyboardInterrupt):
            run(benchmarks, CPU, out, smoke=True, deadline=math.inf)
        assert [result.case for result in read(out)] == CASES[:1]
        for _ in range(2):  # the second time there is nothing left to do
            assert run(benchmarks, CPU, out, smoke=True, deadline=math.inf) == 0
            assert [result.case for result in read(out)] == CASES
        assert prepared == [CASES[0], CASES[1], CASES[1], CASES[2]]

    def test_no_case_begins_after_the_deadline(self, out, capsys):
        benchmarks = benchmark_of(lambda case, device: pytest.fail("measured"))
        assert run(benchmarks, CPU, out, smoke=True, deadline=time.monotonic()) == 0
        assert "3 cases were not reached; the same command goes on with them" in capsys.readouterr().out
        assert not out.exists()

    def test_an_error_shows_in_the_exit_status_and_is_tried_again(self, out):
        prepared = []

        def make_call(case, device):
            prepared.append(case)
            if prepared == CASES[:1]:
                raise RuntimeError("boom")
            return lambda: None

        assert run(benchmark_of(make_call), CPU, out, smoke=True, deadline=math.inf) == 1
        assert run(benchmark_of(make_call), CPU, out, smoke=True, deadline=math.inf) == 0
        assert prepared == [*CASES, CASES[0]]


def test_no_speed_without_right_results(out, monkeypatch, capsys):
    monkeypatch.setattr(main_module, "faults_of", lambda benchmarks, device: ["a pair is left out"])
    monkeypatch.setattr(main_module, "run", lambda *arguments, **options: pytest.fail("measured"))
    assert main(["dense", "--out", str(out)]) == 1
    assert capsys.readouterr().err == "error: wrong results, so no speed is measured:\n  a pair is left out\n"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], list(BENCHMARKS)),
        (["training", "dense"], ["training", "dense"]),
        (["sparse"], ["sparse_n", "sparse_l0", "sparse_density"]),
        (["sparse_l0"], ["sparse_l0"]),
    ],
)
def test_names_choose_benchmarks(out, monkeypatch, names, expected):
    monkeypatch.setattr(main_module, "faults_of", lambda benchmarks, device: [])
    monkeypatch.setattr(main_module, "run", lambda benchmarks, *arguments, **options: list(benchmarks))
    assert main([*names, "--out", str(out)]) == expected


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["dens"], "unknown benchmark 'dens'; there are dense, sparse_n, sparse_l0, sparse_density, training"),
        (["--device", "cuda"], "--device cuda needs a CUDA or ROCm device; torch"),
        (["--report"], "cpu.jsonl has no results"),
    ],
    ids=["unknown_name", "no_gpu", "nothing_to_report"],
)
def test_what_cannot_run_says_why(out, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(out)])
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err
