"""No tensor on the CPU meets one on a GPU: the checks of `tests/devices/`, on a GPU or its stand-in.

They have a process of their own, as the stand-in must be there before the first backward pass.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]
CHECKS = sorted((ROOT / "tests" / "devices").glob("check_*.py"))

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() and not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this version of torch takes no device that is written in Python",
    ),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]


def test_on_a_second_device():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--quiet", *map(str, CHECKS)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
