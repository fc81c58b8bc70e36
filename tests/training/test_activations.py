import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from topk_ortho.training.activations import batches, load_activations, resolve_model
from topk_ortho.training.config import ModelConfig, TextConfig
from topk_ortho.training.text import load_text, token_windows

CPU = torch.device("cpu")
MODEL = ModelConfig(batch_size=3)
TEXT = TextConfig(context_size=16, n_tokens=14 * 5)


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


def test_interrupted_harvest_is_done_again(activations, cache_dir, tmp_path):
    folder = next(path for path in cache_dir.iterdir() if len(list(path.glob("shard-*"))) == 1)
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    (copied / "manifest.json").unlink()
    (copied / "shard-00000.safetensors").write_bytes(b"torn")
    reloaded = [load_activations(MODEL, TEXT, tmp_path, CPU)]
    assert all(torch.equal(a, b) for a, b in zip(activations.windows, reloaded[0].windows, strict=True))


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
