import itertools

import pytest
import torch

from bench import gpu
from bench.gpu import estimate_s, run_cases
from bench.gpu_cases import Case, plan, smoke_plan
from bench.gpu_gate import CHECKS
from bench.gpu_log import case_of, read
from bench.gpu_measure import Measurement
from tests.bench.test_gpu_log import CASES, ENVIRONMENT


class Machine:
    """A clock that stands still but for the cases measured, each of which takes what it is told."""

    def __init__(self, seconds=5.0, time_ms=10.0, fails=None):
        self.now = 0.0
        self.seconds, self.time_ms, self.fails = seconds, time_ms, fails or {}
        self.measured = []

    def measure(self, case):
        self.measured.append(case)
        self.now += self.seconds
        if case in self.fails:
            raise self.fails[case]
        time_ms = self.time_ms(case) if callable(self.time_ms) else self.time_ms
        return Measurement(time_ms, time_ms, time_ms, 3, 10**6)


@pytest.fixture(autouse=True)
def _device_that_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "gpu.csv"


def run(log, cases, machine, *, budget_s=1e6):
    rows = read(log, ENVIRONMENT)
    run_cases(cases, rows, log, ENVIRONMENT, machine.measure, lambda: budget_s - machine.now)
    assert read(log, ENVIRONMENT) == rows
    return rows


class TestBudget:
    def test_cases_run_in_order_until_the_time_is_up(self, log, capsys):
        machine = Machine(seconds=30.0)
        rows = run(log, CASES, machine, budget_s=70)
        assert machine.measured == CASES[:3] == [case_of(row) for row in rows]
        assert "2 cases were not reached" in capsys.readouterr().out

    def test_what_is_too_long_is_left_out_for_what_fits(self, log):
        slow = Case("naive", "forward", "float32", 4096, 32768)
        machine = Machine(seconds=1.0)
        run(log, [slow, CASES[0]], machine, budget_s=15.0)
        assert estimate_s(slow, []) > 15 > estimate_s(CASES[0], [])
        assert machine.measured == [CASES[0]]

    def test_nothing_starts_without_time(self, log):
        machine = Machine()
        assert run(log, plan(), machine, budget_s=0.0) == []
        assert machine.measured == []

    def test_the_default_reaches_the_goals_on_an_unknown_machine(self):
        cases = plan()[:10]
        assert sum(estimate_s(case, []) for case in cases) < 400

    def test_estimate_scales_the_nearest_finished_case(self, log):
        near, far = Case("tiled", "forward", "bfloat16", 4096, 32768), Case("tiled", "forward", "bfloat16", 4096, 8192)
        rows = run(log, [near, far], Machine(time_ms=lambda case: {near: 200.0, far: 2.0}[case]))
        # 65,536 columns are four times the work of the nearer one; 2, 3 and 3 calls
        wanted = near._replace(N=65536)
        assert estimate_s(wanted, rows) == pytest.approx(5 + (2 + 3 + 3) * 0.8)
        assert estimate_s(wanted._replace(mode="forward_backward"), rows) == estimate_s(wanted, []) != 0


