import dataclasses
import errno
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel

from topk_ortho.activations import cache as cache_module
from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.activations.text import Text, token_windows
from topk_ortho.activations.transformer import Transformer, resolve_model
from topk_ortho.files import finished_as

CPU = torch.device("cpu")
TEXT = TextConfig(context_size=16, n_tokens=14 * 150)
MODEL = ModelConfig(batch_size=50)


@pytest.fixture(scope="module", autouse=True)
def few_documents():
    """Reading all of Python's documentation takes seconds; a few of its pages will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topk_ortho.activations.text.python_documentation", lambda: list(topics.values())[:20])
        yield


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Transformers of the same weights share what takes most of a second to load."""
    load, loaded = Transformer.bridge.func, {}

    def bridge(transformer):
        key = (transformer.weights_identity, transformer.config.dtype, transformer.config.hook)
        if key not in loaded:
            loaded[key] = load(transformer)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "bridge", property(bridge))
        yield


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


def open_source(cache_dir, model=MODEL, text=TEXT, cache="float16"):
    return TransformerActivations(model, text, cache, cache_dir, CPU)


@pytest.fixture(scope="module")
def source(cache_dir):
    source = open_source(cache_dir)
    for number in range(len(source.shard_sizes)):
        source.shard(number)
    return source


def no_transformer(monkeypatch):
    monkeypatch.setattr(Transformer, "activations", lambda *arguments: pytest.fail("the transformer ran"))


def test_shards_are_the_model_without_special_tokens(source):
    directory = resolve_model(MODEL)
    tokens = torch.cat(
        list(token_windows(Text(TEXT).documents(), AutoTokenizer.from_pretrained(directory), TEXT))
    ).long()
    model = BertModel.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states[4]  # 0 is the embedding, 4 leaves block 3
    special = torch.isin(tokens, torch.tensor([101, 102]))  # [CLS] and [SEP] of BERT's vocabulary
    assert special.sum() >= 2 * tokens.shape[0]
    assert len(source.shard_sizes) == 3  # 64 windows of 16 tokens each, the last ragged
    actual = torch.cat([source.shard(number) for number in range(3)])
    assert actual.dtype == torch.float16
    assert source.shard_sizes == [len(source.shard(number)) for number in range(3)]
    torch.testing.assert_close(actual, expected[~special].half(), rtol=2**-10, atol=2**-10)


def test_a_second_source_reads_the_cache(source, cache_dir, monkeypatch):
    no_transformer(monkeypatch)
    monkeypatch.setattr(cache_module, "token_windows", lambda *arguments: pytest.fail("tokenised again"))
    again = open_source(cache_dir)
    assert source.tokens_per_second > 0
    assert again.tokens_per_second is None
    assert all(torch.equal(again.shard(n), source.shard(n)) for n in range(3))


def test_an_interrupted_pass_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    first = open_source(tmp_path)  # has made shard 0, to know its width
    save = cache_module.save_file

    def interrupted(tensors, path):
        save(tensors, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.shard(1)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "tokens.bin", "shard-00000.safetensors"}
    again = open_source(tmp_path)
    assert all(torch.equal(again.shard(n), source.shard(n)) for n in range(3))


def test_two_that_tokenise_at_a_time_end_in_one_folder(tmp_path, monkeypatch):
    read = Text.documents

    def beside_another(text):
        monkeypatch.setattr(Text, "documents", read)
        open_source(tmp_path)  # starts later, finishes first
        return read(text)

    monkeypatch.setattr(Text, "documents", beside_another)
    open_source(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_runs_at_the_same_time_make_each_shard_once(source, tmp_path, monkeypatch):
    """A second run asks for each while the first one makes it; what failed is made by the one that has waited."""
    first, second = open_source(tmp_path), open_source(tmp_path)
    compute, asked, n_made = TransformerActivations._compute, threading.Event(), []

    def slowly(self, number):
        n_made.append(number)
        if self is first:
            asked.wait(10)
            time.sleep(0.2)  # the second one waits by now, or makes it too
            if number == 2:
                raise RuntimeError("it failed")
        return compute(self, number)

    monkeypatch.setattr(TransformerActivations, "_compute", slowly)
    with ThreadPoolExecutor(1) as other:
        for number in (1, 2):
            asked.clear()
            made = other.submit(first.shard, number)
            while len(n_made) < number and not made.done():
                time.sleep(0.01)
            asked.set()
            assert torch.equal(second.shard(number), source.shard(number))
            assert isinstance(made.exception(), RuntimeError) == (number == 2)
    assert n_made == [1, 2, 2]
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.glob("shard*")) == [f"shard-0000{n}.safetensors" for n in range(3)]


