"""Which small kernels have a race, as Triton compiles them for sm_90, and what cannot be judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.races import races

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    """What `tests/bench/racing_kernels.py` prints."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.bench.racing_kernels"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


EXPECTED = {
    "clears_what_it_has_read": ["a_ptr"],
    "replaces_a_number": ["a_ptr"],
    "waits": [],
    "waits_too_early": ["a_ptr"],
    "waits_on_one_way": ["a_ptr"],
    "loads_on_one_way": ["a_ptr"],
    "returns_early": ["a_ptr"],
    "stores_before_it_loads": [],
    "stores_at_the_next_step": ["a_ptr"],
    "waits_at_every_step": [],
    "stores_at_the_next_step_of_the_outer_loop": ["a_ptr"],
    "stores_at_the_next_step_of_a_while_loop": ["a_ptr"],
    "carries_pointers": [],
    "computes_an_offset": [],
    "chooses_a_pointer": ["b_ptr"],
    "adds_atomically": ["a_ptr"],
}


@pytest.mark.parametrize("kernel", EXPECTED)
def test_kernels(kernel, found):
    assert found[kernel] == EXPECTED[kernel]


def test_all_are_expected(found):
    assert set(found) == set(EXPECTED)


FUNCTION = "module {\n  tt.func public @f(%a_ptr: !tt.ptr<i64>, %n: i32) {\n    BODY\n    tt.return\n  }\n}\n"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        pytest.param("gpu.barrier", [], id="of_Triton_3.6"),
        pytest.param("ttg.barrier all", [], id="of_Triton_3.9"),
        pytest.param("ttg.barrier local", ["a_ptr"], id="of_shared_memory_alone"),
    ],
)
def test_barriers(body, found):
    lines = f"%0 = tt.load %a_ptr : !tt.ptr<i64>\n    {body}\n    tt.store %a_ptr, %0 : !tt.ptr<i64>"
    assert races(FUNCTION.replace("BODY", lines)) == found


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("%0 = tt.load %elsewhere : !tt.ptr<i64>", "%elsewhere comes from no argument"),
        ("tt.call @g(%a_ptr) : (!tt.ptr<i64>) -> ()", "a function is not inlined"),
    ],
)
def test_what_cannot_be_judged_is_an_error(body, reason):
    with pytest.raises(AssertionError, match=reason):
        races(FUNCTION.replace("BODY", body))
