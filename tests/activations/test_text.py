import json
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from topk_ortho.activations import text as text_module
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.activations.text import Text, python_documentation, token_windows, tokenizer_identity
from topk_ortho.activations.transformer import resolve_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model(ModelConfig()))


def test_windows_hold_the_joined_documents_between_special_tokens(tokenizer):
    documents = ["a dictionary of features", "one two three four five six", "seven"]
    windows = torch.cat(list(token_windows(documents, tokenizer, TextConfig(context_size=8, n_tokens=12))))
    assert windows.dtype == torch.int32
    assert windows.shape == (2, 8)
    assert (windows[:, 0] == tokenizer.cls_token_id).all()
    assert (windows[:, -1] == tokenizer.sep_token_id).all()
    text = tokenizer.convert_ids_to_tokens(windows[:, 1:-1].flatten().tolist())
    assert text == ["a", "dictionary", "of", "features", "[SEP]", "one", "two", "three", "four", "five", "six", "[SEP]"]


def test_the_side_on_which_a_tokenizer_pads_makes_no_difference():
    """Windows are full: nothing is padded, whatever a tokenizer is set to."""
    documents = ["a dictionary of features", "one two three four five six", "seven"]
    config, windows = TextConfig(context_size=8, n_tokens=12), []
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(ModelConfig()), padding_side=side)
        windows.append(torch.cat(list(token_windows(documents, tokenizer, config))))
        assert not (windows[-1] == tokenizer.pad_token_id).any()
    assert torch.equal(*windows)


def test_tokens_are_rounded_up_to_whole_windows(tokenizer):
    def endless():
        while True:
            yield "word " * 50

    (block,) = token_windows(endless(), tokenizer, TextConfig(context_size=10, n_tokens=100))
    assert block.shape == (13, 10)


def test_long_texts_come_in_blocks_that_make_one_text(tokenizer):
    """A window that begins in one block of documents and ends in the next loses nothing."""
    documents = [f"word {number} of many" for number in range(2500)]
    config = TextConfig(context_size=10, n_tokens=100_000)
    blocks = list(token_windows(documents, tokenizer, config))
    assert len(blocks) == 3
    body = torch.cat(blocks)[:, 1:-1].flatten().tolist()
    ids = [i for text in documents for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], 102]]
    assert body == ids[: len(body)]
    assert len(ids) - len(body) < 8


def test_tokenizers_without_a_fast_backend_are_told_apart():
    tokenizers = [ByT5Tokenizer(extra_ids=extra_ids) for extra_ids in (125, 125, 3)]
    first, same, other = map(tokenizer_identity, tokenizers)
    assert first == same != other
    tokenizers[1].add_tokens(["word"])
    assert tokenizer_identity(tokenizers[1]) != first


def test_only_as_many_documents_are_read_as_are_needed(tokenizer):
    n_read = 0

    def endless():
        nonlocal n_read
        while n_read < 10:
            n_read += 1
            yield "word " * 60_000
        pytest.fail("read much more than 100 tokens")

    list(token_windows(endless(), tokenizer, TextConfig(context_size=10, n_tokens=100)))


def test_identities_tell_texts_apart(tmp_path):
    configs = [TextConfig()]
    configs += [TextConfig(source="owner/data", **more) for more in ({}, {"subset": "small"}, {"split": "test"})]
    for name, content in (("a.txt", "one"), ("b.txt", "two"), ("a.jsonl", "one"), ("a.json", "one")):
        (tmp_path / name).write_text(content)
        configs.append(TextConfig(source=str(tmp_path / name)))
    configs.append(TextConfig(source=str(tmp_path / "a.json"), column="body"))
    assert len({json.dumps(Text(config).identity) for config in configs}) == len(configs)


def test_a_file_is_known_by_its_content_not_its_name(tmp_path):
    for name in ("a.txt", "b.TXT"):
        (tmp_path / name).write_text("one")
    first, second = (Text(TextConfig(source=str(tmp_path / name))).identity for name in ("a.txt", "b.TXT"))
    assert first == second


