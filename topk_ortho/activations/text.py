"""Text as windows of token ids: of a local file, of the documentation in Python code, or of a data set on the hub."""

import ast
import functools
import hashlib
import importlib
import inspect
import json
import platform
import random
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topk_ortho.activations.config import DOCUMENTATION, TextConfig, way_to_the_hub
from topk_ortho.activations.documents import FILE_KINDS, read_documents, texts_of
from topk_ortho.files import sha256_of

_PYTHON_DOCS, _INSTALLED_DOCS = DOCUMENTATION
_NOT_DOCUMENTATION = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
_CHARACTERS_AT_A_TIME = 1_000_000
"""How much text is tokenised at a time, apart from a document that is longer"""


class Text:
    """A source of documents: a local file, the documentation in Python code, or a data set on the hub (streamed).

    Parameters
    ----------
    config : TextConfig
        Names the source, and the column of it that is read.
    """

    def __init__(self, config: TextConfig):
        self.config = config
        self._file = _local_file(config.source)

    @property
    def is_on_hub(self) -> bool:
        """True if the documents are streamed from a data set on the hub, False if all are on this machine."""
        return self._file is None and self.config.source not in DOCUMENTATION

    def documents(self) -> Iterator[str]:
        """The documents, read as they are asked for."""
        if self._file is not None:
            return read_documents(self._file, self.config.column)
        if self.is_on_hub:
            return texts_of(self._rows_of_hub(), self.config.column)
        return _distinct(python_documentation() if self.config.source == _PYTHON_DOCS else installed_documentation())

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the documents, found without reading them as documents.

        A file is known by the hash of its content, by how it is parsed, and by its column. A data set on the hub is
        known by its name, and by its commit, which is asked for apart.
        """
        if self.is_on_hub:
            names = {"text": self.config.source, "subset": self.config.subset, "split": self.config.split}
            return names | {"column": self.config.column}
        if self._file is None:
            version, digest = platform.python_version(), _hash_of_code(self.config.source)
            return {"text": f"{self.config.source} of Python {version}, sha256 {digest}"}
        kind = self._file.suffix.lower()
        identity = {"text": f"sha256 {sha256_of(self._file)}", "text_format": kind}
        return identity if kind == ".txt" else identity | {"column": self.config.column}

    def ask_commit(self) -> str:
        """The commit of a data set on the hub whose documents these are.

        Raises
        ------
        OSError
            If the hub does not tell.
        """
        return str(self._builder.hash)

    @functools.cached_property
    def _builder(self) -> Any:
        """The data set on the hub, at the commit that its revision means now."""
        try:
            return datasets.load_dataset_builder(self.config.source, self.config.subset, revision=self.config.revision)
        except Exception as error:  # whatever datasets, the hub's client or the network raise
            raise OSError(
                f"text.source {self.config.source!r} is not a file and cannot be read as a data set on the hub; "
                f"{way_to_the_hub('text.source')}: {error}"
            ) from error

    def _rows_of_hub(self) -> Iterator[tuple[str, dict[str, Any]]]:
        source, split = self.config.source, self.config.split
        builder = self._builder
        try:
            for row in builder.as_streaming_dataset(split=split):
                yield source, row
        except Exception as error:
            raise OSError(f"split {split!r} of text.source {source!r} cannot be read: {error}") from error


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of all that decides which tokens a tokenizer makes, whatever files it was loaded from."""
    if tokenizer.is_fast:
        contents = [tokenizer.backend_tokenizer.to_str().encode()]
    else:
        settings = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int)}
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "settings": settings}
        contents = [json.dumps(described, sort_keys=True).encode()]
        with tempfile.TemporaryDirectory() as folder, suppress(NotImplementedError):  # some have nothing to save
            contents += [Path(file).read_bytes() for file in tokenizer.save_vocabulary(folder)]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep")}
    contents.append(json.dumps(special | {"all": sorted(tokenizer.all_special_ids)}).encode())
    digests = b"".join(hashlib.sha256(content).digest() for content in contents)
    return f"sha256 {hashlib.sha256(digests).hexdigest()}"


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer, and where windows have them."""

    first: int | None
    """Opens each window: classification or beginning of sequence; None if the tokenizer has neither."""
    last: int | None
    """Closes each window: the separator, of a tokenizer that has a classification token."""
    separator: int | None
    """Stands after each document: the separator or the end of sequence."""
    opens_with_bos: bool
    """Whether the token that opens a window is the one that the tokenizer calls the beginning of a sequence (BOS)."""
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
    for batch in _batched(documents):
        for ids in tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            stream += ids + separator
        n = min(n_missing, len(stream) // n_body)
        body = torch.tensor(stream[: n * n_body], dtype=torch.int32).view(n, n_body)
        yield torch.cat([first.expand(n, -1), body, last.expand(n, -1)], dim=1)
        del stream[: n * n_body]
        n_missing -= n
        if n_missing == 0:
            return


def python_documentation() -> Iterator[str]:
    """Python's language reference as `help()` shows it, then docstrings of the standard library.

    Their order is fixed for a version of Python; the text differs between versions, and some of it repeats.
    """
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for path in _code(_PYTHON_DOCS):
        yield from _docstrings(path)
    for name in sorted(sys.builtin_module_names):
        members = [member for _, member in inspect.getmembers(importlib.import_module(name), callable)]
        yield from filter(None, map(inspect.getdoc, members))


def installed_documentation() -> Iterator[str]:
    """Docstrings of the packages that are installed for this Python, file by file in an order that mixes the packages.

    It is the same for the same files; some of the text repeats.
    """
    files = _code(_INSTALLED_DOCS)
    random.Random(0).shuffle(files)
    for path in files:
        with suppress(SyntaxError, RecursionError, ValueError):  # code for another Python, or what is not text
            for docstring in _docstrings(path):
                docstring.encode()
                yield docstring


def _code(source: str) -> list[Path]:
    """The files whose docstrings are read: of the standard library, or of what is installed beside it."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"]] if source == _PYTHON_DOCS else dict.fromkeys((paths["purelib"], paths["platlib"]))
    return [
        path
        for root in map(Path, roots)
        for path in sorted(root.rglob("*.py"))
        if path.is_file() and _NOT_DOCUMENTATION.isdisjoint(path.relative_to(root).parts)
    ]


@functools.cache
def _hash_of_code(source: str) -> str:
    """A hash of the files; those of one version of Python can differ, as distributions leave some out."""
    return hashlib.sha256("".join(map(sha256_of, _code(source))).encode()).hexdigest()


def _docstrings(path: Path) -> Iterator[str]:
    code = path.read_text(encoding="utf-8", errors="ignore")
    if '"""' not in code:
        return
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    """The documents without repetitions, each as soon as it is read: a short run needs few of them."""
    seen: set[str] = set()
    for document in documents:
        if document not in seen:
            seen.add(document)
            yield document


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents a thousand at a time, and fewer of long ones."""
    batch: list[str] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document)
        if len(batch) == 1000 or n_characters >= _CHARACTERS_AT_A_TIME:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _as_list(token: int | None) -> list[int]:
    """A token that may be missing as a list of one or none."""
    return [] if token is None else [token]


def _local_file(source: str) -> Path | None:
    """The file that a text source names, if it does not name something else."""
    if source in DOCUMENTATION:
        return None
    path = Path(source)
    is_known = path.suffix.lower() in FILE_KINDS
    if is_known and path.is_file():
        return path
    if path.exists():
        raise ValueError(f"text.source must be a {', '.join(FILE_KINDS)} file or a data set, got {source!r}")
    if is_known or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"text.source {source!r} is not a file")
    return None
