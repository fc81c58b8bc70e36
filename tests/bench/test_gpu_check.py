import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu_check.sh"


@pytest.fixture
def run_script(tmp_path):
    """Runs bench/gpu_check.sh with tools that only write down what they are asked, and fail at a pattern."""

    def run(failing, *arguments):
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

    return run


def test_a_failed_step_shows_and_the_others_run(run_script, tmp_path):
    result, calls = run_script('*"--tool memcheck"*', "--smoke", "--out", "x")
    assert calls[0] == "python -m pytest -m gpu"
    assert "--tool memcheck" in calls[1]
    assert "--tool racecheck" in calls[2]
    assert all("-m pytest -m gpu -k sanitizer" in call for call in calls[1:3])
    assert calls[-1] == "python -m bench --device cuda --smoke --out x"
    summary = result.stdout.split("== summary\n")[1]
    assert "tests: passed" in summary
    assert "memcheck: FAILED with status 3" in summary
    assert "racecheck: passed" in summary
    assert any(call.startswith("python -c") for call in calls) or "ncu: skipped, there is no ncu" in summary
    assert result.returncode == 1
    assert {path.name for path in (tmp_path / "logs").iterdir()} >= {"tests.log", "memcheck.log", "bench.log"}


def test_without_a_gpu(run_script):
    result, calls = run_script('*"cuda.is_available"*')
    assert (result.returncode, calls) == (2, [])
    assert "sees no CUDA or ROCm device" in result.stderr
