"""A model, not a measurement: memory and time of a training step of a dictionary that is spread over GPUs.

python -m bench.plan [--n-features N] [--d-in D] [--batch-size B] [--l0 L] [--fraction F] [--gpus 8 64]

It counts what a process holds at the same time, and what it computes and sends in a step of `train.py` with the
penalty on the decoder, a BatchTopK dictionary without AuxK and autocast in bfloat16, and divides by what datasheets
promise of an H100 SXM. So its times are a floor, and its memory leaves out what torch keeps beside (fragments,
workspaces of cuBLAS).
"""

import argparse
from typing import NamedTuple

from bench.roofline import HARDWARE
from topk_ortho.definitions import k_from_fraction

_GPU = "NVIDIA H100 80GB HBM3"
_NVLINK, _NETWORK = 450e9, 50e9
"""Bytes that a GPU sends in a second: NVLink 4 in one direction, and a 400 Gb/s adapter of its own"""
_KEPT = 1.15
"""Pairs that pass the guess, relative to those that are selected"""
_BYTES_OF_A_PAIR = {"kept: cosine, index": 12, "selected: rows, columns, weights, told to two owners": 88}


class Plan(NamedTuple):
    """A model of one process."""

    memory: dict[str, float]
    """Bytes, by what they are"""
    seconds: dict[str, float]
    """Least time of a step, by what takes it; sending overlaps with computing where the GPUs are fast enough"""


def plan(n_features: int, d_in: int, batch_size: int, l0: int, fraction: float, n_gpus: int) -> Plan:
    """The model for a dictionary that `n_gpus` processes hold together, each n_features / n_gpus of its features."""
    own = n_features / n_gpus
    weights = 2 * own * d_in * 4  # encoder and decoder
    pairs = k_from_fraction(n_features, fraction) / n_gpus
    kept, selected = _BYTES_OF_A_PAIR.values()
    memory = {
        "weights, gradients and two moments": 4 * weights,
        "penalty's gradient": weights / 2,
        "shards that go round: own, visiting, arriving": 3 * weights / 2,
        "pre-activations, and which exceed the guess": batch_size * own * 3,
        "batch, reconstruction, residual and gradients": 6 * batch_size * d_in * 4,
        "pairs": pairs * (_KEPT * kept + selected),
    }
    peak = HARDWARE[_GPU]
    link = _NVLINK if n_gpus <= 8 else _NETWORK
    active = batch_size * l0 / n_gpus
    seconds = {
        "encoder's product (bfloat16)": 2 * batch_size * own * d_in / peak["half"],
        "sums over active features (memory)": 4 * active * d_in * 4 / peak["memory"],
        "Adam (memory)": 7 * weights / peak["memory"],
        "products of pairs (tf32)": n_features**2 * d_in / n_gpus / peak["tf32"],
        "products of pairs (float32)": n_features**2 * d_in / n_gpus / peak["fp32"],
        "shards sent, loss": (n_gpus // 2) * own * d_in * 4 / link,
        "reconstructions summed": 2 * (n_gpus - 1) / n_gpus * batch_size * d_in * 4 / link,
        "shards sent, gradient": (n_gpus - 1) * own * d_in * 4 / link,
    }
    return Plan(memory, seconds)


def main(arguments: list[str] | None = None) -> None:
    """Print the model as two tables in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-features", type=int, default=2**20)
    parser.add_argument("--d-in", type=int, default=2_304)
    parser.add_argument("--batch-size", type=int, default=4_096)
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--fraction", type=float, default=1e-4)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    options = vars(parser.parse_args(arguments))
    counts = options.pop("gpus")
    plans = [plan(**options, n_gpus=n) for n in counts]
    head = " | ".join(f"{n} GPUs" for n in counts)
    print(f"| memory of a process, GB | {head} |\n|---|{'---|' * len(counts)}")
    for name in plans[0].memory:
        print(f"| {name} | {' | '.join(f'{each.memory[name] / 1e9:.2f}' for each in plans)} |")
    print(f"| together | {' | '.join(f'{sum(each.memory.values()) / 1e9:.2f}' for each in plans)} |")
    print(f"\n| least time in a step, ms | {head} |\n|---|{'---|' * len(counts)}")
    for name in plans[0].seconds:
        print(f"| {name} | {' | '.join(f'{each.seconds[name] * 1e3:.2f}' for each in plans)} |")


if __name__ == "__main__":
    main()
