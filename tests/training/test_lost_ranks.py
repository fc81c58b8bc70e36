"""A process of several is lost in a step: the others stop, name it, and leave a checkpoint that goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import train
from tests.together import PROCESSES
from topk_ortho.training import trainer
from topk_ortho.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "--preset", "toy-hierarchy", "--penalty.encoder-inhibition", "0", "--checkpoint-every", "5", "--eval-every", "5",
    "--batch-size", "128", "--synthetic.n-tokens", "8000", "--held-out-tokens", "500", "--buffer-tokens", "2000",
]  # fmt: skip


def _train(rank: int, n_ranks: int, port: int, arguments: list[str], log: Path, rank_1: str) -> None:
    """`train.py` as torchrun starts it. Rank 1 may be different: "short of memory", or "of other settings"."""
    if rank == 1 and rank_1 == "short of memory":
        trainer.Trainer.evaluation = _out_of_memory
    if rank == 1 and rank_1 == "of other settings":
        arguments = [*arguments, "--lr", "0.5"]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.argv = ["train.py", *arguments]
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    train.main()


def _out_of_memory(self: Any) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def latest_step(out_dir: Path) -> int:
    return int(checkpoints(out_dir / "checkpoints")[0].name.removeprefix("step-"))


class Ranks:
    """Processes that train together."""

    def __init__(self, out_dir: Path, n_ranks: int, *more: str, rank_1: str = "like the others"):
        port = free_port()
        self._logs = [out_dir.with_suffix(f".{rank}.log") for rank in range(n_ranks)]
        arguments = [*ARGUMENTS, "--out-dir", str(out_dir), *more]
        self.processes = [
            PROCESSES.Process(target=_train, args=(rank, n_ranks, port, arguments, log, rank_1))
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def end(self, rank: int) -> tuple[int | None, str]:
        """Wait for the end of a process; its exit status, None if it does not end, and what it printed."""
        self.processes[rank].join(60)
        return self.processes[rank].exitcode, self._logs[rank].read_text()


@pytest.fixture
def start() -> Any:
    started: list[Ranks] = []

    def start_(*arguments: Any, **options: Any) -> Ranks:
        started.append(Ranks(*arguments, **options))
        return started[-1]

    yield start_
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.join()


def wait_for_checkpoint(out_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not checkpoints(out_dir / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


LOST = "does not answer: it was killed, hangs or cannot be reached; --resume goes on from the latest checkpoint"
NO_STORE = "the process at which all of them meet (that of torchrun, or rank 0) does not answer any more"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_hangs_is_named_and_the_run_goes_on(number: Any, start: Any, tmp_path: Path):
    out_dir = tmp_path / "run"
    ranks = start(out_dir, 3, "--steps", "100000", "--rank-timeout", "4")
    wait_for_checkpoint(out_dir)
    ranks.send(1, number)
    code, said = ranks.end(0)
    assert code == 1, said
    assert f"train.py: rank 1 {LOST}" in said
    code, said = ranks.end(2)
    assert code == 1, said
    # without torchrun, what they meet at ends with rank 0
    assert f"train.py: rank 1 {LOST}" in said or f"train.py: {NO_STORE}" in said
    ranks.processes[1].kill()
    step = latest_step(out_dir)
    again = start(out_dir, 2, "--resume", "--steps", "100000", "--rank-timeout", "20")
    deadline = time.monotonic() + 60
    while latest_step(out_dir) <= step:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again.send(0, signal.SIGTERM)
    for rank in (0, 1):
        code, said = again.end(rank)
        assert code == 128 + signal.SIGTERM, said
    assert f"going on at step {step}" in again.end(0)[1]


def test_a_rank_that_keeps_the_others_together_is_missed(start: Any, tmp_path: Path):
    out_dir = tmp_path / "run"
    ranks = start(out_dir, 2, "--steps", "100000", "--rank-timeout", "4")
    wait_for_checkpoint(out_dir)
    ranks.send(0, signal.SIGKILL)
    code, said = ranks.end(1)
    assert code == 1, said
    assert f"train.py: {NO_STORE}" in said


def test_a_rank_that_fails_says_why_and_the_others_name_it(start: Any, tmp_path: Path):
    ranks = start(tmp_path / "run", 2, "--rank-timeout", "10", rank_1="short of memory")
    (code, first), (other_code, second) = ranks.end(0), ranks.end(1)
    assert (code, other_code) == (1, 1)
    assert "train.py: rank 1 failed; --resume goes on from the latest checkpoint" in first
    assert "train.py: out of memory: DefaultCPUAllocator" in second


def test_settings_that_differ_are_refused_by_all(start: Any, tmp_path: Path):
    ranks = start(tmp_path / "run", 2, "--rank-timeout", "10", rank_1="of other settings")
    (code, first), (other_code, second) = ranks.end(0), ranks.end(1)
    assert (code, other_code) == (1, 1)
    message = "train.py: lr must be the same on all ranks; rank 0 has 0.003, rank 1 has 0.5"
    assert (first + second).count(message) == 1, first + second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1e30", "--clip-norm", "None"], "training diverged"),
        (["--batch-size", "8000"], "batch_size must be below synthetic.n_tokens"),
        (["--data-parallel", "3"], "data_parallel must divide the number of processes, which is 2, got 3"),
        (["--config", "absent.toml"], "absent.toml"),
    ],
)
def test_what_all_would_say_is_said_once(arguments: list[str], message: str, start: Any, tmp_path: Path):
    ranks = start(tmp_path / "run", 2, "--rank-timeout", "10", *arguments)
    (code, first), (other_code, second) = ranks.end(0), ranks.end(1)
    assert code
    assert other_code
    assert (first + second).count(message) == 1, first + second


def test_torchrun_ends_with_the_name_of_a_rank_that_was_killed(tmp_path: Path):
    """torchrun, as a user starts it, ends too, and the line that names the rank is among what it prints."""
    out_dir = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*torchrun, "train.py", *ARGUMENTS, "--steps", "100000", "--out-dir", str(out_dir)],
            cwd=ROOT, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        wait_for_checkpoint(out_dir)
        for child in children_of(process.pid):
            if "RANK=1" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                os.kill(child, signal.SIGKILL)
        assert process.wait(60) == 1, log.read_text()
    finally:
        process.kill()
    assert f"train.py: rank 1 {LOST}" in log.read_text()
