import pytest
from matplotlib.axes import Axes

from bench.dense import DENSE
from bench.measurement import Measurement
from bench.report import tables_of, write_report
from bench.results import Result
from bench.sparse import SPARSE_DENSITY, SPARSE_L0, SPARSE_N
from bench.training import TRAINING

CPU = {
    "cpu": "EPYC", "capability": "AVX512", "cores": 2, "memory_bytes": 24 * 2**30, "torch": "2.13.0", "commit": "abc",
    "sae_lens": "6.54.12",
}  # fmt: skip
GPU = CPU | {"gpu": "NVIDIA H100 80GB HBM3", "driver": "570.1", "cuda": "12.8", "triton": "3.9.0"}


def results_of(benchmark, measure, environment=CPU):
    """Results of every case, measured by a function of the case that returns seconds, or None if memory ran out."""
    results = []
    for case in benchmark.cases("cuda" if environment is GPU else "cpu"):
        measurement = Measurement("ok", time_s=measure(case), rounds=5, peak_extra_bytes=3_000_000)
        if measurement.time_s is None:
            measurement = Measurement("out of memory")
        results.append(Result(case, measurement, benchmark.setting, environment, "2026-01-02 03:04"))
    return results


def sparse_results():
    def measure(case):
        if case.benchmark == "sparse_density" and case.provider != "dense":
            return (100 * case.L0 / case.N) ** 2  # 1 s at a density of 1%
        return {"dense": 1.0, "scipy": 0.7}.get(case.provider, 0.3 if case.N == 2**20 else 0.25)

    return [r for benchmark in (SPARSE_N, SPARSE_L0, SPARSE_DENSITY) for r in results_of(benchmark, measure)]


class TestDense:
    def test_times_memory_and_ratios(self):
        seconds = {"topk_ortho": 0.055, "half_gemm": 0.05, "chunked": 1.25, "naive": 12.5, "naive_compiled": 11.0}
        text = tables_of(results_of(DENSE, lambda case: seconds.get(case.provider)))["dense"]
        ours = "0.055 s, 3 MB | 0.050 s, 3 MB | 1.25 s, 3 MB | 12.5 s, 3 MB"
        assert f"| 2,048 | forward | {ours} |  | 11.0 s, 3 MB | 1.10 | 227.3 x | 100.00% |" in text
        assert "12.5 s, 3 MB | out of memory | 11.0 s, 3 MB |  | 227.3 x | 100.00% |" in text
        assert "as large as x. M = 1,024, float32, k = 0.1% of the pairs." in text
        assert "2 cores of EPYC (AVX512), 24 GiB, torch 2.13.0, commit abc, 2026-01-02 03:04 UTC." in text

    def test_a_provider_that_was_not_measured_has_no_column(self):
        results = results_of(DENSE, lambda case: 0.5)
        results = [r for r in results if r.case.provider != "naive_compiled"]
        assert "torch.compile" not in tables_of(results)["dense"]

    def test_no_ratio_without_its_two_times(self):
        results = [r for r in results_of(DENSE, lambda case: 0.5) if r.case.provider in ("topk_ortho", "chunked")]
        assert "| 2,048 | forward | 0.50 s, 3 MB | 0.50 s, 3 MB |  |  |  |" in tables_of(results)["dense"]


