"""Benchmarks of sparse features: python -m bench.sparse [--device cpu] [--repeats 5] [--out PATH].

Three sweeps: the number of features N at fixed rows and active features; the active features L0 at fixed N; and the
density of a dense x, where the sparse and the dense route take equal time somewhere. Every case has a process of its
own, which measures the peak memory of one call and then the time of several. Writes PATH.json, and PATH.png and the
README's table through `bench.sparse_report`; on a GPU, where scipy is left out, without the table. Takes about ten
minutes on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.memory import peak_extra_bytes_of
from bench.providers import FRACTION
from bench.run import environment
from bench.sparse_report import write_report
from topk_ortho import SparseFeatures, topk_ortho_loss, topk_pairs
from topk_ortho.definitions import k_from_fraction

_ROOT = Path(__file__).resolve().parent.parent
_N, _L0, _ROWS = 65536, 64, 4096
_FIXED_K = k_from_fraction(16384, FRACTION)
_DENSE_ROWS = 1024
_EXPONENT, _OFFSET = 0.8, 10
Case = dict[str, Any]
"""sweep, provider, mode, rows, L0, N"""


def cases() -> Iterator[Case]:
    """Every case, in the order of the sweeps. "dense" is the route of "tiled", or of "triton" on a GPU."""
    listings = [(provider, mode) for provider in ("sparse", "scipy") for mode in ("pairs", "pairs_fixed_k")]
    providers = [("sparse", "forward"), ("sparse", "forward_backward"), *listings]
    for n in (16384, 65536, 262144, 1048576):
        for provider, mode in providers:
            yield {"sweep": "N", "provider": provider, "mode": mode, "rows": _ROWS, "L0": _L0, "N": n}
    for mode in ("forward", "forward_backward"):
        yield {"sweep": "N", "provider": "dense", "mode": mode, "rows": _ROWS, "L0": _L0, "N": 16384}
    for l0 in (16, 32, 64, 128):
        for provider, mode in (("sparse", "forward"), ("sparse", "forward_backward"), ("scipy", "pairs")):
            yield {"sweep": "L0", "provider": provider, "mode": mode, "rows": _ROWS, "L0": l0, "N": _N}
    for n in (4096, 16384):
        yield {"sweep": "density", "provider": "dense", "mode": "forward", "rows": _DENSE_ROWS, "L0": n // 64, "N": n}
        for share in (512, 256, 128, 64, 32):
            for mode in ("forward", "auto"):
                yield {"sweep": "density", "provider": "dense_to_sparse", "mode": mode, "rows": _DENSE_ROWS,
                       "L0": n // share, "N": n}  # fmt: skip


def active_features(n_rows: int, l0: int, n_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(indices, values) [n_rows, l0]: distinct features, some far more frequent than others, and gamma(2) values."""
    generator = np.random.default_rng(seed)
    cumulative = np.cumsum((np.arange(n_features) + _OFFSET) ** -_EXPONENT)
    feature_of_rank = generator.permutation(n_features)
    indices = np.empty((n_rows, l0), dtype=np.int64)
    for row in indices:
        drawn = np.empty(0, dtype=np.int64)
        while drawn.size < l0:
            ranks = np.searchsorted(cumulative, generator.random(3 * l0) * cumulative[-1], side="right")
            drawn = np.concatenate([drawn, ranks])
            drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        row[:] = feature_of_rank[drawn[:l0]]
    return torch.from_numpy(indices), torch.from_numpy(generator.gamma(2, size=(n_rows, l0)).astype(np.float32))


