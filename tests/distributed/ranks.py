"""Processes that stand ready for the tests of ops over a process group."""

import datetime
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from topk_ortho.backends import tile_stream
from topk_ortho.backends.sparse.products import Slabs
from topk_ortho.backends.tile_stream import TileStream
from topk_ortho.distributed import gradient, sparse, topk

MEMBERS = {1: [2], 2: [1, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}
"""The processes of the group of each size, whose ranks are not their numbers among all"""


class Pool:
    """Runs a function of a module on some ranks of a gloo group, each in a process of its own."""

    def __init__(self, pipes: list[Any]):
        self._pipes = pipes

    def run(self, n_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(group, *arguments)`` returns on each rank; if it raises on any, an AssertionError."""
        pipes = [self._pipes[member] for member in MEMBERS[n_ranks]]
        for pipe in pipes:
            pipe.send((n_ranks, function, arguments))
        answers = [pipe.recv() for pipe in pipes]
        errors = [f"rank {rank} of {n_ranks}:\n{error}" for rank, (error, _) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]


@contextmanager
def pool() -> Iterator[Pool]:
    """Four processes, which end with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(len(MEMBERS)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        yield Pool(pipes)
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(10)
            process.kill()


def _serve(rank: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    _cut_small()
    torch.use_deterministic_algorithms(True)  # as in tests/conftest.py: reading memory before writing shows
    torch.utils.deterministic.fill_uninitialized_memory = True
    address, patience = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(MEMBERS), timeout=patience)
    groups = {size: dist.new_group(members, timeout=patience) for size, members in MEMBERS.items()}
    while (task := pipe.recv()) is not None:
        n_ranks, function, arguments = task
        try:
            pipe.send((None, function(groups[n_ranks], *arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()


def _cut_small() -> None:
    """Cut the work of small matrices into many pieces, ragged at both ends."""
    tile_stream._CPU_TILE = tile_stream.TileShape(7, 11)
    gradient._SLAB_BYTES, gradient._LEAST_SLAB = 64, 3
    sparse._SLABS = Slabs(most_products=50)
    topk.TileStream = lambda query, *arguments: TileStream(query, *arguments, capacity=query.k)
