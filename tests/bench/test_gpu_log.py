import csv
from pathlib import Path

import pytest
import torch

from bench.gpu_cases import Case
from bench.gpu_log import ENVIRONMENT_FIELDS, append, case_of, environment_of, read, row_of

ENVIRONMENT = {
    "gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 80 * 10**9, "driver": "570.1", "cuda": "12.8",
    "torch": "2.13.0", "triton": "3.9.0", "python": "3.11.2", "source": "0123456789ab", "commit": "abc1234",
}  # fmt: skip
CASES = [Case("half_gemm", "forward", "bfloat16", 4096, 1024 * 2**i) for i in range(5)]
RESULT = {
    "status": "ok", "time_ms": 0.2, "time_q20_ms": 0.1, "time_q80_ms": 0.3, "rounds": 3, "peak_extra_bytes": 10**6
}  # fmt: skip


@pytest.fixture
def log(tmp_path):
    return tmp_path / "results" / "gpu.csv"


def fill(log, cases, environment=ENVIRONMENT):
    for case in cases:
        append(log, row_of(case, RESULT, environment))


def test_a_row_survives_the_file(log):
    rows = [
        row_of(CASES[0], RESULT | {"kernels_ms": {"gram_select": 1.5, "other": 0.25}}, ENVIRONMENT),
        row_of(CASES[1], {"status": "error", "note": 'ValueError("a, b")'}, ENVIRONMENT),
    ]
    for row in rows:
        append(log, row)
    assert read(log) == rows
    assert [case_of(row) for row in rows] == CASES[:2]
    assert rows[1]["time_ms"] is None
    with log.open() as file:
        assert next(csv.reader(file)) == list(rows[0])


def test_no_file(log):
    assert read(log) == read(log, ENVIRONMENT) == []


@pytest.mark.parametrize("n_bytes", [1, 40], ids=["only_the_line_end_is_missing", "half_a_line"])
def test_torn_last_line_does_not_count_and_is_replaced(log, n_bytes):
    fill(log, CASES[:3])
    log.write_bytes(log.read_bytes()[:-n_bytes])
    assert [case_of(row) for row in read(log)] == CASES[:2]
    fill(log, CASES[2:])
    assert [case_of(row) for row in read(log)] == CASES


@pytest.mark.parametrize("content", [b"", b"provider,mo"], ids=["empty", "torn_header"])
def test_killed_before_the_first_line(log, content):
    log.parent.mkdir()
    log.write_bytes(content)
    assert read(log) == []
    fill(log, CASES)
    assert [case_of(row) for row in read(log)] == CASES


@pytest.mark.parametrize("field", ENVIRONMENT)
def test_rows_of_another_environment_are_passed_over(log, field):
    fill(log, CASES[:3])
    other = ENVIRONMENT | {field: 7 if field == "gpu_memory_bytes" else "other"}
    n_old = 3 if field == "commit" else 0  # sources tell what a commit changed
    assert len(read(log, other)) == n_old
    fill(log, CASES[3:], other)
    assert [case_of(row) for row in read(log)] == CASES[3 - n_old :]
    assert len(read(log, ENVIRONMENT)) == 3 + (2 if n_old else 0)


def test_a_file_with_other_columns_is_refused(log):
    log.parent.mkdir()
    log.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"gpu\.csv has columns of another version: move it away"):
        read(log, ENVIRONMENT)


def test_sources_are_part_of_the_environment(monkeypatch):
    properties = type("Properties", (), {"name": "card", "total_memory": 7})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    environment = environment_of(torch.device("cpu"))
    assert tuple(environment) == ENVIRONMENT_FIELDS
    assert (environment["gpu"], environment["gpu_memory_bytes"]) == ("card", 7)
    assert environment["torch"] == torch.__version__
    original = Path.read_bytes
    for name in ("gram_select.py", "functional.py", "gpu_measure.py"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda path, name=name: original(path) + (b"#" if path.name == name else b"")
        )
        assert environment_of(torch.device("cpu"))["source"] != environment["source"]
