import json

import pytest
from transformers import AutoTokenizer

from topk_ortho.training.activations import resolve_model
from topk_ortho.training.config import ModelConfig, TextConfig
from topk_ortho.training.text import load_text, python_documentation, token_windows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model(ModelConfig()))


def test_windows_hold_the_joined_documents_between_special_tokens(tokenizer):
    documents = ["a dictionary of features", "one two three four five six", "seven"]
    windows = token_windows(documents, tokenizer, TextConfig(context_size=8, n_tokens=12))
    assert windows.shape == (2, 8)
    assert (windows[:, 0] == tokenizer.cls_token_id).all()
    assert (windows[:, -1] == tokenizer.sep_token_id).all()
    text = tokenizer.convert_ids_to_tokens(windows[:, 1:-1].flatten().tolist())
    assert text == ["a", "dictionary", "of", "features", "[SEP]", "one", "two", "three", "four", "five", "six", "[SEP]"]


def test_tokens_are_rounded_up_to_whole_windows(tokenizer):
    def endless():
        while True:
            yield "word " * 50

    assert token_windows(endless(), tokenizer, TextConfig(context_size=10, n_tokens=100)).shape == (13, 10)


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="text has 2 tokens; at least two windows of 6 are needed"):
        token_windows(["word"], tokenizer, TextConfig(context_size=8))


def test_python_documentation_is_ample_and_in_a_fixed_order():
    documents = list(python_documentation())
    assert documents == list(python_documentation())
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

    def load_dataset(name, **arguments):
        calls.append((name, arguments))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr("topk_ortho.training.text.datasets.load_dataset", load_dataset)
    assert list(load_text(TextConfig(source="owner/name"))) == ["one", "two"]
    assert calls == [("owner/name", {"split": "train", "streaming": True})]
