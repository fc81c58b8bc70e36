"""The most similar other column of every column, on many ranks."""

import torch
from torch import Tensor

from topk_ortho.backends.norms import inverse_norms
from topk_ortho.backends.tile_stream import LowerTriangle
from topk_ortho.definitions import Precision
from topk_ortho.distributed.shards import Dealt


def nearest(x: Dealt, chunk_bounds: list[int], precision: Precision) -> tuple[Tensor, Tensor]:
    """(cosines, partners) [N] by place: the largest cosine to another column of the chunk, the first among equals."""
    found, inverse = _Nearest(x.norms), inverse_norms(x.norms)
    lower_triangle = LowerTriangle(x.norms, x.tile_shape())
    for row, col, cosines in x.tiles(precision, chunk_bounds):
        cosines.mul_(inverse[col : col + cosines.shape[1]]).clamp_(-1, 1)
        if row == col:
            lower_triangle.fill(cosines, -torch.inf)
        found.look(cosines, dim=0, first=col, first_partner=row)
        found.look(cosines, dim=1, first=row, first_partner=col)
    ranks = x.shards.ranks
    best = ranks.max(found.best.clone())
    partners = torch.where(found.best == best, found.partners, x.shards.n_features)
    return best, ranks.min(partners)


class _Nearest:
    """The largest cosines so far, and the first partners that have them."""

    def __init__(self, norms: Tensor):
        self.best = torch.full_like(norms, -torch.inf)
        self.partners = torch.full_like(norms, len(norms), dtype=torch.int64)

    def look(self, cosines: Tensor, *, dim: int, first: int, first_partner: int) -> None:
        """Compare with the maxima over a dimension of a tile; the other one's columns begin at `first`."""
        span = slice(first, first + cosines.shape[1 - dim])
        best, partners = self.best[span], self.partners[span]
        highest = cosines.amax(dim=dim)
        rising = (highest >= best).nonzero().squeeze(1)
        found = cosines.index_select(1 - dim, rising).argmax(dim=dim) + first_partner
        is_better = (highest[rising] > best[rising]) | (found < partners[rising])
        best[rising] = highest[rising]
        partners[rising] = torch.where(is_better, found, partners[rising])
