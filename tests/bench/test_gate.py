import pytest
import torch

from bench.dense import DENSE
from bench.gate import CHECKS, faults_of, faults_of_check, faults_of_provider
from bench.sparse import SPARSE_DENSITY, SPARSE_L0, SPARSE_N
from topk_ortho import TopKPairs, topk_ortho_loss, topk_pairs

CPU = torch.device("cpu")
SMALL = {
    check.name: check._replace(n=400) for check in CHECKS if check.name not in ("bf16_ragged", "fp32_highest_large")
}
PROVIDED = {
    str(benchmark.small(case)): (benchmark, benchmark.small(case))
    for benchmark, device in ((DENSE, "cuda"), (SPARSE_N, "cpu"), (SPARSE_DENSITY, "cpu"))
    for case in benchmark.cases(device, True)
    if case.provider not in ("half_gemm", "cublas", "naive_compiled")  # products alone; compiles for seconds
}


@pytest.mark.parametrize("name", PROVIDED)
def test_every_provider_is_right(name):
    assert list(faults_of_provider(*PROVIDED[name], CPU)) == []


@pytest.mark.parametrize(
    ("mode", "wrong", "message"),
    [
        ("forward", lambda loss: 1.001 * loss, "the loss is"),
        ("forward", lambda loss: loss * torch.nan, "the loss is nan"),
        ("forward_backward", lambda gradients: (1.001 * gradients[0],), "the gradient is off by 0.001"),
        ("forward_backward", lambda gradients: (gradients[0].roll(1, dims=1),), "the gradient is off by"),
    ],
)
def test_a_wrong_provider_is_caught(mode, wrong, message, capsys):
    case = next(c for c in DENSE.cases("cpu", True) if (c.provider, c.mode) == ("naive", mode))

    def make_call(case, device):
        call = DENSE.make_call(case, device)
        return lambda: wrong(call())

    broken = DENSE._replace(make_call=make_call, cases=lambda device, smoke: [case])
    (fault,) = faults_of([broken], CPU, exact=[])
    assert str(DENSE.small(case)) in fault
    assert message in fault
    assert "wrong\n" in capsys.readouterr().out


def test_a_wrong_listing_is_caught():
    case = next(c for c in SPARSE_L0.cases("cpu", True) if c.provider == "scipy")
    broken = SPARSE_L0._replace(make_call=lambda *a: lambda: tuple(x[:-1] for x in SPARSE_L0.make_call(*a)()))
    (fault,) = faults_of_provider(broken, SPARSE_L0.small(case), CPU)
    assert fault == "43 pairs selected, expected 44"


def test_an_error_is_a_fault():
    def make_call(case, device):
        raise RuntimeError("out of resource: shared memory")

    case = DENSE.cases("cpu", True)[1]
    (fault,) = faults_of([DENSE._replace(make_call=make_call, cases=lambda device, smoke: [case])], CPU, [])
    assert "RuntimeError('out of resource: shared memory')" in fault


@pytest.mark.parametrize("name", SMALL)
def test_exact_results_pass(name):
    assert list(faults_of_check(SMALL[name], CPU)) == []


def reordered(pairs, order):
    return pairs._replace(rows=pairs.rows[order], cols=pairs.cols[order], values=pairs.values[order])


def without_last(pairs):
    return reordered(pairs, torch.arange(len(pairs.rows) - 1))


def with_last(pairs, row, col):
    """Another pair in place of the last, with a cosine of 0."""
    rows, cols, values = (tensor.clone() for tensor in pairs[:3])
    rows[-1], cols[-1], values[-1] = row, col, 0.0
    return TopKPairs(rows, cols, values, values[-1], pairs.tau, pairs.n_features, pairs.k)


def without_first(pairs):
    order = torch.arange(1, len(pairs.rows) + 1).clamp(max=len(pairs.rows) - 1)
    return with_last(reordered(pairs, order), 2, 3)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda pairs: pairs._replace(values=pairs.values + 3e-5), "a value is off by 3e-05"),
        (lambda pairs: pairs._replace(values=pairs.values * torch.nan), "a value is off by nan"),
        (lambda pairs: with_last(pairs, 2, 3), "a selected pair has"),  # column 3 is dead
        (without_first, "is left out"),
        (lambda pairs: with_last(pairs, pairs.rows[0], pairs.cols[0]), "a pair is listed twice"),
        (without_last, "78 pairs selected, expected 79"),
        (lambda pairs: pairs._replace(rows=pairs.cols, cols=pairs.rows), "not all pairs have 0 <= row < col < N"),
        (lambda pairs: reordered(pairs, torch.arange(79).flip(0)), "values are not in order"),
        (lambda pairs: pairs._replace(threshold=pairs.threshold + 1e-6), "the threshold is"),
    ],
)
def test_a_wrong_selection_is_caught(breaks, message):
    faults = list(faults_of_check(SMALL["fp32_highest"], CPU, select=lambda *a, **o: breaks(topk_pairs(*a, **o))))
    assert any(message in fault for fault in faults)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda k: [*range(k - 1), k], "of equal pairs not the first"),
        (lambda k: [*range(k - 2), k - 1, k - 2], "equal values are not in the order of"),
    ],
    ids=["the_wrong_one", "the_wrong_order"],
)
def test_ties_resolved_otherwise_are_caught(order, message):
    def broken(x, *arguments, **options):
        k = topk_pairs(x, *arguments, **options).k
        more = topk_pairs(x, k=k + 1, backend="tiled")
        assert more.values[-3].abs() == more.values[-1].abs()
        return reordered(more, torch.tensor(order(k)))

    assert any(message in fault for fault in faults_of_check(SMALL["fp32_ties"], CPU, select=broken))


def test_a_state_that_changes_the_result_is_caught():
    def broken(*arguments, state=None, **options):
        pairs = topk_pairs(*arguments, state=state, **options)
        return pairs if state is None else without_last(pairs)

    faults = list(faults_of_check(SMALL["bf16"], CPU, select=broken))
    assert [fault.split(": ")[0] for fault in faults] == ["first of a state", "warm"]


def spoiled(gradient, wrong):
    if wrong == "scaled":
        return gradient * 1.02
    gradient = gradient.clone()
    largest = gradient.norm(dim=0).argmax()
    if wrong == "one_column_zero":
        gradient[:, largest] = 0
    else:
        gradient[0, largest] = torch.nan
    return gradient


@pytest.mark.parametrize("wrong", ["scaled", "one_entry_nan", "one_column_zero"])
@pytest.mark.parametrize("name", ["fp32_highest", "bf16"])
def test_a_wrong_gradient_is_caught(name, wrong):
    def broken(x, *arguments, **options):
        x = x.clone()  # so that the hook is not on the leaf that autograd asks for
        x.register_hook(lambda gradient: spoiled(gradient, wrong))
        return topk_ortho_loss(x, *arguments, **options)

    (fault,) = faults_of_check(SMALL[name], CPU, loss_of=broken)
    assert "the gradient is off by" in fault


def test_a_wrong_loss_is_caught():
    (fault,) = faults_of_check(
        SMALL["fp32_highest"], CPU, loss_of=lambda x, *a, **o: topk_ortho_loss(x, *a, **o) + 1e-4
    )
    assert fault.startswith("the loss is ")
