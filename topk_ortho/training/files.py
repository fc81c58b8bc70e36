"""Files that appear under their names when they are whole."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def finished_as(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends without an error.

    Raises
    ------
    OSError
        If the file cannot be written, by safetensors too; what was at `path` is as it was.
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
    """Replace the text of a file, or leave it as it was."""
    with finished_as(path) as unfinished:
        unfinished.write_text(text)
