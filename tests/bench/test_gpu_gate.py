import pytest
import torch

from bench import gpu_gate
from bench.gpu_gate import CHECKS, faults_of
from topk_ortho import TopKPairs, topk_ortho_loss, topk_pairs
from topk_ortho.backends import triton

CPU = torch.device("cpu")
SMALL = {check.name: check._replace(n=min(check.n, 400)) for check in CHECKS}
needs_interpreter = pytest.mark.skipif(triton.unavailable_reason(CPU) is not None, reason="no TRITON_INTERPRET")


@pytest.mark.parametrize("name", SMALL)
def test_right_results_pass(name):
    assert faults_of(SMALL[name], CPU, "tiled") == []


@needs_interpreter
def test_triton_passes():
    assert faults_of(CHECKS[0]._replace(m=40, n=100), CPU, "triton") == []


def reordered(pairs, order):
    return pairs._replace(rows=pairs.rows[order], cols=pairs.cols[order], values=pairs.values[order])


def without_last(pairs):
    return reordered(pairs, torch.arange(len(pairs.rows) - 1))


def with_last(pairs, row, col):
    """Another pair in place of the last, with its own cosine, which is 0."""
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
def test_a_wrong_selection_fails(monkeypatch, breaks, message):
    monkeypatch.setattr(gpu_gate, "topk_pairs", lambda *a, **o: breaks(topk_pairs(*a, **o)))
    faults = faults_of(SMALL["fp32_highest"], CPU, "tiled")
    assert all(fault.startswith("fp32_highest: ") for fault in faults)
    assert any(message in fault for fault in faults)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda k: [*range(k - 1), k], "of equal pairs not the first"),
        (lambda k: [*range(k - 2), k - 1, k - 2], "equal values are not in the order of"),
    ],
    ids=["the_wrong_one", "the_wrong_order"],
)
def test_ties_resolved_otherwise_fail(monkeypatch, order, message):
    def broken(x, *arguments, **options):
        k = topk_pairs(x, *arguments, **options).k
        more = topk_pairs(x, k=k + 1, backend="tiled")
        assert more.values[-3].abs() == more.values[-1].abs()
        return reordered(more, torch.tensor(order(k)))

    monkeypatch.setattr(gpu_gate, "topk_pairs", broken)
    assert any(message in fault for fault in faults_of(SMALL["fp32_ties"], CPU, "tiled"))


def test_a_state_that_changes_the_result_fails(monkeypatch):
    def broken(*arguments, state=None, **options):
        pairs = topk_pairs(*arguments, state=state, **options)
        return pairs if state is None else without_last(pairs)

    monkeypatch.setattr(gpu_gate, "topk_pairs", broken)
    faults = faults_of(SMALL["bf16"], CPU, "tiled")
    assert [fault.split(": ")[1] for fault in faults] == ["first of a state", "warm"]


def test_a_wrong_loss_fails(monkeypatch):
    monkeypatch.setattr(
        gpu_gate, "topk_ortho_loss", lambda *a, **o: 1.001 * topk_ortho_loss(*a, **o).detach() + 0 * a[0].sum()
    )
    faults = faults_of(SMALL["fp32_highest"], CPU, "tiled")
    assert "fp32_highest: loss " in faults[0]


def spoiled(gradient, wrong):
    if wrong == "scaled":
        return gradient * 1.02
    gradient = gradient.clone()
    largest = gradient.abs().amax(dim=0).argmax()
    if wrong == "one_column_zero":
        gradient[:, largest] = 0
    else:
        gradient[0, largest] = torch.nan
    return gradient


@pytest.mark.parametrize("wrong", ["scaled", "one_entry_nan", "one_column_zero"])
@pytest.mark.parametrize("name", ["fp32_highest", "bf16"])
def test_a_wrong_gradient_fails(monkeypatch, name, wrong):
    def broken(x, *arguments, **options):
        x = x.clone()  # of the leaf that autograd asks for
        x.register_hook(lambda gradient: spoiled(gradient, wrong))
        return topk_ortho_loss(x, *arguments, **options)

    monkeypatch.setattr(gpu_gate, "topk_ortho_loss", broken)
    (fault,) = faults_of(SMALL[name], CPU, "tiled")
    assert "the gradient is off by" in fault


def test_an_error_is_a_fault(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of resource:\nshared memory")

    monkeypatch.setattr(gpu_gate, "topk_pairs", broken)
    assert faults_of(SMALL["bf16"], CPU, "tiled") == ["bf16: RuntimeError('out of resource:\\nshared memory')"]
