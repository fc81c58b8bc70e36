import pytest
import torch

from topk_ortho.sae import StandardSAE, normalize_after_step, normalize_decoder


@pytest.fixture
def sae():
    return StandardSAE(d_in=6, n_features=10, generator=torch.Generator().manual_seed(0))


def test_forward_is_the_stated_equation(sae):
    x = torch.randn(4, 6)
    sae.b_enc.data.normal_()
    sae.b_dec.data.normal_()
    reconstruction, features = sae(x)
    expected = ((x - sae.b_dec).double() @ sae.W_enc.double() + sae.b_enc.double()).clamp_min(0)
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        reconstruction.double(), expected @ sae.W_dec.double() + sae.b_dec.double(), rtol=1e-5, atol=1e-5
    )


def test_decoder_starts_with_unit_directions_and_encoder_as_its_scaled_transpose(sae):
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T * 0.6)


def test_same_generator_seed_gives_the_same_weights(sae):
    again = StandardSAE(d_in=6, n_features=10, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


def test_normalize_decoder_keeps_directions_and_spares_zeros():
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    normalize_decoder(weights)
    assert weights.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


def test_hook_normalizes_after_every_step_until_removed(sae):
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    handle = normalize_after_step(optimizer, sae.W_dec)
    for removed in (False, True):
        if removed:
            handle.remove()
        sae(torch.randn(4, 6)).reconstruction.square().sum().backward()
        optimizer.step()
        unit = torch.allclose(sae.W_dec.norm(dim=1), torch.ones(10))
        assert unit is not removed
