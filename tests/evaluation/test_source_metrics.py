import pytest
import torch

from tests.activations.sources import numbered
from topk_ortho.activations.config import SyntheticConfig
from topk_ortho.activations.synthetic import SyntheticActivations
from topk_ortho.evaluation import ground_truth_metrics, source_metrics
from topk_ortho.sae import StandardSAE, TopKSAE


@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
def test_synthetic_activations_are_compared_with_their_true_features(sae_class):
    source = SyntheticActivations(SyntheticConfig(d_in=6, n_parents=2, n_children=2, n_tokens=3000), seed=1)
    sae = sae_class(6, 10, *([3] if sae_class is TopKSAE else []), generator=torch.Generator().manual_seed(0))
    (x, coefficients), (more_x, more_coefficients) = source.sample(1), source.sample(0)
    features = sae.encode(torch.cat([x, more_x]))
    dense = features if sae_class is StandardSAE else features.to_dense()
    expected = ground_truth_metrics(sae.W_dec, dense, source.truth, torch.cat([coefficients, more_coefficients]))
    assert source_metrics(sae, source, [1, 0]) == expected
    assert expected["mcc"] > 0


def test_other_sources_allow_no_further_metrics():
    assert source_metrics(StandardSAE(1, 4), numbered([10, 10]), [0]) == {}
