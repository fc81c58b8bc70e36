"""Checkpoints that are either whole or absent, and are checked when they are read.

A checkpoint is a folder `step-00000200` with `state.safetensors` (all tensors) and `manifest.json` (numbers, the
configuration, and the sha256 of the state). It is written under another name, synced to disk and renamed. So earlier
checkpoints stay as they were if the process is killed at any moment, or if the disk is full.

Where several processes train together, which see the same folder, each writes what it holds to a file of its own,
`shard-00001-....safetensors`, by torch.distributed.checkpoint, which also reads them: any number of processes can go on
from what any number has saved.
"""

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from topk_ortho.distributed.parallel import Parallel
from topk_ortho.distributed.ranks import FailedOnFirst, Ranks, exchange_with_others
from topk_ortho.files import finished_as, remove_abandoned, sha256_of

_FORMAT = 3
_NAME = "step-" + 8 * "[0-9]"
_FILES = ("state.safetensors", "shard-*.safetensors", "manifest.json")
CHECKPOINT_FILES = tuple(f"{prefix}{_NAME}/{file}" for prefix in ("", ".unfinished-") for file in _FILES)
"""Patterns of all files in a folder of checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, which are read when they are asked for.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._sizes())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._sizes())

    def __getitem__(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return self.read([name])[name]

    def read(
        self,
        names: list[str],
        parallel: Parallel | None = None,
        is_of_features: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, Tensor]:
        """Some tensors, on the CPU. All processes ask for the same ones.

        Of those that have a row for every feature each process gets the rows of its own features.
        """
        # these take half a second to import
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        parallel = Parallel.alone() if parallel is None else parallel
        sizes, own, whole = self._sizes(), {}, {}
        for name in names:
            size, dtype = sizes[name]
            if is_of_features(name):
                rows = range(size[0])[parallel.rows_here(size[0])]
                own[name] = torch.empty(len(rows), *size[1:], dtype=dtype)
                whole[name] = parallel.as_part_of(own[name], size[0])
            else:
                own[name] = whole[name] = torch.empty(size, dtype=dtype)
        with warnings.catch_warnings(), exchange_with_others():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(self._folder))
            try:
                load(whole, storage_reader=reader, no_dist=parallel.world.size == 1)
            except _torch_error() as error:
                raise CheckpointError(f"{self._folder} cannot be read: {error}") from error
        return own

    def _sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        stored: dict[str, Any] = HuggingFaceStorageReader(str(self._folder)).read_metadata().state_dict_metadata
        return {name: (tensor.size, tensor.properties.dtype) for name, tensor in stored.items()}


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    step: int
    """Number of optimizer steps done"""
    tensors: Mapping[str, Tensor]
    """All tensors of the run by name; a part of one that several processes hold is a DTensor when it is to be saved"""
    values: dict[str, Any]
    """Everything else that decides the rest of the run, as JSON values"""
    config: dict[str, Any]
    """The configuration of the run, as JSON values"""

    def tensors_of(
        self, part: str, parallel: Parallel | None = None, is_of_features: Callable[[str], bool] = lambda name: False
    ) -> dict[str, Tensor]:
        """The stored tensors of one part of the run, by the names that they have there; see `StoredTensors.read`."""
        assert isinstance(self.tensors, StoredTensors)
        prefix = f"{part}."
        names = [name for name in self.tensors if name.startswith(prefix)]
        found = self.tensors.read(names, parallel, lambda name: is_of_features(name.removeprefix(prefix)))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def save_checkpoint(folder: Path, checkpoint: Checkpoint, ranks: Ranks | None = None) -> Path:
    """Write a checkpoint into a folder of checkpoints; returns its path. An error leaves the folder as it was.

    Several processes that train together all call this, each with its own tensors.
    """
    ranks = Ranks.alone() if ranks is None else ranks
    path = folder / _name(checkpoint.step)
    unfinished = folder / f".unfinished-{path.name}"
    try:
        ranks.on_first(partial(_begin, folder, unfinished))
        _write_tensors(unfinished, checkpoint.tensors, ranks)
        hashes = _hashes(unfinished, ranks)
        ranks.on_first(partial(_finish, unfinished, path, checkpoint, hashes))
    except (OSError, SafetensorError, FailedOnFirst, _torch_error()) as error:
        if ranks.rank == 0:
            _remove(unfinished)
        raise OSError(f"checkpoint {path} could not be written: {error}") from error
    return path


def _torch_error() -> type[BaseException]:
    """What torch.distributed.checkpoint raises on all ranks if one of them cannot write or read."""
    from torch.distributed.checkpoint.api import CheckpointException

    return CheckpointException


def _begin(folder: Path, unfinished: Path) -> None:
    """Make the folder that is written to."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".unfinished-{_NAME}"):  # by a process that was killed
        remove_abandoned(left)
        _remove(left)
    unfinished.mkdir()


