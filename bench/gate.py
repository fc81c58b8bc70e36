"""Are the results right? No speed is measured until every provider that will be timed has been checked.

Each runs once at the small size of its benchmark, and its loss, gradient or list of pairs is compared with that of the
backend "naive", which forms the whole matrix, on x in float64 on the same device. This finds a provider that is broken
here, by its code or by this machine's compiler or driver. That selections are exact, also on difficult inputs, is the
business of the tests, which `pytest -m gpu` runs on a GPU.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from bench.cases import Benchmark, Case
from topk_ortho import topk_ortho_loss, topk_pairs

_TOLERANCE = {  # relative error of a loss or of cosines, and of a gradient in its norm
    "float32": {"forward": 1e-5, "pairs": 1e-5, "pairs_fixed_k": 1e-5, "forward_backward": 1e-4},
    # the peers select by 8 bits, so that near the k-th |cosine| they take other pairs
    "bfloat16": {"forward": 2e-2, "forward_backward": 0.3},
}


def faults_of(benchmarks: Iterable[Benchmark], device: torch.device) -> list[str]:
    """All that is wrong with what these benchmarks time on a device; prints the checks as they go."""
    faults = []
    for benchmark in benchmarks:
        for case in benchmark.small_cases(device.type) if benchmark.inputs else []:
            if case.provider in ("half_gemm", "cublas"):  # products alone, which are no answer
                continue
            try:
                fault = fault_of(benchmark, case, device)
            except Exception as error:  # of a compiler or driver too: all that fails is to be seen at once
                fault = f"{error!r:.300}"
            print(f"check {case}: {'wrong' if fault else 'right'}", flush=True)
            faults += [f"{case}: {fault}"] if fault else []
    return faults


def fault_of(benchmark: Benchmark, case: Case, device: torch.device) -> str:
    """What is wrong with the first result of a case, which has to be small; the empty text if it is right."""
    assert benchmark.inputs is not None
    answer = benchmark.make_call(case, device)()
    x, active = benchmark.inputs(case, device)
    x, k = x.double().requires_grad_(), case.k
    loss = topk_ortho_loss(x, k=k, backend="naive")
    if case.mode == "forward":
        name, value, expected = "loss", answer, loss
    elif case.mode == "forward_backward":
        assert isinstance(answer, tuple)
        name, (value,), (expected,) = "gradient", answer, torch.autograd.grad(loss, x)
        if active is not None and value.shape == active.shape:
            expected = expected.gather(1, active)
    else:
        assert isinstance(answer, tuple)
        rows, cols, listed = answer[:3]
        exact = topk_pairs(x.detach(), k=k, backend="naive").values
        exact = exact[exact != 0]  # a sparse route does not list pairs of cosine 0
        if len(rows) != len(exact):
            return f"{len(rows)} pairs selected, expected {len(exact)}"
        if not (rows < cols).all() or torch.stack([rows, cols]).unique(dim=1).shape[1] < len(rows):
            return "not all pairs have row < col, or one is listed twice"
        # pairs are told apart by their cosines, so that neighbours may change places
        x_hat = torch.nn.functional.normalize(x.detach(), dim=0)
        cosines = (x_hat[:, rows.long()] * x_hat[:, cols.long()]).sum(dim=0)
        name, value, expected = "list of cosines", torch.stack([cosines, listed.double()]), torch.stack([exact, exact])
    assert isinstance(value, Tensor)
    error = ((value.double() - expected).norm() / expected.norm()).item()
    if not error <= _TOLERANCE[case.dtype][case.mode]:
        return f"the {name} is off by {error:.2g} of its norm"
    return ""
