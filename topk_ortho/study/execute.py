"""Trains the runs of a study and judges them, several at a time, each in a process of its own.

joblib hands the runs out. On this machine a thread waits for each of them; on Dask's and Ray's back ends a worker,
wherever it is. A run is stopped with SIGTERM, upon which it saves a checkpoint; that it gets as well when the process
that waits for it is gone, however that ended. So a study can be killed and started anew at any moment.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partialmethod
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import joblib
from tqdm import tqdm

from topk_ortho.study.plan import PlannedRun
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.interrupt import SignalGuard
from topk_ortho.training.metric_table import headlines
from topk_ortho.training.run_folder import is_finished

LOCAL = "threading"
"""The back end for this machine: threads of joblib, each of which waits for a process."""
LOG = "study.log"
"""Name of the file in a run's folder that gets what the run prints."""


class Outcome(NamedTuple):
    """How a run ended."""

    run: PlannedRun
    error: str | None
    """What went wrong; None if it was finished or stopped"""


def train_runs(
    runs: list[PlannedRun], *, jobs: int, threads: int, backend: str = LOCAL
) -> tuple[dict[str, str], signal.Signals | None]:
    """Train those runs of a study that are not finished, and have SAEBench judge them where the study asks for it.

    Parameters
    ----------
    runs : list of PlannedRun
        The runs. One that was begun before goes on from its last checkpoint.
    jobs : int
        Number of runs at a time; -1 is as many as the back end has processors.
    threads : int
        Threads of torch in each run.
    backend : str, default "threading"
        A back end of joblib. All but the default need the folder of the study on a file system that all workers share.

    Returns
    -------
    failures : dict of str to str
        Error messages of the runs that failed, by their names.
    stopped_by : signal.Signals or None
        The signal that ended the study before all runs were done.

    Raises
    ------
    ValueError
        If the folder of a run holds one of other settings.
    """
    pending = [run for run in runs if not run.is_done]
    stop = threading.Event()
    is_local = backend == LOCAL
    failures = {}
    with (
        SignalGuard(stop.set if is_local else _interrupt) as guard,
        _progress(runs) as progress,
        joblib.parallel_config(backend=backend, n_jobs=jobs),
    ):
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        tasks = [joblib.delayed(_train)(run, threads, stop if is_local else None) for run in pending]
        try:
            for outcome in parallel(tasks):
                if outcome.error:
                    failures[outcome.run.name] = outcome.error
                progress(outcome)
        except KeyboardInterrupt:
            if guard.received is None:
                raise
    return failures, guard.received


def _interrupt() -> None:
    raise KeyboardInterrupt


def _train(run: PlannedRun, threads: int, stop: threading.Event | None) -> Outcome:
    """Train a run in a process of its own, and wait for its end or for the request to stop."""
    if multiprocessing.current_process().daemon:  # a worker of Dask, which is a process of its own and may start none
        return Outcome(run, _train_quietly(run, threads))
    if stop and stop.is_set():
        return Outcome(run, None)
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(["topk_ortho.training.trainer"])  # importing it takes seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(run, threads, sender))
    process.start()
    sender.close()
    while not wait([process.sentinel], timeout=0.2):
        if stop and stop.is_set():
            process.terminate()
            process.join()
    process.join()
    try:
        error = receiver.recv()
    except EOFError:
        error = f"the process ended with exit code {process.exitcode}"
    is_stopped = stop is not None and stop.is_set()
    return Outcome(run, None if is_stopped else error)


def _child(run: PlannedRun, threads: int, sender: "Connection[str | None, None]") -> None:
    """The process of a run, which ends when the one that waits for it ends."""
    for name in ("SIGINT", "SIGHUP"):  # of the terminal; the process that waits passes them on as SIGTERM
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(_train_quietly(run, threads))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train_quietly(planned: PlannedRun, threads: int) -> str | None:
    """Train and judge a run, with what it prints in a file of its folder; returns what went wrong, if anything."""
    import torch

    from topk_ortho.device import resolve_device
    from topk_ortho.training.build import open_source
    from topk_ortho.training.run_folder import open_run
    from topk_ortho.training.trainer import Trainer

    config = planned.config
    torch.set_num_threads(threads)
    # no bars in the log, those of libraries neither: every bar is made by this, and the process trains runs alone
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment, method-assign]
    config.out_dir.mkdir(parents=True, exist_ok=True)
    with (config.out_dir / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if not is_finished(config):
                with open_run(config, resume=True) as run:
                    Trainer(config, open_source(config, resolve_device(config.device)), run).fit()
            return planned.benchmark.judge(config) if planned.benchmark else None
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"


@contextmanager
def _progress(runs: list[PlannedRun]) -> Iterator[Callable[[Outcome], None]]:
    """Show how far the runs are, by the steps that all of them have done; yields what to call when one has ended."""
    steps = {run.name: _step_of(run.config) for run in runs}
    n_ended = sum(run.is_done for run in runs)
    running = [run for run in runs if not run.is_done]
    bar = tqdm(
        total=sum(run.config.steps for run in runs),
        initial=sum(steps.values()),
        smoothing=0,  # the time that is left follows from the mean speed so far
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    )
    is_over = threading.Event()
    lock = threading.Lock()  # tqdm's own is never given back once the terminal cannot be written to

    def update() -> None:
        with lock:
            steps.update({run.name: _step_of(run.config) for run in running})
            bar.n = sum(steps.values())
            bar.set_description_str(f"{n_ended} of {len(runs)} runs", refresh=False)
            bar.refresh(nolock=True)

    def watch() -> None:
        while not is_over.wait(1.0):
            update()

    def ended(outcome: Outcome) -> None:
        nonlocal n_ended
        run = outcome.run
        with lock:
            running.remove(run)
            n_ended += 1
            if outcome.error:
                bar.write(f"{run.name} failed: {outcome.error}", file=sys.stderr, nolock=True)
                bar.total = (bar.total or 0) - run.config.steps + steps[run.name]
            elif run.is_done:
                summary = json.loads((run.config.out_dir / "summary.json").read_text())
                numbers = ", ".join(f"{line.metric.title} {line.value}" for line in headlines(summary))
                bar.write(f"{run.name}: {numbers}", file=sys.stderr, nolock=True)
                steps[run.name] = run.config.steps

    with bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield ended
        finally:
            is_over.set()
            watcher.join()
            update()


def _step_of(config: TrainConfig) -> int:
    """The step that the last line of a run's metrics tells of; 0 if there is none."""
    try:
        lines = (config.out_dir / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):  # not begun, or in the middle of a line
        return 0
