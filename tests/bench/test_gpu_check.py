import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu_check.sh"
STEPS = ["tests", "memcheck", "racecheck", "ncu", "bench"]


@pytest.fixture
def run_script(tmp_path):
    """Runs bench/gpu_check.sh with tools that only write down what they are asked; they fail or sleep at a pattern."""

    def run(*arguments, failing="nothing", sleeping="nothing", **environment):
        for name in ("python", "compute-sanitizer", "ncu"):
            (tmp_path / name).write_text(
                f'#!/bin/sh\necho "{name} $*" | head -1 | tee -a "$CALLS"\n'
                f'case "{name} $*" in {failing}) exit 3 ;; {sleeping}) sleep 60 ;; esac\n'
            )
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {
            "PYTHON": str(tmp_path / "python"), "LOG_DIR": str(tmp_path / "logs"), "CALLS": str(tmp_path / "calls"),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        } | environment  # fmt: skip
        (tmp_path / "calls").touch()
        command = ["bash", str(SCRIPT), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        calls = (tmp_path / "calls").read_text().splitlines()
        return result, [call for call in calls if not call.startswith("python -c")]  # which ask what there is

    return run


def summary_of(result):
    """The results of the steps by their names."""
    return dict(line.split(": ", 1) for line in result.stdout.split("== summary\n")[1].splitlines())


def test_a_failed_step_shows_and_the_others_run(run_script, tmp_path):
    result, calls = run_script("--smoke", "--out", "x", failing='*"--tool memcheck"*')
    assert re.match(r"python -m pytest -m gpu -q --tb=short --durations=15 -n \d+ tests/test_gpu.py tests/", calls[0])
    for tool, call in zip(("memcheck", "racecheck"), calls[1:3], strict=True):
        assert f"--tool {tool}" in call
        assert call.endswith("-m pytest -q --tb=short tests/test_gpu.py -k sanitizer")
    assert calls[3].startswith("ncu --clock-control none --kernel-name regex:survivors --launch-count 1")
    assert calls[4:] == ["python -m bench --device cuda --time-budget 55 --smoke --out x"]
    summary = summary_of(result)
    assert list(summary) == STEPS
    assert summary.pop("memcheck").startswith("FAILED with status 3, ")
    logs = tmp_path / "logs"
    for name, line in summary.items():
        assert re.fullmatch(rf"passed, \d+ s, {logs / name}.log", line)
    assert result.returncode == 1
    assert {path.name for path in logs.iterdir()} == {"summary.txt"} | {f"{name}.log" for name in STEPS}


def test_steps_by_name(run_script):
    """In the order of the script."""
    result, calls = run_script("bench", "racecheck", "--smoke")
    assert [call.split()[0] for call in calls] == ["compute-sanitizer", "python"]
    assert calls[1].endswith(" --smoke")
    assert list(summary_of(result)) == ["racecheck", "bench"]
    assert result.returncode == 0


def test_a_step_that_does_not_exist(run_script):
    result, calls = run_script("tests", "benchmarks")
    assert (result.returncode, calls) == (2, [])
    assert "there is no step benchmarks" in result.stderr


def test_a_step_is_stopped_at_its_limit(run_script, tmp_path):
    """What it wrote until then is in its log."""
    result, _ = run_script("tests", "bench", sleeping='*"-m pytest"*', STEP_LIMIT_S="0.5")
    assert summary_of(result)["tests"].startswith("FAILED with status 124, ")
    assert summary_of(result)["bench"].startswith("passed, ")
    assert (tmp_path / "logs/tests.log").read_text().startswith("python -m pytest")


def test_without_xdist(run_script):
    _, calls = run_script("tests", failing='*"import xdist"*')
    assert calls[0].startswith("python -m pytest -m gpu -q --tb=short --durations=15 tests/test_gpu.py tests/")
    assert calls[0].endswith(" tests/test_devices.py")


def test_without_what_training_needs(run_script):
    _, calls = run_script("tests", failing='*"import sae_lens"*')
    assert calls[0].endswith(" tests/test_functional.py")


def test_the_limits_are_those_of_the_header(run_script, tmp_path):
    """They leave time for the rest within 8 minutes."""
    (tmp_path / "timeout").write_text('#!/bin/sh\necho "limit $3" >>"$CALLS"\n')
    (tmp_path / "timeout").chmod(0o755)
    _, calls = run_script()
    header = dict(re.findall(r"^#   (\w+) +(\d+)  ", SCRIPT.read_text(), flags=re.MULTILINE))
    assert [call.split()[1] for call in calls] == [header[name] for name in STEPS]
    total = sum(map(int, header.values()))
    assert f"{total} together" in SCRIPT.read_text()
    assert total <= 460


def test_all_that_is_for_a_gpu_is_run():
    """What is marked, or runs on every backend, lies where the step looks."""
    root = SCRIPT.parents[1]
    paths = " ".join(re.findall(r"paths\+?=\((.*?)\)", SCRIPT.read_text()))
    command = ["bash", "-c", f"printf '%s\\n' {paths}"]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert all((root / path).exists() for path in named)
    of_backends = r"def test\w*\([^)]*\b(small_)?backend\b|@(with_screen|not_interpreted|crossed|on)\b|mark\.gpu\b"
    for path in (root / "tests").rglob("test_*.py"):
        if re.search(of_backends, path.read_text()):
            assert any(path.is_relative_to(root / name) for name in named), path


def test_without_a_gpu(run_script):
    result, calls = run_script(failing='*"cuda.is_available"*')
    assert (result.returncode, calls) == (2, [])
    assert "sees no CUDA or ROCm device" in result.stderr
