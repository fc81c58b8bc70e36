import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu_check.sh"


class TestScript:
    """bench/gpu_check.sh with an interpreter that only writes down what it is asked."""

    def run_script(self, tmp_path, failing, *arguments):
        for name in ("python", "compute-sanitizer"):
            (tmp_path / name).write_text(
                f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\ncase "{name} $*" in {failing}) exit 3 ;; esac\n'
            )
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {
            "PYTHON": str(tmp_path / "python"), "LOG_DIR": str(tmp_path / "logs"), "CALLS": str(tmp_path / "calls"),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }  # fmt: skip
        command = ["bash", str(SCRIPT), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return result, (tmp_path / "calls").read_text().splitlines()[1:]  # the first asks for a GPU

    def test_steps_and_their_order(self, tmp_path):
        result, calls = self.run_script(tmp_path, "nothing", "--smoke", "--out", "x")
        assert result.returncode == 0
        assert calls[0] == "python -m pytest -m gpu"
        assert "--tool memcheck" in calls[1]
        assert "--tool racecheck" in calls[2]
        assert all("-m pytest -m gpu -k sanitizer" in call for call in calls[1:3])
        assert calls[-2:] == ["python -m bench.gpu --smoke --out x", "python -m bench.sparse --device cuda"]
        assert "tests: passed, " in result.stdout
        assert {path.name for path in (tmp_path / "logs").iterdir()} >= {"tests.log", "memcheck.log", "bench.log"}

    def test_a_failed_step_shows_and_the_others_run(self, tmp_path):
        result, calls = self.run_script(tmp_path, '*"--tool memcheck"*')
        assert result.returncode == 1
        assert calls[-2:] == ["python -m bench.gpu", "python -m bench.sparse --device cuda"]
        assert "memcheck: FAILED with status 3" in result.stdout
        assert "racecheck: passed" in result.stdout

    def test_a_missing_tool_skips_its_step(self, tmp_path):
        result, calls = self.run_script(tmp_path, "nothing")
        if any(call.startswith("python -c") for call in calls):
            pytest.skip("this machine has ncu")
        assert result.returncode == 0
        assert "ncu: skipped, there is no ncu" in result.stdout

    def test_without_a_gpu(self, tmp_path):
        result, calls = self.run_script(tmp_path, '*"cuda.is_available"*')
        assert (result.returncode, calls) == (2, [])
        assert "sees no CUDA or ROCm device" in result.stderr
