"""The reference: materialises the gram, sorts every pair. Short enough to be obviously right; O(N**2) memory.

    x_hat[:, j] = x[:, j] / max(||x[:, j]||, eps),    gram = x_hat.T @ x_hat

Products are always "highest": `precision` names the least that is asked for.
"""

import torch
from torch import Tensor

from topk_ortho.backends.base import EPS, Precision, Query, RowMax, Selection, accumulation_dtype
from topk_ortho.backends.norms import column_norms, inverse_norms
from topk_ortho.backends.precision import matmul_precision
from topk_ortho.selection import next_state, similarity_of


def unavailable_reason(device: torch.device) -> str | None:
    """None: plain torch runs everywhere."""
    return None


def select_pairs(x: Tensor, query: Query, state: Tensor | None) -> Selection:
    """Sort all N(N-1)/2 cosines and keep the first k that pass tau."""
    n_features = x.shape[1]
    norms = column_norms(x)
    rows, cols = torch.triu_indices(n_features, n_features, 1, device=x.device)  # in (row, col) order
    values = _gram(_normalize(x, norms))[rows, cols]
    magnitude = values.abs()

    tau = query.tau
    if query.n_std is not None:
        tau = (magnitude.double().mean() + query.n_std * magnitude.double().std(correction=0)).item()
    passes = torch.ones_like(values, dtype=torch.bool) if tau is None else magnitude > tau
    if query.similarity == "positive":
        passes &= values > 0

    similarity = similarity_of(values, query.similarity)
    order = similarity.argsort(descending=True, stable=True)
    order = order[passes[order]]
    selected = order[: query.k]
    n_selected = selected.numel()
    padding = (0, query.k - n_selected)
    floor = max(0.0, tau or 0.0)
    threshold = similarity[selected[-1]].clone() if n_selected == query.k else values.new_tensor(floor)
    return Selection(
        values=torch.nn.functional.pad(values[selected], padding),
        rows=torch.nn.functional.pad(rows[selected], padding),
        cols=torch.nn.functional.pad(cols[selected], padding),
        n_selected=torch.tensor(n_selected, device=x.device),
        threshold=threshold,
        tau=values.new_tensor(-1.0 if tau is None else tau),
        norms=norms,
        state=norms.new_empty(0) if state is None else next_state(state, similarity[order], query.k, n_passes=1),
    )


def row_max(x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Precision) -> RowMax:
    """Mask the diagonal of each chunk's gram and take row maxima."""
    norms = column_norms(x)
    x_hat = _normalize(x, norms)
    values, partners = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.int64)
    for chunk in chunks or (torch.arange(x.shape[1], device=x.device),):
        members = chunk.sort().values
        gram = _gram(x_hat[:, members]).fill_diagonal_(-torch.inf)
        values[members], argmax = gram.max(dim=1)
        partners[members] = members[argmax]
    return RowMax(values, partners, norms)


def pair_gradient(
    x: Tensor, norms: Tensor, rows: Tensor, cols: Tensor, values: Tensor, grad_rows: Tensor, grad_cols: Tensor
) -> Tensor:
    """d x_hat = x_hat @ S with a dense [N, N] S, then the Jacobian of the normalisation."""
    n_features = x.shape[1]
    x_hat = _normalize(x, norms)
    weights = x_hat.new_zeros(n_features, n_features)
    weights.index_put_((cols, rows), grad_rows, accumulate=True)
    weights.index_put_((rows, cols), grad_cols, accumulate=True)
    with matmul_precision(x.device, "highest"):
        grad_x_hat = x_hat @ weights
    inner = (grad_x_hat * x_hat).sum(dim=0) * (norms > EPS)
    return torch.empty_like(x).copy_((grad_x_hat - x_hat * inner) * inverse_norms(norms))


def _normalize(x: Tensor, norms: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x)) * inverse_norms(norms)


def _gram(x_hat: Tensor) -> Tensor:
    with matmul_precision(x_hat.device, "highest"):
        return (x_hat.T @ x_hat).clamp_(-1, 1)
