"""Text as windows of token ids, through Hugging Face `datasets`."""

import ast
import hashlib
import importlib
import inspect
import json
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topk_ortho.activations.config import TextConfig
from topk_ortho.activations.files import sha256_of

_NOT_DOCUMENTATION = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
_FILE_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_text(config: TextConfig) -> Iterable[str]:
    """Documents of a text source as strings. A data set on the hub is streamed."""
    path = Path(config.source)
    if config.source == "python-docs":
        documents = datasets.Dataset.from_dict({config.column: list(dict.fromkeys(python_documentation()))})
    elif path.suffix.lower() in _FILE_LOADERS:
        if not path.is_file():
            raise FileNotFoundError(f"text.source {config.source!r} is not a file")
        by_paragraph = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        documents = datasets.load_dataset(
            _FILE_LOADERS[path.suffix.lower()], data_files=str(path), split="train", streaming=True, **by_paragraph
        )
    elif path.exists():
        raise ValueError(f"text.source must be a {', '.join(_FILE_LOADERS)} file or a data set, got {config.source!r}")
    else:
        documents = datasets.load_dataset(config.source, config.subset, split=config.split, streaming=True)
    for document in documents:
        if config.column not in document:
            raise ValueError(f"text.column {config.column!r} is not in {config.source!r}; it has {sorted(document)}")
        text = document[config.column]
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise ValueError(
                f"text.column {config.column!r} of {config.source!r} holds {type(text).__name__}, not text"
            )


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer, and where windows have them."""

    first: int | None
    """Opens each window: classification or beginning of sequence; None if the tokenizer has neither."""
    last: int | None
    """Closes each window: the separator, of a tokenizer that has a classification token."""
    separator: int | None
    """Stands after each document: the separator or the end of sequence."""
    opens_with_bos: bool
    """Whether `first` is the tokenizer's beginning of sequence."""
    ids: list[int]
    """All special tokens of the tokenizer."""


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a tokenizer, and where windows have them."""
    has_cls = tokenizer.cls_token_id is not None
    first = tokenizer.cls_token_id if has_cls else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if has_cls else None
    return SpecialTokens(
        first=first,
        last=last,
        separator=tokenizer.eos_token_id if last is None else last,
        opens_with_bos=first is not None and first == tokenizer.bos_token_id,
        ids=sorted(tokenizer.all_special_ids),
    )


def token_windows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, config: TextConfig) -> Iterator[Tensor]:
    """Blocks [n, context_size] of token ids, int32, in full windows that together hold config.n_tokens or more.

    Documents are joined by the tokenizer's separator and cut without regard to their ends. Each window opens with the
    classification or beginning-of-sequence token and closes with the separator, as far as the tokenizer has them.
    """
    special = special_tokens_of(tokenizer)
    first, last = (torch.tensor(_as_list(token), dtype=torch.int32) for token in (special.first, special.last))
    n_body = config.context_size - len(first) - len(last)
    separator = _as_list(special.separator)
    n_missing = -(-config.n_tokens // n_body)
    stream: list[int] = []
    for batch in _batched(documents, 1000):
        for ids in tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            stream += ids + separator
        n = min(n_missing, len(stream) // n_body)
        body = torch.tensor(stream[: n * n_body], dtype=torch.int32).view(n, n_body)
        yield torch.cat([first.expand(n, -1), body, last.expand(n, -1)], dim=1)
        del stream[: n * n_body]
        n_missing -= n
        if n_missing == 0:
            return


def text_identity(config: TextConfig) -> dict[str, Any]:
    """What decides the documents of a text source, found without reading them as documents.

    A file is known by the hash of its content, by how it is parsed, and by its column.
    """
    path = Path(config.source)
    if config.source == "python-docs":
        return {"text": f"python-docs {sys.version}"}
    if path.is_file():
        return {"text": f"sha256 {sha256_of(path)}", "text_format": path.suffix.lower(), "column": config.column}
    return {"text": f"{config.source} {config.subset} {config.split}", "column": config.column}


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of all that decides which tokens a tokenizer makes, whatever files it was loaded from."""
    if tokenizer.is_fast:
        contents = [tokenizer.backend_tokenizer.to_str().encode()]
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = tokenizer.save_vocabulary(folder)
            contents = [type(tokenizer).__name__.encode(), *(Path(file).read_bytes() for file in files)]
            contents.append(json.dumps(tokenizer.get_added_vocab(), sort_keys=True).encode())
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep")}
    contents.append(json.dumps(special | {"all": sorted(tokenizer.all_special_ids)}).encode())
    digests = b"".join(hashlib.sha256(content).digest() for content in contents)
    return f"sha256 {hashlib.sha256(digests).hexdigest()}"


def python_documentation() -> Iterator[str]:
    """Python's language reference as `help()` shows it, then docstrings of the standard library.

    Their order is fixed for a version of Python; the text differs between versions, and some of it repeats.
    """
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _NOT_DOCUMENTATION.isdisjoint(path.relative_to(root).parts):
            yield from _docstrings(path)
    for name in sorted(sys.builtin_module_names):
        members = [member for _, member in inspect.getmembers(importlib.import_module(name), callable)]
        yield from filter(None, map(inspect.getdoc, members))


def _docstrings(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8", errors="ignore")
    if '"""' not in source:
        return
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _batched(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch


def _as_list(token: int | None) -> list[int]:
    """A token that may be missing as a list of one or none."""
    return [] if token is None else [token]
