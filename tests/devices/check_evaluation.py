"""What judges a dictionary, where the dictionary, the data or both are on the second device."""

from dataclasses import asdict

import pytest
import torch

from tests.activations.models import save_tiny_gemma
from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, SyntheticConfig, TextConfig
from topk_ortho.activations.hierarchy import HierarchicalFeatures
from topk_ortho.activations.source import mean_and_variance
from topk_ortho.activations.synthetic import SyntheticActivations
from topk_ortho.evaluation import evaluate, ground_truth_metrics, mean_max_cosine, source_metrics
from topk_ortho.sae import BatchTopKSAE, MatryoshkaSAE, StandardSAE, TopKSAE
from topk_ortho.sae.export import save_saelens

SAES = {
    "standard": lambda generator: StandardSAE(16, 24, generator=generator),
    "topk": lambda generator: TopKSAE(16, 24, 3, generator=generator),
    "batchtopk": lambda generator: BatchTopKSAE(16, 24, 3, generator=generator),
    "matryoshka": lambda generator: MatryoshkaSAE(16, 24, 3, (8, 24), generator=generator),
}


def make(architecture="standard", where="cpu"):
    return SAES[architecture](torch.Generator().manual_seed(0)).to(where).eval().requires_grad_(False)


def close(expected):
    return pytest.approx(expected, rel=1e-2, abs=1e-3)


def assert_metrics(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is None or isinstance(value, dict) or isinstance(actual[name], float)
        assert actual[name] == (value if value is None or isinstance(value, dict) else close(value)), name


@pytest.mark.parametrize("architecture", SAES)
def test_dictionary_and_activations_may_be_on_different_devices(architecture, device):
    x = torch.randn(70, 16, generator=torch.Generator().manual_seed(1))
    expected = evaluate(make(architecture), x)
    for sae_on, x_on in ((device, "cpu"), ("cpu", device), (device, device)):
        assert_metrics(evaluate(make(architecture, sae_on), x.to(x_on)), expected)


def test_directions_are_compared_where_they_are(device):
    sae = make()
    assert mean_max_cosine(sae.W_dec.to(device)) == close(mean_max_cosine(sae.W_dec))


def test_moments_are_where_the_activations_are(device):
    x = torch.randn(50, 16)
    (mean, variance), (expected, expected_variance) = mean_and_variance(x.to(device)), mean_and_variance(x)
    assert mean.device.type == torch.device(device).type
    torch.testing.assert_close(mean.cpu(), expected)
    assert variance == close(expected_variance)


def synthetic():
    config = SyntheticConfig(d_in=16, n_parents=3, n_children=2, n_independent=4, n_tokens=2000)
    return SyntheticActivations(config, seed=0)


def moved(truth, device):
    return HierarchicalFeatures(
        directions=truth.directions.to(device), parent=truth.parent.to(device), interval=truth.interval.to(device)
    )


@pytest.mark.parametrize("architecture", SAES)
def test_known_features_are_on_the_cpu_whatever_the_dictionary_is_on(architecture, device):
    expected = source_metrics(make(architecture), synthetic(), [0])
    assert_metrics(source_metrics(make(architecture, device), synthetic(), [0]), expected)


def test_ground_truth_may_be_on_the_device(device):
    source, sae = synthetic(), make()
    x, coefficients = source.sample(0)
    expected = ground_truth_metrics(sae.W_dec, sae.encode(x), source.truth, coefficients)
    W_dec, features, coefficients = (tensor.to(device) for tensor in (sae.W_dec, sae.encode(x), coefficients))
    assert_metrics(ground_truth_metrics(W_dec, features, moved(source.truth, device), coefficients), expected)


def test_true_features_know_themselves_on_the_device(device):
    truth = synthetic().truth
    there = moved(truth, device)
    assert there.is_child.tolist() == truth.is_child.tolist()
    assert there.is_parent.tolist() == truth.is_parent.tolist()
    assert there.mean_l0 == close(truth.mean_l0)


def test_reconstructions_in_a_language_model(device, tmp_path):
    model = save_tiny_gemma(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 20)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=500)
    config = ModelConfig(name=str(model), hook="blocks.0.hook_resid_post", batch_size=5)
    results = []
    for where in ("cpu", device):
        source = TransformerActivations(config, text, "float32", tmp_path / where, torch.device(where))
        assert source.shard(0).device.type == "cpu"
        results.append((source.shard(0), source_metrics(make("topk", where), source, [0])))
    (expected_x, expected), (x, metrics) = results
    torch.testing.assert_close(x, expected_x, rtol=1e-3, atol=1e-4)
    assert_metrics(metrics, expected)


@pytest.mark.filterwarnings("default")  # those of SAEBench
def test_core_metrics_of_saebench(device, tmp_path):
    pytest.importorskip("sae_bench", reason="needs SAEBench, which make test installs")
    from topk_ortho.evaluation.saebench.core import measure_core
    from topk_ortho.evaluation.saebench.subject import load_subject

    model = save_tiny_gemma(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 20)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=200)
    metadata = {"model_name": str(model), "hook_name": "blocks.0.hook_resid_post"}
    save_saelens(make("topk"), tmp_path / "sae", metadata)
    expected, found = (
        measure_core(
            load_subject(tmp_path / "sae", model=None, batch_size=4, device=torch.device(where)), text, n_batches=2
        )
        for where in ("cpu", device)
    )
    for name in ("sparsity", "reconstruction_quality", "model_performance_preservation"):
        parts = (asdict(getattr(each.eval_result_metrics, name)) for each in (found, expected))
        assert_metrics(*parts)
    assert_metrics(found.eval_result_unstructured, expected.eval_result_unstructured)
