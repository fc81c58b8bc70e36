"""The benchmarks of sparse features, in three sweeps.

- "sparse_n" varies the number of features N, at fixed rows and active features;
- "sparse_l0" varies the active features L0, at fixed N;
- "sparse_density" varies the density of a dense x: at some density the sparse and the dense route take equal time.

The provider "dense" is the route of "tiled", or of "triton" on a GPU; "auto" leaves the choice to the package.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import FIXED_K, FRACTION, Benchmark, Call, Case
from topk_ortho import SparseFeatures, topk_ortho_loss, topk_pairs

_EXPONENT, _OFFSET = 0.8, 10
_LOSS = [("sparse", "forward"), ("sparse", "forward_backward")]


def _n_cases(device_type: str) -> list[Case]:
    columns = [*_LOSS, ("sparse", "pairs"), ("sparse", "pairs_fixed_k")]
    if device_type == "cpu":
        columns += [("scipy", "pairs"), ("scipy", "pairs_fixed_k")]
    dense = [("dense", mode) for _, mode in _LOSS]
    sizes = {16384: columns + dense, 65536: columns, 262144: columns, 1048576: columns}
    return [Case("sparse_n", p, mode, "float32", 4096, n, 64) for n in sizes for p, mode in sizes[n]]


def _l0_cases(device_type: str) -> list[Case]:
    columns = [*_LOSS, ("scipy", "pairs")] if device_type == "cpu" else _LOSS
    return [Case("sparse_l0", p, mode, "float32", 4096, 65536, l0) for l0 in (16, 32, 64, 128) for p, mode in columns]


def _density_cases(device_type: str) -> list[Case]:
    # one feature in so many is active; the dense route takes equally long at every density
    columns = [("dense", 64), *((p, share) for share in (512, 256, 128, 64, 32) for p in ("sparse", "auto"))]
    sizes = (4096, 16384)
    return [Case("sparse_density", p, "forward", "float32", 1024, n, n // share) for n in sizes for p, share in columns]


@functools.lru_cache(maxsize=1)
def active_features(n_rows: int, l0: int, n_features: int) -> tuple[Tensor, Tensor]:
    """(indices, values) [n_rows, l0]: distinct features, some far more frequent than others, and gamma(2) values."""
    generator = np.random.default_rng(0)
    cumulative = np.cumsum((np.arange(n_features) + _OFFSET) ** -_EXPONENT)
    feature_of_rank = generator.permutation(n_features)
    indices = np.empty((n_rows, l0), dtype=np.int64)
    for row in indices:
        distinct: dict[int, None] = {}  # in the order in which they are drawn
        while len(distinct) < l0:
            ranks = np.searchsorted(cumulative, generator.random(3 * l0) * cumulative[-1], side="right")
            distinct |= dict.fromkeys(ranks.tolist())
        row[:] = feature_of_rank[list(distinct)[:l0]]
    return torch.from_numpy(indices), torch.from_numpy(generator.gamma(2, size=(n_rows, l0)).astype(np.float32))


def scipy_pairs(indices: Tensor, values: Tensor, n_features: int, k: int) -> tuple[Tensor, ...]:
    """The rows, columns and cosines of the same selection, from scipy's sparse product and a partition of it.

    scipy computes both triangles, of which one is kept. All values are positive here, so no magnitude is taken.
    """
    import scipy.sparse

    n_rows, l0 = indices.shape
    entries = (values.numpy().ravel(), indices.numpy().ravel(), np.arange(n_rows + 1) * l0)
    x = scipy.sparse.csr_array(entries, shape=(n_rows, n_features), copy=True)  # which scipy then sorts in place
    norms = scipy.sparse.linalg.norm(x, axis=0)
    x.data = x.data / norms[x.indices]
    gram = scipy.sparse.triu(x.T.tocsr() @ x, 1, format="coo")
    k = min(k, gram.nnz)
    best = np.argpartition(gram.data, gram.nnz - k)[gram.nnz - k :]
    best = best[np.argsort(-gram.data[best], kind="stable")]
    return tuple(torch.from_numpy(part[best]) for part in (gram.row, gram.col, gram.data))


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """The features written out [M, N], and the indices of those that are active [M, L0]."""
    assert case.L0 is not None
    indices, values = (tensor.to(device) for tensor in active_features(case.M, case.L0, case.N))
    return torch.zeros(case.M, case.N, device=device).scatter_(1, indices, values), indices


def make_call(case: Case, device: torch.device) -> Call:
    """A call that lists the pairs, or computes the loss, or its gradient for the values."""
    assert case.L0 is not None
    indices, values = (tensor.to(device) for tensor in active_features(case.M, case.L0, case.N))
    if case.provider == "scipy":
        return lambda: scipy_pairs(indices, values, case.N, case.k)
    dense = "tiled" if device.type == "cpu" else "triton"
    backend: Any = dense if case.provider == "dense" else case.provider
    leaf = values.clone()
    x: Tensor | SparseFeatures = SparseFeatures(indices, leaf, case.N)
    if case.benchmark == "sparse_density" or case.provider == "dense":
        x = leaf = inputs(case, device)[0]
    if case.mode.startswith("pairs"):
        return lambda: topk_pairs(x, k=case.k, backend=backend)
    if case.mode == "forward":
        return lambda: topk_ortho_loss(x, k=case.k, backend=backend)
    leaf.requires_grad_()
    return lambda: torch.autograd.grad(topk_ortho_loss(x, k=case.k, backend=backend), leaf)


SPARSE_N, SPARSE_L0, SPARSE_DENSITY = (
    Benchmark(
        cases=cases,
        make_call=make_call,
        small={"M": 64, "N": 300, "L0": 6},
        inputs=inputs,
        setting={
            "fraction": FRACTION,
            "fixed_k": FIXED_K,
            "data": f"features by a power law, (rank + {_OFFSET}) ** -{_EXPONENT}; values gamma(2)",
        },
    )
    for cases in (_n_cases, _l0_cases, _density_cases)
)
