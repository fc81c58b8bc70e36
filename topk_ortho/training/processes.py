"""Several processes that train one dictionary: how they find each other, what they can train, and whom they have lost.

They are started by torchrun, whose environment variables tell each of them about the others.
"""

import datetime
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from topk_ortho.activations.config import require
from topk_ortho.activations.source import ActivationSource
from topk_ortho.device import resolve_device
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.distributed.ranks import Disconnected, FailedOnFirst
from topk_ortho.training.build import open_source
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.interrupt import Interrupted, SignalGuard

_PATIENCE = 10.0
"""Seconds in which the processes that are left tell each other so"""


class LostRanks(RuntimeError):
    """Training cannot go on because of other processes, which the message names."""


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun has started; true for one alone."""
    return int(os.environ.get("RANK", "0")) == 0


def n_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def open_processes(config: TrainConfig) -> Iterator[Parallel]:
    """The part of this process in the work of all, within the block. On GPUs, one of them becomes the current one.

    Raises
    ------
    ValueError
        If so many processes cannot train this configuration together.
    LostRanks
        If an exchange with the others failed in the block.
    FailedOnFirst
        In place of an error in the block that another process has raised in the same words.
    """
    if n_processes() == 1:
        require(config.data_parallel == 1, "data_parallel", config.data_parallel, "1 unless torchrun starts more")
        yield Parallel.alone()
        return
    is_cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    if is_cuda:
        require(
            ":" not in config.device, "device", config.device, "without a number: each process takes a GPU of its own"
        )
        torch.cuda.set_device(resolve_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    backend, patience = "cpu:gloo,cuda:nccl" if is_cuda else "gloo", datetime.timedelta(seconds=config.rank_timeout)
    dist.init_process_group(backend, timeout=patience)
    try:
        parallel = Parallel.of_all("cuda" if is_cuda else "cpu", config.data_parallel)
        _check(config, parallel)
        yield parallel
    except BaseException as error:
        with SignalGuard(lambda: None):  # torchrun tells those that are left to stop
            if isinstance(error, Disconnected):
                raise LostRanks(_why_lost(error)) from error
            _store().set(f"rank {dist.get_rank()}", "failed")
            if not isinstance(error, Interrupted) and not _is_first_to_say(str(error)):
                raise FailedOnFirst from error
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def open_source_together(config: TrainConfig, parallel: Parallel) -> ActivationSource:
    """The source of activations, opened by the first process first, which makes what its cache lacks."""
    opened: list[ActivationSource] = []
    device = resolve_device(config.device)
    parallel.world.on_first(lambda: opened.append(open_source(config, device)))
    return opened[0] if opened else open_source(config, device)


def _check(config: TrainConfig, parallel: Parallel) -> None:
    """Refuse what several processes cannot train together, all of them in the same words."""
    n_parts, penalty = parallel.features.size, config.penalty
    several = f"with {parallel.world.size} processes"
    divides = config.batch_size % parallel.batch.size == 0
    require(divides, "batch_size", config.batch_size, f"a multiple of data_parallel = {parallel.batch.size}")
    most = config.sae.n_features
    has_features = -(-most // n_parts) * (n_parts - 1) < most
    allowed = f"large enough that each of {n_parts} processes has some of them, as many as the others or fewer"
    require(has_features, "sae.n_features", most, allowed)
    require(not config.compile, "compile", config.compile, f"false {several}")
    require(config.pairs_every == 0, "pairs_every", config.pairs_every, f"0 {several}")
    if penalty.target == "none":
        return
    require(penalty.op != "c2r", "penalty.op", penalty.op, f"another {several}")
    if parallel.batch.size > 1:
        allowed = "decoder or none where data_parallel spreads the batch over which activations are compared"
        require(penalty.target == "decoder", "penalty.target", penalty.target, allowed)
    if n_parts > 1:
        each = f"where each process holds a part of the dictionary; data_parallel = {parallel.world.size} gives it all"
        require(penalty.op != "random_pairs", "penalty.op", penalty.op, f"topk_pairs or max_cosine {each}")
        require(penalty.refresh == "exact", "penalty.refresh", penalty.refresh, f"exact {each}")
        inhibition = penalty.encoder_inhibition
        require(inhibition == 0, "penalty.encoder_inhibition", inhibition, f"0 {each}")


def _is_first_to_say(message: str) -> bool:
    """Whether no other process has said this yet."""
    try:
        return bool(_store().add(f"said {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)
    except RuntimeError:  # the process that kept the store is gone
        return True


def _why_lost(error: Disconnected) -> str:
    """Which processes are the reason why the others cannot go on; waits for a few seconds to hear who is left."""
    everybody, states = range(dist.get_world_size()), dict[int, str]()
    deadline = time.monotonic() + _PATIENCE
    try:
        _store().set(f"rank {dist.get_rank()}", "left")
        while len(states) < len(everybody) and time.monotonic() < deadline:
            for rank in everybody:
                if rank not in states and _store().check([f"rank {rank}"]):
                    states[rank] = _store().get(f"rank {rank}").decode()
            time.sleep(0.1)
    except RuntimeError:
        return "the process at which all of them meet (that of torchrun, or rank 0) does not answer any more"
    failed = [rank for rank, state in states.items() if state == "failed"]
    silent = [rank for rank in everybody if rank not in states]
    reasons = [f"{_named(failed)} failed"] if failed else []
    reasons += [f"{_named(silent)} does not answer: it was killed, hangs or cannot be reached"] if silent else []
    return " and ".join(reasons) or f"the ranks could not exchange data: {error}"


def _named(ranks: list[int]) -> str:
    return "rank " + ", ".join(map(str, ranks))


def _store() -> Any:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(datetime.timedelta(seconds=_PATIENCE))
    return store
