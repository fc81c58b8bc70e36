import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("hook", ["hook_z", "hook_q"])
def test_heads_are_put_side_by_side(hook, gemma):
    """Against the weights of the layers that make and take them."""
    transformer = Transformer(ModelConfig(name=str(gemma), hook=f"blocks.0.attn.{hook}", batch_size=3), CPU)
    actual = transformer.activations(tokens())
    assert actual.shape == (7, 12, 2 * 8)
    reference = Gemma2ForCausalLM.from_pretrained(gemma, attn_implementation="eager")
    attention, carried = reference.model.layers[0].self_attn, []
    with torch.no_grad():
        if hook == "hook_z":
            attention.o_proj.register_forward_pre_hook(lambda module, inputs: carried.append(inputs[0]))
        else:
            attention.q_proj.register_forward_hook(lambda module, inputs, output: carried.append(output))
        reference(tokens())
    torch.testing.assert_close(actual, carried[0], rtol=1e-4, atol=1e-5)


def test_heads_are_put_back_where_a_loss_needs_them(gemma):
    transformer = Transformer(ModelConfig(name=str(gemma), hook="blocks.0.attn.hook_z"), CPU)
    counted = torch.ones(7, 12, dtype=torch.bool)
    as_they_are = transformer.cross_entropy(tokens(), counted)
    torch.testing.assert_close(transformer.cross_entropy(tokens(), counted, lambda x: x), as_they_are)
    assert not torch.allclose(transformer.cross_entropy(tokens(), counted, lambda x: 0 * x), as_they_are)


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        ("1", "no directory; the hub is switched off by HF_HUB_OFFLINE: set it to 0, or let model.name be a directory"),
        ("0", "no directory; where the hub cannot be reached, let model.name be a directory"),
    ],
)
def test_a_name_on_a_hub_that_is_not_there(offline, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("topk_ortho.activations.transformer.AutoConfig.from_pretrained", _no_hub)
    with pytest.raises(OSError, match=rf"'some/model' cannot be loaded from some/model, which is {message}"):
        Transformer(ModelConfig(name="some/model"), CPU)


def _no_hub(name):
    raise OSError("no connection")


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


@pytest.fixture
def copy(gemma, tmp_path):
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(gemma, tmp_path / "copy"))


def of(directory, hook="blocks.0.hook_resid_post"):
    return Transformer(ModelConfig(name=str(directory), hook=hook), CPU)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_another_shape(path):
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [cut_off, without_a_tensor, with_another_shape, Path.unlink, lambda path: path.write_bytes(b"")],
    ids=["cut_off", "without_a_tensor", "another_shape", "none", "empty"],
)
def test_damaged_weights_are_named(damage, copy):
    """Also where transformers itself would draw what is missing at random."""
    damage(copy / "model.safetensors")
    with pytest.raises(OSError, match=rf"the weights of model.name '{copy}' cannot be loaded from {copy}: "):
        of(copy).activations(tokens())


def test_a_shard_of_the_weights_that_is_missing_is_named(gemma, copy):
    (copy / "model.safetensors").unlink()
    Gemma2ForCausalLM.from_pretrained(gemma).save_pretrained(copy, max_shard_size="5KB")
    torch.testing.assert_close(of(copy).activations(tokens()), of(gemma).activations(tokens()))
    (copy / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(OSError, match=r"the weights of .* cannot be loaded .*model-00002-of-00005.safetensors"):
        of(copy).activations(tokens())


@pytest.mark.parametrize("content", ['{"model_type": "gemma2', "[]", '{"model_type": "none"}'])
def test_a_broken_configuration_is_named(content, copy):
    (copy / "config.json").write_text(content)
    with pytest.raises(OSError, match=rf"the configuration of model.name '{copy}' cannot be loaded from {copy}: "):
        of(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"version": "1.0", "trunc', "{}", "[]", ""])
def test_a_broken_tokenizer_is_named(name, content, copy):
    (copy / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", "{}"):
        return  # nothing that must be there
    with pytest.raises(OSError, match=rf"model.name '{copy}' (cannot be loaded from {copy}|has no tokenizer): "):
        of(copy).load_tokenizer()


def test_a_model_without_tokenizer_is_named(copy):
    """transformers makes one up, to which every word is unknown."""
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(OSError, match=rf"model.name '{copy}' has no tokenizer: put its files, such as tokenizer.json"):
        of(copy).load_tokenizer()


def test_a_token_beyond_the_vocabulary_is_refused(gemma):
    with pytest.raises(ValueError, match=r"makes the token 30, and the model has a vocabulary of 30"):
        of(gemma).activations(torch.full((1, 8), 30))


def test_a_hook_that_never_fires_is_named(gemma):
    hook = "blocks.0.attn.hook_hidden_states"
    assert hook in of(gemma).bridge.hook_dict
    with pytest.raises(ValueError, match=rf"'{hook}' carries nothing when {gemma} runs; take blocks.0.hook_resid_post"):
        of(gemma, hook).activations(tokens())


@pytest.mark.parametrize("hook", ["rotary_emb.hook_cos", "embed.hook_in", "blocks.0.attn.hook_attn_scores"])
def test_a_hook_of_another_shape_is_named(hook, gemma):
    """The first has [1, context, width] whatever the number of windows."""
    with pytest.raises(ValueError, match=rf"model.hook must carry .*; {hook} has \[.*\] for \[7, 12\] tokens"):
        of(gemma, hook).activations(tokens())


def test_a_hook_that_is_switched_off_is_named(gemma):
    with pytest.raises(ValueError, match=r"does not run to model.hook 'blocks.0.attn.hook_result' on 7 windows of"):
        of(gemma, "blocks.0.attn.hook_result").activations(tokens())


def test_windows_that_the_model_cannot_read_are_refused():
    """Some architectures take fewer tokens than their configuration says."""
    transformer = Transformer(ModelConfig(hook="blocks.0.hook_resid_post"), CPU)
    with pytest.raises(ValueError, match=r"minilm does not run to .* on 2 windows of text.context_size 513 tokens"):
        transformer.activations(torch.ones(2, 513, dtype=torch.int32))


def test_a_copy_is_the_same_model_and_an_edited_one_is_not(gemma, copy):
    assert of(copy).weights_identity == of(gemma).weights_identity
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"hidden_activation": "relu"}))
    assert of(copy).weights_identity != of(gemma).weights_identity
    before = of(copy).weights_identity
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    assert of(copy).weights_identity != before


def test_a_path_in_the_home_directory(gemma, monkeypatch):
    monkeypatch.setenv("HOME", str(gemma.parent))
    assert resolve_model(ModelConfig(name=f"~/{gemma.name}")) == str(gemma)