class TestGpu:
    """Times in proportion to the operations: 600 Tflop/s of cuBLAS in bfloat16, 50 in float32."""

    @pytest.fixture
    def measured(self):
        def measure(case):
            operations = 2 * case.M * (case.N**2 if case.provider == "cublas" else case.N * (case.N - 1) // 2)
            rate = 600e12 if case.dtype == "bfloat16" else 50e12
            factor = {"cublas": 1.0, "topk_ortho_warm": 1.1}.get(case.provider, 5.0)
            return None if case.provider == "naive_autograd" else factor * operations / rate

        return results_of(DENSE, measure, GPU)

    def test_figures_by_hand(self, measured):
        row = next(
            r
            for r in tables_of(measured)["dense"].splitlines()
            if r.startswith("| bfloat16 | 4,096 | 65,536 | forward |")
        )
        # the model: 65,536 * 65,535 * 4,096 operations at 989.4 Tflop/s and the norms' 538 MB at 3.35 TB/s, 17.94 ms
        assert row.endswith("| 545.5 | 56% | 1.10 |")
        assert row.startswith("| bfloat16 | 4,096 | 65,536 | forward | 32.3 ms, 3 MB |")

    def test_another_card_has_no_share_of_a_model(self, measured):
        other = [result._replace(environment=GPU | {"gpu": "some card"}) for result in measured]
        assert "| 545.5 |  | 1.10 |" in tables_of(other)["dense"]


class TestSparse:
    def test_table(self):
        lines = tables_of(sparse_results())["sparse"].splitlines()
        ours, scipy = " 0.25 s, 3 MB |", " 0.70 s, 3 MB |"
        assert lines[2] == "| 16,384 |" + 3 * ours + scipy + ours + scipy + " 1.00 s, 3 MB |"
        assert lines[5].endswith("|  |")
        assert "1,048,576 take 1.20 times as long as at N = 16,384" in lines[-1]
        assert "density of 1.0% at N = 4,096, 1.0% at N = 16,384" in lines[-1]

    def test_no_crossover_between_equal_times_or_without_a_sweep(self):
        never = [result._replace(measurement=Measurement("ok", time_s=0.5)) for result in sparse_results()]
        without = [result for result in sparse_results() if result.case.benchmark == "sparse_n"]
        for results in (never, without):
            assert "equal time at a density" not in tables_of(results)["sparse"]


def test_training_table_compares_with_saelens():
    results = results_of(TRAINING, lambda case: 0.26 if case.provider == "saelens" else 0.052)
    text = tables_of(results)["training"]
    assert "| SAELens | 260 ms | 1.0 |\n" in text
    assert "| topk_ortho, with the penalty on the decoder | 52 ms | 5.0 |\n" in text
    assert "Median of 5 alternating steps" in text
    assert "SAELens 6.54.12" in text


def test_report_fills_the_page_and_draws_figures(tmp_path, monkeypatch):
    crosses = []
    monkeypatch.setattr(Axes, "annotate", lambda self, text, at, *arguments, **options: crosses.append((text, at[0])))
    page, names = tmp_path / "benchmarks.md", ("bench", "sparse-bench", "training-bench")
    page.write_text("".join(f"a\n<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nb\n" for name in names))
    results = results_of(DENSE, lambda case: None if case.provider == "naive_autograd" else 0.5) + sparse_results()
    write_report(results, tmp_path / "cpu.jsonl", page)
    text = page.read_text()
    assert text.count("a\n<!-- ") == text.count(" end -->\nb\n") == 3
    assert (text.count("\nold\n"), text.count("| N |")) == (1, 2)  # training was not measured, and its table stays
    assert tables_of(results)["training"] == "not measured\n"
    assert {path.name for path in tmp_path.glob("*.png")} == {"cpu.png", "cpu-sparse.png"}
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert crosses == [("out of memory", n) for n in (2048, 4096, 8192, 16384, 32768)]


def test_the_report_of_a_gpu(tmp_path):
    """Results of a GPU make a figure, and fill their own table in the page; that of the CPU stays as it was."""
    seconds = {"topk_ortho_warm": 0.5, "half_gemm": 0.4, "chunked": 2.0, "naive_compiled": 1.0}
    page = tmp_path / "benchmarks.md"
    names = ("bench", "gpu-bench")
    page.write_text("".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in names))
    results = results_of(DENSE, lambda case: seconds.get(case.provider, 9.0), GPU)
    write_report(results, tmp_path / "cuda.jsonl", page)
    assert (tmp_path / "cuda.png").read_bytes().startswith(b"\x89PNG")
    before, after = page.read_text().split("<!-- gpu-bench: begin -->")
    assert "old" in before
    others = "9000.0 ms, 3 MB | 400.0 ms, 3 MB | 2000.0 ms, 3 MB"
    assert f"| bfloat16 | 4,096 | 65,536 | forward | 500.0 ms, 3 MB | {others} |  | 1.25 | 4.0 x |" in after
    compiled = "1000.0 ms, 3 MB | 1.25 | 2.0 x |"
    assert f"| float32 | 4,096 | 32,768 | forward | 500.0 ms, 3 MB | {others} | {compiled}" in after
    assert "NVIDIA H100 80GB HBM3, driver 570.1" in after
