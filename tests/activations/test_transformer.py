from pathlib import Path

import pytest
import torch
from transformers import Gemma2ForCausalLM

from tests.activations.models import save_tiny_gemma
from topk_ortho.activations.config import ModelConfig
from topk_ortho.activations.transformer import Transformer, resolve_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return save_tiny_gemma(tmp_path_factory.mktemp("gemma"))


def tokens(n=7):
    return torch.randint(3, 30, (n, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def test_activations_are_those_of_the_reference_model(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.hook_resid_post", batch_size=3), CPU)
    reference = Gemma2ForCausalLM.from_pretrained(gemma, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(tokens().long(), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(transformer.activations(tokens()), expected)


def test_the_layers_behind_the_hook_do_not_run(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.hook_resid_post"), CPU)
    last = transformer.bridge.blocks[1]
    ran = []
    handle = last.register_forward_pre_hook(lambda *arguments: ran.append(True))
    transformer.activations(tokens())
    assert not ran
    transformer.cross_entropy(tokens(), tokens() > 0)
    assert ran
    handle.remove()


def test_losses_and_replaced_activations_are_those_of_the_counted_tokens(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.hook_resid_post", batch_size=3), CPU)
    everything, some = tokens() > 0, tokens() % 3 == 0
    some[2] = False
    losses = transformer.cross_entropy(tokens(), everything)
    assert losses.shape == (7 * 11,)
    passed = []
    counted = transformer.cross_entropy(tokens(), some, lambda x: passed.append(x) or x)
    torch.testing.assert_close(counted, losses.view(7, 11)[some[:, :-1]])
    torch.testing.assert_close(torch.cat(passed), transformer.activations(tokens())[some])
    assert transformer.cross_entropy(tokens(), ~everything).shape == (0,)


def test_no_speed_without_time(gemma, monkeypatch):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.hook_resid_post"), CPU)
    assert transformer.tokens_per_second is None
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: 1.0)
        transformer.activations(tokens())
    assert transformer.tokens_per_second is None
    transformer.activations(tokens())
    assert transformer.tokens_per_second > 0


def test_bfloat16_weights(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.hook_resid_post", dtype="bfloat16"), CPU)
    exact = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.hook_resid_post"), CPU).activations(tokens())
    actual = transformer.activations(tokens())
    assert actual.dtype == torch.bfloat16
    assert 0 < (actual.float() - exact).norm() / exact.norm() < 0.02


def test_which_models_predict_tokens(gemma):
    assert Transformer(ModelConfig(name=str(gemma)), CPU).has_logits
    assert not Transformer(ModelConfig(), CPU).has_logits


def test_windows_longer_than_the_model_takes_are_refused():
    with pytest.raises(ValueError, match=r"text.context_size must be at most 512 for minilm, got 513"):
        Transformer(ModelConfig(), CPU).check_context_size(513)


def test_hook_that_is_no_stream_of_vectors_is_refused(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.1.attn.hook_pattern"), CPU)
    with pytest.raises(ValueError, match=r"model.hook must carry \[batch, context, width\].*hook_pattern has \["):
        transformer.activations(tokens())


def test_unknown_hook_is_refused_with_examples(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="nowhere"), CPU)
    with pytest.raises(ValueError, match=r"model.hook must be a hook of .*blocks.0.hook_resid_post.*got 'nowhere'"):
        transformer.activations(tokens())


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match=r"has sha256 53aa51172d.*, expected 00"):
        resolve_model(ModelConfig(sha256="00"))


def test_local_directory_and_hub_name(tmp_path):
    directory = Path(resolve_model(ModelConfig()))
    assert resolve_model(ModelConfig(name=str(directory))) == str(directory)
    assert resolve_model(ModelConfig(name="owner/model")) == "owner/model"
    with pytest.raises(ValueError, match=r"model.name './absent' is not a directory"):
        resolve_model(ModelConfig(name="./absent"))
    with pytest.raises(ValueError, match=r"is a directory without a model: it has no config.json"):
        resolve_model(ModelConfig(name=str(tmp_path)))
    with pytest.raises(ValueError, match=r"model.sha256 checks a local directory, and 'owner/model' is none"):
        resolve_model(ModelConfig(name="owner/model", sha256="00"))
