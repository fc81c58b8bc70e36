import json

import pytest

from bench import roofline
from bench.roofline import HARDWARE, Hardware, hardware_of

GPU = Hardware(name="round numbers", device_names=("toy",), half=1000.0, tf32=500.0, fp32=100.0, bandwidth=10.0)
M, N, K = 4, 8, 3  # 28 pairs
TRIANGLE = 28 * 2 * 4  # multiply-adds count twice


@pytest.mark.parametrize(
    ("work", "unit", "operations", "n_bytes", "gathered_bytes"),
    [
        (roofline.column_norms(M, N, "float32"), "fp32", 160, 4 * 8 * 4 + 4 * 4 * 8, 0),
        (roofline.column_norms(M, N, "bfloat16"), "fp32", 160, 4 * 8 * 2 + 4 * 4 * 8, 0),
        (roofline.round_columns(M, N), "fp32", 128, 4 * 8 * 4 + 4 * 8 * 2 + 4 * 8, 0),
        (roofline.gram_select(M, N, K, "half"), "half", TRIANGLE, 4 * 8 * 2 + 4 * 8 + 3 * 12, 0),
        (roofline.gram_select(M, N, K, "tf32"), "tf32", TRIANGLE, 4 * 8 * 4 + 4 * 8 + 3 * 12, 0),
        (roofline.gram_select(M, N, K, "ieee"), "fp32", TRIANGLE, 4 * 8 * 4 + 4 * 8 + 3 * 12, 0),
        (roofline.gram_histogram(M, N, "half"), "half", TRIANGLE, 4 * 8 * 2 + 4 * 8 + 256 * 8, 0),
        (roofline.gram_row_max(M, N, "ieee"), "fp32", TRIANGLE, 4 * 8 * 4 + 4 * 8 + 8 * 8, 0),
        # three pairs touch six columns, twenty touch all eight
        (roofline.rescore(M, N, 3), "fp32", 48, 6 * 4 * 4 + 4 * 8 + 12 * 3, 6 * 4 * 4),
        (roofline.rescore(M, N, 20), "fp32", 320, 8 * 4 * 4 + 4 * 8 + 12 * 20, 40 * 4 * 4),
        (
            roofline.pair_gradient(M, N, K, "bfloat16"),
            "fp32",
            6 * 4 * 3 + 4 * 8 * 4,
            2 * 4 * 8 * 2 + 6 * 12 + 9 * 8 + 2 * 8 * 4,
            6 * 4 * 2,
        ),
    ],
    ids=lambda value: f"{value.kernel}_{value.unit}" if isinstance(value, roofline.Work) else "",
)
def test_work_of_each_kernel(work, unit, operations, n_bytes, gathered_bytes):
    assert (work.unit, work.operations, work.n_bytes, work.gathered_bytes) == (
        unit,
        operations,
        n_bytes,
        gathered_bytes,
    )


def test_floor_is_the_longer_of_operations_and_bytes():
    by_operations = roofline.Work(kernel="", unit="tf32", operations=1500, n_bytes=20)
    by_bytes = roofline.Work(kernel="", unit="tf32", operations=500, n_bytes=20, gathered_bytes=10**6)
    assert by_operations.floor_s(GPU) == 3.0
    assert by_bytes.floor_s(GPU) == 2.0


@pytest.mark.parametrize(
    ("dtype", "precision", "kernels"),
    [
        ("bfloat16", "highest", ["column_norms", "gram_select half"]),
        ("float16", "high", ["column_norms", "gram_select half"]),
        ("float32", "high", ["column_norms", "gram_select tf32"]),
        ("float32", "medium", ["column_norms", "round_columns", "gram_select half"]),
    ],
)
def test_route_follows_from_dtype_and_precision(dtype, precision, kernels):
    route = roofline.forward_kernels(GPU, M, N, K, dtype, precision)
    assert [f"{work.kernel} {kind or ''}".strip() for work, kind in route] == kernels
    total = sum(work.floor_s(GPU) for work, _ in route)
    assert roofline.forward_floor(GPU, M, N, K, dtype, precision) == pytest.approx(total)


def test_highest_precision_takes_the_faster_route():
    few = roofline.forward_kernels(GPU, 4, 8, 3, "float32")
    many = roofline.forward_kernels(GPU, 4, 8000, 3, "float32")
    assert [kind for _, kind in few] == [None, "ieee"]
    assert [kind for _, kind in many] == [None, None, "half", None]