def _write_tensors(unfinished: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write the tensors, or those that this process holds."""
    if ranks.size == 1:
        with finished_as(unfinished / "state.safetensors") as file:
            # safetensors refuses tensors that are not contiguous
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with exchange_with_others():
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True))


def _hashes(unfinished: Path, ranks: Ranks) -> dict[str, str]:
    """Sync the files of tensors to disk, and their sha256 by name; the processes share the work."""
    files = sorted(unfinished.glob("*.safetensors"))[ranks.rank :: ranks.size]
    own: dict[str, str] | OSError
    try:
        for file in files:
            _sync(file)
        own = {file.name: sha256_of(file) for file in files}
    except OSError as error:
        own = error
    hashes: dict[str, str] = {}
    for found in ranks.gather_objects(own):
        if isinstance(found, OSError):
            raise found
        hashes |= found
    return hashes


def _finish(unfinished: Path, path: Path, checkpoint: Checkpoint, hashes: dict[str, str]) -> None:
    """Write the manifest, and give the folder its name."""
    manifest = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "sha256": hashes,
        "values": checkpoint.values,
        "config": checkpoint.config,
    }
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for file in (unfinished / "manifest.json", unfinished):
        _sync(file)
    if path.is_dir():  # a resumed run comes to the same step again, with as many processes as before or others
        for file in _files_in(unfinished):  # the manifest last
            file.replace(path / file.name)
        for file in _files_in(path):
            if file.name not in (*hashes, "manifest.json"):
                file.unlink()
        unfinished.rmdir()
    else:
        unfinished.rename(path)
    _sync(path.parent)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, but for its tensors; raises `CheckpointError` if it is torn or not one of ours."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version")
        hashes = manifest["sha256"]
        if isinstance(hashes, str):  # of an older version
            hashes = {"state.safetensors": hashes}
        if unknown := {file.name for file in path.glob("*.safetensors")} - hashes.keys():
            raise CheckpointError(f"{path} is damaged: its manifest does not know {min(unknown)}")
        for name, sha256 in hashes.items():
            if sha256_of(path / name) != sha256:
                raise CheckpointError(f"{path} is damaged: the sha256 of {name} is not the one in its manifest")
        return Checkpoint(manifest["step"], StoredTensors(path), manifest["values"], manifest["config"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error


def checkpoints(folder: Path) -> list[Path]:
    """Paths of the checkpoints in a folder, the latest first."""
    return sorted((path for path in folder.glob(_NAME) if path.is_dir()), reverse=True)


def latest_checkpoint(folder: Path, check: Callable[[Checkpoint], None]) -> tuple[Checkpoint | None, list[str]]:
    """The latest checkpoint of a folder that can be read and passes `check`, and what is wrong with later ones.

    `check` raises `CheckpointError` for a checkpoint of another run. If there are checkpoints and none of them is good,
    this function raises that error too, as a run should not start anew unasked.
    """
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            checkpoint = load_checkpoint(path)
            check(checkpoint)
            return checkpoint, problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    return None, []


def prune_checkpoints(folder: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Remove the checkpoints up to a step, except for the latest few and the best one."""
    ours = [path for path in checkpoints(folder) if path.name <= _name(step)]
    for path in ours[keep_last:]:
        if best_step is None or path.name != _name(best_step):
            _remove(path)


def _name(step: int) -> str:
    return f"step-{step:08}"


def _remove(path: Path) -> None:
    """Remove a checkpoint; what else is in its folder stays, and the folder with it."""
    for file in _files_in(path):
        file.unlink()
    with contextlib.suppress(OSError):  # not empty, or not there
        path.rmdir()


def _files_in(path: Path) -> list[Path]:
    """The files of a checkpoint."""
    return list(itertools.chain.from_iterable(path.glob(pattern) for pattern in _FILES))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
