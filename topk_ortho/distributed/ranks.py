"""A process group: sums over ranks, exchanges, and errors that all ranks raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Facts = dict[str, Any]
"""What a rank says of itself, by name"""
Result = TypeVar("Result")


class Disconnected(RuntimeError):
    """An exchange with the other ranks failed: one of them has ended, cannot be reached, or kept the others waiting."""


class FailedOnFirst(RuntimeError):
    """The first rank failed at what it did for all, and raises the error itself."""


@contextmanager
def exchange_with_others() -> Iterator[None]:
    """Raise `Disconnected` where an exchange with other ranks fails, which torch reports in several ways."""
    try:
        yield
    except RuntimeError as error:
        if "allocate" in str(error):  # memory is short here, and the others are there
            raise
        raise Disconnected(str(error).splitlines()[0]) from error


class Ranks:
    """The processes of a group, all of which call the same things in the same order.

    Parameters
    ----------
    group : ProcessGroup, optional
        The processes that hold parts of a matrix; all of them by default.

    Raises
    ------
    RuntimeError
        If torch.distributed is not initialised.
    ValueError
        If this process does not belong to the group.

    Attributes
    ----------
    group : ProcessGroup or None
        The processes; None for one alone.
    rank, size : int
        The number of this process among them, and how many they are.
    """

    def __init__(self, group: Any = None):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "topk_ortho.distributed needs a process group: start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank: int = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("group must be a process group that this process belongs to")
        self.size: int = dist.get_world_size(self.group)

    @classmethod
    def alone(cls) -> "Ranks":
        """One process that needs no others, and no process group."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.size = None, 0, 1
        return ranks

    def part(self, total: int, rank: int | None = None) -> range:
        """Which of the numbers 0 to total - 1 fall to a rank, by default this one, where all share them in order."""
        rank = self.rank if rank is None else rank
        return range(rank * total // self.size, (rank + 1) * total // self.size)

    def agree(self, describe: Callable[[], tuple[Facts, Facts]]) -> list[Facts]:
        """Compare what the ranks say of themselves.

        `describe` returns what must be the same on all ranks, and what may differ. If it raises on one of the ranks, or
        if what should be the same is not, all of them raise: a TypeError or ValueError as it is, anything else as a
        RuntimeError, with the rank named.

        Returns
        -------
        list of dict
            What may differ, of every rank.
        """
        said, failure, cause = None, None, None
        try:
            said = describe()
        except Exception as error:
            kind = next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), RuntimeError)
            failure, cause = (kind, str(error)), error
        answers = self.gather_objects((said, failure))
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                kind, message = failed
                raise kind(f"rank {rank}: {message}") from cause
        first, _ = answers[0][0]
        for rank, ((shared, _), _) in enumerate(answers):
            for name, value in shared.items():
                if value != first.get(name) and repr(value) != repr(first.get(name)):
                    raise ValueError(
                        f"{name} must be the same on all ranks; rank 0 has {first.get(name)}, rank {rank} has {value}"
                    )
        return [own for (_, own), _ in answers]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """What a function returns on the first rank, which alone calls it.

        If it raises there, the first rank raises its error, and the others `FailedOnFirst`.
        """
        answer: list[Any] = [None, False]
        if self.rank == 0:
            try:
                answer[0] = function()
            except BaseException:
                self._broadcast_objects([None, True])
                raise
        self._broadcast_objects(answer)
        result: Result
        result, has_failed = answer
        if has_failed:
            raise FailedOnFirst
        return result

    def gather_objects(self, own: Any) -> list[Any]:
        """What every rank has; anything that can be pickled."""
        answers: list[Any] = [own] * self.size
        if self.size > 1:
            with exchange_with_others():
                dist.all_gather_object(answers, own, group=self.group)
        return answers

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def min(self, tensor: Tensor) -> Tensor:
        """The minimum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def gather(self, own: Tensor, start: int, total: int) -> Tensor:
        """A tensor [total, ...] whose first dimension the ranks hold in parts; that of this one begins at `start`."""
        if self.size == 1:
            return own
        whole = own.new_zeros(total, *own.shape[1:])
        whole[start : start + len(own)] = own
        return self.sum(whole)

    def gather_on_first(self, own: Tensor) -> Tensor | None:
        """The rows of all ranks, those of the first one first; on the first rank, None on the others."""
        n_rows = self.gather_objects(len(own))
        is_first = self.rank == 0
        whole = self.exchange(own, [len(own)] + [0] * (self.size - 1), n_rows if is_first else [0] * self.size)
        return whole if is_first else None

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """What one rank has, the first by default, in place."""
        if self.size > 1:
            with exchange_with_others():
                dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def exchange(self, rows: Tensor, n_sent: list[int], n_received: list[int]) -> Tensor:
        """Send consecutive parts of the first dimension to the ranks in turn, and receive theirs."""
        if self.size == 1:
            return rows
        received = rows.new_empty(sum(n_received), *rows.shape[1:])
        with exchange_with_others():
            dist.all_to_all_single(received, rows.contiguous(), n_received, n_sent, group=self.group)
        return received

    def counts_for_me(self, n_sent: Tensor) -> list[int]:
        """How many every rank sends to this one, where this one sends so many [R] to each."""
        counts: list[int] = self.gather(n_sent[None], self.rank, self.size)[:, self.rank].tolist()
        return counts

    def shift(self, own: Tensor, arriving: Tensor) -> Callable[[], None]:
        """Begin to send to the next rank and to receive from the rank before; the function returned waits for both."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [
            dist.P2POp(dist.isend, own, group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=before),
        ]
        with exchange_with_others():
            works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            with exchange_with_others():
                for work in works:
                    work.wait()

        return wait

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            with exchange_with_others():
                dist.all_reduce(tensor, operation, group=self.group)
        return tensor

    def _broadcast_objects(self, objects: list[Any]) -> None:
        if self.size > 1:
            with exchange_with_others():
                dist.broadcast_object_list(objects, group=self.group, group_src=0)
