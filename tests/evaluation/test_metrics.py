import math

import pytest
import torch

from topk_ortho.evaluation.metrics import evaluate, mean_max_cosine, ratio
from topk_ortho.sae import StandardSAE, TopKSAE


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae():
    return StandardSAE(6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
def test_reconstruction_and_sparsity_against_their_definitions(sae_class):
    """On more tokens than are looked at at a time."""
    arguments = (6, 10) if sae_class is StandardSAE else (6, 10, 3)
    sae = sae_class(*arguments, generator=torch.Generator().manual_seed(0))
    sae.b_enc.data[2] = -100.0
    n = 1500
    x = normal(n, 6) + 3
    output = sae(x)
    dense = output.features if sae_class is StandardSAE else output.features.to_dense()
    error = (x - output.reconstruction).square().sum()
    metrics = evaluate(sae, x)
    assert metrics["explained_variance"] == pytest.approx(
        (1 - error / (x - x.mean(dim=0)).square().sum()).item(), abs=1e-5
    )
    assert metrics["normalized_mse"] == pytest.approx((error / x.square().sum()).item(), rel=1e-5)
    assert metrics["l0"] == pytest.approx((dense > 0).sum().item() / n)

    histogram = metrics["density_histogram"]
    rates = [(column > 0).sum().item() / n for column in dense.T]
    assert histogram["silent"] == rates.count(0) >= 1
    expected = [0] * 24
    for rate in rates:
        if rate:
            expected[min(23, math.floor((math.log10(rate) + 6) / 0.25))] += 1
    assert histogram["counts"] == expected
    assert len(histogram["log10_edges"]) == 25
    assert (histogram["log10_edges"][0], histogram["log10_edges"][-1]) == (-6, 0)


EQUAL = {
    "one": normal(1, 6),
    "equal": normal(1, 6).expand(50, 6),
    "rounding_of_float32": 3 + 1e-7 * normal(50, 6),
    "rounding_of_cancelled_sums": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) + 1e-7 * normal(50, 6),
    "rounding_of_float16": (3 + 1e-3 * normal(50, 6)).half(),
    "rounding_of_bfloat16": (3 + 1e-2 * normal(50, 6)).bfloat16(),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_activations_have_no_variance_to_explain(name):
    metrics = evaluate(make_sae(), EQUAL[name])
    assert metrics["explained_variance"] is None
    assert 0 < metrics["normalized_mse"] < 2


DIFFERENT = {
    "float32": 3 + 1e-4 * normal(50, 6),
    "float16": (3 + 1e-2 * normal(50, 6)).half(),
    "one_dimension_of_six": torch.cat([torch.full((50, 5), 3.0), normal(50, 1)], dim=1),
    "small_beside_one_large_constant": torch.cat([torch.full((50, 1), 1e4), 0.1 * normal(50, 5)], dim=1),
    "small_beside_one_large_constant_in_float16": torch.cat([torch.full((50, 1), 1e3), 0.2 * normal(50, 5)], 1).half(),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_small_variance_is_variance(name):
    x = DIFFERENT[name]
    sae = make_sae()
    error = (x.float() - sae(x.float()).reconstruction).double().square().sum()
    variance = (x.double() - x.double().mean(dim=0)).square().sum()
    assert evaluate(sae, x)["explained_variance"] == pytest.approx((1 - error / variance).item(), rel=1e-6)


def test_zeros_have_no_norm_to_compare_with():
    metrics = evaluate(make_sae(), torch.zeros(50, 6))
    assert (metrics["explained_variance"], metrics["normalized_mse"], metrics["l0"]) == (None, None, 0)


def test_without_tokens_nothing_is_measured():
    assert set(evaluate(make_sae(), torch.zeros(0, 6)).values()) == {None}


def test_mean_max_cosine_leaves_out_the_feature_itself():
    W_dec = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert mean_max_cosine(W_dec) == pytest.approx((1 + 1 + 0 + 0) / 4, abs=1e-6)


def test_one_feature_has_no_other():
    assert mean_max_cosine(torch.ones(1, 2)) is None


def test_ratio():
    assert ratio(1, 4) == 0.25
    assert ratio(0, 4) == 0
    assert ratio(1, 0) is None
    assert ratio(0.0, 0.0) is None
