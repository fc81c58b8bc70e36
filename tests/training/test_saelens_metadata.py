"""SAELens makes the activations of a dictionary again from what is saved beside it."""

from dataclasses import replace

import datasets
import pytest
import sae_lens
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.activations.models import save_tiny_gemma
from tests.activations.sources import sparse_mixtures
from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.activations.text import special_tokens_of
from topk_ortho.sae import StandardSAE
from topk_ortho.sae.export import save_saelens
from topk_ortho.training.config import SAEConfig, TrainConfig
from topk_ortho.training.presets import PRESETS
from topk_ortho.training.saelens_metadata import saelens_metadata

SUMMARY = {"l0": 7.5, "dead_features": 3}
LETTERS = "".join(chr(97 + number * number % 26) for number in range(2000))


def run_on(folder, *, text, **model):
    """A configuration and its activations, of a text in a file."""
    (folder / "corpus.txt").write_text(text)
    config = TrainConfig(
        batch_size=100,
        model=ModelConfig(hook="blocks.0.hook_resid_post", **model),
        text=TextConfig(source=str(folder / "corpus.txt"), context_size=16, n_tokens=300),
    )
    return config, TransformerActivations(
        config.model, config.text, "float32", folder / "activations", torch.device("cpu")
    )


def loaded(folder, config, source):
    """The dictionary as SAELens loads it."""
    save_saelens(StandardSAE(source.d_in, 20), folder / "sae", saelens_metadata(config, source, SUMMARY))
    return sae_lens.SAE.load_from_disk(folder / "sae")


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning", "ignore:The training dataset:UserWarning")
def test_an_activation_store_opened_from_it_has_the_same_windows_and_activations(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config, source = run_on(tmp_path, text=LETTERS, name=str(save_tiny_gemma(tmp_path / "model")))
    sae = loaded(tmp_path, config, source)
    assert sae.cfg.metadata.model_name == str(tmp_path / "model")
    store = sae_lens.ActivationsStore.from_sae(
        source.transformer.bridge,
        sae,
        datasets.Dataset.from_dict({"text": [LETTERS]}),
        streaming=False,
        sequence_separator_token=sae.cfg.metadata.sequence_separator_token,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=8,
    )
    tokens = store.get_batch_tokens(source.tokens(0).shape[0])
    assert torch.equal(tokens.int(), source.tokens(0))
    kept = ~torch.isin(tokens, torch.tensor(sae.cfg.metadata.exclude_special_tokens))
    torch.testing.assert_close(store.get_activations(tokens)[kept], source.shard(0))
    assert next(iter(store)).shape == (8, 16)


def test_minilm_by_the_name_that_others_know(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config, source = run_on(tmp_path, text="a dictionary of features " * 200)
    python_docs = replace(config, text=replace(config.text, source="python-docs"))
    metadata = loaded(tmp_path, python_docs, source).cfg.metadata
    assert metadata.model_name == "sentence-transformers/all-MiniLM-L6-v2"
    assert metadata.dataset_path is None  # no data set of that name exists elsewhere
    assert metadata.training_config["text"]["source"] == "python-docs"
    installed_docs = replace(config, text=replace(config.text, source="installed-docs"))
    assert loaded(tmp_path, installed_docs, source).cfg.metadata.dataset_path is None
    # windows open with [CLS], which is no beginning of sequence, and what SAELens would put there is another token
    assert (metadata.prepend_bos, metadata.begin_batch_token, metadata.sequence_separator_token) == (False, 101, 102)
    assert metadata.exclude_special_tokens == [0, 100, 101, 102, 103]


@pytest.mark.parametrize(
    ("special", "opens_with_bos", "separator"),
    [({}, False, None), ({"eos_token": "b"}, False, 1), ({"bos_token": "a", "eos_token": "a"}, True, 0)],
    ids=["no_special_tokens", "no_bos", "bos_is_eos"],
)
def test_bos_is_prepended_only_where_windows_open_with_it(special, opens_with_bos, separator):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    tokens = special_tokens_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))
    assert (tokens.opens_with_bos, tokens.separator) == (opens_with_bos, separator)


def test_what_is_known_has_the_names_of_saelens(tmp_path):
    base = PRESETS["gemma-2-2b"]
    config = replace(base, sae=SAEConfig(architecture="matryoshka"), text=replace(base.text, context_size=64))
    with pytest.warns(UserWarning, match="non-empty model_from_pretrained_kwargs"):
        metadata = loaded(tmp_path, config, sparse_mixtures()).cfg.metadata
    assert metadata.model_name == "google/gemma-2-2b"
    assert (metadata.model_class_name, metadata.model_from_pretrained_kwargs) == (
        "HookedTransformer",
        {"dtype": "bfloat16"},
    )
    assert (metadata.hook_name, metadata.hook_head_index) == ("blocks.12.hook_resid_post", None)
    assert (metadata.context_size, metadata.seqpos_slice) == (64, [None])
    assert (metadata.dataset_path, metadata.dataset_trust_remote_code) == ("HuggingFaceFW/fineweb", False)
    assert (metadata.training_architecture, metadata.l0, metadata.num_dead_features) == ("matryoshka_batchtopk", 7.5, 3)
    assert metadata.sae_lens_training_version is None


def test_the_name_of_a_model_in_a_folder_holds_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "corpus.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(model=ModelConfig(name="./model"), text=TextConfig(source="corpus.jsonl"))
    metadata = saelens_metadata(config, sparse_mixtures(), SUMMARY)
    assert metadata["model_name"] == str(tmp_path / "model")
    assert metadata["dataset_path"] is None  # SAELens would ask the hub for it


def test_synthetic_activations_are_of_no_model():
    metadata = saelens_metadata(PRESETS["toy-hierarchy"], sparse_mixtures(), SUMMARY)
    assert not {"model_name", "hook_name", "dataset_path"} & metadata.keys()
