"""A process group as the ops use it: sums over ranks, exchanges, and errors that all ranks raise."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

Facts = dict[str, Any]
"""What a rank says of itself, by name"""


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
    """

    def __init__(self, group: Any = None):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "topk_ortho.distributed needs a process group: start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        self._group = dist.group.WORLD if group is None else group
        self.rank: int = dist.get_rank(self._group)
        if self.rank < 0:
            raise ValueError("group must be a process group that this process belongs to")
        self.size: int = dist.get_world_size(self._group)

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
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (said, failure), group=self._group)
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

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self._group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor

    def min(self, tensor: Tensor) -> Tensor:
        """The minimum over ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)
        return tensor

    def gather(self, own: Tensor, start: int, total: int) -> Tensor:
        """A tensor [total, ...] whose first dimension the ranks hold in parts; that of this one begins at `start`."""
        whole = own.new_zeros(total, *own.shape[1:])
        whole[start : start + len(own)] = own
        return self.sum(whole)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """What the first rank has, in place."""
        dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def exchange(self, rows: Tensor, n_sent: list[int], n_received: list[int]) -> Tensor:
        """Send consecutive parts of the first dimension to the ranks in turn, and receive theirs."""
        received = rows.new_empty(sum(n_received), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), n_received, n_sent, group=self._group)
        return received

    def counts_for_me(self, n_sent: Tensor) -> list[int]:
        """How many every rank sends to this one, where this one sends so many [R] to each."""
        counts: list[int] = self.gather(n_sent[None], self.rank, self.size)[:, self.rank].tolist()
        return counts

    def shift(self, own: Tensor, arriving: Tensor) -> Callable[[], None]:
        """Begin to send to the next rank and to receive from the rank before; the function returned waits for both."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [
            dist.P2POp(dist.isend, own, group=self._group, group_peer=after),
            dist.P2POp(dist.irecv, arriving, group=self._group, group_peer=before),
        ]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()

        return wait