def test_floors_by_hand():
    # H100: 65,536 * 65,535 * 4,096 operations of the triangle take 17.781 ms; the norms read 536.9 MB in 0.161 ms
    gpu = hardware_of("NVIDIA H100 80GB HBM3")
    floor = roofline.forward_floor(gpu, 4096, 65536, 2147450, "bfloat16")
    assert floor == pytest.approx(17.780e-3 + 0.1606e-3, rel=1e-4)
    # the gradient: x and gradient of 536.9 MB each, 51.5 MB of lists, 1.0 MB of norms, or 53.8 Gop at 66.9 Tflop/s
    both = roofline.forward_backward_floor(gpu, 4096, 65536, 2147450, "bfloat16")
    assert both - floor == pytest.approx(max(1126.3e6 / 3.35e12, 53.85e9 / 66.9e12), rel=1e-3)


def test_hardware_is_found_by_the_exact_name():
    assert {gpu.name for gpu in HARDWARE} == {"A100 SXM 80GB", "H100 SXM", "H200", "B200", "MI300X"}
    assert hardware_of("NVIDIA H200").bandwidth == 4.8e12
    assert hardware_of("NVIDIA H100 PCIe") is None
    for gpu in HARDWARE:  # per second, dense: tf32 runs at half the rate
        assert gpu.half == pytest.approx(2 * gpu.tf32)
        assert 1e13 < gpu.fp32 < gpu.tf32
        assert 1e12 < gpu.bandwidth < 1e13


def result(provider, mode, time_ms, kernels_ms=None, dtype="bfloat16", status="ok"):
    return {
        "provider": provider, "mode": mode, "dtype": dtype, "M": 64, "N": 512, "status": status, "time_ms": time_ms,
        "kernels_ms": kernels_ms,
    }  # fmt: skip


def run_main(tmp_path, capsys, results, *options):
    path = tmp_path / "gpu.json"
    if results is not None:
        path.write_text(json.dumps({"fraction": 1e-3, "environment": {"gpu": "NVIDIA H200"}, "rows": results}))
    roofline.main(["--m", "64", "--n", "512", "--results", str(path), *options])
    return capsys.readouterr().out


def test_table_says_that_it_is_a_model(tmp_path, capsys):
    text = run_main(tmp_path, capsys, None)
    assert text.count("MODEL, not a measurement") == len(HARDWARE)
    kernels = ("column_norms", "gram_select", "gram_histogram", "gram_row_max", "pair_gradient")
    assert all(text.count(kernel) == len(HARDWARE) for kernel in kernels)
    assert "rescore" not in text
    assert text.count("not measured") == len(HARDWARE) * (len(kernels) + 2)


def test_measured_times_stand_beside_the_model_of_their_gpu_alone(tmp_path, capsys):
    results = [
        result("triton", "forward", 1.25),
        result("triton", "forward_backward", 2.5),
        result("triton", "forward", 99.0, dtype="float32"),
        result("kernels", "forward_backward", 2.0, {"gram_select": 0.75, "gram_histogram": 0.001, "other": 0.2}),
    ]
    models = json.loads(run_main(tmp_path, capsys, results, "--json"))
    for model in models:
        assert "not a measurement" in model["what"]
        measured = {(row["kernel"], row["kind"]): row["measured_ms"] for row in model["kernels"]}
        calls = {call["mode"]: call["measured_ms"] for call in model["calls"]}
        if model["hardware"]["name"] == "H200":
            assert measured.pop(("gram_select", "half")) == 0.75
            assert calls == {"forward": 1.25, "forward_backward": 2.5}
        else:
            assert set(calls.values()) == {None}
        assert set(measured.values()) == {None}  # idle kernels too


@pytest.mark.parametrize("is_screened", [True, False])
def test_measured_kind_of_float32_is_that_of_the_route_taken(tmp_path, capsys, is_screened):
    times = {"gram_select": 0.5} | ({"round_columns": 0.1, "rescore": 0.2} if is_screened else {})
    results = [result("kernels", "forward", 1.0, times, dtype="float32")]
    models = json.loads(run_main(tmp_path, capsys, results, "--json", "--dtype", "float32"))
    kernels = next(model["kernels"] for model in models if model["hardware"]["name"] == "H200")
    measured = {(row["kernel"], row["kind"]) for row in kernels if row["measured_ms"] is not None}
    expected = {("round_columns", None), ("rescore", None), ("gram_select", "half")}
    assert measured == (expected if is_screened else {("gram_select", "ieee")})


def test_what_failed_or_is_of_another_fraction_is_not_measured(tmp_path, capsys):
    text = run_main(tmp_path, capsys, [result("triton", "forward", None, status="error")])
    other = run_main(tmp_path, capsys, [result("triton", "forward", 1.25)], "--fraction", "0.01")
    assert "1.250" not in text + other