def test_without_a_cache_shards_are_made_anew(source, tmp_path, monkeypatch):
    uncached = open_source(tmp_path, cache="off")
    for number in (1, 1):
        torch.testing.assert_close(uncached.shard(number).half(), source.shard(number))
    assert uncached.shard(1).dtype == torch.float32
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "tokens.bin"}


@pytest.mark.parametrize(
    "change",
    [
        {"model": dataclasses.replace(MODEL, hook="blocks.0.hook_resid_post")},
        {"model": dataclasses.replace(MODEL, dtype="bfloat16")},
        {"text": dataclasses.replace(TEXT, n_tokens=14 * 100)},
        {"text": dataclasses.replace(TEXT, context_size=18)},
        {"cache": "float32"},
    ],
    ids=["hook", "model_dtype", "n_tokens", "context_size", "cache"],
)
def test_another_hook_or_text_is_not_served_from_the_cache(source, cache_dir, change):
    other = open_source(cache_dir, **change)
    assert other.tokens_per_second is not None
    first, before = other.shard(0), source.shard(0)
    same = first.shape == before.shape and torch.equal(first, before) and first.dtype == before.dtype
    assert not same or other.shard_sizes != source.shard_sizes


@pytest.mark.parametrize(("key", "value"), [("hook", "blocks.9.hook_mlp_out"), ("text", "other"), ("weights", "x")])
def test_a_manifest_that_does_not_match_is_refused_by_name(key, value, tmp_path):
    open_source(tmp_path)
    (folder,) = tmp_path.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(ValueError, match=rf"{folder} is of {key} '{value}', not "):
        open_source(tmp_path)


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "tokens.bin", "manifest.json"])
def test_a_damaged_cache_is_named(file, tmp_path):
    open_source(tmp_path)
    (folder,) = tmp_path.iterdir()
    less = json.loads((folder / "manifest.json").read_text())
    del less["special_ids"]
    for content in (b"torn", b"", b"[]", json.dumps(less).encode(), b'{"shape": "x", "special_ids": []}'):
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{folder}.* is damaged, delete it"):
            open_source(tmp_path)


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_changed_model_is_not_served_from_the_cache(change, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(resolve_model(MODEL), directory)
    model = dataclasses.replace(MODEL, name=str(directory))
    before = open_source(tmp_path / "cache", model)
    if change == "weights":
        weights = load_file(directory / "model.safetensors")
        save_file({n: 0.5 * w for n, w in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        settings = json.loads((directory / "config.json").read_text()) | {"hidden_act": "relu"}
        (directory / "config.json").write_text(json.dumps(settings))
    after = open_source(tmp_path / "cache", model)
    assert not torch.equal(before.shard(0), after.shard(0))


def test_a_changed_text_file_is_not_served_from_the_cache(tmp_path):
    text, shapes = tmp_path / "corpus.txt", []
    for words in ("one two three ", "four five "):
        text.write_text(words * 200)
        source = open_source(tmp_path / "cache", text=dataclasses.replace(TEXT, source=str(text)))
        shapes.append(source.shard_sizes)
    assert shapes[0] != shapes[1]


def test_overflow_of_the_cache_dtype_is_refused(tmp_path, monkeypatch):
    activations = Transformer.activations
    monkeypatch.setattr(Transformer, "activations", lambda *arguments: 1e6 * activations(*arguments))
    with pytest.raises(ValueError, match=r"blocks.3.hook_resid_post of minilm exceed torch.float16 \(cache can be"):
        open_source(tmp_path)
    assert not list(tmp_path.glob("*/shard-*"))
    assert open_source(tmp_path, cache="float32").d_in == 384


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "corpus.txt").write_text("word")
    text = dataclasses.replace(TEXT, source=str(tmp_path / "corpus.txt"))
    with pytest.raises(ValueError, match=r"corpus.txt fills 0 windows of 16 tokens; at least 2 are needed"):
        open_source(tmp_path / "cache", text=text)
    assert not list((tmp_path / "cache").iterdir())


def edited(directory, name, change):
    """A copy of the small model whose file `name` holds what `change` makes of its JSON."""
    directory.mkdir()
    for path in Path(resolve_model(MODEL)).glob("*.*"):
        (directory / path.name).symlink_to(path)
    if name is not None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).unlink()
        (directory / name).write_text(json.dumps(content))
    return dataclasses.replace(MODEL, name=str(directory))


def swap_words(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", swap_words),
        ("tokenizer_config.json", lambda settings: settings.update(do_lower_case=False)),
        ("special_tokens_map.json", lambda special: special.update(sep_token="[MASK]")),
    ],
    ids=["vocabulary", "lower_case", "special_token"],
)
def test_another_tokenizer_beside_the_same_weights_is_not_served_from_the_cache(name, change, source, tmp_path):
    other = open_source(tmp_path / "cache", edited(tmp_path / "model", name, change))
    differing = {key for key, value in source.identity.items() if other.identity[key] != value}
    assert differing == {"tokenizer"}
    assert not torch.equal(other.tokens(0), source.tokens(0))


