from bench.gpu_cases import LABELS, Case, plan, smoke_plan


def test_goals_come_first_and_large_n_last():
    cases = plan()
    place = {case: number for number, case in enumerate(cases)}
    assert len(place) == len(cases), "a case is there twice"
    goals = [
        Case("triton", "forward", "bfloat16", 4096, 65536),
        Case("triton", "forward_backward", "bfloat16", 4096, 32768),
        Case("naive_autograd", "forward_backward", "bfloat16", 4096, 32768),
        Case("chunked", "forward_backward", "bfloat16", 4096, 32768),
    ]
    assert [place[case] for case in goals] == [1, 7, 8, 9]
    stages = [
        Case("triton", "forward", "bfloat16", 4096, 16384),
        Case("triton", "forward", "float32", 4096, 65536),
        Case("triton", "forward", "bfloat16", 16384, 32768),
        Case("triton", "forward", "bfloat16", 4096, 262144),
    ]
    assert sorted(stages, key=place.get) == stages


def test_everything_is_in_it():
    cases = plan()
    assert {case.N for case in cases} == {2**i for i in range(13, 19)}
    assert {case.M for case in cases} == {1024, 4096, 16384}
    assert {(case.mode, case.dtype) for case in cases} == {
        (mode, dtype) for mode in ("forward", "forward_backward") for dtype in ("bfloat16", "float32")
    }
    assert {case.provider for case in cases} == {case.provider for case in smoke_plan()} == set(LABELS)


def test_every_ratio_has_its_denominator():
    cases = plan()
    rates = {(case.dtype, case.M) for case in cases if case.provider == "cublas"}
    assert {(case.dtype, case.M) for case in cases} == rates
    forward = {case for case in cases if case.mode == "forward" and case.provider != "cublas"}
    assert {case._replace(provider="half_gemm") for case in forward} <= set(cases)


def test_operations_by_hand():
    assert Case("triton", "forward", "bfloat16", 3, 4).operations == 6 * 3 * 2
    assert Case("cublas", "forward", "bfloat16", 3, 4).operations == 16 * 3 * 2
