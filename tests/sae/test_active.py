"""Sums over active entries against the dense products they stand for, in float64."""

import pytest
import torch

from topk_ortho.sae.active import ActiveFeatures, decode_active, decode_nested, encode_selected, firing_counts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(batch, n_features, share=0.3, seed=3):
    """Ascending positions of about a share of the entries; row 1 has none."""
    mask = torch.rand(batch, n_features, generator=torch.Generator().manual_seed(seed)) < share
    mask[1] = False
    return mask.flatten().nonzero().squeeze(1)


def parameters(n_features=11, d_in=5):
    return [t.requires_grad_() for t in (random(n_features, d_in, seed=1), random(n_features, seed=2))]


def test_encoding_selected_entries_is_the_dense_encoder_masked():
    x = random(7, 5).requires_grad_()
    W_enc, b_enc = parameters()
    positions = chosen(7, 11)
    mask = torch.zeros(77, dtype=torch.bool).index_fill(0, positions, True).view(7, 11)
    actual = encode_selected(x, W_enc, b_enc, lambda pre_activations: positions).to_dense()
    expected = torch.relu(x @ W_enc.T + b_enc) * mask
    torch.testing.assert_close(actual, expected)
    weight = random(7, 11, seed=4)
    gradients = [torch.autograd.grad((f * weight).sum(), (x, W_enc, b_enc)) for f in (actual, expected)]
    for name, a, e in zip(("x", "W_enc", "b_enc"), *gradients, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, n=name: f"{n}: {m}")


def test_select_sees_the_pre_activations():
    x, (W_enc, b_enc) = random(3, 5), parameters()
    seen = []
    encode_selected(x, W_enc, b_enc, lambda z: seen.append(z) or torch.tensor([0]))
    torch.testing.assert_close(seen[0], (x @ W_enc.T + b_enc).detach())


@pytest.mark.parametrize("widths", [(11,), (1, 4, 11), (5, 11)])
def test_decoding_and_its_gradients_are_those_of_the_dense_products(widths):
    W_dec = random(11, 5, seed=1).requires_grad_()
    positions = chosen(7, 11)
    values = random(len(positions), seed=5).abs().requires_grad_()
    features = ActiveFeatures(positions, values, 7, 11)
    dense = features.to_dense()
    nested = torch.stack([dense[:, :width] @ W_dec[:width] for width in widths], dim=1)
    for actual, expected in [
        (decode_active(features, W_dec), dense @ W_dec),
        (decode_nested(features, W_dec, widths), nested),
    ]:
        torch.testing.assert_close(actual, expected)
        weight = random(*actual.shape, seed=6)
        gradients = [
            torch.autograd.grad((r * weight).sum(), (values, W_dec), retain_graph=True) for r in (actual, expected)
        ]
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e)


def test_nothing_active():
    features = ActiveFeatures(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 3, 4)
    assert torch.equal(decode_active(features, torch.ones(4, 2)), torch.zeros(3, 2))
    assert torch.equal(features.to_dense(), torch.zeros(3, 4))
    assert features.to_sparse().shape == (3, 4)
    assert features.to_sparse()._nnz() == 0
    assert torch.equal(firing_counts(features), torch.zeros(4, dtype=torch.int64))


def test_the_sparse_tensor_is_the_same_matrix_and_carries_gradients():
    positions = chosen(7, 11)
    values = random(len(positions), seed=5).abs().requires_grad_()
    features = ActiveFeatures(positions, values, 7, 11)
    sparse = features.to_sparse()
    assert sparse.is_coalesced()
    again = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape, check_invariants=True).coalesce()
    assert torch.equal(sparse.indices(), again.indices()), "it is not coalesced, though it says so"
    torch.testing.assert_close(sparse.to_dense(), features.to_dense())
    weight = random(7, 11, seed=4)
    (gradient,) = torch.autograd.grad((sparse.to_dense() * weight).sum(), values)
    torch.testing.assert_close(gradient, weight.flatten()[positions])


def test_an_entry_of_value_0_does_not_fire():
    dense = torch.tensor([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]])
    features = ActiveFeatures(torch.tensor([0, 1, 2, 4]), torch.tensor([0.0, 2.0, 1.0, 3.0]), 2, 3)
    assert torch.equal(features.to_dense(), dense)
    assert firing_counts(features).tolist() == firing_counts(dense).tolist() == [0, 2, 1]