def test_python_documentation_is_ample_and_in_a_fixed_order(monkeypatch):
    """To read all of it takes seconds: a quarter of the standard library's files stands for them."""
    files = text_module._code("python-docs")[::4]
    monkeypatch.setattr(text_module, "_code", lambda source: files)
    documents = list(python_documentation())
    assert documents == list(python_documentation())
    assert sum(map(len, documents)) > 700_000
    assert all(isinstance(document, str) and document for document in documents)


def test_docstrings_of_what_is_installed(monkeypatch, tmp_path):
    """Those of all packages mixed, without tests, and without files that cannot be read."""
    files = {
        "first/__init__.py": '"""Documentation of the first package."""',
        "first/tests/test.py": '"""Documentation of a test."""',
        "second/other.py": 'def f():\n    """What f does."""',
        "second/python_2.py": 'print "no longer"\n"""Documentation of old code."""',
        "second/half.py": '"""Half a character: \\ud800."""',
        "second/nul.py": '"""Documentation."""\0',
        **{f"many/{number}.py": f'"""Number {number}."""' for number in range(9)},
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    (tmp_path / "many" / "folder.py").mkdir()
    monkeypatch.setattr(text_module.sysconfig, "get_paths", lambda: {"purelib": tmp_path, "platlib": tmp_path})
    text_module._hash_of_code.cache_clear()
    text = Text(TextConfig(source="installed-docs"))
    documents = list(text.documents())
    expected = ["Documentation of the first package.", "What f does.", *(f"Number {number}." for number in range(9))]
    assert sorted(documents) == sorted(expected)
    assert documents == list(text.documents())
    numbers = [document for document in documents if document.startswith("Number")]
    assert numbers != sorted(numbers)

    identity = text.identity
    (tmp_path / "many" / "9.py").write_text('"""One more."""')
    text_module._hash_of_code.cache_clear()
    assert text.identity != identity
    text_module._hash_of_code.cache_clear()


def test_documents_come_once_and_as_they_are_read(monkeypatch):
    """Without waiting for those that follow."""

    def documents():
        yield from ("first", "second", "first")
        pytest.fail("more was read than was asked for")

    monkeypatch.setattr(text_module, "python_documentation", documents)
    assert [*islice(Text(TextConfig(source="python-docs")).documents(), 2)] == ["first", "second"]
    monkeypatch.setattr(text_module, "python_documentation", lambda: iter(["first", "second", "first", "third"]))
    assert [*Text(TextConfig(source="python-docs")).documents()] == ["first", "second", "third"]


def test_missing_file_is_refused(tmp_path):
    for name in ("none.txt", "none.JSONL", "none"):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            Text(TextConfig(source=str(tmp_path / name)))


def test_file_of_unknown_kind_is_refused(tmp_path):
    (tmp_path / "corpus.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"text.source must be a .txt, .jsonl, .json, .parquet file or a data set"):
        Text(TextConfig(source=str(tmp_path / "corpus.csv")))


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "corpus.txt").write_text("one")
    assert list(Text(TextConfig(source="~/corpus.txt")).documents()) == ["one"]


def test_hub_data_set_is_streamed(monkeypatch):
    asked = []

    class Builder:
        hash = "0123abcd"

        def as_streaming_dataset(self, split):
            asked.append(split)
            yield {"text": "one"}
            yield {"text": "two"}
            raise ConnectionResetError("the cable was pulled")

    def load_dataset_builder(*arguments, revision):
        asked.append((*arguments, revision))
        return Builder()

    monkeypatch.setattr("topk_ortho.activations.text.datasets.load_dataset_builder", load_dataset_builder)
    text = Text(TextConfig(source="owner/name", subset="small", split="test", revision="v1"))
    assert not asked
    assert text.ask_commit() == "0123abcd"
    documents = text.documents()
    assert [next(documents), next(documents)] == ["one", "two"]
    assert asked == [("owner/name", "small", "v1"), "test"]
    with pytest.raises(OSError, match=r"split 'test' of text.source 'owner/name' cannot be read: the cable was pulled"):
        next(documents)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    def fail(*arguments, revision):
        raise ConnectionError("no network")

    monkeypatch.setattr("topk_ortho.activations.text.datasets.load_dataset_builder", fail)
    with pytest.raises(OSError, match=r"^text.source 'owner/name' is not a file and cannot be read .*: no network"):
        list(Text(TextConfig(source="owner/name")).documents())
