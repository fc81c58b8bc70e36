"""Processes that run a function together, each with its rank in a process group of all of them."""

import datetime
import multiprocessing
import pickle
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from topk_ortho.distributed.parallel import Parallel

PROCESSES = multiprocessing.get_context("forkserver")
# their imports take longer than these runs
PROCESSES.set_forkserver_preload(["train", "tests.together", "topk_ortho.evaluation.cross_entropy"])


def run_together(
    n_ranks: int, n_batch_parts: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """What ``function(parallel, *arguments)`` returns on each rank; an AssertionError if it raises on any.

    The ranks meet at a file in the folder.
    """
    meeting = folder / f"meeting-{uuid.uuid4().hex}"
    pipes, processes = [], []
    for rank in range(n_ranks):
        ours, theirs = PROCESSES.Pipe()
        task = (rank, n_ranks, n_batch_parts, meeting, theirs, function, arguments)
        process = PROCESSES.Process(target=_run, args=task, daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    answers = [pickle.loads(pipe.recv_bytes()) if pipe.poll(120) else ("no answer", None) for pipe in pipes]
    for process in processes:
        process.join(20)
        process.kill()
    errors = [f"rank {rank} of {n_ranks}:\n{error}" for rank, (error, _) in enumerate(answers) if error]
    assert not errors, "\n".join(errors)
    return [result for _, result in answers]


def _run(
    rank: int, n_ranks: int, n_batch_parts: int, meeting: Path, pipe: Any, function: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as in tests/conftest.py: reading memory before writing shows
    torch.utils.deterministic.fill_uninitialized_memory = True
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_ranks, timeout=patience)
    try:
        answer = (None, function(Parallel.of_all(n_batch_parts), *arguments))
    except BaseException:
        answer = (traceback.format_exc(), None)
    # in bytes: the memory of a tensor that is sent as it is goes with the process
    pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
