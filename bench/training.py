"""Time of a BatchTopK training step, beside SAELens's, on the same activations, in one run: python -m bench.training.

Both trainers take whole steps as their users do: fetch a batch, forward, loss, backward, clip the gradient, Adam,
count what fires. Steps alternate, so that all see the same machine. Ours is timed with the penalty too. Writes
PATH.json and the README's table; takes about two minutes on two cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from bench.report import machine_line, write_into_readme
from bench.run import environment
from topk_ortho.sae import SparseAutoencoder
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.trainer import Trainer

_ROOT = Path(__file__).resolve().parent.parent
_D_IN, _N_FEATURES, _BATCH, _L0 = 384, 4096, 1024, 32
_LR = 3e-4
_N_SHARDS = 40


class Mixtures:
    """Sparse mixtures of twice as many random directions as there are features; a shard is a batch."""

    name = "synthetic mixtures"
    d_in = _D_IN
    tokens_per_second: float | None = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        directions = normalize(torch.randn(2 * _N_FEATURES, _D_IN, generator=generator), dim=1)
        shape = (_N_SHARDS * _BATCH, _L0)
        chosen = torch.randint(0, len(directions), shape, generator=generator)
        coefficients = torch.rand(shape, generator=generator)
        self.x = embedding_bag(chosen, directions, mode="sum", per_sample_weights=coefficients)
        self.shard_sizes = [_BATCH] * _N_SHARDS

    def shard(self, number: int) -> Tensor:
        """Activations [batch, d_in] of a shard."""
        return self.x[number * _BATCH : (number + 1) * _BATCH]

    def measure(self, sae: SparseAutoencoder, held_out: list[int]) -> dict[str, float]:
        """Nothing to say about an SAE."""
        return {}

    def batches(self) -> Iterator[Tensor]:
        """Batches without end for SAELens, of random tokens, as ours are."""
        generator = torch.Generator().manual_seed(0)
        while True:
            for rows in torch.randperm(len(self.x), generator=generator).split(_BATCH):
                yield self.x[rows]


def steps(source: Mixtures, out_dir: Path) -> dict[str, Callable[[], object]]:
    """One training step of each provider."""

    def ours(target: Any) -> Callable[[], object]:
        config = TrainConfig(
            sae=SAEConfig(n_features=_N_FEATURES, l0=_L0),
            penalty=PenaltyConfig(target=target),
            steps=10**6,
            batch_size=_BATCH,
            lr=_LR,
            held_out_tokens=_BATCH,
            out_dir=out_dir,
        )
        trainer = Trainer(config, source)
        return lambda: trainer.train_step(next(trainer.batches))

    theirs: SAETrainer[Any, Any] = SAETrainer(
        SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=_BATCH, lr=_LR, lr_end=_LR),
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=_D_IN, d_sae=_N_FEATURES, k=_L0)),
        source.batches(),
    )
    return {
        "SAELens": lambda: theirs.step(next(theirs.data_provider)),
        "topk_ortho": ours("none"),
        "topk_ortho, with the penalty on the decoder": ours("decoder"),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=_ROOT / "bench/results/training.json")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as out_dir:
        providers = steps(Mixtures(), Path(out_dir))
        times: dict[str, list[float]] = {name: [] for name in providers}
        for number in range(options.warmup + options.steps):
            for name, step in providers.items():
                started = time.perf_counter()
                step()
                if number >= options.warmup:
                    times[name].append(time.perf_counter() - started)
    results = {
        "environment": environment() | {"sae_lens": version("sae-lens")},
        "d_in": _D_IN,
        "n_features": _N_FEATURES,
        "batch_size": _BATCH,
        "l0": _L0,
        "warmup_steps": options.warmup,
        "steps": options.steps,
        "rows": [{"provider": name} | _quartiles(seconds) for name, seconds in times.items()],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    if options.out.is_relative_to(_ROOT):
        write_into_readme("training-bench", table(results))


def _quartiles(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"time_s": median, "time_q1_s": low, "time_q3_s": high}


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    median = {row["provider"]: row["time_s"] for row in results["rows"]}
    lines = ["| a BatchTopK step | time | SAELens / this |", "|---|--:|--:|"]
    lines += [f"| {name} | {1e3 * t:.0f} ms | {median['SAELens'] / t:.1f} |" for name, t in median.items()]
    setting = (
        f"Median of {results['steps']} alternating steps, d_in = {results['d_in']:,}, "
        f"{results['n_features']:,} features, L0 = {results['l0']}, batch {results['batch_size']:,}, float32, "
        f"SAELens {results['environment']['sae_lens']}."
    )
    machine = machine_line(results["environment"])
    return "\n".join([*lines, "", f"{setting} {machine}", ""])


if __name__ == "__main__":
    main()
