import json

import pytest

from bench import gpu_report
from bench.gpu_cases import Case, plan, smoke_plan
from bench.gpu_log import case_of, row_of
from bench.gpu_report import goals, results_of, table, write_report
from tests.bench.test_gpu_log import ENVIRONMENT

TIME_IN_PRODUCTS = {"triton": 1.1, "cublas": 1.0, "half_gemm": 1.05}


def fabricated(case):
    """A row whose time is in proportion to the operations; autograd through the matrix runs out of memory."""
    if case.provider == "naive_autograd":
        result = {"status": "out of memory", "note": "OutOfMemoryError('CUDA out of memory')"}
    else:
        rate = 600e9 if case.dtype == "bfloat16" else 50e9  # operations a millisecond
        time_ms = TIME_IN_PRODUCTS.get(case.provider, 5.0) * case.operations / rate
        result = {
            "status": "ok", "time_ms": time_ms, "time_q20_ms": 0.9 * time_ms, "time_q80_ms": 1.1 * time_ms,
            "rounds": 3, "peak_extra_bytes": 10**6,
        }  # fmt: skip
        if case.provider == "kernels":
            result["kernels_ms"] = {"other": 0.25, "gram_select": 1.5}
    return row_of(case, result, ENVIRONMENT)


ROWS = [fabricated(case) for case in plan()[:-2]]  # two are not reached


def test_files_and_table(tmp_path, capsys):
    write_report(tmp_path / "gpu", ROWS, plan())
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert (tmp_path / "gpu.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert results["environment"] == ENVIRONMENT | {"utc": ROWS[-1]["utc"]}
    assert [case_of(row) for row in results["rows"]] == plan()[:-2]
    assert [Case(**case) for case in results["not_reached"]] == plan()[-2:]
    text = capsys.readouterr().out
    assert text.startswith("gpu NVIDIA H100 80GB HBM3, gpu_memory_bytes 80000000000, driver 570.1, cuda 12.8")
    for mode in ("forward", "forward + backward"):
        assert f"{mode}, float32, M = 16,384\n" in text
    assert "kernels, forward_backward, bfloat16, M = 4,096, N = 65,536, ms: gram_select 1.500, other 0.250" in text
    assert "out of memory  OutOfMemoryError('CUDA out of memory')" in text
    assert "not reached:\n  chunked, forward, bfloat16, M = 4,096, N = 262,144" in text


def test_derived_figures_by_hand():
    rows = {case_of(row): row for row in results_of(ROWS, plan())["rows"]}
    row = rows[Case("triton", "forward", "bfloat16", 4096, 65536)]
    operations = 65536 * 65535 * 4096
    assert row["tflops"] == pytest.approx(600 / 1.1)
    assert row["to_half_gemm"] == pytest.approx(1.1)
    floor_ms = operations / 989.4e9 + (65536 * 4096 * 2 + 65536 * 16) / 3.35e9
    assert row["of_model"] == pytest.approx(floor_ms / row["time_ms"])
    square = rows[Case("cublas", "forward", "bfloat16", 4096, 16384)]
    assert square["tflops"] == pytest.approx(600)
    assert square["of_model"] is square["to_half_gemm"] is None
    lost = rows[Case("naive_autograd", "forward_backward", "bfloat16", 4096, 32768)]
    assert (lost["status"], lost["tflops"], lost["to_half_gemm"]) == ("out of memory", None, None)


def test_no_share_of_a_model_that_there_is_not():
    rows = [row | {"gpu": "some other card"} for row in ROWS]
    assert {row["of_model"] for row in results_of(rows, plan())["rows"]} == {None}


def test_goals():
    lines = goals(results_of(ROWS, plan()))
    forward, both = "forward, bfloat16, N = 65,536", "forward + backward, bfloat16, N = 32,768, times faster than"
    assert lines[:5] == [
        f"{forward}, time / half-GEMM at the cuBLAS rate: 1.10 (1.25 or less)",
        f"{forward}, extra memory / N**2 float32: 0.01% (2% or less)",
        f"{both} matmul + torch.topk, all by autograd: not measured (4 or more)",
        f"{both} matmul + torch.topk: 4.5",
        f"{both} row blocks, merged torch.topk: 4.5 (2 or more)",
    ]
    assert all("not measured" in line for line in goals({"rows": []}))


@pytest.mark.parametrize("status", ["ok", "error", "skipped"])
def test_a_single_row(tmp_path, status, capsys):
    row = fabricated(Case("naive", "forward", "float32", 64, 1024))
    if status != "ok":
        row |= dict.fromkeys(("time_ms", "time_q20_ms", "time_q80_ms", "peak_extra_bytes"))
    write_report(tmp_path / "gpu", [row | {"status": status, "note": "boom"}], [])
    assert (tmp_path / "gpu.png").exists()
    assert ("boom" in capsys.readouterr().out) == (status != "ok")


def test_a_failed_profile_shows_why():
    row = row_of(Case("kernels", "forward", "float32", 64, 1024), {"status": "error", "note": "boom"}, ENVIRONMENT)
    assert "kernels, forward, float32, M = 64, N = 1,024, ms: boom" in table(results_of([row], []))


def test_smoke_has_every_figure():
    rows = results_of([fabricated(case) for case in smoke_plan()], smoke_plan())["rows"]
    assert all(
        row["to_half_gemm"] for row in rows if row["status"] == "ok" and row["provider"] not in ("cublas", "kernels")
    )


def test_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "find_spec", lambda name: None)
    write_report(tmp_path / "gpu", ROWS, plan())
    assert "no figure: matplotlib is missing" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json"}
