import math

import pytest
import torch

from topk_ortho.evaluation.metrics import evaluate, mean_max_cosine
from topk_ortho.sae import StandardSAE, TopKSAE


@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
def test_reconstruction_and_sparsity_against_their_definitions(sae_class):
    arguments = (6, 10) if sae_class is StandardSAE else (6, 10, 3)
    sae = sae_class(*arguments, generator=torch.Generator().manual_seed(0))
    sae.b_enc.data[2] = -100.0
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)) + 3
    output = sae(x)
    dense = output.features if sae_class is StandardSAE else output.features.to_dense()
    error = (x - output.reconstruction).square().sum()
    metrics = evaluate(sae, x.split(7))
    assert metrics["explained_variance"] == pytest.approx(
        (1 - error / (x - x.mean(dim=0)).square().sum()).item(), abs=1e-5
    )
    assert metrics["normalized_mse"] == pytest.approx((error / x.square().sum()).item(), rel=1e-5)
    assert metrics["l0"] == pytest.approx((dense > 0).sum().item() / 30)

    histogram = metrics["density_histogram"]
    rates = [(column > 0).sum().item() / 30 for column in dense.T]
    assert histogram["silent"] == rates.count(0) >= 1
    expected = [0] * 24
    for rate in rates:
        if rate:
            expected[min(23, math.floor((math.log10(rate) + 6) / 0.25))] += 1
    assert histogram["counts"] == expected
    assert len(histogram["log10_edges"]) == 25
    assert (histogram["log10_edges"][0], histogram["log10_edges"][-1]) == (-6, 0)


def test_mean_max_cosine_leaves_out_the_feature_itself():
    W_dec = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert mean_max_cosine(W_dec) == pytest.approx((1 + 1 + 0 + 0) / 4, abs=1e-6)
