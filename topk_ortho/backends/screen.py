"""A first look at all pairs in bfloat16, for CPUs that multiply it faster than float32.

What it finds is computed again in the dtype of x_hat, so it changes the time that a selection takes, and not what is
selected. With x_hat the columns divided by their lengths, x_16 these rounded to bfloat16, and r the largest length of
x_hat_i - x_16_i over the columns,

    |x_hat_i . x_hat_j - x_16_i . x_16_j| <= 2 r + r**2

Beside that the M products are summed in float32, in whatever order. The sum is rounded to the nearest number in
bfloat16, which keeps the order: it does not fall below the largest such number under what is looked for.
"""

import torch
from torch import Tensor

from topk_ortho.backends.tile_stream import LowerTriangle, Scan, TileShape, tiles
from topk_ortho.definitions import Similarity

_LEAST_FEATURES = 1024
"""With fewer features a screen saves nothing, measured for M = 384 (2 cores, AVX-512)"""
_MOST_ROWS = 4096
"""With more rows a screen finds too many pairs: cosines lie closer together, and sums are off by more."""
_SLAB_ELEMENTS = 2**18
"""Elements of x_hat that are rounded at a time, so that they stay in a core's cache"""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 faster than float32 there, as oneDNN does on CPUs with instructions for it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch do not tell
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def is_faster(n_rows: int, n_features: int, device: torch.device) -> bool:
    """Whether `topk_pairs` of an x [n_rows, n_features] on this device is expected to take less time with a screen."""
    return n_features >= _LEAST_FEATURES and n_rows <= _MOST_ROWS and multiplies_bfloat16(device)


def pairs_that_may_reach(
    least: float, x_hat: Tensor, similarity: Similarity, shape: TileShape, capacity: int
) -> Tensor | None:
    """Index of every pair whose similarity, computed from x_hat, is `least` or more, and of some others.

    Parameters
    ----------
    least : float
        The similarity.
    x_hat : Tensor, shape [N, M], float32 or float64
        The columns divided by their lengths, as rows.
    similarity : {"abs", "positive"}
        What is compared.
    shape : TileShape
        Products that are held at a time.
    capacity : int
        Pairs that are held.

    Returns
    -------
    Tensor, shape [p], int64, or None
        ``row * N + col`` of each pair, ascending. None if there are more than `capacity` of them, or if `least` is so
        small that every pair would be one.
    """
    n_features, n_rows = x_hat.shape
    rounded, distance = _rounded(x_hat)
    # two roundings a product there, one where the pair is computed again; 8 for those of `least` and of norms
    sums = (n_rows + 8) * 3 * 2**-24
    bits = _bits_below(least - distance * (2 + distance) - sums)
    if bits <= 0:
        return None
    shape = TileShape(*(size + Scan.GROUP - 1 & -Scan.GROUP for size in shape))
    like = rounded.new_empty(0, dtype=torch.int16)
    scan, lower = Scan(like, shape), LowerTriangle(like, shape)
    bound = like.new_full((shape.cols,), bits - 1)
    found, n_found = [], 0
    for row, col, products in tiles(rounded.T, rounded.new_ones(len(rounded)), shape):
        scores = products.view(torch.int16)  # positive numbers in bfloat16 are in the order of their bits
        if similarity == "abs":
            scores &= 0x7FFF
        if row == col:
            lower.fill(scores, 0)
        scan.hold(scores)
        local_row, local_col = scan.above(bound[: scores.shape[1]])
        found.append((local_row + row) * n_features + (local_col + col))
        n_found += local_row.numel()
        if n_found > capacity:
            return None
    return torch.cat(found).sort().values


def _rounded(x_hat: Tensor) -> tuple[Tensor, float]:
    """x_hat in bfloat16, with rows of zeros up to a multiple of the scan's groups, and how far a row is off at most."""
    n_features, n_rows = x_hat.shape
    n_padded = n_features + Scan.GROUP - 1 & -Scan.GROUP
    rounded = torch.zeros(n_padded, n_rows, dtype=torch.bfloat16, device=x_hat.device)
    furthest = 0.0
    size = max(1, _SLAB_ELEMENTS // n_rows)
    for rows, out in zip(x_hat.split(size), rounded[:n_features].split(size), strict=True):
        out.copy_(rows)
        furthest = max(furthest, torch.linalg.vector_norm(rows - out, dim=1).max().item())
    return rounded, furthest * (1 + 2**-10)  # rows are longer than 1 by some roundings, and distances are rounded


def _bits_below(number: float) -> int:
    """Bits of the largest bfloat16 that is below a number or hardly above it, 0 if that is not positive."""
    return int(torch.tensor(max(0.0, number), dtype=torch.float32, device="cpu").view(torch.int32)) >> 16