class TestResume:
    def test_finished_cases_are_not_measured_again(self, log):
        first, second, third = Machine(seconds=30.0), Machine(), Machine()
        run(log, CASES, first, budget_s=70)
        rows = run(log, CASES, second)
        assert first.measured + second.measured == CASES == [case_of(row) for row in rows]
        run(log, CASES, third)
        assert third.measured == []

    def test_killed_in_a_case(self, log):
        with pytest.raises(KeyboardInterrupt):
            run(log, CASES, Machine(fails={CASES[2]: KeyboardInterrupt()}))
        machine = Machine()
        run(log, CASES, machine)
        assert machine.measured == CASES[2:]


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 16 GiB"), "out of memory"),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
            (ValueError("shared memory, and a comma"), "error"),
        ],
        ids=["torch", "cublas", "other"],
    )
    def test_a_failed_case_is_a_row_and_the_next_one_runs(self, log, error, status):
        machine = Machine(fails={CASES[1]: error})
        rows = run(log, CASES, machine)
        assert machine.measured == CASES
        assert [row["status"] for row in rows] == ["ok", status, "ok", "ok", "ok"]
        assert (rows[1]["note"], rows[1]["time_ms"]) == (repr(error), None)
        again = Machine()
        run(log, CASES, again)
        assert again.measured == []

    def test_a_lost_device_ends_the_run(self, log, monkeypatch):
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run(log, CASES, Machine(fails={CASES[1]: RuntimeError("launch failed")}))
        following = Machine()
        run(log, CASES, following)
        assert following.measured == CASES[2:]

    @pytest.mark.parametrize("provider", ["naive", "naive_autograd", "naive_compiled"])
    @pytest.mark.parametrize(("n", "status"), [(46340, "ok"), (46341, "skipped")])
    def test_topk_is_not_asked_for_more_than_it_can(self, log, provider, n, status):
        machine = Machine()
        case = Case(provider, "forward", "float32", 64, n)
        (row,) = run(log, [case], machine)
        assert row["status"] == status
        assert machine.measured == ([case] if status == "ok" else [])


@pytest.fixture
def device(monkeypatch):
    """As if there were one, on which every check passes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(gpu, "resolve_backend", lambda name, device: name)
    monkeypatch.setattr(gpu, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(gpu, "faults_of", lambda check, device, backend: [])


class TestMain:
    @pytest.mark.parametrize("fails", [False, True], ids=["all_ran", "one_failed"])
    def test_from_checks_to_report(self, tmp_path, monkeypatch, capsys, device, fails):
        machine = Machine(fails={smoke_plan()[3]: RuntimeError("boom")} if fails else {})
        monkeypatch.setattr(gpu, "measure", lambda case, device: machine.measure(case))
        assert gpu.main(["--out", str(tmp_path / "gpu.1"), "--smoke", "--budget-s", "inf"]) == int(fails)
        assert machine.measured == smoke_plan()
        assert {path.name for path in tmp_path.iterdir()} == {f"gpu.1-smoke.{end}" for end in ("csv", "json", "png")}
        text = capsys.readouterr().out
        assert text.count("right\n") == len(CHECKS)
        assert "not reached" not in text

        (tmp_path / "gpu.1-smoke.png").unlink()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main(["--out", str(tmp_path / "gpu.1"), "--smoke", "--report"]) == 0
        assert (tmp_path / "gpu.1-smoke.png").exists()

    def test_no_speed_without_right_results(self, tmp_path, monkeypatch, capsys, device):
        monkeypatch.setattr(gpu, "faults_of", lambda check, device, backend: [f"{check.name}: a pair is left out"])
        monkeypatch.setattr(gpu, "run_cases", lambda *arguments: pytest.fail("measured"))
        assert gpu.main(["--out", str(tmp_path / "gpu")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: wrong results, so no speed is measured")
        assert all(f"{check.name}: a pair is left out" in error for check in CHECKS)
        assert list(tmp_path.iterdir()) == []

    def test_checks_take_from_the_budget(self, tmp_path, monkeypatch, capsys, device):
        clock = itertools.chain([0.0], itertools.repeat(481.0))
        monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(gpu, "measure", lambda case, device: pytest.fail("measured"))
        assert gpu.main(["--out", str(tmp_path / "gpu")]) == 0
        assert f"{len(plan())} cases were not reached" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [([], "bench.gpu needs a CUDA or ROCm device; torch"), (["--report"], "{out}.csv has no results")],
        ids=["no_gpu", "nothing_to_report"],
    )
    def test_what_cannot_run_says_why(self, tmp_path, monkeypatch, capsys, arguments, error):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        out = tmp_path / "gpu"
        assert gpu.main(["--out", str(out), *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: " + error.format(out=out))
        assert message.count("\n") == 1
