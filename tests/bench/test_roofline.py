import re

import pytest

from bench import roofline
from bench.roofline import (
    ARCHITECTURES,
    HARDWARE,
    SHARES,
    expected_first_pass,
    floor_of,
    floor_of_call,
    works,
)

TOY = {"half": 1000.0, "tf32": 500.0, "fp32": 100.0, "memory": 10.0}
M, N, K = 4, 8, 3  # 28 pairs
TRIANGLE = 28 * 2 * 4  # multiply-adds count twice
HALF, FULL = 4 * 8 * 2 + 4 * 8, 4 * 8 * 4 + 4 * 8  # the operand in 16 or 32 bits, and its factors


@pytest.mark.parametrize(
    ("kernel", "dtype", "expected"),
    [
        ("column_norms", "float32", {"fp32": 160, "memory": 4 * 8 * 4 + 4 * 4 * 8}),
        ("column_norms", "bfloat16", {"fp32": 160, "memory": 4 * 8 * 2 + 4 * 4 * 8}),
        ("round_columns", "float32", {"fp32": 128, "memory": 4 * 8 * 4 + 4 * 8 * 2 + 4 * 8}),
        ("gram_survivors half", "bfloat16", {"half": TRIANGLE, "memory": HALF + 3 * 12}),
        ("gram_survivors tf32", "float32", {"tf32": TRIANGLE, "memory": FULL + 3 * 12}),
        ("gram_survivors fp32", "float32", {"fp32": TRIANGLE, "memory": FULL + 3 * 12}),
        ("gram_histogram half", "bfloat16", {"half": TRIANGLE, "memory": HALF + 256 * 8}),
        ("max_cosine fp32", "float32", {"fp32": TRIANGLE, "memory": FULL + 8 * 8}),
        # three pairs touch six columns
        ("rescore", "float32", {"fp32": 48, "memory": 6 * 4 * 4 + 4 * 8 + 12 * 3, "gathered": 6 * 4 * 4}),
        (
            "pair_gradient",
            "bfloat16",
            {
                "fp32": 6 * 4 * 3 + 4 * 8 * 4,
                "memory": 2 * 4 * 8 * 2 + 6 * 12 + 9 * 8 + 2 * 8 * 4,
                "gathered": 6 * 4 * 2,
            },
        ),
    ],
)
def test_work_of_each_kernel(kernel, dtype, expected):
    assert works(M, N, K, dtype)[kernel] == expected


def test_twenty_pairs_touch_all_eight_columns():
    expected = {"fp32": 320, "memory": 8 * 4 * 4 + 4 * 8 + 12 * 20, "gathered": 40 * 4 * 4}
    assert works(M, N, 20, "float32")["rescore"] == expected


def test_the_floor_is_the_longer_of_operations_and_bytes():
    assert floor_of({"tf32": 1500, "memory": 20, "gathered": 10**6}, TOY) == (3.0, "tf32")
    assert floor_of({"tf32": 1500, "memory": 40, "gathered": 10**6}, TOY) == (4.0, "memory")


def test_a_call_takes_the_faster_route():
    floors = {kernel: floor_of(work, TOY)[0] for kernel, work in works(4, 8000, 3, "float32").items()}
    screened = sum(floors[name] for name in ("column_norms", "round_columns", "gram_survivors half", "rescore"))
    assert floor_of_call(TOY, 4, 8000, 3, "float32", "forward") == pytest.approx(screened)
    floors = {kernel: floor_of(work, TOY)[0] for kernel, work in works(4, 8, 3, "float32").items()}
    direct = floors["column_norms"] + floors["gram_survivors fp32"]
    assert floor_of_call(TOY, 4, 8, 3, "float32", "forward") == pytest.approx(direct)


def test_floors_by_hand():
    # H100: 65,536 * 65,535 * 4,096 operations of the triangle take 17.780 ms; the norms read 536.9 MB in 0.161 ms
    gpu, case = HARDWARE["NVIDIA H100 80GB HBM3"], (4096, 65536, 2147450, "bfloat16")
    forward = floor_of_call(gpu, *case, "forward")
    assert forward == pytest.approx(17.780e-3 + 0.1606e-3, rel=1e-4)
    # the gradient: x and gradient of 536.9 MB each, 51.5 MB of lists, 1.0 MB of norms, or 53.8 Gop at 66.9 Tflop/s
    both = floor_of_call(gpu, *case, "forward_backward")
    assert both - forward == pytest.approx(max(1126.3e6 / 3.35e12, 53.85e9 / 66.9e12), rel=1e-3)


def test_what_to_expect_by_hand():
    """H200: two thirds of the peak for the products of 2,147,450,880 pairs, then 100 fp32 operations for each."""
    products = 2_147_450_880 * 2 * 4096 / (0.67 * 989.4e12)
    epilogue = 2_147_450_880 * 100 / 66.9e12
    assert 26.5e-3 < products < 26.6e-3
    assert 3.2e-3 < epilogue < 3.3e-3
    assert expected_first_pass("NVIDIA H200", "half", 4096, 65536) == pytest.approx(products + epilogue)


@pytest.mark.parametrize("unit", ["half", "tf32", "fp32"])
@pytest.mark.parametrize("name", HARDWARE)
def test_every_peak_has_a_share_and_a_source(name, unit):
    share = SHARES[ARCHITECTURES[name], unit]
    assert 0.2 < share.of_peak < 0.95
    assert re.search("issues/|bench/results/|^as |^a guess: ", share.source)


def test_hardware():
    assert HARDWARE["NVIDIA H200"]["memory"] == 4.8e12
    for gpu in HARDWARE.values():  # per second, dense: tf32 runs at half the rate
        assert gpu["half"] == pytest.approx(2 * gpu["tf32"])
        assert 1e13 < gpu["fp32"] < gpu["tf32"]
        assert 1e12 < gpu["memory"] < 1e13


@pytest.mark.parametrize(
    ("dtype", "n_kernels", "units"), [("bfloat16", 5, ["half"]), ("float32", 13, ["half", "tf32", "fp32"])]
)
def test_every_gpu_has_a_table_of_kernels_and_calls(capsys, dtype, n_kernels, units):
    roofline.main(["--dtype", dtype])
    models = capsys.readouterr().out.split("MODEL, not a measurement: ")[1:]
    assert [model.split(",")[0] for model in models] == list(HARDWARE)
    for name, model in zip(HARDWARE, models, strict=True):
        rows = dict(line.rsplit(maxsplit=1) for line in model.splitlines() if line.endswith(tuple("0123456789")))
        for mode in ("forward", "forward + backward"):
            floor_s = floor_of_call(HARDWARE[name], 4096, 65536, 2147450, dtype, mode.replace(" + ", "_"))
            assert float(rows[f"{mode}, sum of its kernels"]) == pytest.approx(1e3 * floor_s, abs=5e-4)
        expected = {row.split()[1]: float(ms) for row, ms in rows.items() if row.startswith("gram_survivors")}
        assert list(expected) == units
        for unit, expected_ms in expected.items():
            assert expected_ms == pytest.approx(1e3 * expected_first_pass(name, unit, 4096, 65536), abs=5e-4)
            floor_s, _ = floor_of(works(4096, 65536, 2147450, dtype)[f"gram_survivors {unit}"], HARDWARE[name])
            assert expected_ms > 1e3 * floor_s
            share = SHARES[ARCHITECTURES[name], unit]
            assert f"  {unit}: {share.of_peak:.0%}, {share.source}" in model
        assert len(model.strip().splitlines()) == 3 + n_kernels + 2 + 1 + len(units)
