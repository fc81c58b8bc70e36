"""Plain torch, on any device: stream the upper triangle of the gram in tiles, keep what survives, certify.

Extra memory: one tile with its magnitudes, O(k) survivors, and a copy of x if its dtype or layout cannot be multiplied
as it is. Where pairs are screened (`topk_ortho.backends.screen`) there are also the columns divided by their lengths,
once as they are and once in bfloat16. Exactness is the business of `topk_ortho.selection`.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from topk_ortho.backends.base import MaxCosine, WeightedPairs
from topk_ortho.backends.listed_pairs import cosines_of
from topk_ortho.backends.moments import Moments
from topk_ortho.backends.norms import column_norms, directions, in_range, inverse_norms
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.backends.screen import is_faster, pairs_that_may_reach
from topk_ortho.backends.survivors import Survivors
from topk_ortho.backends.tile_stream import LowerTriangle, TileShape, TileStream, multipliable, tile_shape, tiles
from topk_ortho.definitions import EPS, Precision, Query, first_in_order, floor_of, n_pairs, similarity_of
from topk_ortho.selection import Selection, finish
from topk_ortho.warm_start import GUESS, SampleSizes, guess_from_sample, next_state


@dataclass(frozen=True)
class _Found:
    """What passes over the pairs have found, certified."""

    cosines: Tensor
    """[n] in order, those of the first k pairs before any others"""
    index: Tensor
    """int64 [n]"""
    tau: float | Tensor | None
    n_passes: int


@dataclass(frozen=True, kw_only=True)
class TiledBackend:
    """Streams the gram in plain torch."""

    tile: TileShape | None = None
    """Size of a tile; None is the best known for the device."""
    capacity: int | None = None
    """Records that a pass holds, at least k; None is 2 k + 2**14, and 4 k + 2**14 in a screen."""
    screen: bool | None = None
    """Whether all pairs are multiplied in bfloat16 first, see `topk_ortho.backends.screen`; None: if that is faster."""
    sample: SampleSizes = field(default_factory=SampleSizes)
    """Pairs that a first guess is made from."""
    slab_bytes: int = 2**21
    """The gradient gathers from feature-major slabs [N, rows] of about this size, which stay in cache."""
    least_slab_rows: int = 16
    """A slab has at least so many rows, so that a gathered line fills a cache line."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """None: plain torch runs everywhere."""
        return None

    def topk_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """One pass from a guess; a second, from the floor, only if the first cannot be certified."""
        norms = column_norms(x)
        x, scaled_norms, _ = in_range(x, norms)
        x = multipliable(x)
        is_screened = self._is_screened(x, query)
        with matmul_precision(x.device, "highest" if is_screened else query.precision):
            guess = self._guess(x, scaled_norms, query, state)
            if is_screened:
                found = self._screened(x, scaled_norms, query, guess)
            else:
                found = self._passes(x, scaled_norms, query, guess)
        if state is not None:
            state = next_state(state, similarity_of(found.cosines, query.similarity), query.k, found.n_passes)
        return finish(found.cosines, found.index, query, tau=found.tau, norms=norms, state=state)

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> MaxCosine:
        """Running maxima over the tiles, for the columns of a tile and for its rows."""
        norms = column_norms(x)
        x, scaled_norms, _ = in_range(x, norms)
        x = multipliable(x)
        with matmul_precision(x.device, precision):
            if chunks is None:
                return MaxCosine(*self._max_cosine_of_all(x, scaled_norms), norms)
            cosines, partners = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.int64)
            for chunk in chunks:
                members = chunk.sort().values
                chunk_norms = scaled_norms[members]
                cosines[members], local_partners = self._max_cosine_of_all(x.index_select(1, members), chunk_norms)
                partners[members] = members[local_partners]
        return MaxCosine(cosines, partners, norms)

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """Gather in CSR order, one slab of rows of x at a time; the order of every sum is fixed by a stable sort.

        On a CPU what has weight 0 is left out, as the held column of each pair. Elsewhere that would wait for a count.

        With the weights of the pairs in a sparse S [N, N], d x_hat = x_hat @ S. The Jacobian of the normalisation
        removes from column j its own share s_j = sum_p weight_p * cosine_p over its pairs, so that
        d x = (x_hat @ S - x_hat * s) / norm.
        """
        n_features, n_pairs = x.shape[1], cosines.numel()
        targets = torch.cat([pairs.rows, pairs.cols])
        weights = torch.cat([pairs.row_weights, pairs.col_weights])
        if x.device.type == "cpu":
            used = weights.nonzero().squeeze(1)
            targets, order = targets.index_select(0, used).sort(stable=True)
            order = used.index_select(0, order)
        else:
            targets, order = targets.sort(stable=True)
        sources = torch.cat([pairs.cols, pairs.rows]).index_select(0, order)
        weights = weights.index_select(0, order)
        products = weights * cosines.index_select(0, order.remainder_(n_pairs))
        offsets = torch.searchsorted(targets, torch.arange(n_features, device=x.device))
        own = embedding_bag(
            torch.zeros_like(sources), weights.new_ones(1, 1), offsets, mode="sum", per_sample_weights=products
        )
        grad = torch.empty_like(x)
        is_long = norms > EPS
        x, norms, factor = in_range(x, norms)
        inverse = inverse_norms(norms)
        own *= (inverse * is_long).unsqueeze(1)
        weights *= inverse.index_select(0, targets)
        slab_rows = max(self.least_slab_rows, self.slab_bytes // (n_features * weights.element_size()))
        for x_slab, grad_slab in zip(x.split(slab_rows), grad.split(slab_rows), strict=True):
            x_hat = (x_slab.T.to(weights.dtype) * inverse.unsqueeze(1)).contiguous()  # [N, slab]
            gathered = embedding_bag(sources, x_hat, offsets, mode="sum", per_sample_weights=weights)
            grad_slab.copy_(gathered.addcmul_(x_hat, own, value=-1).T)
        return grad if factor is None else grad.mul_(factor)

    def _guess(self, x: Tensor, norms: Tensor, query: Query, state: Tensor | None) -> float:
        """Lower estimate of the k-th similarity: from the last call, else from a sample of columns, else none (-1)."""
        if state is not None and state[GUESS] > -1:
            return state[GUESS].item()
        n_features = x.shape[1]
        n_rows, n_cols = self.sample.shape(n_features)
        if n_rows == 0:
            return -1.0
        sample = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))[: n_rows + n_cols].to(x.device)
        x_hat = x.index_select(1, sample) * inverse_norms(norms)[sample]
        cosines = x_hat[:, :n_rows].T @ x_hat[:, n_rows:]
        return guess_from_sample(similarity_of(cosines, query.similarity), query.k, n_pairs(n_features))

    def _is_screened(self, x: Tensor, query: Query) -> bool:
        """Whether all pairs are multiplied in bfloat16 first; never for an adaptive tau, which needs all cosines."""
        if query.n_std is not None:
            return False
        if self.screen is not None:
            return self.screen
        return is_faster(x.shape[0], x.shape[1], x.device)

    def _screened(self, x: Tensor, norms: Tensor, query: Query, guess: float) -> _Found:
        """One pass in bfloat16 from a guess; if it cannot be certified, one more from what passes in x's dtype find.

        Whatever the guess is, a pair that a screen can find gets the bits that `cosines_of` computes.
        """
        floor = floor_of(query)
        x_hat = directions(x, norms)
        found = self._screen(x_hat, query, max(guess, floor))
        if found is not None and (found.index.numel() >= query.k or guess <= floor):
            return found
        streamed = self._passes(x, norms, query, guess if found is None else floor)
        least = floor
        if streamed.index.numel() >= query.k:
            rounding = 4 * (x.shape[0] + 8) * torch.finfo(x.dtype).eps
            least = similarity_of(streamed.cosines[query.k - 1], query.similarity).item() - rounding
        n_passes = streamed.n_passes if found is None else 2  # a guess that was too low is no second pass
        found = self._screen(x_hat, query, least)
        if found is None:
            return replace(streamed, n_passes=n_passes)
        n_found = found.index.numel()  # hardly more than k; the next guess is made of those that follow
        cosines = torch.cat([found.cosines, streamed.cosines[n_found:]])
        index = torch.cat([found.index, streamed.index[n_found:]])
        return replace(found, cosines=cosines, index=index, n_passes=n_passes)

    def _screen(self, x_hat: Tensor, query: Query, least: float) -> _Found | None:
        """The first pairs of the order among those that are not below `least`; None if a screen does not find them."""
        capacity = 4 * query.k + 2**14 if self.capacity is None else self.capacity
        shape = tile_shape(x_hat.device, x_hat.shape[0], self.tile)
        index = pairs_that_may_reach(least, x_hat, query.similarity, shape, capacity)
        if index is None:
            return None
        cosines = cosines_of(x_hat, index)
        kept = (similarity_of(cosines, query.similarity) >= least).nonzero().squeeze(1)
        first = first_in_order(cosines[kept], index[kept], query.similarity, 2 * query.k)
        return _Found(*first, query.tau, n_passes=1)

    def _passes(self, x: Tensor, norms: Tensor, query: Query, guess: float) -> _Found:
        """One pass in the dtype of x from a guess; a second, from the floor, only if it cannot be certified."""
        floor, tau = floor_of(query), query.tau
        survivors, moments = self._stream(x, norms, query, max(guess, floor))
        n_passes = 1
        if query.n_std is not None:
            tau = moments.adaptive_tau(query.n_std)
            floor = floor_of(query, tau)
        cosines, index = survivors.first_in_order(2 * query.k)
        if index.numel() < query.k and guess > floor:
            survivors, _ = self._stream(x, norms, query._replace(n_std=None), floor)  # tau is known
            cosines, index = survivors.first_in_order(2 * query.k)
            n_passes = 2
        return _Found(cosines, index, tau, n_passes)

    def _stream(self, x: Tensor, norms: Tensor, query: Query, guess: float) -> tuple[Survivors, Moments]:
        """Survivors of one pass, and the moments of |cosine| over all pairs, empty unless tau is adaptive."""
        shape = tile_shape(x.device, x.shape[1], self.tile)
        stream = TileStream(query, guess, x.shape[1], x, shape, self.capacity)
        for row, col, products in tiles(x, norms, shape):
            stream.add(row, col, products, norms[col : col + shape.cols], is_diagonal=row == col)
        return stream.survivors, stream.moments

    def _max_cosine_of_all(self, x: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, partners) [N]. A partner is looked for only where the running maximum rises, which is soon rare."""
        inverse = inverse_norms(norms)
        shape = tile_shape(x.device, x.shape[1], self.tile)
        lower = LowerTriangle(x, shape)
        best = torch.full_like(norms, -torch.inf)
        partners = torch.zeros_like(norms, dtype=torch.int64)
        for row, col, products in tiles(x, norms, shape):
            rows, cols = slice(row, row + products.shape[0]), slice(col, col + products.shape[1])
            cosines = products.mul_(inverse[cols]).clamp_(-1, 1)
            if row == col:
                lower.fill(cosines, -torch.inf)
            # partners ascend for every column: earlier panels came first, then the column side, then the row side
            for span, dim, first_partner in ((cols, 0, row), (rows, 1, col)):
                highest = cosines.amax(dim=dim)
                improved = (highest > best[span]).nonzero().squeeze(1)
                lines = cosines.index_select(1 - dim, improved)
                partners[span][improved] = lines.argmax(dim=dim) + first_partner
                best[span][improved] = highest[improved]
        return best, partners
