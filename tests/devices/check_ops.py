"""The public ops on the second device give what they give on the CPU, which the suite compares with the oracle."""

import pytest
import torch

from tests.inputs import activations
from topk_ortho import (
    MaxCosineLoss,
    SparseFeatures,
    TopKOrthoLoss,
    initial_state,
    max_cosine_loss,
    pair_jaccard,
    topk_ortho_loss,
    topk_pairs,
)

N = 140
"""So many that a first guess is made from a sample."""
QUERIES = [{}, {"tau": "adaptive"}, {"tau": 0.3, "reduction": "sum"}, {"similarity": "positive"}]
FORMS = {
    "dense": lambda x: x,
    "sparse_features": SparseFeatures.from_dense,
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-6}


def inputs(where):
    return (activations(14, N, seed=3) * (activations(14, N, seed=4) > 0.2)).to(where).requires_grad_()


def seeded():
    return torch.Generator().manual_seed(0)


def assert_same_on_both(device, measure):
    """What is measured of x, tensors all of them, is on the device of x, and the same on the CPU."""
    on_cpu, on_device = (measure(inputs(where)) for where in ("cpu", device))
    for actual, expected in zip(on_device, on_cpu, strict=True):
        assert actual.device.type == torch.device(device).type
        torch.testing.assert_close(actual.cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize("query", QUERIES, ids=str)
@pytest.mark.parametrize("backend", ["naive", "tiled", "sparse", "auto"])
def test_dense_x(backend, query, device):
    selection = {name: value for name, value in query.items() if name != "reduction"}
    options = {"priority": torch.arange(N), "structural_zeros": True, "backend": backend}

    def measure(x):
        state = initial_state(x.device)
        for _ in range(2):
            loss = topk_ortho_loss(x, 0.01, state=state, **options, **query)
        pairs = topk_pairs(x, 0.01, backend=backend, **selection)
        assert pairs.rows.device == pairs.cols.device == pairs.threshold.device == x.device
        assert pair_jaccard(pairs, topk_pairs(x, 0.01, backend=backend, state=state, **selection)) == 1
        assert state.device == x.device
        # without structural zeros "sparse" leaves the gradient of a dense x to kernels
        values = pairs.values.detach() if backend == "sparse" else pairs.values
        return loss.detach(), *torch.autograd.grad(loss + values.sum(), x)

    assert_same_on_both(device, measure)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precision(precision, device):
    values = [topk_pairs(inputs(where), 0.01, backend="tiled", precision=precision).values for where in ("cpu", device)]
    torch.testing.assert_close(values[1].cpu(), values[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("n_chunks", [1, 4])
@pytest.mark.parametrize("backend", ["naive", "tiled"])
def test_max_cosine(backend, n_chunks, device):
    def measure(x):
        loss = max_cosine_loss(x, n_chunks, generator=seeded(), backend=backend)
        max_cosine_loss(x, n_chunks, backend=backend)  # chunks that the device draws
        return loss.detach(), *torch.autograd.grad(loss, x)

    assert_same_on_both(device, measure)


@pytest.mark.parametrize("arguments", [{"k": 20}, {"fraction": 1.0}, {"k": 900, "tau": "adaptive"}], ids=str)
@pytest.mark.parametrize("form", ["sparse_features", "coo", "csr"])
def test_sparse_x(form, arguments, device):
    """A few pairs; the sum over all that meet; a list of these."""
    options = {"priority": torch.arange(N)} if "tau" in arguments else {}

    def measure(x):
        if form == "csr":  # through `to_sparse_csr` torch has no gradient
            x = x.detach()
        loss = topk_ortho_loss(FORMS[form](x), **arguments, **options)
        loss = loss + max_cosine_loss(FORMS[form](x), 3, generator=seeded())
        pairs = topk_pairs(FORMS[form](x), **arguments)
        assert pairs.rows.device == x.device
        gradients = torch.autograd.grad(loss + pairs.values.sum(), x) if x.requires_grad else ()
        return loss.detach(), pairs.values.detach(), *gradients

    assert_same_on_both(device, measure)


def test_sparse_features_become_dense(device):
    assert_same_on_both(device, lambda x: [SparseFeatures.from_dense(x.detach()).to_dense()])


@pytest.mark.parametrize("form", ["dense", "sparse_features"])
def test_modules_move_with_their_state(form, device):
    def measure(x):
        penalty = TopKOrthoLoss(0.01).to(x.device)
        for _ in range(2):
            loss = penalty(FORMS[form](x), torch.arange(N).tolist()) + MaxCosineLoss(4, generator=seeded())(x)
        assert (penalty.state[2] > 0) == (form == "dense")
        penalty.reset_state()
        loaded = TopKOrthoLoss(0.01).to(x.device)
        loaded.load_state_dict({"state": initial_state()})
        return loss.detach(), *torch.autograd.grad(loss, x), penalty.state, loaded.state

    assert_same_on_both(device, measure)


def test_errors_name_the_columns(device):
    x = inputs(device).detach()
    x[3, 7] = torch.nan
    for form in FORMS.values():
        with pytest.raises(ValueError, match="x has 1 column with NaN or Inf: 7"):
            topk_ortho_loss(form(x), 0.01)
    with pytest.raises(ValueError, match="priority has 1 NaN"):
        topk_ortho_loss(x, 0.01, priority=[torch.nan] + [0.0] * (N - 1))
    with pytest.raises(ValueError, match="state must be on the device of x"):
        topk_ortho_loss(x, 0.01, state=initial_state())
    with pytest.raises(ValueError, match=r"x.indices and x.values must be on one device"):
        topk_ortho_loss(SparseFeatures(torch.zeros(14, 2, dtype=torch.int64), x[:, :2], N))