def test_a_copy_of_the_model_elsewhere_is_the_same_model(source, cache_dir, tmp_path, monkeypatch):
    no_transformer(monkeypatch)
    copy = open_source(cache_dir, edited(tmp_path / "model", None, None))
    assert copy.identity == source.identity


def test_the_same_bytes_parsed_otherwise_are_another_text(tmp_path):
    sources = []
    for name in ("corpus.txt", "corpus.jsonl"):
        (tmp_path / name).write_text('{"text": "one two three"}\n' * 50)
        sources.append(open_source(tmp_path / "cache", text=dataclasses.replace(TEXT, source=str(tmp_path / name))))
    first, second = sources
    assert {key for key in first.identity if first.identity[key] != second.identity[key]} == {"text_format"}
    assert len(first.tokens(0)) > len(second.tokens(0))


def test_a_shard_of_other_content_is_named_as_damaged(tmp_path):
    open_source(tmp_path)
    (shard,) = tmp_path.glob("*/shard-*")
    for tensors in (
        {"other": torch.zeros(3)},
        {"activations": torch.zeros(3, 384).half()},
        {"activations": load_file(shard)["activations"].float()},
    ):
        save_file(tensors, shard)
        with pytest.raises(ValueError, match=rf"{shard} is damaged, delete it"):
            open_source(tmp_path)


def test_a_cache_can_be_shared_with_a_group(tmp_path):
    before = os.umask(0o002)
    try:
        open_source(tmp_path / "cache")
    finally:
        os.umask(before)
    paths = list((tmp_path / "cache").rglob("*"))
    assert {path.name for path in paths if path.is_file()} == {"manifest.json", "tokens.bin", "shard-00000.safetensors"}
    for path in [tmp_path / "cache", *paths]:
        assert path.stat().st_mode & 0o777 == (0o775 if path.is_dir() else 0o664), path


