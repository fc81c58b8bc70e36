import errno
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from topk_ortho import files
from topk_ortho.files import finished_as, finished_folder, made_once, remove_abandoned, write_whole


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with finished_as(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_whole(path, "newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("raised", [OSError("full"), KeyboardInterrupt(), SafetensorError("full")], ids=type)
def test_an_error_leaves_the_old_one_and_nothing_else(raised, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    expected = OSError if isinstance(raised, SafetensorError) else type(raised)

    def write():
        with finished_as(path) as unfinished:
            unfinished.write_text("ne")
            raise raised

    with pytest.raises(expected):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("finished", [finished_as, finished_folder])
def test_a_full_disk_is_an_error_that_names_the_path(finished, tmp_path):
    def write():
        with finished(tmp_path / "data"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/data'"):
        write()
    assert names(tmp_path) == []


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "above" / "folder"
    with finished_folder(path) as unfinished:
        (unfinished / "file").write_text("content")
        assert not path.exists()
    assert names(path) == ["file"]
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("raised", [ValueError("no text"), KeyboardInterrupt()], ids=type)
def test_an_error_leaves_no_folder(raised, tmp_path):
    def write():
        with finished_folder(tmp_path / "folder") as unfinished:
            (unfinished / "file").write_text("content")
            raise raised

    with pytest.raises(type(raised)):
        write()
    assert names(tmp_path) == []


def test_the_folder_of_another_process_stays(tmp_path):
    path = tmp_path / "folder"
    with finished_folder(path) as unfinished:
        (unfinished / "ours").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert names(path) == ["theirs"]
    assert names(tmp_path) == ["folder"]


def test_files_and_folders_get_the_permissions_of_the_umask(umask, tmp_path):
    """Also where the writer lets only the owner read, as safetensors does."""
    with finished_as(tmp_path / "file") as unfinished:
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_CREAT | os.O_WRONLY, 0o600))
    with finished_folder(tmp_path / "above" / "folder"):
        pass
    assert permissions(tmp_path / "file") == 0o666 & ~umask
    assert permissions(tmp_path / "above") == permissions(tmp_path / "above" / "folder") == 0o777 & ~umask


KILLED = """
import os, signal, sys
from pathlib import Path
from files import finished_as, finished_folder
with finished_as(Path(sys.argv[1]) / "file") as file, finished_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write_text("half")
    (folder / "tokens.bin").write_text("half")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    input()
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    # a module of the folder, not of the package, which takes seconds to import
    options = {"env": os.environ | {"PYTHONPATH": str(Path(files.__file__).parent)}, "text": True}
    assert subprocess.run([*command, "killed"], check=False, **options).returncode == -9
    assert len(names(tmp_path)) == 2
    with subprocess.Popen([*command, "living"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as living:
        assert living.stdout.readline() == "writing\n"
        assert len(names(tmp_path)) == 4
        with finished_as(tmp_path / "own") as own:
            own.write_text("whole")
            remove_abandoned(tmp_path)
            assert len(names(tmp_path)) == 3
        living.communicate("go on\n")
    assert names(tmp_path) == ["file", "folder", "own"]
    assert (tmp_path / "folder" / "tokens.bin").read_text() == "half"


def test_what_another_machine_left_goes_when_it_is_old(tmp_path):
    old = time.time() - 3 * 86_400
    process = "0" * 32
    for name in (f"unfinished-there-1-17-{process}-0", f"unfinished-there-1-17-{process}-1", "unfinished-novel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").touch()
        os.utime(tmp_path / name / "tokens.bin", (old, old))
        os.utime(tmp_path / name, (old, old))
    os.utime(tmp_path / f"unfinished-there-1-17-{process}-1" / "tokens.bin")  # it is still written
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["unfinished-novel", f"unfinished-there-1-17-{process}-1"]


def test_an_earlier_process_of_the_same_number_is_gone(tmp_path):
    """In a container every process may be number 1."""
    with finished_as(tmp_path / "file") as unfinished:
        machine_and_pid, process, counter = unfinished.name.rsplit("-", 2)
        (tmp_path / f"{machine_and_pid}-{process[::-1]}-{counter}").touch()
        remove_abandoned(tmp_path)
        assert names(tmp_path) == [unfinished.name]


def test_nothing_to_remove_in_a_folder_that_is_not_there(tmp_path):
    remove_abandoned(tmp_path / "none")


def test_one_at_a_time_makes_a_file(tmp_path):
    """Each of the others finds it when its turn comes, and no lock is left."""
    path, n_made = tmp_path / "file", []

    def make(_):
        with made_once(path):
            if not path.exists():
                n_made.append(1)
                time.sleep(0.1)
                path.write_text("made")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(make, range(8)))
    assert n_made == [1]
    assert names(tmp_path) == ["file"]


def test_nobody_waits_for_one_that_hangs(tmp_path):
    path = tmp_path / "file"
    with made_once(path), made_once(path, longest_wait=0.1):
        path.write_text("made")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [PermissionError, NotImplementedError])
def test_a_file_is_made_where_there_are_no_locks(error, tmp_path, monkeypatch):
    """An error of the block is not said to have come of that of the lock."""

    def acquire(*arguments, **settings):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ValueError, match="too large") as raised, made_once(tmp_path / "file"):
        raise ValueError("too large")
    assert raised.value.__context__ is None
