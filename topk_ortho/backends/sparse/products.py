"""The cosines of all pairs of features that meet, slab by slab.

    cosine[i, j] = sum_m x_hat[m, i] * x_hat[m, j],    i < j, over the samples m that hold both

The cost is the number of products, sum_m n_m (n_m - 1) / 2 for samples of n_m entries, whatever the number of features
is. Applied to a transposed matrix, the same code finds the samples that share features.

Products are made in slabs of consecutive first features i, so that every pair is summed within one slab: expand, sort
by pair, sum runs of equal pairs. On a GPU the three steps that are not a sort are kernels of `topk_ortho.kernels`; here
are their twins in plain torch. Sums are float64 and have a fixed order: equal calls give equal bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho.backends.device import IMPORT_ERROR, device_guard
from topk_ortho.backends.sparse.coordinates import Coordinates

if IMPORT_ERROR is None:
    from topk_ortho.kernels.coactivation import (
        coactivation_long_sums,
        coactivation_products,
        coactivation_spread,
        coactivation_sums,
    )

_MOST_PROGRAMS = 2**31 - 1  # of a launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Slabs:
    """How the products are cut into slabs; None is the best known for the device of x."""

    most_products: int | None = None
    """Most products of a slab, but for a slab of one feature, which has as many as that feature takes.

    CPU: what a slab holds, about 60 bytes a product, is sorted in the cache; from 2**18 to 2**20 the time is the same,
    at 2**23 twice that. GPU: large enough to hide the launches; not yet measured."""
    on_kernels: bool | None = None
    """Whether slabs are made by Triton's kernels, or in plain torch."""

    def of(self, x_hat: Coordinates, share: tuple[int, int] = (0, 1)) -> Iterator["Slab"]:
        """Slabs that cover all pairs of an x_hat whose entries are in order, first features ascending.

        With a share (i, n) they cover the i-th of n parts of about as many products.
        """
        is_cuda = x_hat.values.device.type == "cuda"
        on_kernels = is_cuda if self.on_kernels is None else self.on_kernels
        if on_kernels and x_hat.values.numel() > _MOST_PROGRAMS:
            raise ValueError(
                f"a sparse x must have at most {_MOST_PROGRAMS:,} non-zeros on a GPU, where each has a program of its "
                f"own; got {x_hat.values.numel():,}"
            )
        most = self.most_products or (2**24 if is_cuda else 2**19)
        entries = x_hat.features.argsort(stable=True)
        totals = torch.nn.functional.pad(x_hat.n_partners()[entries].cumsum(0), (1, 0))
        features = x_hat.features[entries]
        is_last = torch.ones_like(features, dtype=torch.bool)
        torch.ne(features[1:], features[:-1], out=is_last[:-1])
        stops = is_last.nonzero().squeeze(1) + 1  # a slab may end after the last entry of a feature
        totals_at_stops = totals[stops]
        first = n_done = stop = 0
        end = stops.numel()
        number, n_shares = share
        if n_shares > 1 and end:
            bounds = totals[-1] * torch.arange(1, n_shares, device=totals.device) // n_shares
            ends = [0, *torch.searchsorted(totals_at_stops, bounds, right=True).tolist(), end]
            stop, end = ends[number], ends[number + 1]
            first = int(stops[stop - 1]) if stop else 0
            n_done = int(totals[first])
        while stop < end:
            following = int(torch.searchsorted(totals_at_stops, n_done + most, right=True))
            following = min(max(following, stop + 1), end)
            last = int(stops[following - 1])
            starts = totals[first : last + 1] - n_done
            n_products = int(starts[-1])
            if n_products:
                span = (int(features[first]), int(features[last - 1]))
                yield Slab(x_hat, entries[first:last], starts, n_products, *span, on_kernels)
            first, n_done, stop = last, n_done + n_products, following


