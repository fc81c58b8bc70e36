"""Each architecture against its definition, written out densely."""

import numpy as np
import pytest
import torch

from topk_ortho.sae import ActiveFeatures, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, SAEOutput, StandardSAE, TopKSAE

D_IN, N = 6, 20


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


BUILD = {
    "standard": lambda: StandardSAE(D_IN, N, generator=generator()),
    "topk": lambda: TopKSAE(D_IN, N, 3, generator=generator()),
    "batchtopk": lambda: BatchTopKSAE(D_IN, N, 3, generator=generator()),
    "matryoshka": lambda: MatryoshkaSAE(D_IN, N, 3, (5, 12, N), generator=generator()),
    "jumprelu": lambda: JumpReLUSAE(D_IN, N, 3, initial_threshold=0.4, bandwidth=0.5, generator=generator()),
}


def make(name):
    """An SAE whose biases matter."""
    sae = BUILD[name]()
    sae.b_enc.data = 0.3 * torch.randn(N, generator=generator(1))
    sae.b_dec.data = torch.randn(D_IN, generator=generator(2))
    return sae


def inputs(batch=9, seed=3):
    return torch.randn(batch, D_IN, generator=generator(seed)) + 0.5


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, D_IN), r"x must have shape \[batch, d_in = 6\], got \[2, 3, 6\]: flatten its other dimensions"),
        ((D_IN,), r"x must have shape \[batch, d_in = 6\], got \[6\]$"),
        ((4, 7), r"x must have shape \[batch, d_in = 6\], got \[4, 7\]$"),
    ],
)
def test_activations_of_another_shape_are_refused(shape, message, is_training, name):
    sae = make(name).train(is_training)
    for call in (sae, sae.encode):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(shape))


def pre_activations(sae, x):
    """By loops, in float64."""
    W, b, centre = (t.detach().double().numpy() for t in (sae.W_enc, sae.b_enc, sae.b_dec))
    return np.array([[b[i] + W[i] @ (row - centre) for i in range(N)] for row in x.double().numpy()])


def dense(features):
    return features.to_dense() if isinstance(features, ActiveFeatures) else features


def expected_features(name, sae, x):
    z = pre_activations(sae, x)
    match name:
        case "standard":
            return np.maximum(z, 0)
        case "jumprelu":
            return np.where(z > 0.4, z, 0)
        case "topk":
            cut = np.sort(z, axis=1)[:, [-3]]
            return np.where(z >= cut, np.maximum(z, 0), 0)
        case _:
            cut = np.sort(z.flatten())[-3 * len(z)]
            return np.where(z >= cut, np.maximum(z, 0), 0)


