"""Pairs of members that meet in groups, and the sums over groups of the products of their values.

    sum[i, j] = sum_g value[g, i] * value[g, j],    i < j, over the groups g that hold both

Features that are active in the same samples: group = sample, member = feature, and the sums of unit columns are their
cosines. Or, turned round, samples that share features. The cost is the number of products, sum_g n_g (n_g - 1) / 2 for
groups of n_g members, whatever the number of members is.

Products are made in slabs of consecutive first members i, so that every pair is summed within one slab: expand, sort
by pair, sum runs of equal pairs. On a GPU the three steps that are not a sort are kernels of `topk_ortho.kernels`; here
are their twins in plain torch. Sums are float64 and have the order of the groups: equal calls give equal bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends import triton
from topk_ortho.backends.base import current

if triton.IMPORT_ERROR is None:
    from topk_ortho.kernels.coactivation import coactivation_products, coactivation_spread, coactivation_sums

# Products of a slab. CPU: what a slab holds, about 60 bytes a product, is sorted in the cache; from 2**18 to 2**20 the
# time is the same, at 2**23 twice that. GPU: large enough to hide the launches; not yet measured.
_CPU_SLAB, _GPU_SLAB = 2**19, 2**24
_KERNEL_DEVICES = ("cuda",)
"""Types of the devices whose slabs are made by kernels."""


class Grouped(NamedTuple):
    """Entries in the order of (group, member), no member twice in a group."""

    groups: Tensor
    """int64 [n]"""
    members: Tensor
    """int64 [n]"""
    values: Tensor
    """float32 or float64 [n]"""
    n_members: int
    """Members are in [0, n_members)."""

    def n_products(self) -> int:
        """Products that all pairs take."""
        return int(_n_partners(self.groups).sum())


class Slab(NamedTuple):
    """All pairs whose first member is in a range, before they are computed."""

    grouped: Grouped
    entries: Tensor
    """int64 [e] places in `grouped` of the entries of these members, in the order of (member, group)"""
    starts: Tensor
    """int64 [e + 1] first product of each; a product pairs an entry with one that follows it in its group"""
    n_products: int
    first_member: int
    last_member: int

    def sums(self) -> "Sums":
        """Compute it."""
        keys, products = self._products()
        keys, order = keys.sort(stable=True)
        is_first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=is_first[1:])
        firsts, runs = is_first.nonzero().squeeze(1), is_first.cumsum(0).sub_(1)
        pairs = keys.index_select(0, firsts).long().add_(self.first_member * self.grouped.n_members)
        products = products.index_select(0, order)
        if self.has_kernels:
            at_first = torch.empty_like(products)
            with current(keys.device):
                coactivation_sums(keys, products, at_first)
            return Sums(self, pairs, at_first.index_select(0, firsts), order, runs)
        sums = torch.zeros(pairs.numel(), dtype=torch.float64, device=keys.device)
        sums.index_add_(0, runs, products.double())
        return Sums(self, pairs, sums.to(products.dtype), order, runs)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels make it."""
        return self.entries.device.type in _KERNEL_DEVICES

    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each entry: where those of the slab that precede it in its group begin and stop; where the group ends."""
        groups, members, _, n_members = self.grouped
        first_keys, keys = groups * n_members, groups * n_members + members
        begins, ends = (
            torch.searchsorted(keys, first_keys + member) for member in (self.first_member, self.last_member + 1)
        )
        places = torch.arange(groups.numel(), device=groups.device)
        return begins, torch.minimum(ends, places), torch.searchsorted(groups, groups, right=True)

    def _products(self) -> tuple[Tensor, Tensor]:
        """((first - first_member) * n_members + second, product) [n_products]."""
        _, members, values, n_members = self.grouped
        # keys of 32 bits take half the time to sort
        fits = (self.last_member + 1 - self.first_member) * n_members < 2**31
        dtype = torch.int32 if fits else torch.int64
        if self.has_kernels:
            keys, products = members.new_empty(self.n_products, dtype=dtype), values.new_empty(self.n_products)
            with current(keys.device):
                coactivation_products(
                    self.entries, self.starts, members, values, self.first_member, n_members, keys, products
                )
            return keys, products
        places, second = self._partners()
        # index_select: a third of the time of indexing
        keys = ((members[self.entries] - self.first_member) * n_members).to(dtype).index_select(0, places)
        keys += members.index_select(0, second)
        return keys, values[self.entries].index_select(0, places).mul_(values.index_select(0, second))

    def _partners(self) -> tuple[Tensor, Tensor]:
        """For each product, where its first entry is in `entries` and its second in `grouped`, int64 [n_products]."""
        places = torch.repeat_interleave(self.starts.diff(), output_size=self.n_products)
        offsets = self.entries + 1 - self.starts[:-1]
        return places, torch.arange(self.n_products, device=places.device).add_(offsets.index_select(0, places))


class Sums(NamedTuple):
    """Pairs that meet, ascending, with their sums, and how products became pairs."""

    slab: Slab
    pairs: Tensor
    """int64 [p], first * n_members + second"""
    sums: Tensor
    """[p] in the dtype of the values"""
    order: Tensor
    """int64 [n_products] the products in the order of pairs"""
    runs: Tensor
    """int64 [n_products] the pair of each product in that order"""

    def spread(self, first_weights: Tensor, second_weights: Tensor, out: Tensor) -> None:
        """Add to out [n], float64, for each entry the weighted values of those that it meets.

        The first member of a pair sees `first_weights` [p] times the value of the second, and the other way round.
        """
        groups, values = self.slab.grouped.groups, self.slab.grouped.values
        entries, starts = self.slab.entries, self.slab.starts
        if self.slab.has_kernels:
            weights = values.new_empty(2, self.slab.n_products)
            for of_products, of_pairs in zip(weights, (first_weights, second_weights), strict=True):
                of_products[self.order] = of_pairs.to(values.dtype)[self.runs]
            first_product = torch.full_like(groups, -1)
            first_product[entries] = starts[:-1]
            with current(groups.device):
                coactivation_spread(first_product, *weights, *self.slab.bounds(), values, out)
            return
        is_weighted = (first_weights != 0) | (second_weights != 0)
        chosen = is_weighted.index_select(0, self.runs).nonzero().squeeze(1)
        products, runs = self.order.index_select(0, chosen), self.runs.index_select(0, chosen)
        places, partners = self.slab._partners()
        entry = entries.index_select(0, places.index_select(0, products))
        partner = partners.index_select(0, products)
        for of_pairs, target, source in ((first_weights, entry, partner), (second_weights, partner, entry)):
            weights = of_pairs.double().index_select(0, runs)
            out.index_add_(0, target, weights.mul_(values.index_select(0, source)))


def slabs(grouped: Grouped) -> Iterator[Slab]:
    """Slabs that cover all pairs, first members ascending.

    A slab has at most the budget of its device, or, if that is more, what a single first member takes: at most as many
    products as there are entries.
    """
    budget = _GPU_SLAB if grouped.members.device.type in _KERNEL_DEVICES else _CPU_SLAB
    entries = grouped.members.argsort(stable=True)
    totals = _n_partners(grouped.groups)[entries].cumsum(0)
    members = grouped.members[entries]
    is_last = torch.ones_like(members, dtype=torch.bool)
    torch.ne(members[1:], members[:-1], out=is_last[:-1])
    stops = is_last.nonzero().squeeze(1) + 1  # a slab may end after the last entry of a member
    totals = torch.nn.functional.pad(totals, (1, 0))
    totals_at_stops = totals[stops]
    first = n_done = stop = 0
    while stop < stops.numel():
        following = int(torch.searchsorted(totals_at_stops, n_done + budget, right=True))
        following = max(following, stop + 1)
        last = int(stops[following - 1])
        starts = totals[first : last + 1] - n_done
        n_products = int(starts[-1])
        if n_products:
            yield Slab(grouped, entries[first:last], starts, n_products, int(members[first]), int(members[last - 1]))
        first, n_done, stop = last, n_done + n_products, following


def _n_partners(groups: Tensor) -> Tensor:
    """For each entry how many follow it in its group."""
    last = torch.searchsorted(groups, groups, right=True)
    return last.sub_(torch.arange(1, groups.numel() + 1, device=groups.device))
