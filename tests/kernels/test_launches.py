"""The launches of the compile report cover every kernel, and kernels compile when an integer argument is 1."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launches() -> dict:
    """What `tests/kernels/launches.py` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.launches"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_launched(launches):
    functions = {
        node.name.removeprefix("_").removesuffix("_kernel")
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert {kernel for kernel, _ in launches["names"]} == functions


def test_variants(launches):
    """Their names differ, and the passes are there as the backend launches them."""
    names = [tuple(name) for name in launches["names"]]
    assert len(set(names)) == len(names)
    survivors = {label for kernel, label in names if kernel == "gram_survivors"}
    assert {"half, moments", "half, scaled", "tf32", "ieee", "tf32, ragged", "ieee, ragged"} <= survivors
    described = {label for kernel, label in names if kernel == "described_survivors"}
    assert described == {"half", "half, fp16", "half, feature-major", "half, ragged", "half, restarted"}
    assert ("max_cosine", "half, ragged") in names
    keyed = {f"{value}, {key} keys" for value in ("fp32", "fp64") for key in ("int32", "int64")}
    for kernel in ("coactivation_products", "coactivation_sums", "coactivation_long_sums"):
        assert {label for name, label in names if name == kernel} == keyed
    assert {label for name, label in names if name == "coactivation_spread"} == {"fp32", "fp64"}


def test_an_argument_may_be_one(launches):
    """Triton makes a constant of every integer argument that is 1, which the interpreter does not show."""
    errors = {
        f"{kernel}, {argument}": error
        for kernel, of_kernel in launches["errors"].items()
        for argument, error in of_kernel.items()
    }
    assert len(errors) > 60
    failed = {case: error for case, error in errors.items() if error is not None}
    assert not failed, failed


def test_kernels_are_compiled_ahead(launches):
    """Two launches within `compiling_ahead` compile two kernels and run none; launched again, neither is compiled."""
    assert launches["ahead"] == {"compiled": 2, "launched": 0, "compiled later": 0, "launched later": 1}


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float32"])
def test_all_that_a_call_launches_is_compiled_ahead(dtype, launches):
    calls = launches["calls"][dtype]
    assert calls["launched"] >= 9
    assert calls["not ahead"] == 0