class Slab(NamedTuple):
    """All pairs whose first feature is in a range, before their cosines are computed."""

    x_hat: Coordinates
    entries: Tensor
    """int64 [e] places in `x_hat` of the entries of these features, in the order of (feature, sample)"""
    starts: Tensor
    """int64 [e + 1] first product of each entry; a product pairs an entry with one that follows it in its sample"""
    n_products: int
    first_feature: int
    last_feature: int
    on_kernels: bool

    def cosines(self) -> "SlabCosines":
        """Compute the cosines of the pairs."""
        keys, products = self._products()
        keys, order = keys.sort(stable=True)
        is_first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=is_first[1:])
        firsts, runs = is_first.nonzero().squeeze(1), is_first.cumsum(0).sub_(1)
        pairs = keys.index_select(0, firsts).long().add_(self.first_feature * self.x_hat.n_features)
        products = products.index_select(0, order)
        if self.on_kernels:
            at_first = torch.empty_like(products)
            with device_guard(keys.device):
                leading = coactivation_sums(keys, products, at_first)
                coactivation_long_sums(keys, products, leading, at_first)
            return SlabCosines(pairs, at_first.index_select(0, firsts), order, runs)
        sums = torch.zeros(pairs.numel(), dtype=torch.float64, device=keys.device)
        sums.index_add_(0, runs, products.double())
        return SlabCosines(pairs, sums.to(products.dtype), order, runs)

    def add_pair_gradient(self, pairs: Tensor, weights: Tensor, out: Tensor) -> None:
        """Add to out [n], float64, the gradient of the weighted cosines of given pairs in the entries of x_hat.

        Pairs [p] are first * n_features + second, ascending, with first features of this slab. Entries of a pair's
        first feature see `weights[0]` [p] times those of its second, which see `weights[1]` times those of the first.
        """
        partners = None
        if self.on_kernels:
            keys, _ = self._products()
        else:
            partners = self._partners()
            keys = self._keys(*partners)
        wanted = (pairs - self.first_feature * self.x_hat.n_features).to(keys.dtype)
        places = torch.searchsorted(wanted, keys).clamp_max_(wanted.numel() - 1)
        products = (wanted.index_select(0, places) == keys).nonzero().squeeze(1)
        self.add_gradient(products, weights.index_select(1, places.index_select(0, products)), out, partners)

    def add_gradient(
        self, products: Tensor, weights: Tensor, out: Tensor, partners: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Add to out [n], float64, the gradient of a weighted sum of some products in the entries of x_hat.

        The first entry of a product sees `weights[0]` [q] times the second entry, which sees `weights[1]` times the
        first. `partners` are those of the slab, if they are at hand.
        """
        values = self.x_hat.values
        if self.on_kernels:
            of_all = values.new_zeros(2, self.n_products)
            of_all[:, products] = weights.to(values.dtype)
            first_product = torch.full_like(self.x_hat.samples, -1)
            first_product[self.entries] = self.starts[:-1]
            with device_guard(values.device):
                coactivation_spread(first_product, *of_all, *self._partner_bounds(), values, out)
            return
        places, seconds = partners or self._partners()
        first = self.entries.index_select(0, places.index_select(0, products))
        second = seconds.index_select(0, products)
        for of_products, target, source in zip(weights, (first, second), (second, first), strict=True):
            out.index_add_(0, target, of_products.double() * values.index_select(0, source))

    def _partner_bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Three places [n] for each entry of `x_hat`.

        The entries before it in its sample that belong to the slab begin at the first place and stop before the second;
        its sample stops before the third.
        """
        samples, features, _, _, n_features = self.x_hat
        first_keys, keys = samples * n_features, samples * n_features + features
        begins, ends = (
            torch.searchsorted(keys, first_keys + feature) for feature in (self.first_feature, self.last_feature + 1)
        )
        places = torch.arange(samples.numel(), device=samples.device)
        return begins, torch.minimum(ends, places), torch.searchsorted(samples, samples, right=True)

    def _partners(self) -> tuple[Tensor, Tensor]:
        """For each product, where its first entry is in `entries` and its second in `x_hat`, int64 [n_products]."""
        places = torch.repeat_interleave(self.starts.diff(), output_size=self.n_products)
        offsets = self.entries + 1 - self.starts[:-1]
        return places, torch.arange(self.n_products, device=places.device).add_(offsets.index_select(0, places))

    def _products(self) -> tuple[Tensor, Tensor]:
        """((first - first_feature) * n_features + second, product) [n_products]."""
        _, features, values, _, n_features = self.x_hat
        if self.on_kernels:
            keys = features.new_empty(self.n_products, dtype=self._key_dtype)
            products = values.new_empty(self.n_products)
            with device_guard(keys.device):
                coactivation_products(
                    self.entries, self.starts, features, values, self.first_feature, n_features, keys, products
                )
            return keys, products
        places, partners = self._partners()
        products = values[self.entries].index_select(0, places).mul_(values.index_select(0, partners))
        return self._keys(places, partners), products

    def _keys(self, places: Tensor, partners: Tensor) -> Tensor:
        """The pair of each product as (first - first_feature) * n_features + second, in plain torch."""
        features, n_features = self.x_hat.features, self.x_hat.n_features
        keys = ((features[self.entries] - self.first_feature) * n_features).to(self._key_dtype)
        keys = keys.index_select(0, places)  # a third of the time of indexing
        keys += features.index_select(0, partners)
        return keys

    @property
    def _key_dtype(self) -> torch.dtype:
        """Keys of 32 bits, where they fit, take half the time to sort."""
        fits = (self.last_feature + 1 - self.first_feature) * self.x_hat.n_features < 2**31
        return torch.int32 if fits else torch.int64


class SlabCosines(NamedTuple):
    """The cosines of a slab's pairs, and how products became pairs."""

    pairs: Tensor
    """int64 [p] first * n_features + second, ascending"""
    cosines: Tensor
    """[p] in the dtype of x_hat"""
    order: Tensor
    """int64 [n_products] the products in the order of pairs"""
    runs: Tensor
    """int64 [n_products] the pair of each product in that order"""

    def not_zero(self) -> tuple[Tensor, Tensor]:
        """The pairs whose cosine is not 0, for products may cancel; and these cosines, brought into [-1, 1]."""
        cosines = self.cosines.clamp(-1, 1)
        is_not_zero = cosines != 0
        return (self.pairs, cosines) if is_not_zero.all() else (self.pairs[is_not_zero], cosines[is_not_zero])
