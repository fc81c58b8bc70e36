import json
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.activations.text import load_text, python_documentation, text_identity, token_windows
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


def test_identities_tell_texts_apart(tmp_path):
    configs = [TextConfig()]
    configs += [TextConfig(source="owner/data", **more) for more in ({}, {"subset": "small"}, {"split": "test"})]
    for name, content in (("a.txt", "one"), ("b.txt", "two"), ("a.jsonl", "one")):
        (tmp_path / name).write_text(content)
        configs += [TextConfig(source=str(tmp_path / name), column=column) for column in ("text", "body")]
    assert len({json.dumps(text_identity(config)) for config in configs}) == len(configs)


def test_a_file_is_known_by_its_content_not_its_name(tmp_path):
    for name in ("a.txt", "b.TXT"):
        (tmp_path / name).write_text("one")
    first, second = (text_identity(TextConfig(source=str(tmp_path / name))) for name in ("a.txt", "b.TXT"))
    assert first == second


def test_python_documentation_is_ample_and_in_a_fixed_order():
    documents = list(python_documentation())
    assert documents[:2000] == list(islice(python_documentation(), 2000))
    assert sum(map(len, documents)) > 1_500_000
    assert all(isinstance(document, str) and document for document in documents)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_local_files(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"corpus{suffix}"
    documents = ["first line\nsecond line", "another"]
    if suffix == ".txt":
        path.write_text("\n\n".join(documents))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    else:
        import datasets

        datasets.Dataset.from_dict({"body": documents}).to_parquet(str(path))
    column = "text" if suffix == ".txt" else "body"
    assert list(load_text(TextConfig(source=str(path), column=column))) == documents
    with pytest.raises(ValueError, match=r"text\.column 'other' is not in"):
        list(load_text(TextConfig(source=str(path), column="other")))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        list(load_text(TextConfig(source=str(tmp_path / "none.txt"))))


def test_rows_without_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.JSONL"
    path.write_text('{"text": "one", "n": 1}\n{"text": null, "n": 2}\n{"text": "two", "n": 3}\n')
    assert list(load_text(TextConfig(source=str(path)))) == ["one", "two"]
    with pytest.raises(ValueError, match=r"text.column 'n' of .*corpus.JSONL' holds int, not text"):
        list(load_text(TextConfig(source=str(path), column="n")))


def test_file_of_unknown_kind_is_refused(tmp_path):
    (tmp_path / "corpus.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"text.source must be a .txt, .jsonl, .json, .parquet file or a data set"):
        list(load_text(TextConfig(source=str(tmp_path / "corpus.csv"))))


def test_hub_data_set_is_streamed(monkeypatch):
    calls = []

    def load_dataset(*arguments, **keywords):
        calls.append((arguments, keywords))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr("topk_ortho.activations.text.datasets.load_dataset", load_dataset)
    assert list(load_text(TextConfig(source="owner/name"))) == ["one", "two"]
    assert list(load_text(TextConfig(source="owner/name", subset="small", split="test"))) == ["one", "two"]
    assert calls == [
        (("owner/name", None), {"split": "train", "streaming": True}),
        (("owner/name", "small"), {"split": "test", "streaming": True}),
    ]
