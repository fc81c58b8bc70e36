"""Against a loop over windows of the reference model. Its tokenizer knows letters alone: a space is a special token."""

import shutil

import pytest
import torch
from transformers import Gemma2ForCausalLM

from tests.activations.models import save_tiny_gemma
from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.evaluation.cross_entropy import cross_entropy_metrics
from topk_ortho.sae import SAEOutput, StandardSAE

CPU = torch.device("cpu")
SPECIAL = {0, 1, 2, 3}
FOX = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_gemma(tmp_path_factory.mktemp("model"))


def open_source(folder, model, paragraphs, *, batch_size=5, hook="blocks.0.hook_resid_post", dtype="float32"):
    (folder / "corpus.txt").write_text("\n\n".join(paragraphs))
    text = TextConfig(source=str(folder / "corpus.txt"), context_size=16, n_tokens=1500)
    config = ModelConfig(name=str(model), hook=hook, batch_size=batch_size, dtype=dtype)
    return TransformerActivations(config, text, "float32", folder / "cache", CPU)


def random_sae():
    return StandardSAE(16, 64, generator=torch.Generator().manual_seed(0))


class Exact(StandardSAE):
    """Reconstructs activations that it has seen, and no others."""

    def __init__(self, seen):
        super().__init__(16, 64)
        self.seen = seen

    def forward(self, x):
        is_seen = (x[:, None] - self.seen).abs().amax(dim=2).amin(dim=1) < 1e-6
        return SAEOutput(x * is_seen[:, None], x, None, ())


def oracle(model, tokens, sae):
    """Losses as they are, with reconstructions, and with the mean of ordinary tokens; one window at a time."""
    reference = Gemma2ForCausalLM.from_pretrained(model, attn_implementation="eager")
    ordinary = [[token not in SPECIAL for token in window] for window in tokens.tolist()]

    def loss(replace):
        losses, seen = [], []
        for window, is_ordinary in zip(tokens, ordinary, strict=True):

            def put(module, inputs, output, is_ordinary=is_ordinary):
                x = output if isinstance(output, torch.Tensor) else output[0]
                for position in range(len(is_ordinary)):
                    if is_ordinary[position]:
                        seen.append(x[0, position].clone())
                        x[0, position] = replace(x[0, position])

            handle = reference.model.layers[0].register_forward_hook(put)
            with torch.no_grad():
                logits = reference(window[None]).logits[0]
            handle.remove()
            losses += [
                -logits[position].log_softmax(0)[window[position + 1]].item()
                for position in range(len(window) - 1)
                if is_ordinary[position]
            ]
        return sum(losses) / len(losses), torch.stack(seen).mean(dim=0)

    clean, mean = loss(lambda x: x)
    reconstructed, _ = loss(lambda x: sae(x[None]).reconstruction[0])
    ablated, _ = loss(lambda x: mean)
    return {
        "ce_loss_clean": clean,
        "ce_loss_reconstructed": reconstructed,
        "ce_loss_ablated": ablated,
        "ce_loss_recovered": (ablated - reconstructed) / (ablated - clean),
    }


@pytest.mark.parametrize("paragraphs", [[FOX] * 80, ["fox", "1" * 40] * 40], ids=["text", "windows_of_special_tokens"])
def test_cross_entropy_is_its_definition_on_ordinary_tokens(paragraphs, tmp_path, model):
    source = open_source(tmp_path, model, paragraphs)
    tokens = source.tokens(0)[:16].long()
    if len(paragraphs[0]) < 40:
        assert any(SPECIAL.issuperset(window) for window in tokens.tolist())
    expected = oracle(model, tokens, random_sae())
    measured = cross_entropy_metrics(random_sae(), source, [0])
    assert measured.pop("ce_loss_recovered") == pytest.approx(expected.pop("ce_loss_recovered"), rel=1e-3)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert len({round(loss, 3) for loss in measured.values()}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dictionary_that_is_exact_on_what_it_is_trained_on_scores_one(dtype, tmp_path, model):
    source = open_source(tmp_path, model, [FOX] * 80, dtype=dtype)
    assert cross_entropy_metrics(Exact(source.shard(1)), source, [1])["ce_loss_recovered"] == 1.0


def test_the_number_of_windows_in_a_forward_pass_makes_no_difference(tmp_path, model):
    one, many = (
        cross_entropy_metrics(random_sae(), open_source(tmp_path, model, [FOX] * 80, batch_size=n), [1])
        for n in (1, 16)
    )
    assert one == pytest.approx(many, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1e-7], ids=["not_at_all", "up_to_rounding"])
def test_nothing_is_recovered_in_a_model_that_ignores_the_hook(weight, tmp_path, model):
    deaf = shutil.copytree(model, tmp_path / "deaf")
    reference = Gemma2ForCausalLM.from_pretrained(model)
    reference.model.layers[0].post_feedforward_layernorm.weight.data.fill_(weight - 1)
    reference.save_pretrained(deaf)
    measured = cross_entropy_metrics(
        random_sae(), open_source(tmp_path, deaf, [FOX] * 80, hook="blocks.0.mlp.hook_out"), [0]
    )
    assert measured["ce_loss_recovered"] is None
    assert measured["ce_loss_ablated"] == pytest.approx(measured["ce_loss_clean"], rel=1e-6)
    assert (measured["ce_loss_ablated"] != measured["ce_loss_clean"]) == bool(weight)


def test_without_ordinary_tokens_nothing_is_measured(tmp_path, model):
    source = open_source(tmp_path, model, ["1 2 3"] * 80)
    names = ["ce_loss_clean", "ce_loss_reconstructed", "ce_loss_ablated", "ce_loss_recovered"]
    assert cross_entropy_metrics(random_sae(), source, [0]) == dict.fromkeys(names)


def test_reconstructions_that_overflow_have_no_loss(tmp_path, model):
    sae = random_sae()
    sae.b_dec.data.fill_(3e38)
    measured = cross_entropy_metrics(sae, open_source(tmp_path, model, [FOX] * 80), [0])
    assert measured["ce_loss_clean"] > 0
    assert measured["ce_loss_reconstructed"] is measured["ce_loss_recovered"] is None


def test_a_model_without_logits_has_no_cross_entropy(tmp_path):
    (tmp_path / "corpus.txt").write_text("word " * 100)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=50)
    source = TransformerActivations(ModelConfig(), text, "off", tmp_path / "cache", CPU)
    assert cross_entropy_metrics(StandardSAE(384, 8), source, [0]) == {}


def test_tokens_that_are_left_out_keep_their_activations(model, tmp_path):
    everything = open_source(tmp_path, model, [FOX] * 40)
    model_config = ModelConfig(name=str(model), hook="blocks.0.hook_resid_post", max_norm_ratio=1.0)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=1500)
    source = TransformerActivations(model_config, text, "float32", tmp_path / "cache", CPU)
    assert source.shard_sizes[0] < everything.shard_sizes[0]
    # it reconstructs those that are trained on, so a left-out one that it were given would change the loss
    losses = cross_entropy_metrics(Exact(source.shard(0)), source, [0])
    assert losses["ce_loss_reconstructed"] == pytest.approx(losses["ce_loss_clean"], rel=1e-5)
    everywhere = cross_entropy_metrics(Exact(source.shard(0)), everything, [0])
    assert abs(everywhere["ce_loss_reconstructed"] - everywhere["ce_loss_clean"]) > 1e-3
