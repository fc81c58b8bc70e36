"""Files that appear under their names only when they are whole, and the hash that tells whether one is."""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def finished_as(path: Path) -> Iterator[Path]:
    """A path to write to, whose file is renamed to `path` when the block ends without an error.

    Raises
    ------
    OSError
        If the file cannot be written; safetensors' own error is turned into this one. The file that was at `path`
        before stays as it was.
    """
    unfinished = path.with_name(f"unfinished-{uuid.uuid4().hex}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} could not be written: {error}") from error
        raise


def write_whole(path: Path, text: str) -> None:
    """Replace the text of a file. If that fails, the file stays as it was."""
    with finished_as(path) as unfinished:
        unfinished.write_text(text)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