@pytest.mark.quick
@pytest.mark.parametrize("name", BUILD)
def test_forward_is_the_definition(name):
    sae, x = make(name), inputs()
    output = sae(x)
    assert isinstance(output, SAEOutput)
    features = expected_features(name, sae, x)
    np.testing.assert_allclose(dense(output.features).detach(), features, rtol=1e-5, atol=1e-6)
    W_dec, b_dec = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    np.testing.assert_allclose(output.reconstruction.detach(), features @ W_dec + b_dec, rtol=1e-5, atol=1e-5)
    widths = (5, 12) if name == "matryoshka" else ()
    assert len(output.inner) == len(widths)
    for width, inner in zip(widths, output.inner, strict=True):
        np.testing.assert_allclose(inner.detach(), features[:, :width] @ W_dec[:width] + b_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_encoder_starts_tied_to_a_unit_decoder(name):
    sae = BUILD[name]()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    scale = D_IN / N if name == "standard" else 1.0
    torch.testing.assert_close(sae.W_enc, sae.W_dec * scale)


@pytest.mark.quick
@pytest.mark.parametrize("name", BUILD)
def test_gradients_are_those_of_the_dense_expression(name):
    sae, x = make(name), inputs()
    mask = dense(sae(x).features) > 0
    loss = sae(x).reconstruction.square().sum()
    actual = torch.autograd.grad(loss, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    features = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * mask
    loss = (features @ sae.W_dec + sae.b_dec).square().sum()
    expected = torch.autograd.grad(loss, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    for parameter, a, e in zip(("W_enc", "b_enc", "W_dec", "b_dec"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", BUILD)
def test_divide_scale_gives_the_same_sae_of_unscaled_activations(name):
    sae, x = make(name), inputs()
    sae.observe(sae(x).features)
    sae.eval()
    before = sae(x)
    sae.divide_scale(8.0)
    after = sae(x / 8)
    torch.testing.assert_close(8 * after.reconstruction, before.reconstruction)
    torch.testing.assert_close(8 * dense(after.features), dense(before.features))
    assert (dense(after.features) > 0).any()


def test_divide_scale_keeps_the_jumprelu_gradient():
    gradients = []
    for factor in (1.0, 8.0):
        sae, x = make("jumprelu"), inputs()
        sae.divide_scale(factor)
        output = sae(x / factor)
        gradients.append(torch.autograd.grad(sae.sparsity(output, 1.0), sae.threshold)[0] / factor)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.9, 5.0, 1e9], ids=lambda t: f"guess_from_{t:g}")
def test_batchtopk_selection_does_not_depend_on_the_guess(threshold):
    sae, x = make("batchtopk"), inputs(40)
    sae.threshold.fill_(threshold)
    np.testing.assert_allclose(
        dense(sae(x).features).detach(), expected_features("batchtopk", sae, x), rtol=1e-5, atol=1e-6
    )


def test_batchtopk_keeps_all_that_is_above_0_if_that_is_less():
    sae, x = make("batchtopk"), inputs()
    sae.b_enc.data -= 2.0
    z = pre_activations(sae, x)
    assert 0 < (z > 0).sum() < 3 * 9
    np.testing.assert_allclose(dense(sae(x).features).detach(), np.maximum(z, 0), rtol=1e-5, atol=1e-6)


def test_batchtopk_ties_keep_the_exact_number():
    sae = BatchTopKSAE(D_IN, N, 3)
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(1.0)
    for threshold in (0.0, 1.0):
        sae.threshold.fill_(threshold)
        assert (dense(sae(inputs()).features) > 0).sum() == 3 * 9


def test_batchtopk_threshold_is_an_average_of_the_smallest_kept():
    sae = make("batchtopk")
    smallest = []
    for seed in range(3):
        features = sae(inputs(seed=seed)).features
        smallest.append(features.values[features.values > 0].min().item())
        sae.observe(features)
    expected = smallest[0]
    for value in smallest[1:]:
        expected += 0.05 * (value - expected)
    assert sae.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_batchtopk_forgets_nothing_when_nothing_fires():
    sae = make("batchtopk")
    sae.threshold.fill_(0.7)
    sae.b_enc.data -= 100.0
    sae.observe(sae(inputs()).features)
    assert sae.threshold.item() == pytest.approx(0.7)


def test_batchtopk_at_inference_looks_at_each_token_alone():
    sae, x = make("batchtopk").eval(), inputs()
    sae.threshold.fill_(0.8)
    z = pre_activations(sae, x)
    np.testing.assert_allclose(dense(sae(x).features).detach(), np.where(z > 0.8, z, 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae(x[:1]).reconstruction, sae(x).reconstruction[:1])


def test_standard_sparsity_is_the_l1_norm_by_decoder_lengths():
    sae, x = make("standard"), inputs()
    sae.W_dec.data *= torch.linspace(0.5, 2.0, N)[:, None]
    output = sae(x)
    expected = (output.features.double() @ sae.W_dec.double().norm(dim=1)).mean() / 4.0**0.5
    assert sae.sparsity(output, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_the_topk_family_has_no_sparsity_term(name):
    sae = make(name)
    assert sae.sparsity(sae(inputs()), 4.0).item() == 0


def test_jumprelu_sparsity_and_its_gradient_by_hand():
    sae, x = make("jumprelu"), inputs()
    z = pre_activations(sae, x)
    l0 = (z > 0.4).sum(axis=1).mean()
    sparsity = sae.sparsity(sae(x), 4.0)
    assert sparsity.item() == pytest.approx((l0 / 3 - 1) ** 2, rel=1e-5)
    threshold, W_enc = torch.autograd.grad(sparsity, (sae.threshold, sae.W_enc), allow_unused=True)
    in_window = np.abs(z - 0.4) < 0.25
    expected = 2 * (l0 / 3 - 1) / 3 * -(in_window / 0.5).mean(axis=0)
    assert in_window.any()
    np.testing.assert_allclose(threshold, expected, rtol=1e-5)
    assert W_enc is None or not W_enc.any()


def test_jumprelu_threshold_gradient_of_the_reconstruction_by_hand():
    sae, x = make("jumprelu"), inputs()
    features = sae.encode(x)
    weight = torch.randn(9, N, generator=generator(7))
    (actual,) = torch.autograd.grad((features * weight).sum(), sae.threshold)
    in_window = np.abs(pre_activations(sae, x) - 0.4) < 0.25
    expected = -(0.4 / 0.5) * (in_window * weight.numpy()).sum(axis=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_jumprelu_thresholds_are_kept_at_0_or_above():
    sae = make("jumprelu")
    sae.threshold.data[:2] = torch.tensor([-1.0, 0.2])
    sae.project()
    assert sae.threshold[:2].tolist() == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize("name", BUILD)
def test_bfloat16_autocast_stays_close_and_gradients_are_float32(name):
    sae, x = make(name), inputs(64)
    with torch.autocast("cpu", torch.bfloat16):
        output = sae(x)
    output.reconstruction.float().square().sum().backward()
    gradients = [p.grad for n, p in sae.named_parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    exact = sae(x).reconstruction
    error = (output.reconstruction.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.15  # bfloat16 has 8 bits; a feature near the cut may be swapped for another