def test_a_cache_that_cannot_be_written_is_used_without_saving(source, tmp_path, monkeypatch, capsys):
    open_source(tmp_path)

    def refuse(tensors, path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(cache_module, "save_file", refuse)
    again = open_source(tmp_path)
    assert all(torch.equal(again.shard(n), source.shard(n)) for n in (0, 1, 2, 1))
    assert capsys.readouterr().err.count("as they cannot be kept: [Errno 30] Read-only file system") == 1
    assert len(list(tmp_path.glob("*/*"))) == 3


def test_what_killed_processes_left_is_removed_when_the_cache_is_used(tmp_path):
    open_source(tmp_path)
    (folder,) = tmp_path.iterdir()
    with finished_as(tmp_path / "name") as unfinished:
        name = unfinished.name.replace(f"-{os.getpid()}-", "-999999999-")  # no process has this number
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokens.bin").touch()
    (folder / name).touch()
    open_source(tmp_path)
    assert list(tmp_path.glob("**/unfinished-*")) == []


def test_an_interrupted_tokenizer_leaves_nothing(tmp_path, monkeypatch):
    read = Text.documents

    def interrupted(text):
        yield next(iter(read(text)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Text, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        open_source(tmp_path / "file")


def test_another_version_of_what_runs_the_transformer_is_said(source, cache_dir, monkeypatch, capsys):
    monkeypatch.setattr(cache_module, "version", lambda name: "99")
    open_source(cache_dir)
    assert "and this is {'transformers': '99', 'transformer_lens': '99'}: if they make other" in capsys.readouterr().err


class Builder:
    """A data set on the hub, as `datasets` has it."""

    def __init__(self, commit):
        self.hash = commit

    def as_streaming_dataset(self, split):
        yield {"text": f"{self.hash} " * 50}


def test_another_commit_of_a_data_set_on_the_hub_is_another_text(tmp_path, monkeypatch, capsys):
    text = dataclasses.replace(TEXT, source="owner/name")
    sources = []
    for commit in ("one", "two", "two"):
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names, commit=commit, revision: Builder(commit))
        sources.append(open_source(tmp_path, text=text))
    assert sources[1].identity == sources[2].identity
    assert {key for key, value in sources[0].identity.items() if sources[1].identity[key] != value} == {"commit"}
    assert not torch.equal(sources[0].tokens(0), sources[1].tokens(0))

    def fail(*names, revision):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    assert open_source(tmp_path, text=text).identity == sources[1].identity
    assert "no network; what was made of its commit two is used" in capsys.readouterr().err
    assert open_source(tmp_path, text=dataclasses.replace(text, revision="one")).identity == sources[0].identity
    for change in ({"split": "test"}, {"revision": "three"}):
        with pytest.raises(OSError, match=r"as a data set on the hub; .* let text\.source be a file: no network"):
            open_source(tmp_path, text=dataclasses.replace(text, **change))


def test_a_token_beyond_the_vocabulary_is_refused_by_name(tmp_path):
    def enlarge(tokenizer):
        tokenizer["model"]["vocab"]["class"] = 30_600

    model = edited(tmp_path / "model", "tokenizer.json", enlarge)
    (tmp_path / "corpus.txt").write_text("a class " * 200)
    text = dataclasses.replace(TEXT, source=str(tmp_path / "corpus.txt"))
    complaint = rf"tokenizer of model.name '{tmp_path}/model' makes the token 30600, .* vocabulary of 30,522"
    with pytest.raises(ValueError, match=complaint):
        open_source(tmp_path / "cache", model, text)
    assert list((tmp_path / "cache").iterdir()) == []


def with_sinks(monkeypatch, sinks):
    """Let the transformer give 100 times longer activations to the tokens whose ids are sinks."""
    run = Transformer.activations

    def activations(transformer, tokens, dtype=None):
        scale = torch.where(torch.isin(tokens, sinks), 100.0, 1.0)[..., None]
        return run(transformer, tokens, dtype) * scale.to(dtype)

    monkeypatch.setattr(Transformer, "activations", activations)


@pytest.mark.parametrize("cache", ["float16", "off"])
def test_very_long_activations_are_left_out_and_counted(source, tmp_path, monkeypatch, cache):
    sinks = torch.tensor([1996, 2003])  # "the" and "is" in BERT's vocabulary
    with_sinks(monkeypatch, sinks)
    limited = open_source(tmp_path, dataclasses.replace(MODEL, max_norm_ratio=10.0), cache=cache)
    tokens = [source.tokens(number) for number in range(3)]
    special = [torch.isin(t, torch.tensor([101, 102])) for t in tokens]
    n_sinks = sum(int(torch.isin(t, sinks).sum()) for t in tokens)
    assert n_sinks > 20
    assert limited.left_out == {"special": sum(int(s.sum()) for s in special), "high_norm": n_sinks}
    assert source.left_out == {"special": limited.left_out["special"]}
    for number in range(3):
        is_sink = torch.isin(tokens[number], sinks)
        assert torch.equal(limited.is_used(number), ~special[number] & ~is_sink)
        assert torch.equal(source.is_used(number), ~special[number])
        expected = source.shard(number)[~is_sink[~special[number]]]
        assert limited.shard_sizes[number] == len(expected)
        torch.testing.assert_close(limited.shard(number), expected, rtol=2**-10, atol=2**-10, check_dtype=False)
    # another limit shares the activations, and the norms are read
    no_transformer(monkeypatch)
    if cache == "off":
        return
    everything = open_source(tmp_path, dataclasses.replace(MODEL, max_norm_ratio=1000.0))
    assert everything.left_out["high_norm"] == 0
    assert everything.shard_sizes == source.shard_sizes
    assert everything.identity != limited.identity
    assert {path.parent for path in tmp_path.glob("*/manifest.json")} == {next(tmp_path.glob("*/norms.*")).parent}


def test_half_of_all_tokens_are_no_longer_than_the_median(tmp_path):
    limited = open_source(tmp_path, dataclasses.replace(MODEL, max_norm_ratio=1.0))
    n_ordinary = sum(limited.shard_sizes) + limited.left_out["high_norm"]
    assert abs(2 * sum(limited.shard_sizes) - n_ordinary) <= 2


def test_a_damaged_file_of_norms_is_named(tmp_path):
    model = dataclasses.replace(MODEL, max_norm_ratio=10.0)
    open_source(tmp_path, model)
    (path,) = tmp_path.glob("*/norms.safetensors")
    save_file({"activations": torch.ones(3, 1)}, path)
    with pytest.raises(ValueError, match=r"norms\.safetensors is damaged, delete it"):
        open_source(tmp_path, model)
