import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel

from topk_ortho.training import activations as activations_module
from topk_ortho.training.activations import batches, load_activations, resolve_model
from topk_ortho.training.config import ModelConfig, TextConfig
from topk_ortho.training.text import load_text, token_windows

CPU = torch.device("cpu")
MODEL = ModelConfig(batch_size=3)
TEXT = TextConfig(context_size=16, n_tokens=14 * 5)


@pytest.fixture(scope="module", autouse=True)
def _small_shards():
    """Five windows make three shards, the last one ragged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations_module, "_WINDOWS_PER_SHARD", 2)
        yield


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@pytest.fixture(scope="module")
def activations(cache_dir):
    return load_activations(MODEL, TEXT, cache_dir, CPU)


def test_activations_are_those_of_the_model_without_special_tokens(activations):
    directory = resolve_model(MODEL)
    tokens = token_windows(load_text(TEXT), AutoTokenizer.from_pretrained(directory), TEXT)
    model = BertModel.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states[4]  # 0 is the embedding, 4 leaves block 3
    special = torch.isin(tokens, torch.tensor([101, 102]))  # [CLS] and [SEP] of BERT's vocabulary
    assert special.sum() >= 2 * tokens.shape[0]
    for window, hidden, is_special in zip(activations.windows, expected, special, strict=True):
        torch.testing.assert_close(window, hidden[~is_special].half(), rtol=2**-10, atol=2**-10)


def test_second_load_reads_the_cache(activations, cache_dir, monkeypatch):
    monkeypatch.setattr("topk_ortho.training.activations._harvest", lambda *arguments: pytest.fail("harvested again"))
    again = load_activations(MODEL, TEXT, cache_dir, CPU)
    assert activations.tokens_per_second > 0
    assert again.tokens_per_second is None
    assert all(torch.equal(a, b) for a, b in zip(activations.windows, again.windows, strict=True))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (dataclasses.replace(MODEL, hook="blocks.0.hook_resid_post"), TEXT),
        (MODEL, dataclasses.replace(TEXT, n_tokens=14 * 4)),
    ],
    ids=["hook", "text"],
)
def test_another_hook_or_text_is_not_served_from_the_cache(activations, cache_dir, model, text):
    other = load_activations(model, text, cache_dir, CPU)
    assert other.tokens_per_second is not None
    assert not torch.equal(other.windows[0], activations.windows[0]) or len(other.windows) != len(activations.windows)


def test_interrupted_harvest_leaves_nothing_behind(activations, tmp_path, monkeypatch):
    save = activations_module.save_file

    def interrupted(tensors, path):
        save(tensors, path)
        if "shard-00001" in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(activations_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_activations(MODEL, TEXT, tmp_path, CPU)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(activations_module, "_WINDOWS_PER_SHARD", 2)
    again = load_activations(MODEL, TEXT, tmp_path, CPU)
    assert all(torch.equal(a, b) for a, b in zip(activations.windows, again.windows, strict=True))


def test_two_harvests_at_a_time_end_in_one_cache(activations, tmp_path, monkeypatch):
    write = activations_module._write_shards

    def beside_another(*arguments):
        monkeypatch.setattr(activations_module, "_write_shards", write)
        load_activations(MODEL, TEXT, tmp_path, CPU)  # starts later, finishes first
        return write(*arguments)

    monkeypatch.setattr(activations_module, "_write_shards", beside_another)
    loaded = load_activations(MODEL, TEXT, tmp_path, CPU)
    assert len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(a, b) for a, b in zip(activations.windows, loaded.windows, strict=True))


@pytest.mark.parametrize("damage", ["torn", "lost"])
def test_damaged_cache_is_named(activations, cache_dir, tmp_path, damage):
    folder = next(
        path for path in cache_dir.iterdir() if json.loads((path / "manifest.json").read_text())["windows"] == 5
    )
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    shard = copied / "shard-00001.safetensors"
    shard.write_bytes(b"torn") if damage == "torn" else shard.unlink()
    model = dataclasses.replace(MODEL, hook=json.loads((folder / "manifest.json").read_text())["hook"])
    with pytest.raises(ValueError, match=rf"{copied} is damaged, delete it"):
        load_activations(model, TEXT, tmp_path, CPU)


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_changed_model_is_not_served_from_the_cache(change, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(resolve_model(MODEL), directory)
    model = dataclasses.replace(MODEL, name=str(directory))
    before = load_activations(model, TEXT, tmp_path / "cache", CPU)
    if change == "weights":
        weights = load_file(directory / "model.safetensors")
        save_file({n: 0.5 * w for n, w in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        settings = json.loads((directory / "config.json").read_text()) | {"hidden_act": "relu"}
        (directory / "config.json").write_text(json.dumps(settings))
    after = load_activations(model, TEXT, tmp_path / "cache", CPU)
    assert not torch.equal(before.windows[0], after.windows[0])


def test_overflow_of_the_cache_dtype_is_refused(tmp_path, monkeypatch):
    hidden = activations_module._hidden_states
    monkeypatch.setattr(activations_module, "_hidden_states", lambda *arguments: 1e6 * hidden(*arguments))
    with pytest.raises(ValueError, match=r"activations at blocks.3.hook_resid_post exceed torch.float16"):
        load_activations(MODEL, TEXT, tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_windows_longer_than_the_model_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"text.context_size must be at most 512 for minilm, got 513"):
        load_activations(MODEL, dataclasses.replace(TEXT, context_size=513), tmp_path, CPU)


def test_hook_that_is_no_stream_of_vectors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.hook must carry \[batch, context, width\].*hook_pattern has \["):
        load_activations(dataclasses.replace(MODEL, hook="blocks.3.attn.hook_pattern"), TEXT, tmp_path, CPU)


def test_unknown_hook_is_refused_with_examples(tmp_path):
    with pytest.raises(ValueError, match=r"model.hook must be a hook of .*blocks.0.hook_resid_post.*got 'nowhere'"):
        load_activations(dataclasses.replace(MODEL, hook="nowhere"), TEXT, tmp_path, CPU)


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


def test_batches_visit_every_token_once_an_epoch():
    tokens = torch.arange(10, dtype=torch.float16).unsqueeze(1)
    stream = batches(tokens, 5, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(stream), next(stream)]).squeeze(1).tolist() for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_batches_are_full_and_float32():
    stream = batches(torch.zeros(7, 3, dtype=torch.float16), 4, torch.Generator())
    assert [next(stream).shape for _ in range(3)] == [(4, 3)] * 3
    assert next(stream).dtype == torch.float32


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the 7 training tokens, got 8"):
        next(batches(torch.zeros(7, 3), 8, torch.Generator()))
