"""Processes that work together: time of a step and bytes exchanged, against their number.

python -m bench.scaling [--ranks 1 2 4] [--report]

Every process has one thread, so that two of them have twice the cores of one; beyond the cores of the machine they take
turns, and only their bytes say something. What is measured is

- "products": a process's share of the bare matrix products, which shows how much faster the machine itself is with
  several processes;
- "penalty": `topk_ortho_loss` of a decoder and its gradient, dictionary spread by features;
- "step by features": a training step with that penalty, the dictionary spread by features;
- "step by batch": the same step, the batch spread.

Bytes are those that Linux counted at the loopback interface, headers included, during the timed rounds; nothing else
should talk there meanwhile. Beside them stands the volume of the algorithm: shards of the decoder that go round in a
ring, ``(R // 2 + R - 1) N d`` numbers of 4 bytes for a loss and its gradient; for a step by features also the
reconstruction of a batch, and for a step by batch the gradients of all weights instead, each of which takes
``2 (R - 1)`` times its size in an all-reduce. Small sums come on top of it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench.mixtures import Size, make_trainer, mixtures
from bench.results import environment_of
from topk_ortho import distributed, initial_state, topk_ortho_loss
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.training.config import PenaltyConfig

_OUT = Path(__file__).resolve().parent / "results" / "scaling.jsonl"
_TILE = 1_024
_MODES = ("products", "penalty", "step by features", "step by batch")


def main(arguments: list[str] | None = None) -> None:
    """Measure and write a line for each number of processes and mode, or print what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each case, after one that is not")
    parser.add_argument("--size", type=int, nargs=4, default=Size(), metavar=("N", "D", "BATCH", "L0"))
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--report", action="store_true", help="only print the table of the results")
    options = parser.parse_args(arguments)
    if not options.report:
        size = Size(*options.size)
        options.out.unlink(missing_ok=True)
        for n_ranks in options.ranks:
            for mode in _MODES if n_ranks > 1 else _MODES[:-1]:
                line = _measure(mode, n_ranks, size, options.rounds)
                with options.out.open("a") as file:
                    print(json.dumps(line), file=file)
    print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


def ring_bytes(mode: str, n_ranks: int, size: Size) -> int:
    """Bytes that all processes together send in a call, by the algorithm; see the description of the module."""
    if mode == "products":
        return 0
    decoder = size.n_features * size.d_in
    ring = (n_ranks // 2 + n_ranks - 1) * decoder
    reduced = {
        "penalty": 0,
        "step by features": size.batch_size * size.d_in,
        "step by batch": 2 * decoder + size.n_features + size.d_in,
    }[mode]
    return 4 * (ring + 2 * (n_ranks - 1) * reduced)


def table(lines: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown. Times beyond the machine's cores are left out."""
    alone = {line["mode"]: line["time_s"] for line in lines if line["ranks"] == 1}
    alone["step by batch"] = alone["step by features"]
    rows = ["| what | processes | time | against one | MB sent | MB by the algorithm |", "|---|---|---|---|---|---|"]
    for line in lines:
        fits = line["ranks"] <= line["environment"]["cores"]
        took = f"{line['time_s']:.2f} s" if fits else "more processes than cores"
        ratio = f"{alone[line['mode']] / line['time_s']:.2f} x as fast" if fits and line["ranks"] > 1 else ""
        is_silent = line["ranks"] == 1 or line["mode"] == "products"
        sent = "0" if is_silent else f"{line['sent_bytes'] / 1e6:.1f}"
        row = (line["mode"], line["ranks"], took, ratio, sent, f"{line['ring_bytes'] / 1e6:.1f}")
        rows.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(rows)


def _measure(mode: str, n_ranks: int, size: Size, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        arguments = (n_ranks, mode, size, rounds, Path(folder) / "meeting", out)
        spawn(_run, args=arguments, nprocs=n_ranks)
        measured = json.loads(out.read_text())
    environment = environment_of(torch.device("cpu")) | {"threads": 1}
    times = {"time_s": statistics.median(measured["times"]), "times": measured["times"]}
    return {
        "mode": mode, "ranks": n_ranks, **size._asdict(), **times, "sent_bytes": measured["sent_bytes"],
        "ring_bytes": ring_bytes(mode, n_ranks, size), "environment": environment,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _run(rank: int, n_ranks: int, mode: str, size: Size, rounds: int, meeting: Path, out: Path) -> None:
    """One of the processes; the first writes what was measured."""
    torch.set_num_threads(1)
    parallel = Parallel.alone()
    if n_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_ranks)
        parallel = Parallel.of_all(n_ranks if mode == "step by batch" else 1)
    call = {"products": _products, "penalty": _penalty}.get(mode, _step)(parallel, size)
    call()
    times = []
    _meet(parallel)
    sent = _loopback_bytes()
    for _ in range(rounds):
        _meet(parallel)
        started = time.perf_counter()
        call()
        _meet(parallel)
        times.append(time.perf_counter() - started)
    if rank == 0:
        out.write_text(json.dumps({"times": times, "sent_bytes": (_loopback_bytes() - sent) // rounds}))
    _meet(parallel)
    if n_ranks > 1:
        dist.destroy_process_group()
    os._exit(0)  # the thread that reads activations ahead is not waited for


def _products(parallel: Parallel, size: Size) -> Callable[[], None]:
    """The products of half of all pairs of columns, shared out, without anything else."""
    decoder = torch.randn(size.n_features, size.d_in, generator=torch.Generator().manual_seed(0))
    rows, columns = decoder[:_TILE], decoder[:_TILE].T
    n_tiles = round(size.n_features**2 / (2 * len(rows) ** 2 * parallel.world.size))

    def call() -> None:
        for _ in range(n_tiles):
            rows @ columns

    return call


def _penalty(parallel: Parallel, size: Size) -> Callable[[], None]:
    """The loss of a random decoder's most similar pairs, and its gradient; a warm start as in training."""
    decoder = torch.randn(size.n_features, size.d_in, generator=torch.Generator().manual_seed(0))
    own = decoder[parallel.rows_here(size.n_features)].clone().requires_grad_()
    state = initial_state()
    options: dict[str, Any] = {"similarity": "positive", "state": state}

    def call() -> None:
        own.grad = None
        if parallel.world.size == 1:
            topk_ortho_loss(own.T, **options).backward()
        else:
            distributed.topk_ortho_loss(own.T, **options).backward()

    return call


def _step(parallel: Parallel, size: Size) -> Callable[[], None]:
    """A step of a trainer on mixtures of random directions."""
    trainer = make_trainer(mixtures(size, 8), size, PenaltyConfig(), parallel=parallel)
    return lambda: (trainer.train_step(trainer.next_batch()), None)[1]


def _meet(parallel: Parallel) -> None:
    parallel.world.sum(torch.zeros(1))


def _loopback_bytes() -> int:
    """Bytes that were sent over the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("there is no loopback interface whose bytes could be counted")


if __name__ == "__main__":
    main()
