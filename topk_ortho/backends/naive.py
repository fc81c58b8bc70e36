"""The reference: materialises the gram, sorts every pair. Short enough to be obviously right; O(N**2) memory.

    x_hat[:, j] = x[:, j] / max(||x[:, j]||, eps),    gram = x_hat.T @ x_hat

Products are always "highest": `precision` names the least that is asked for.
"""

import torch
from torch import Tensor

from topk_ortho.backends.base import MaxCosine, WeightedPairs
from topk_ortho.backends.norms import column_norms, in_range, inverse_norms
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.definitions import EPS, Precision, Query, accumulation_dtype, floor_of, similarity_of
from topk_ortho.selection import Selection, finish
from topk_ortho.warm_start import next_state


class NaiveBackend:
    """Materialises the gram, on any device of torch."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """None: plain torch runs everywhere."""
        return None

    def topk_pairs(self, x: Tensor, query: Query, state: Tensor | None) -> Selection:
        """Sort all N(N-1)/2 cosines and keep the first k that pass tau."""
        n_features = x.shape[1]
        norms = column_norms(x)
        rows, cols = torch.triu_indices(n_features, n_features, 1, device=x.device)  # in (row, col) order
        cosines = _gram(_normalize(x, norms))[rows, cols]
        tau = query.tau
        if query.n_std is not None:
            magnitude = cosines.abs().double()
            tau = (magnitude.mean() + query.n_std * magnitude.std(correction=0)).item()

        similarity = similarity_of(cosines, query.similarity)
        order = similarity.argsort(descending=True, stable=True)
        if state is not None:
            passing = similarity[order][: (similarity > floor_of(query, tau)).sum()]
            state = next_state(state, passing, query.k, n_passes=1)
        first = order[: query.k]
        return finish(cosines[first], rows[first] * n_features + cols[first], query, tau=tau, norms=norms, state=state)

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> MaxCosine:
        """Mask the diagonal of each chunk's gram and take the largest entry of each row, and so of each column."""
        norms = column_norms(x)
        x_hat = _normalize(x, norms)
        cosines, partners = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.int64)
        for chunk in chunks or (torch.arange(x.shape[1], device=x.device),):
            members = chunk.sort().values
            gram = _gram(x_hat[:, members]).fill_diagonal_(-torch.inf)
            cosines[members], argmax = gram.max(dim=1)
            partners[members] = members[argmax]
        return MaxCosine(cosines, partners, norms)

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: WeightedPairs) -> Tensor:
        """d x_hat = x_hat @ S with a dense [N, N] S, then the Jacobian of the normalisation."""
        n_features = x.shape[1]
        scaled = in_range(x, norms)
        x_hat = _normalize(x, norms)
        weights = x_hat.new_zeros(n_features, n_features)
        weights.index_put_((pairs.cols, pairs.rows), pairs.row_weights, accumulate=True)
        weights.index_put_((pairs.rows, pairs.cols), pairs.col_weights, accumulate=True)
        with matmul_precision(x.device, "highest"):
            grad_x_hat = x_hat @ weights
        inner = (grad_x_hat * x_hat).sum(dim=0) * (norms > EPS)
        grad = (grad_x_hat - x_hat * inner) * inverse_norms(scaled.norms)
        return torch.empty_like(x).copy_(grad if scaled.factor is None else grad * scaled.factor)


def _normalize(x: Tensor, norms: Tensor) -> Tensor:
    x, norms, _ = in_range(x, norms)
    return x.to(accumulation_dtype(x)) * inverse_norms(norms)


def _gram(x_hat: Tensor) -> Tensor:
    with matmul_precision(x_hat.device, "highest"):
        return (x_hat.T @ x_hat).clamp_(-1, 1)
