"""Ways to compute the same loss, as a user would write each, and the bare products that all of them need.

    loss = mean of cosine**2 over the k most similar pairs of columns of x [M, N]

Each works in the dtype of x, on its device: at float32 all select in float32. At bfloat16 the gram of `naive` and
`chunked` is bfloat16, which halves their memory and leaves them 8 bits to select by; `topk_ortho` selects in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.cases import FRACTION
from topk_ortho import initial_state, topk_ortho_loss
from topk_ortho.definitions import k_from_fraction

Loss = Callable[[Tensor], Tensor]
_CHUNK = 1024  # columns in a block; 512 and 2,048 take the same time within 2%
_HALF_GEMM_TILE = {
    "cpu": (768, 1536),  # as fast as any tried from (512, 1024) to (2048, 2048)
    "cuda": (2048, 16384),  # 1,024 blocks of 128 x 256 in a product; the diagonal wastes 3% at N = 65,536
}


def loss_of(provider: str, device: torch.device) -> Loss:
    """The function of x that a provider of the dense benchmark runs; "cublas" and "half_gemm" return products."""
    if provider == "naive_compiled":
        torch.compiler.reset()  # after the eighth shape torch would give up and run the function as it is
        return torch.compile(naive, dynamic=False, fullgraph=True)
    state, too_high = initial_state(device), torch.tensor([0.999, 0.15, 1.0], device=device)
    losses: dict[str, Loss] = {
        "topk_ortho": lambda x: topk_ortho_loss(x, FRACTION),
        "topk_ortho_warm": lambda x: topk_ortho_loss(x, FRACTION, state=state),
        "topk_ortho_failed": lambda x: topk_ortho_loss(x, FRACTION, state=state.copy_(too_high)),
        "tiled": lambda x: topk_ortho_loss(x, FRACTION, backend="tiled"),
        "chunked": chunked,
        "naive": naive,
        "naive_autograd": naive_autograd,
        "half_gemm": half_gemm,
        "cublas": lambda x: x.T @ x,
    }
    return losses[provider]


def naive(x: Tensor) -> Tensor:
    """The whole gram in one buffer and one torch.topk; the gradient goes through the selected columns only."""
    n_features = x.shape[1]
    x_hat = normalize(x, dim=0)
    with torch.no_grad():
        magnitude = (x_hat.T @ x_hat).abs_().triu_(1)
        best, index = magnitude.flatten().topk(k_from_fraction(n_features, FRACTION), sorted=False)
        del magnitude
    return best.float().square().mean() if not x.requires_grad else _loss_of_pairs(x_hat, index)


def naive_autograd(x: Tensor) -> Tensor:
    """The same, with the gradient through the whole gram, as autograd makes it of matmul and torch.topk."""
    x_hat = normalize(x, dim=0)
    gram = x_hat.T @ x_hat
    with torch.no_grad():
        index = gram.abs().triu_(1).flatten().topk(k_from_fraction(x.shape[1], FRACTION), sorted=False).indices
    return gram.flatten()[index].float().square().mean()


def chunked(x: Tensor) -> Tensor:
    """Row blocks of the upper triangle, the k best so far merged with those of each block."""
    n_features = x.shape[1]
    k = k_from_fraction(n_features, FRACTION)
    x_hat = normalize(x, dim=0)
    with torch.no_grad():
        best = x.new_empty(0)
        index = x.new_empty(0, dtype=torch.int64)
        for row in range(0, n_features, _CHUNK):
            magnitude = (x_hat[:, row : row + _CHUNK].T @ x_hat[:, row:]).abs_().triu_(1)
            block = magnitude.flatten().topk(min(k, magnitude.numel()), sorted=False)
            n_cols = magnitude.shape[1]
            block_index = (block.indices // n_cols + row) * n_features + block.indices % n_cols + row
            best, kept = torch.cat([best, block.values]).topk(min(k, best.numel() + block.values.numel()), sorted=False)
            index = torch.cat([index, block_index])[kept]
    return best.float().square().mean() if not x.requires_grad else _loss_of_pairs(x_hat, index)


def half_gemm(x: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
    """The products alone, every tile of the upper triangle overwritten by the next: a floor, up to noise."""
    n_features = x.shape[1]
    tile_rows, tile_cols = tile or _HALF_GEMM_TILE[x.device.type]
    buffer = x.new_empty(tile_rows * tile_cols)
    for row in range(0, n_features, tile_rows):
        panel = x[:, row : row + tile_rows].T
        for col in range(row, n_features, tile_cols):
            columns = x[:, col : col + tile_cols]
            size = (panel.shape[0], columns.shape[1])
            torch.mm(panel, columns, out=buffer[: size[0] * size[1]].view(size))
    return buffer[0]


def _loss_of_pairs(x_hat: Tensor, index: Tensor) -> Tensor:
    """Differentiable loss of the pairs row * N + col, their columns gathered."""
    n_features = x_hat.shape[1]
    by_column = x_hat.T.contiguous()
    products = by_column[index // n_features] * by_column[index % n_features]
    return products.sum(dim=1, dtype=torch.float32).square().mean()
