"""Batches of tokens in random order, with a bounded buffer, filled ahead, that can start at any position.

An epoch deals the shards out to pools of about `buffer_tokens` tokens, at random; the tokens of a pool are shuffled
together. So a batch mixes as many shards as fit a buffer, and which tokens are in the n-th batch follows from the
seed and n alone: to resume is to count. A thread prepares the next pool while this one is used.

Where several processes train together, each reads and holds a part of a pool, and they exchange the rows of a batch.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.activations.source import ActivationSource, generator_of
from topk_ortho.distributed.parallel import Parallel


class Stopped(Exception):
    """Waiting for a batch was cut short by `Batches.stop`."""


class _Pool(NamedTuple):
    epoch: int
    number: int
    shards: list[int]
    """Numbers of the shards, in ascending order"""
    n_batches: int


class Batches:
    """Iterator over batches [batch_size, d_in], float32, without end; every token at most once an epoch.

    All processes of `parallel` ask for the same batches. Each gets its rows, ``batch_size / parts of the batch``.

    Parameters
    ----------
    source : ActivationSource
        The shards.
    shards : list of int
        Numbers of the shards to draw from.
    batch_size : int
        Tokens in a batch; what is left of a pool at its end is not used in that epoch.
    buffer_tokens : int
        About how many tokens a pool holds. Two pools are in memory.
    seed : int
        Decides the order.
    position : int
        Number of batches to skip at the beginning.
    parallel : Parallel, optional
        The processes; this one alone by default.
    """

    def __init__(
        self,
        source: ActivationSource,
        shards: list[int],
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        position: int = 0,
        parallel: Parallel | None = None,
    ):
        self.parallel = Parallel.alone() if parallel is None else parallel
        self.source = source
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        total = sum(source.shard_sizes[shard] for shard in shards)
        if batch_size > total:
            raise ValueError(f"batch_size must be at most the {total} training tokens, got {batch_size}")
        # with at least two batches in a pool on average, an epoch cannot be empty
        self.n_pools = max(1, min(len(shards), total // max(buffer_tokens, 2 * batch_size)))
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(1, "activations")
        self._last: tuple[list[int], Tensor] | None = None
        self._pool, self._used = self._find(position)
        self._tokens, self._order = Tensor(), Tensor()
        self._next: Future[tuple[Tensor, Tensor]] = self._executor.submit(self._load, self._pool)
        self._is_loaded = False

    def __iter__(self) -> "Batches":
        """This iterator."""
        return self

    def __next__(self) -> Tensor:
        """The next batch; waits for a pool if it is not there yet."""
        if self._is_loaded and self._used == self._pool.n_batches:
            self._pool, self._used, self._is_loaded = self._after(self._pool), 0, False
        if not self._is_loaded:
            self._tokens, self._order = self._wait()
            self._is_loaded = True
            self._next = self._executor.submit(self._load, self._after(self._pool))
        rows = self._order[self._used * self.batch_size : (self._used + 1) * self.batch_size]
        self._used += 1
        self.position += 1
        return self._exchange(rows).float()

    @property
    def pool(self) -> Tensor:
        """The tokens [n, d_in] of this process that are shuffled together for the next batch; waits for them."""
        if not self._is_loaded:
            return self._wait()[0]
        return self._tokens

    def is_stopped_while_waiting(self) -> bool:
        """Wait until the next batch is there, or `stop` is called; whether it was."""
        try:
            if not self._is_loaded or self._used == self._pool.n_batches:
                self._wait()
        except Stopped:
            return True
        return self._stopping.is_set()

    def stop(self) -> None:
        """Make a thread that waits for a batch raise `Stopped`; safe in a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """End the thread."""
        self.stop()
        self._executor.shutdown(cancel_futures=True)

    def _exchange(self, rows: Tensor) -> Tensor:
        """The tokens of this process's part of a batch, whose rows in the pool are given; others may hold them."""
        world, parts = self.parallel.world, rows.tensor_split(self.parallel.batch.size)
        if world.size == 1:
            return self._tokens[rows]
        starts = torch.tensor([world.part(len(self._order), rank).start for rank in range(1, world.size)])
        here = world.part(len(self._order))
        # process f * parts + b works on part b
        sent = [part[(part >= here.start) & (part < here.stop)] - here.start for part in parts]
        sent *= self.parallel.features.size
        holders = torch.searchsorted(starts, parts[self.parallel.batch.rank], right=True)
        n_received: list[int] = holders.bincount(minlength=world.size).tolist()
        received = world.exchange(self._tokens[torch.cat(sent)], [len(part) for part in sent], n_received)
        return torch.empty_like(received).index_copy_(0, holders.argsort(stable=True), received)

    def _wait(self) -> tuple[Tensor, Tensor]:
        while not wait([self._next], timeout=0.1).done:
            if self._stopping.is_set():
                raise Stopped
        return self._next.result()

    def _load(self, pool: _Pool) -> tuple[Tensor, Tensor]:
        """The tokens of a pool that this process holds, and the order in which those of all processes are used."""
        # if an epoch is one pool, the next one has the same tokens in another order
        if self._last is None or self._last[0] != pool.shards:
            self._last = (pool.shards, self._read(pool.shards))
        generator = generator_of("order of tokens", self.seed, pool.epoch, pool.number)
        n_tokens = sum(self.source.shard_sizes[shard] for shard in pool.shards)
        return self._last[1], torch.randperm(n_tokens, generator=generator)

    def _read(self, shards: list[int]) -> Tensor:
        """The part of this process of the tokens of some shards, one shard after another."""
        return read_part(self.source, shards, self.parallel, self._refuse_if_stopping)

    def _refuse_if_stopping(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _pools(self, epoch: int) -> list[_Pool]:
        """The pools of an epoch."""
        order = torch.randperm(len(self.shards), generator=generator_of("order of shards", self.seed, epoch))
        dealt = (sorted(self.shards[i] for i in part) for part in torch.tensor_split(order, self.n_pools))
        sizes = self.source.shard_sizes
        return [_Pool(epoch, n, part, sum(sizes[i] for i in part) // self.batch_size) for n, part in enumerate(dealt)]

    def _after(self, pool: _Pool) -> _Pool:
        later = [p for p in self._pools(pool.epoch)[pool.number + 1 :] if p.n_batches]
        return later[0] if later else next(p for p in self._pools(pool.epoch + 1) if p.n_batches)

    def _find(self, position: int) -> tuple[_Pool, int]:
        """The pool of the batch at a position, and how many of its batches come before."""
        pool = next(p for p in self._pools(0) if p.n_batches)
        while position >= pool.n_batches:
            position -= pool.n_batches
            pool = self._after(pool)
        return pool, position


def read_part(
    source: ActivationSource, shards: list[int], parallel: Parallel, before_shard: Callable[[], None] = lambda: None
) -> Tensor:
    """The part of this process [n, d_in] of the tokens of some shards, one shard after another.

    Shards without a token of this part are not read. `before_shard` is called before one is, and may raise.
    """
    sizes = [source.shard_sizes[shard] for shard in shards]
    here = parallel.world.part(sum(sizes))
    tokens = None
    for shard, start, size in zip(shards, accumulate(sizes, initial=0), sizes, strict=False):
        own = range(max(start, here.start), min(start + size, here.stop))
        if not own:
            continue
        before_shard()
        part = source.shard(shard)
        if tokens is None:  # to collect the parts first would take twice the memory
            tokens = part.new_empty(len(here), part.shape[1])
        tokens[own.start - here.start : own.stop - here.start] = part[own.start - start : own.stop - start]
    # no token of this part, but of the others' dtype
    return source.shard(shards[0])[:0].clone() if tokens is None else tokens
