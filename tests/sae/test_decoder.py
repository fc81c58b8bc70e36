import pytest
import torch

from topk_ortho.sae import keep_normalized, normalize_decoder, remove_parallel_gradient


def decoder():
    return torch.nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))


def test_directions_get_unit_length_and_a_zero_stays_zero():
    W_dec = decoder()
    W_dec.data[2] = 0.0
    expected = torch.nn.functional.normalize(W_dec.detach(), dim=1)
    normalize_decoder(W_dec)
    torch.testing.assert_close(W_dec.detach(), expected)
    assert not W_dec[2].any()


def test_parallel_gradient_is_removed_and_the_rest_kept():
    W_dec = decoder()
    normalize_decoder(W_dec)
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    W_dec.grad = gradient.clone()
    remove_parallel_gradient(W_dec)
    along = [(g @ w).item() for g, w in zip(W_dec.grad, W_dec.detach(), strict=True)]
    assert along == pytest.approx([0.0] * 7, abs=1e-6)
    expected = torch.stack([g - (g @ w) * w for g, w in zip(gradient, W_dec.detach(), strict=True)])
    torch.testing.assert_close(W_dec.grad, expected)


@pytest.mark.parametrize("decoder_norm", ["none", "l2", "l2-hook"])
def test_what_a_step_does(decoder_norm):
    """Against the step written out: SGD's is W - lr * gradient."""
    W_dec = decoder()
    normalize_decoder(W_dec)
    start, gradient = W_dec.detach().clone(), torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([W_dec], lr=0.1)
    keep_normalized(optimizer, W_dec, decoder_norm)
    W_dec.grad = gradient.clone()
    optimizer.step()
    if decoder_norm == "l2":
        gradient = gradient - (gradient * start).sum(dim=1, keepdim=True) * start
    expected = start - 0.1 * gradient
    if decoder_norm != "none":
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(W_dec.detach(), expected)
