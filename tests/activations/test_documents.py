import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topk_ortho.activations.documents import read_documents

DOCUMENTS = ["first line\nsecond line", "another"]


def write(path, documents, column="text"):
    """Write a file of the kind that its ending says."""
    rows = [{column: document} for document in documents]
    match path.suffix.lower():
        case ".txt":
            path.write_text("\n\n".join(documents))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)


def read(path, column="text"):
    return list(read_documents(path, column))


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".jsonl", ".JsonL", ".json", ".JSON", ".parquet", ".PARQUET"])
def test_a_kind_is_read_alike_in_small_and_capital_letters(suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    column = "text" if suffix.lower() == ".txt" else "body"
    write(path, DOCUMENTS, column)
    assert read(path, column) == DOCUMENTS
    with pytest.raises(ValueError, match=rf"text\.column 'other' is not in .*{path}; it has \['{column}'\]"):
        read(path, "other")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a::b", " a b ", "-x", "{a,b}", "%61", "train-a@b#c", "~a"])
def test_a_path_is_taken_literally(name, suffix, tmp_path):
    (tmp_path / "decoys").mkdir()
    for folder in (tmp_path, tmp_path / "decoys"):
        for decoy in ("a", "a1", "ab", "a2", "b"):
            write(folder / f"{decoy}{suffix}", ["decoy"])
    write(tmp_path / f"{name}{suffix}", DOCUMENTS)
    assert read(tmp_path / f"{name}{suffix}") == DOCUMENTS


def test_a_link_is_followed(tmp_path):
    write(tmp_path / "data.parquet", DOCUMENTS)
    (tmp_path / "link.parquet").symlink_to(tmp_path / "data.parquet")
    assert read(tmp_path / "link.parquet") == DOCUMENTS


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_a_byte_order_mark_is_no_text(suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    write(path, DOCUMENTS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "utf-16-le", "cp1252", "utf-32"])
def test_another_encoding_is_named_with_the_file(encoding, suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    path.write_text('{"text": "one"}\n{"text": "caf\u00e9"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=rf"{path} is not (UTF-8|text|JSON)"):
        read(path)


def test_nul_characters_are_not_text(tmp_path):
    """UTF-16 without a mark, in which plain letters pass for UTF-8."""
    path = tmp_path / "corpus.txt"
    path.write_text("one\ntwo\n", encoding="utf-16-le")
    with pytest.raises(ValueError, match=rf"{path} is not text: it holds the character NUL"):
        read(path)


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 5_000 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"line 5001 of {path} is not UTF-8"):
        read(path)


def test_blank_lines_separate_paragraphs(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\r\n one\r\ntwo\r\n\r\n \t\n\nthree\nfour")
    assert read(path) == [" one\ntwo", "three\nfour"]


def test_a_text_without_blank_lines_comes_in_pieces(tmp_path):
    path = tmp_path / "corpus.txt"
    lines = [f"line {number}" for number in range(250_000)] + ["x" * 2_500_000]
    path.write_text("\n".join(lines))
    pieces = read(path)
    assert len(pieces) > 4
    assert max(map(len, pieces)) <= 1_000_000
    assert sum(piece.count("\n") + 1 for piece in pieces[:-3]) >= 250_000  # cut at the ends of lines
    assert "".join(pieces).replace("\n", "") == "".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"}, {"text": "two"}]',
        '[\n  {"text": "one", "n": 1},\n  {"text": "two", "n": "x"}\n]\n',
        '{"data": [{"text": "one"}, {"text": "two"}]}',
        '{\n"version": 1,\n"data": [{"text": "one"},\n{"text": "two"}]}\n',
        '\n{"text": "one"}\n\n{"text": "two"}\n',
    ],
    ids=["array", "indented", "data", "indented_data", "lines"],
)
def test_forms_of_json(content, tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(content)
    assert read(path) == ["one", "two"]


def test_one_object_is_one_document(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text('{"text": "one"}')
    assert read(path) == ["one"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_other_columns_may_hold_anything(suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    others = [1, "two", [3], {"four": 4}, None]
    rows = [json.dumps({"meta": other, "text": "one"}) for other in others]
    path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]")
    assert read(path) == ["one"] * 5


def test_other_columns_of_parquet_are_not_read(tmp_path):
    path = tmp_path / "corpus.parquet"
    columns = {"meta": pa.array([{"a": [1]}, None]), "a.b": pa.array(["one", None]), "c": pa.array([1, 2])}
    pq.write_table(pa.table(columns | {"damaged": pa.array(["x" * 50, "y" * 50])}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    page = pq.ParquetFile(path).metadata.row_group(0).column(3).data_page_offset
    content[page : page + 20] = b"\xff" * 20
    path.write_bytes(content)
    assert read(path, "a.b") == ["one"]
    with pytest.raises(ValueError, match=rf"{path} is not a whole .parquet file"):
        read(path, "damaged")
    with pytest.raises(ValueError, match=rf"text.column 'c' of {path} holds int, not text"):
        read(path, "c")


def test_rows_without_text_are_passed_over(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one", "n": 1}\n{"text": null}\n{}\n{"text": "two"}\n')
    assert read(path) == ["one", "two"]
    with pytest.raises(ValueError, match=rf"text.column 'n' of line 1 of {path} holds int, not text"):
        read(path, "n")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_an_empty_file_has_no_documents(suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(b"")
    assert read(path) == []


def test_an_empty_parquet_file_is_named(tmp_path):
    path = tmp_path / "corpus.parquet"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path} is not a whole .parquet file"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("kept", [0.48, 0.97])
def test_a_file_that_is_cut_off_is_named(kept, suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    write(path, ["some words"] * 20)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{path} is not (JSON; is (the file|it) cut off|a whole .parquet file)"):
        read(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('["one"]', r"item 1 of .* must hold an object such as \{\"text\": \"...\"\}, got str"),
        ('"one"', r"must hold an array of objects or \{\"data\": \[...\]\}, got str"),
        ("[" * 100_000, r"is not JSON"),
        (r'[{"text": "\ud83d"}]', r"text.column 'text' of item 1 of .* holds half a character"),
    ],
    ids=["strings", "string", "deep", "surrogate"],
)
def test_json_without_texts_is_refused(content, complaint, tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint) as raised:
        read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_a_file_is_read_no_further_than_needed(suffix, tmp_path):
    """What is wrong near the end of a file is not noticed at its beginning."""
    path = tmp_path / f"corpus{suffix}"
    line = "\n\n" if suffix == ".txt" else "\n"
    path.write_bytes(f'{{"text": "one"}}{line}'.encode() * 50_000 + b"\xff")
    documents = read_documents(path, "text")
    assert len({next(documents) for _ in range(10)}) == 1
    with pytest.raises(ValueError, match="is not UTF-8"):
        list(documents)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "corpus.parquet"
    write(path, DOCUMENTS)
    path.chmod(0)
    with pytest.raises(PermissionError, match=str(path)):
        read(path)
