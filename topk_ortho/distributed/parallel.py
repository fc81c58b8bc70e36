"""How a dictionary and its batches are spread over processes, and what the processes add up.

Each process holds a part of the dictionary, the rows of W_enc and W_dec of some features, and works on a part of the
rows of a batch. Every part of the dictionary meets every part of the batch on one process. One process alone has all
of both, and then nothing is exchanged.

A term of a loss is the same number on every rank: sums of what the ranks hold go into it. Its backward pass gives every
rank the gradient of that number in what it holds itself.
"""

import datetime
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from topk_ortho.distributed.gradient import sum_over_ranks, take_to_ranks
from topk_ortho.distributed.ranks import Ranks
from topk_ortho.distributed.selection import first_of_all


class Parallel:
    """The part of this process in the work of all.

    Attributes
    ----------
    world : Ranks
        All processes. Process ``f * n_batch_parts + b`` holds part f of the dictionary and works on part b of a batch.
    features : Ranks
        Those that work on the same rows of a batch, and together hold all features.
    batch : Ranks
        Those that hold the same part of the dictionary, and together work on the whole batch.
    mesh : DeviceMesh or None
        The grid, with the dimensions "features" and "batch"; None for one process alone.
    """

    def __init__(self, world: Ranks, features: Ranks, batch: Ranks, mesh: DeviceMesh | None = None):
        self.world = world
        self.features = features
        self.batch = batch
        self.mesh = mesh

    @classmethod
    def alone(cls) -> "Parallel":
        """One process that does all of the work."""
        return cls(Ranks.alone(), Ranks.alone(), Ranks.alone())

    @classmethod
    def of_all(cls, n_batch_parts: int, patience: datetime.timedelta | None = None) -> "Parallel":
        """All processes of torch.distributed, which is initialised, in a grid, and how long they wait for each other.

        Raises
        ------
        ValueError
            If the number of processes is not a multiple of `n_batch_parts`.
        """
        world = Ranks()
        if world.size % n_batch_parts:
            raise ValueError(
                f"data_parallel must divide the number of processes, which is {world.size}, got {n_batch_parts}"
            )
        grid = torch.arange(world.size).view(-1, n_batch_parts)
        groups = []
        for lines in (grid.T, grid):  # every process makes the groups of all
            made = [dist.new_group(line, timeout=patience) for line in lines.tolist()]
            groups += [group for group, line in zip(made, lines.tolist(), strict=True) if world.rank in line]
        # on the CPU, where checkpoints are written from and read to
        mesh = DeviceMesh.from_group(groups, "cpu", grid, mesh_dim_names=("features", "batch"))
        features, batch = (
            Ranks(group) if size > 1 else Ranks.alone() for group, size in zip(groups, grid.shape, strict=True)
        )
        return cls(world, features, batch, mesh)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parallel":
        """This object itself, as processes cannot be copied; a copy of an SAE is held by those that hold the SAE."""
        return self

    def rows_here(self, n_features: int) -> slice:
        """Which of so many features this process holds: as many on every rank, but for the last ones."""
        size = -(-n_features // self.features.size)
        return slice(*(min(n_features, size * n) for n in (self.features.rank, self.features.rank + 1)))

    def sum_features(self, term: Tensor) -> Tensor:
        """The sum of a term over the parts of the dictionary, differentiable."""
        return sum_over_ranks(term, self.features)

    def sum_batch(self, term: Tensor) -> Tensor:
        """The sum of a term over the parts of the batch, differentiable."""
        return sum_over_ranks(term, self.batch)

    def take_to_features(self, tensor: Tensor) -> Tensor:
        """A tensor that all parts of the dictionary use, each in its own way; its gradient is the sum of theirs."""
        return take_to_ranks(tensor, self.features)

    def gather_features(self, own: Tensor, n_features: int) -> Tensor:
        """What belongs to all features, [n_features, ...], from what belongs to those of each rank."""
        return self.features.gather(own, self.rows_here(n_features).start, n_features)

    def as_part_of(self, own: Tensor, n_features: int) -> Tensor:
        """What belongs to the features here as a part of what belongs to all, which torch knows how to save and load.

        It is a DTensor if several processes hold parts. `own` is on the CPU, and shares its memory.
        """
        if self.features.size == 1:
            return own
        shape = torch.Size([n_features, *own.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        assert self.mesh is not None
        whole: Tensor = DTensor.from_local(
            own, self.mesh, [Shard(0), Replicate()], run_check=False, shape=shape, stride=stride
        )
        return whole

    def n_rows(self, x: Tensor) -> int:
        """Rows of the whole batch, of which x has a part; parts are equal."""
        return x.shape[0] * self.batch.size

    def largest_in_rows(self, values: Tensor, count: int) -> Tensor:
        """The `count` largest values [n, features here] of every row over all features, none of which is NaN.

        Returns the positions of those that are here, ``row * features here + feature``, int64, ascending.
        """
        n_rows, n_here = values.shape
        largest = values.topk(min(count, n_here), dim=1, sorted=False)
        chosen = largest.indices
        if self.features.size > 1:
            width, rank = count, self.features.rank
            candidates = values.new_full((width, n_rows), -math.inf)
            candidates[: chosen.shape[1]] = largest.values.T
            candidates = self.features.gather(candidates, width * rank, width * self.features.size)
            among_all = candidates.topk(count, dim=0, sorted=False).indices - width * rank
            is_here = (among_all >= 0) & (among_all < chosen.shape[1])
            rows = torch.arange(n_rows, device=values.device).expand_as(among_all)[is_here]
            return (rows * n_here + chosen[rows, among_all[is_here]]).sort().values
        features = chosen.sort(dim=1).values
        return (torch.arange(n_rows, device=values.device)[:, None] * n_here + features).flatten()

    def largest_of_batch(self, values: Tensor, positions: Tensor, count: int) -> Tensor:
        """Those of some positions that hold the `count` largest of the whole batch, ascending.

        `values` [n, features here] are those of this process, and `positions` [p] some places among them, ascending:
        ``row * features here + feature``. Among equal values the first of the first process comes first.
        """
        if self.count_of_all(positions) <= count:
            return positions
        at_positions = values.flatten()[positions]
        if self.world.size == 1:
            return positions[at_positions.topk(count, sorted=False).indices].sort().values
        most = int(self.world.max(torch.tensor(values.numel(), device=values.device)))
        return positions[first_of_all(at_positions.float(), self.world.rank * most + positions, count, self.world)]

    def count_of_all(self, entries: Tensor) -> int:
        """How many entries all ranks have."""
        n_here = entries.numel()
        return n_here if self.world.size == 1 else int(self.world.sum(torch.tensor(n_here, device=entries.device)))

    def deal(self, numbers: Tensor) -> Tensor:
        """Send numbers [n], int64, that the processes have found to where each belongs; returns those of this process.

        A number belongs to the process of its remainder by the number of processes. Those returned ascend.
        """
        owners = numbers % self.world.size
        counts = owners.bincount(minlength=self.world.size)
        n_sent: list[int] = counts.tolist()
        in_order = numbers[owners.argsort(stable=True)]
        return self.world.exchange(in_order, n_sent, self.world.counts_for_me(counts)).sort().values

    def dealt_here(self, numbers: Tensor) -> Tensor:
        """Those of some numbers that belong to this process, see `deal`."""
        return numbers[numbers % self.world.size == self.world.rank]

    def shared_parts(self, kept: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
        """The rows that the processes keep, [n_kept, width] each, a few at a time as float32 on a device.

        The ranks of all features get the same rows, those that they keep; the parts of the batch get different ones.
        """
        for source, n_rows in enumerate(self.features.gather_objects(len(kept))):
            for start in range(0, n_rows, size):
                is_own = source == self.features.rank
                rows = kept.new_empty(min(size, n_rows - start), kept.shape[1])
                part = (kept[start : start + size] if is_own else rows).to(device)
                yield self.features.broadcast(part.contiguous(), source).float()
