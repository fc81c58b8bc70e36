"""The sparse benchmarks compare like with like, and their report says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import sparse, sparse_report
from topk_ortho import SparseFeatures, topk_ortho_loss, topk_pairs

ROOT = Path(__file__).parents[2]


def test_active_features_are_distinct_and_uneven():
    indices, values = sparse.active_features(300, 20, 500)
    assert indices.shape == values.shape == (300, 20)
    assert all(len(set(row)) == 20 for row in indices.tolist())
    assert (values > 0).all()
    frequency = torch.bincount(indices.flatten(), minlength=500).sort(descending=True).values
    assert frequency[0] > 5 * frequency[250]
    assert torch.equal(sparse.active_features(300, 20, 500)[0], indices)


def test_scipy_selects_the_same():
    indices, values = sparse.active_features(200, 12, 400)
    before = values.clone()
    rows, cols, cosines = sparse.scipy_pairs(indices, values, 400, 700)
    assert torch.equal(values, before)
    assert (rows < cols).all()
    expected = topk_pairs(SparseFeatures(indices, values, 400), k=700)
    np.testing.assert_allclose(cosines, expected.values.numpy(), atol=1e-6)


def test_every_route_computes_the_same_loss():
    case = {"sweep": "N", "rows": 64, "L0": 6, "N": 300}
    indices, values = sparse.active_features(64, 6, 300)
    expected = topk_ortho_loss(SparseFeatures(indices, values, 300))
    (gradient,) = sparse.make_call(case | {"provider": "sparse", "mode": "forward_backward"}, "cpu")()
    (dense_gradient,) = sparse.make_call(case | {"provider": "dense", "mode": "forward_backward"}, "cpu")()
    torch.testing.assert_close(dense_gradient.gather(1, indices), gradient, rtol=1e-4, atol=1e-7)
    for sweep, provider, mode in (("N", "dense", "forward"), ("density", "dense_to_sparse", "forward"),
                                  ("density", "dense_to_sparse", "auto"), ("N", "sparse", "forward")):  # fmt: skip
        value = sparse.make_call(case | {"sweep": sweep, "provider": provider, "mode": mode}, "cpu")()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_cases():
    cases = list(sparse.cases())
    assert len({tuple(case.values()) for case in cases}) == len(cases)
    of_goal = [
        c for c in cases if (c["provider"], c["mode"], c["rows"], c["L0"]) == ("sparse", "forward_backward", 4096, 64)
    ]
    assert {16384, 2**20} <= {case["N"] for case in of_goal}
    assert {case["sweep"] for case in cases} == {"N", "L0", "density"}


def test_a_case_measures_itself():
    case = {"sweep": "N", "provider": "sparse", "mode": "forward_backward", "rows": 64, "L0": 6, "N": 300}
    row = sparse.measure(case, "cpu", repeats=3)
    assert 0 < row["time_q1_s"] <= row["time_s"] <= row["time_q3_s"]
    assert row["peak_extra_bytes"] >= 0


def row_of(case, time_s):
    return case | {"time_s": time_s, "time_q1_s": time_s, "time_q3_s": time_s, "peak_extra_bytes": 3_000_000}


@pytest.fixture
def results():
    environment = dict.fromkeys(("cores", "cpu", "capability", "torch", "commit", "utc"), "x") | {"memory_bytes": 2**30}
    rows = []
    for case in sparse.cases():
        time_s = {"dense": 1.0, "scipy": 0.7}.get(case["provider"], 0.25)
        if case["provider"] == "dense_to_sparse":
            time_s = (100 * case["L0"] / case["N"]) ** 2  # 1 s at a density of 1%
        elif case["provider"] == "sparse" and case["N"] == 2**20:
            time_s = 0.3
        rows.append(row_of(case, time_s))
    return {"environment": environment, "dtype": "float32", "fraction": 1e-3, "fixed_k": 134_209, "rows": rows}


class TestReport:
    def test_crossover(self, results):
        for n in (4096, 16384):
            assert sparse_report.crossover(results["rows"], n) == pytest.approx(0.01)

    def test_no_crossover(self, results):
        for row in results["rows"]:
            if row["provider"] == "dense_to_sparse":
                row["time_s"] = 0.5
        assert sparse_report.crossover(results["rows"], 4096) is None

    def test_table(self, results):
        text = sparse_report.table(results)
        lines = text.splitlines()
        assert lines[0].startswith("| N | loss, forward | loss, forward + backward |")
        assert (
            lines[2]
            == "| 16,384 |" + " 0.25 s, 3 MB |" * 3 + " 0.70 s, 3 MB | 0.25 s, 3 MB | 0.70 s, 3 MB | 1.00 s, 3 MB |"
        )
        assert lines[5].endswith("|  |")
        assert "1,048,576 take 1.20 times as long as at N = 16,384" in text
        assert "1.0% at N = 4,096, 1.0% at N = 16,384" in text

    def test_figure(self, results, tmp_path):
        out = tmp_path / "sparse"
        out.with_suffix(".json").write_text(json.dumps(results))
        sparse_report.write_report(out, into_readme=False)
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = subprocess.run(
        [sys.executable, "-m", "bench.sparse", "--device", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--device cuda needs a CUDA or ROCm device" in result.stderr
