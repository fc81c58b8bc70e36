import pytest
import torch
from transformers import Gemma2ForCausalLM

from tests.activations.models import save_tiny_gemma
from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.evaluation.cross_entropy import cross_entropy_metrics
from topk_ortho.sae import StandardSAE

CPU = torch.device("cpu")


def test_cross_entropy_recovered_is_its_definition(tmp_path):
    directory = save_tiny_gemma(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n\n".join(["the quick brown fox jumps over the lazy dog"] * 80))
    model = ModelConfig(name=str(directory), hook="blocks.0.hook_resid_post", batch_size=5)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=1500)
    source = TransformerActivations(model, text, "float32", tmp_path / "cache", CPU)
    sae = StandardSAE(16, 64, generator=torch.Generator().manual_seed(0))
    measured = cross_entropy_metrics(sae, source, [1])

    tokens = source.tokens(1)[:16].long()
    reference = Gemma2ForCausalLM.from_pretrained(directory, attn_implementation="eager")

    def loss(replace):
        handle = reference.model.layers[0].register_forward_hook(
            lambda module, inputs, output: (
                replace(output) if isinstance(output, torch.Tensor) else (replace(output[0]), *output[1:])
            )
        )
        with torch.no_grad():
            # windows in the batches of the model's configuration: the ablation is their mean
            losses = [reference(part, labels=part).loss.item() * len(part) for part in tokens.split(5)]
        handle.remove()
        return sum(losses) / len(tokens)

    clean = loss(lambda x: x)
    reconstructed = loss(lambda x: sae(x.flatten(0, 1)).reconstruction.view_as(x))
    ablated = loss(lambda x: x.mean(dim=(0, 1)).expand_as(x))
    assert measured["ce_loss_clean"] == pytest.approx(clean, rel=1e-5)
    assert measured["ce_loss_reconstructed"] == pytest.approx(reconstructed, rel=1e-5)
    assert measured["ce_loss_ablated"] == pytest.approx(ablated, rel=1e-5)
    assert measured["ce_loss_recovered"] == pytest.approx((ablated - reconstructed) / (ablated - clean), rel=1e-2)
    assert len({clean, reconstructed, ablated}) == 3


def test_a_model_without_logits_has_no_cross_entropy(tmp_path):
    (tmp_path / "corpus.txt").write_text("word " * 100)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=50)
    source = TransformerActivations(ModelConfig(), text, "off", tmp_path / "cache", CPU)
    assert cross_entropy_metrics(StandardSAE(384, 8), source, [0]) == {}
