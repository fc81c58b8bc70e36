"""Documents of a local file, whose path is taken literally. It is read no further than they are asked for."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
"""Endings of the files that can be read, in small letters"""

_LONGEST_PARAGRAPH = 1_000_000
"""Characters after which a paragraph is cut at the end of a line, and a line anywhere: a file may have no blank line"""


def read_documents(path: Path, column: str) -> Iterator[str]:
    """Documents of a file, whose ending says how it is read.

    - .txt: paragraphs, which blank lines separate;
    - .jsonl: lines that each hold an object;
    - .json: an array of objects, an object whose "data" is one, or the same as .jsonl;
    - .parquet: rows.

    Raises
    ------
    ValueError
        If the file is not what its ending says, is not encoded in UTF-8, or has no text in the column.
    """
    match path.suffix.lower():
        case ".txt":
            return texts_of(((str(path), {"text": paragraph}) for paragraph in _paragraphs(path)), column)
        case ".jsonl":
            return texts_of(_json_lines(path), column)
        case ".json":
            return texts_of(_json_lines(path) if _is_json_lines(path) else _json_items(path), column)
        case ".parquet":
            return texts_of(_parquet_rows(path, column), column)
    raise ValueError(f"{path} must be a {', '.join(FILE_KINDS)} file")


def texts_of(rows: Iterable[tuple[str, Any]], column: str) -> Iterator[str]:
    """The texts in a column of rows, each of which comes with words for where it stands.

    Rows where the column is null or missing have none, but the first must have the column.
    """
    for number, (place, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f'{place} must hold an object such as {{"{column}": "..."}}, got {type(row).__name__}')
        if number == 0 and column not in row:
            raise ValueError(f"text.column {column!r} is not in {place}; it has {sorted(row)}")
        text = row.get(column)
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"text.column {column!r} of {place} holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text.column {column!r} of {place} holds half a character: {error}") from error
        yield text


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A file of text, without the byte order mark that it may begin with."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {_line_that_is_not_utf8(path)} of {path} is not UTF-8 ({error.reason}); "
            "convert the file, for instance with iconv -f LATIN1 -t UTF-8 or iconv -f UTF-16 -t UTF-8"
        ) from error


def _line_that_is_not_utf8(path: Path) -> int:
    n_good = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError:
                break
            n_good += 1
    return n_good + 1


def _paragraphs(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    length = 0
    with _opened(path) as file:
        for line in iter(partial(file.readline, _LONGEST_PARAGRAPH), ""):
            if "\0" in line:
                raise ValueError(f"{path} is not text: it holds the character NUL, as UTF-16 read as UTF-8 does")
            is_blank = not line.strip()
            if paragraph and (is_blank or length + len(line) > _LONGEST_PARAGRAPH):
                yield "".join(paragraph).rstrip("\n")
                paragraph, length = [], 0
            if not is_blank:
                paragraph.append(line)
                length += len(line)
    if paragraph:
        yield "".join(paragraph).rstrip("\n")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"line {number} of {path}"
                yield place, _parse_json(line, f"{place} is not JSON; is the file cut off there?")


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file has one object on each line: the first line is a whole object, and there is a second."""
    with _opened(path) as file:
        lines = (line for line in file if line.strip())
        first = next(lines, "")
        if not first.lstrip().startswith("{") or next(lines, None) is None:
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        text = file.read()
    if not text.strip():
        return
    content = _parse_json(text, f"{path} is not JSON; is it cut off?")
    if isinstance(content, dict):
        data = content.get("data")
        content = data if isinstance(data, list) else [content]
    if not isinstance(content, list):
        raise ValueError(f'{path} must hold an array of objects or {{"data": [...]}}, got {type(content).__name__}')
    for number, item in enumerate(content, start=1):
        yield f"item {number} of {path}", item


def _parse_json(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{complaint} ({error})") from error


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of a .parquet file with nothing but the column."""
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if column not in names:
                raise ValueError(f"text.column {column!r} is not in {path}; it has {sorted(names)}")
            for batch in table.iter_batches(batch_size=1_000, columns=[column]):
                for row in batch.to_pylist():
                    yield str(path), row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole .parquet file: {error}") from error
