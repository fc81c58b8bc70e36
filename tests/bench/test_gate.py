import pytest
import torch

from bench.dense import DENSE
from bench.gate import fault_of, faults_of
from bench.sparse import SPARSE_DENSITY, SPARSE_L0, SPARSE_N

CPU = torch.device("cpu")
PROVIDED = {
    str(case): (benchmark, case)
    for benchmark, device in ((DENSE, "cuda"), (SPARSE_N, "cpu"), (SPARSE_DENSITY, "cpu"))
    for case in benchmark.small_cases(device)
    if case.provider not in ("half_gemm", "cublas", "naive_compiled")  # products alone; compiles for seconds
}


@pytest.mark.parametrize("name", PROVIDED)
def test_every_provider_is_right(name):
    assert fault_of(*PROVIDED[name], CPU) == ""


def broken(benchmark, provider, mode, wrong):
    """The small case of a provider alone, with a result that is made wrong."""
    case = next(c for c in benchmark.small_cases("cpu") if (c.provider, c.mode) == (provider, mode))

    def make_call(case, device):
        call = benchmark.make_call(case, device)
        return lambda: wrong(call())

    return case, benchmark._replace(make_call=make_call, cases=lambda device: [case])


def raises(result):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("mode", "wrong", "message"),
    [
        ("forward", lambda loss: 1.001 * loss, "the loss is off by 0.001"),
        ("forward", lambda loss: loss * torch.nan, "the loss is off by nan"),
        ("forward", raises, "RuntimeError('out of resource: shared memory')"),
        ("forward_backward", lambda gradients: (1.001 * gradients[0],), "the gradient is off by 0.001"),
        ("forward_backward", lambda gradients: (gradients[0].roll(1, dims=1),), "the gradient is off by"),
    ],
)
def test_a_wrong_provider_is_caught(mode, wrong, message, capsys):
    case, benchmark = broken(DENSE, "naive", mode, wrong)
    (fault,) = faults_of([benchmark, DENSE._replace(cases=lambda device: [case])], CPU)
    assert fault.startswith(f"{case}: ")
    assert message in fault
    assert capsys.readouterr().out == f"check {case}: wrong\ncheck {case}: right\n"


def with_last(rows, cols, values, row, col):
    """Another pair in place of the last, with its value."""
    rows[-1], cols[-1] = row, col
    return rows, cols, values


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda rows, cols, values: (rows[:-1], cols[:-1], values[:-1]), "43 pairs selected, expected 44"),
        (lambda rows, cols, values: (cols, rows, values), "not all pairs have row < col"),
        (lambda rows, cols, values: with_last(rows, cols, values, rows[0], cols[0]), "one is listed twice"),
        (lambda rows, cols, values: (rows, cols, values * 1.001), "the list of cosines is off by"),
        (lambda rows, cols, values: (rows, cols, values * torch.nan), "the list of cosines is off by nan"),
        (lambda rows, cols, values: with_last(rows, cols, values, 0, 1), "the list of cosines is off by"),
    ],
    ids=["left_out", "swapped", "twice", "values", "nan", "another_pair"],
)
def test_a_wrong_listing_is_caught(wrong, message):
    case, benchmark = broken(SPARSE_L0, "scipy", "pairs", lambda answer: wrong(*answer))
    assert message in fault_of(benchmark, case, CPU)
