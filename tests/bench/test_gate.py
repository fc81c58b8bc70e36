import pytest
import torch

from bench import gate
from bench.dense import DENSE
from bench.gate import EXACT, difficult, faults_of, faults_of_provider, faults_of_topk_ortho
from bench.sparse import SPARSE_DENSITY, SPARSE_L0, SPARSE_N
from topk_ortho import TopKPairs, topk_ortho_loss, topk_pairs

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = (difficult(dtype, 256, 400) for dtype in (torch.float32, torch.bfloat16))
PROVIDED = {
    str(case): (benchmark, case)
    for benchmark, device in ((DENSE, "cuda"), (SPARSE_N, "cpu"), (SPARSE_DENSITY, "cpu"))
    for case in benchmark.small_cases(device)
    if case.provider not in ("half_gemm", "cublas", "naive_compiled")  # products alone; compiles for seconds
}


@pytest.mark.parametrize("name", PROVIDED)
def test_every_provider_is_right(name):
    assert list(faults_of_provider(*PROVIDED[name], CPU)) == []


@pytest.mark.parametrize(
    ("mode", "wrong", "message"),
    [
        ("forward", lambda loss: 1.001 * loss, "the loss is off by 0.001"),
        ("forward", lambda loss: loss * torch.nan, "the loss is off by nan"),
        ("forward_backward", lambda gradients: (1.001 * gradients[0],), "the gradient is off by 0.001"),
        ("forward_backward", lambda gradients: (gradients[0].roll(1, dims=1),), "the gradient is off by"),
    ],
)
def test_a_wrong_provider_is_caught(mode, wrong, message, capsys, monkeypatch):
    case = next(c for c in DENSE.small_cases("cpu") if (c.provider, c.mode) == ("naive", mode))

    def make_call(case, device):
        call = DENSE.make_call(case, device)
        return lambda: wrong(call())

    broken = DENSE._replace(make_call=make_call, cases=lambda device: [case])
    monkeypatch.setattr(gate, "EXACT", [])
    (fault,) = faults_of([broken], CPU)
    assert str(case) in fault
    assert message in fault
    assert "wrong\n" in capsys.readouterr().out


def test_a_wrong_listing_is_caught():
    case = next(c for c in SPARSE_L0.small_cases("cpu") if c.provider == "scipy")
    broken = SPARSE_L0._replace(make_call=lambda *a: lambda: tuple(x[:-1] for x in SPARSE_L0.make_call(*a)()))
    (fault,) = faults_of_provider(broken, case, CPU)
    assert fault == "43 pairs selected, expected 44"


def test_an_error_is_a_fault(monkeypatch):
    monkeypatch.setattr(gate, "EXACT", [])

    def make_call(case, device):
        raise RuntimeError("out of resource: shared memory")

    case = DENSE.small_cases("cpu")[1]
    (fault,) = faults_of([DENSE._replace(make_call=make_call, cases=lambda device: [case])], CPU)
    assert "RuntimeError('out of resource: shared memory')" in fault


@pytest.mark.parametrize(("dtype", "m"), [(dtype, m) for dtype, m, n in EXACT if n != 8192], ids=str)
def test_exact_results_pass(dtype, m):
    assert list(faults_of_topk_ortho(difficult(dtype, m, 400))) == []


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
    ],
)
def test_a_wrong_selection_is_caught(breaks, message):
    faults = list(faults_of_topk_ortho(FLOAT32, select=lambda *a, **o: breaks(topk_pairs(*a, **o))))
    assert any(message in fault for fault in faults)


def test_a_state_that_changes_the_result_is_caught():
    def broken(*arguments, state=None, **options):
        pairs = topk_pairs(*arguments, state=state, **options)
        return pairs if state is None else without_last(pairs)

    faults = list(faults_of_topk_ortho(BFLOAT16, select=broken))
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
@pytest.mark.parametrize("x", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_wrong_gradient_is_caught(x, wrong):
    def broken(x, *arguments, **options):
        x = x.clone()  # so that the hook is not on the leaf that autograd asks for
        x.register_hook(lambda gradient: spoiled(gradient, wrong))
        return topk_ortho_loss(x, *arguments, **options)

    (fault,) = faults_of_topk_ortho(x, loss_of=broken)
    assert "the gradient is off by" in fault


def test_a_wrong_loss_is_caught():
    (fault,) = faults_of_topk_ortho(FLOAT32, loss_of=lambda x, *a, **o: topk_ortho_loss(x, *a, **o) + 1e-4)
    assert fault.startswith("the loss is off by ")
