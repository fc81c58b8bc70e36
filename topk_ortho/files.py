"""Files and folders that appear under their names only when they are whole, their hash, and the folder of caches.

Until then they are called `unfinished-` and a name that tells which process writes them, so that what a killed process
left behind can be told from what a living one still writes.
"""

import hashlib
import itertools
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

_PROCESS = uuid.uuid4().hex
"""Tells this process from an earlier one that had the same number"""
_COUNTER = itertools.count()
_UNFINISHED = re.compile(r"unfinished-(?P<machine>.+)-(?P<pid>\d{1,9})-(?P<process>[0-9a-f]{32})-\d+")
_DAY = 86_400.0


@contextmanager
def finished_as(path: Path) -> Iterator[Path]:
    """A path to write to, whose file is renamed to `path` when the block ends without an error.

    The file gets the permissions that the umask gives, whatever the writer of the block would give it.

    Raises
    ------
    OSError
        If the file cannot be written; safetensors' own error is turned into this one. The file that was at `path`
        before stays as it was.
    """
    unfinished = _unfinished_beside(path)
    try:
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        yield unfinished
        if stat.S_IMODE(unfinished.stat().st_mode) != mode:  # safetensors lets only the owner read
            unfinished.chmod(mode)
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} could not be written: {error}") from error
        _name_in(error, unfinished, path)
        raise


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """A new folder to write to, which is renamed to `path` when the block ends without an error.

    If another process has made `path` in the meantime, that one stays and the new folder goes. The folders above it are
    made where they are missing.
    """
    unfinished = _unfinished_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    except OSError as error:
        _name_in(error, unfinished, path)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def made_once(path: Path, longest_wait: float = 600.0) -> Iterator[None]:
    """Let one process or thread at a time make the file or folder at `path`; others wait until its block has ended.

    Whoever has waited must look whether `path` is there by then. Nobody waits where the folder cannot be written, or
    for more than so many seconds: another process may hang, or a file system keep the lock of one that was killed.
    """
    lock, is_locked = FileLock(path.with_name(path.name + ".lock")), False
    with suppress(OSError, NotImplementedError):  # the latter is raised where the file system has no locks
        lock.acquire(timeout=longest_wait)
        is_locked = True
    try:
        yield
    finally:
        if is_locked:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()


def remove_abandoned(folder: Path) -> None:
    """Remove the unfinished files and folders in a folder that no process writes any more.

    A process of this machine can be asked for. What another machine writes counts as abandoned when it has not changed
    for a day. Where the folder cannot be changed, everything stays.
    """
    for path in folder.glob("unfinished-*"):
        name = _UNFINISHED.fullmatch(path.name)
        if name is None or _is_written(path, name["machine"], int(name["pid"]), name["process"]):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Replace the text of a file. If that fails, the file stays as it was."""
    with finished_as(path) as unfinished:
        unfinished.write_text(text)


def user_cache() -> Path:
    """The package's folder for what takes long to make and serves every run: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topk_ortho"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_in(error: BaseException, unfinished: Path, path: Path) -> None:
    """Let an error of the system name what was to be written, where it names the unfinished file or none at all."""
    if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(unfinished)):
        error.filename = str(path)


def _unfinished_beside(path: Path) -> Path:
    """A new name in the folder of a path, for what this process writes."""
    return path.with_name(f"unfinished-{_machine()}-{os.getpid()}-{_PROCESS}-{next(_COUNTER)}")


def _machine() -> str:
    """Name of where a process number means something: the host and, on Linux, the container on it."""
    with suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _is_written(path: Path, machine: str, pid: int, process: str) -> bool:
    """Whether an unfinished file or folder may still be completed by the process that its name tells of."""
    if machine == _machine():
        if pid == os.getpid():
            return process == _PROCESS
        if not _is_running(pid):
            return False
    try:
        last_change = max(part.stat().st_mtime for part in (path, *path.glob("*")))
    except OSError:  # it is being renamed
        return True
    return time.time() - last_change < _DAY


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # elsewhere the signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