def scipy_pairs(indices: Tensor, values: Tensor, n_features: int, k: int) -> object:
    """The same selection from scipy's sparse product: both triangles, of which one is kept, then a partition."""
    n_rows, l0 = indices.shape
    entries = (values.numpy().ravel(), indices.numpy().ravel(), np.arange(n_rows + 1) * l0)
    x = scipy.sparse.csr_array(entries, shape=(n_rows, n_features), copy=True)  # which scipy then sorts in place
    norms = scipy.sparse.linalg.norm(x, axis=0)
    x.data = x.data / norms[x.indices]
    gram = scipy.sparse.triu(x.T.tocsr() @ x, 1, format="coo")
    k = min(k, gram.nnz)
    best = np.argpartition(gram.data, gram.nnz - k)[gram.nnz - k :]
    best = best[np.argsort(-gram.data[best], kind="stable")]
    return gram.row[best], gram.col[best], gram.data[best]


def make_call(case: Case, device: str) -> Callable[[], object]:
    """A call that runs the case once."""
    provider, mode, n = case["provider"], case["mode"], case["N"]
    indices, values = (tensor.to(device) for tensor in active_features(case["rows"], case["L0"], n))
    k = min(_FIXED_K, n * (n - 1) // 2) if mode == "pairs_fixed_k" else k_from_fraction(n, FRACTION)
    if provider == "scipy":
        return lambda: scipy_pairs(indices, values, n, k)
    leaf, backend = values, "sparse"
    x: Tensor | SparseFeatures = SparseFeatures(indices, values, n)
    if case["sweep"] == "density" or provider == "dense":
        x = leaf = torch.zeros(case["rows"], n, device=device).scatter_(1, indices, values)
        if provider == "dense":
            backend = "tiled" if device == "cpu" else "triton"
        elif mode == "auto":
            backend = "auto"
    if mode in ("pairs", "pairs_fixed_k"):
        return lambda: topk_pairs(x, k=k, backend=backend)
    if mode != "forward_backward":
        return lambda: topk_ortho_loss(x, k=k, backend=backend)
    leaf.requires_grad_()
    return lambda: torch.autograd.grad(topk_ortho_loss(x, k=k, backend=backend), leaf)


def measure(case: Case, device: str, repeats: int) -> dict[str, object]:
    """Peak memory of one call and quartiles of the time of `repeats` more."""
    make_call(case | {"rows": 16, "L0": 8, "N": 512}, device)()  # loads libraries, compiles kernels, starts threads
    call = make_call(case, device)
    with torch.set_grad_enabled(case["mode"] == "forward_backward"):
        peak = peak_extra_bytes_of(call) if device == "cpu" else _peak_on_gpu(call)
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        times = [timer.timeit(1).median for _ in range(repeats)]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if repeats > 1 else times * 3
    return {"peak_extra_bytes": peak, "time_s": median, "time_q1_s": low, "time_q3_s": high}


def _peak_on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: bench/results/sparse, or sparse-gpu")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.device, options.repeats)))
        return
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a CUDA or ROCm device; torch {torch.__version__} sees none")
    out = options.out or _ROOT / "bench/results" / ("sparse-gpu" if on_gpu else "sparse")
    rows = []
    for case in cases():
        if on_gpu and case["provider"] == "scipy":
            continue
        print(*case.values(), end=" ", flush=True)
        command = [sys.executable, "-m", "bench.sparse", "--device", options.device, "--case", json.dumps(case)]
        command += ["--repeats", str(options.repeats)]
        process = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        row = json.loads(process.stdout)
        print(f"{row['time_s']:.3f} s, {row['peak_extra_bytes'] / 1e6:,.0f} MB")
        rows.append(case | row)
    packages = {"numpy": version("numpy"), "scipy": version("scipy"), "triton": version("triton")}
    results = {
        "environment": environment() | packages | {"gpu": torch.cuda.get_device_name() if on_gpu else None},
        "fraction": FRACTION,
        "fixed_k": _FIXED_K,
        "dtype": "float32",
        "data": f"features by a power law, (rank + {_OFFSET}) ** -{_EXPONENT}; values gamma(2)",
        "repeats": options.repeats,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(out, into_readme=not on_gpu)


if __name__ == "__main__":
    main()
