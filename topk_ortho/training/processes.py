"""Several processes that train one dictionary: how they find each other, what they can train, and whom they have lost.

They are started by torchrun, whose environment variables tell each of them about the others.
"""

import datetime
import hashlib
import os
import threading
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
from topk_ortho.sae.saved import check_size, read_saelens
from topk_ortho.training.build import open_source
from topk_ortho.training.config import TrainConfig, flatten
from topk_ortho.training.interrupt import Interrupted, SignalGuard

_BEAT = 1.0
"""Seconds between two signs of life"""
_SILENCE = 6.0
"""Seconds without one after which a process is taken for lost, where an exchange has failed"""

_FAREWELL = 5.0
"""Seconds that rank 0 waits for others that fail with it"""


class LostRanks(RuntimeError):
    """Training cannot go on because of other processes, which the message names."""


def n_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def open_processes(config: TrainConfig) -> Iterator[Parallel]:
    """Join the processes that torchrun has started, and leave them after the block; yields how the work is shared.

    On a machine with GPUs each process gets one of its own, which becomes torch's current device.

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
    heartbeat = _Heartbeat()
    try:
        parallel = Parallel.of_all(config.data_parallel, patience)
        parallel.world.agree(lambda: (flatten(config.as_json()), {}))
        refuse_what_cannot_be_trained_together(config, parallel)
        yield parallel
    except BaseException as error:
        with SignalGuard(lambda: None):  # torchrun tells those that are left to stop
            if isinstance(error, Disconnected):
                raise LostRanks(_why_lost(error)) from error
            with suppress(RuntimeError):  # the process that kept the store is gone
                _store().set(f"rank {dist.get_rank()}", "failed")
            if not isinstance(error, Interrupted):
                is_first_to_say = _is_first_to_say(str(error))
                _let_others_ask()
                if not is_first_to_say:
                    raise FailedOnFirst from error
        raise
    finally:
        heartbeat.end()
        with suppress(RuntimeError):
            dist.destroy_process_group()


def open_source_together(config: TrainConfig, parallel: Parallel) -> ActivationSource:
    """The source of activations, opened by the first process first, which makes what its cache lacks.

    Before that takes its time, it looks at the weights that the run begins with.
    """
    opened: list[ActivationSource] = []
    device = resolve_device(config.device)

    def open_on_first() -> None:
        if config.init_from is not None:
            check_size(read_saelens(config.init_from), config.sae.n_features)
        opened.append(open_source(config, device))

    parallel.world.on_first(open_on_first)
    return opened[0] if opened else open_source(config, device)


def refuse_what_cannot_be_trained_together(config: TrainConfig, parallel: Parallel) -> None:
    """Raise a ValueError, on all processes in the same words, if so many cannot train a configuration."""
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
    require(penalty.op != "c2r", "penalty.op", penalty.op, f"topk_pairs or max_cosine {several}")
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
    """Whether this process is to print a message, as the first of those that want to.

    Several processes often fail in the same words. The others stay silent.
    """
    try:
        return bool(_store().add(f"said {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)
    except RuntimeError:  # the process that kept the store is gone
        return True


def _let_others_ask() -> None:
    """Keep rank 0, with which the store may end, until the others have asked theirs, or for a moment if they do not."""
    deadline = time.monotonic() + _FAREWELL
    with suppress(RuntimeError):  # the process that kept the store is gone
        n_asked = _store().add("asked", 1)
        while dist.get_rank() == 0 and n_asked < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(_FAREWELL / 100)
            n_asked = _store().add("asked", 0)


class _Heartbeat:
    """Counts in the store that all processes share, so that others see that this one lives."""

    def __init__(self) -> None:
        self._store, self._key = _store(), f"beat {dist.get_rank()}"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop counting."""
        self._is_over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT):
            with suppress(RuntimeError):  # the process that kept the store is gone
                self._store.add(self._key, 1)


def _why_lost(error: Disconnected) -> str:
    """Which processes are the reason why the others cannot go on; takes some heartbeats."""
    store, others = _store(), [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    try:
        store.set(f"rank {dist.get_rank()}", "left")  # as the others will, from when they notice
        first_beats = {rank: store.add(f"beat {rank}", 0) for rank in others}
        silent, deadline = set(others), time.monotonic() + _SILENCE
        while silent and time.monotonic() < deadline:
            time.sleep(_BEAT / 4)
            silent -= {rank for rank in silent if store.add(f"beat {rank}", 0) > first_beats[rank]}
            silent -= {rank for rank in silent if store.check([f"rank {rank}"])}
        states = {rank: store.get(f"rank {rank}") for rank in others if store.check([f"rank {rank}"])}
    except RuntimeError:
        return "the process at which all of them meet (that of torchrun, or rank 0) does not answer any more"
    failed = [rank for rank, state in states.items() if state == b"failed"]
    reasons = [f"{_named(failed)} failed"] if failed else []
    if silent:
        reasons.append(f"{_named(sorted(silent))} does not answer: it was killed, hangs or cannot be reached")
    return " and ".join(reasons) or f"the ranks could not exchange data: {error}"


def _named(ranks: list[int]) -> str:
    return "rank " + ", ".join(map(str, ranks))


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
