"""What a decoder's penalty adds to a step of training, by how often all pairs of directions are compared.

python -m bench.refresh [--device cuda] [--size N D BATCH L0] [--steps 60] [--lr 3e-4] [--ways WAY ...] [--report]

Dictionaries are trained one after the other on the same synthetic mixtures, each with one way to choose the pairs:
the most similar pairs of all, selected anew at every step or at every so many; the same kept from step to step,
refreshed as often as the measured recall asks for ("adaptive") or certified never to miss one ("certified"); and, for
comparison, OrtSAE's and C2R's nearest columns within random chunks of 8,192 features. Times are means over the steps of
the second half. Of a policy that seldom compares all pairs they are means over the steps from the first such comparison
in that half to before the last: give it so many steps that there are two at least. On a GPU each step is waited for.

Recall is measured here, not reported by the policy: after the last step the kept selection is compared with an exact
one of the same decoder. A line of JSON for each way goes into bench/results/refresh-DEVICE.jsonl. Lines of other ways
stay there if they were measured with the same size and learning rate.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.mixtures import Size, make_trainer, mixtures
from bench.results import environment_of
from topk_ortho import topk_pairs
from topk_ortho.training.config import PenaltyConfig
from topk_ortho.training.trainer import Trainer

_RESULTS = Path(__file__).resolve().parent / "results"
_CHUNK = 8_192
_N_BATCHES = 9  # one of them is held out
WAYS: dict[str, dict[str, Any]] = {
    "no penalty": {"target": "none"},
    "all pairs, every step": {},
    "all pairs, every 5th step": {"every": 5},
    "all pairs, every 20th step": {"every": 20},
    "adaptive, every step": {"refresh": "adaptive"},
    "adaptive, every 5th step": {"refresh": "adaptive", "every": 5},
    "adaptive, every 10th step": {"refresh": "adaptive", "every": 10},
    "adaptive, every 20th step": {"refresh": "adaptive", "every": 20},
    "certified, every step": {"refresh": "certified"},
    "OrtSAE, every step": {"op": "max_cosine"},
    "OrtSAE, every 5th step": {"op": "max_cosine", "every": 5},
    "C2R, every step": {"op": "c2r"},
    "C2R, every 5th step": {"op": "c2r", "every": 5},
}
"""Settings of `PenaltyConfig` by the words of the table"""


def main(arguments: list[str] | None = None) -> None:
    """Measure and write a line for each way, or print what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.refresh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help='"cuda" is ROCm too')
    parser.add_argument("--size", type=int, nargs=4, default=Size(), metavar=("N", "D", "BATCH", "L0"))
    parser.add_argument("--steps", type=int, default=60, help="training steps of each way; the second half is timed")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate, which decides how fast directions move")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="default: all")
    parser.add_argument("--out", type=Path, metavar="PATH.jsonl", help="default: bench/results/refresh-DEVICE.jsonl")
    parser.add_argument("--report", action="store_true", help="only print the table of the results")
    options = parser.parse_args(arguments)
    out = options.out or _RESULTS / f"refresh-{options.device}.jsonl"
    if not options.report:
        size, device = Size(*options.size), torch.device(options.device)
        x, setting = mixtures(size, _N_BATCHES), {**size._asdict(), "lr": options.lr}
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = {line["way"]: line for line in _lines(out) if line.items() >= setting.items()}
        for way in options.ways:
            measured = _measure(way, x, size, options.steps, options.lr, device)
            lines[way] = {
                "way": way, **setting, "steps": options.steps, **measured,
                "environment": environment_of(device), "utc": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            out.write_text("".join(json.dumps(lines[way]) + "\n" for way in WAYS if way in lines))
            print(f"{way}: {1e3 * measured['step_s']:.1f} ms a step", file=sys.stderr, flush=True)
    print(table(_lines(out)))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown.

    What the penalty adds is taken over the rest of the same steps. Ways are measured one after the other, and by then a
    machine may have become faster or slower.
    """
    rows = ["| pairs | steps | step | penalty | added | refresh | recall |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        added = f"{100 * line['penalty_s'] / (line['step_s'] - line['penalty_s']):.0f}%"
        interval = "" if line["interval"] is None else f"every {line['interval']} uses"
        recall = "" if line["recall"] is None else f"{100 * line['recall']:.2f}%"
        times = (f"{1e3 * line[name]:.1f} ms" for name in ("step_s", "penalty_s"))
        rows.append(f"| {' | '.join((line['way'], str(line['timed_steps']), *times, added, interval, recall))} |")
    return "\n".join(rows)


def _measure(way: str, x: Tensor, size: Size, steps: int, lr: float, device: torch.device) -> dict[str, Any]:
    """Train with one way to choose pairs."""
    settings = dict(WAYS[way])
    if settings.get("op") in ("max_cosine", "c2r"):
        settings["n_chunks"] = max(1, size.n_features // _CHUNK)
    trainer = make_trainer(x, size, PenaltyConfig(**settings), lr=lr, device=device.type)
    kept = trainer.penalty.topk_pairs.pairs
    times, penalties, refreshes = [], [], []
    for step in range(steps):
        batch = trainer.next_batch()
        trainer.stopwatch.read()
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        trainer.train_step(batch)
        penalties.append(trainer.stopwatch.read().get("penalty", 0.0))  # waits for the device
        times.append(time.perf_counter() - started)
        if kept is not None and penalties[-1] and not kept.schedule[0]:
            refreshes.append(step)
    trainer.batches.close()
    timed = timed_steps(steps, refreshes)
    return {
        "timed_steps": len(timed),
        "step_s": statistics.fmean(times[timed.start : timed.stop]),
        "step_median_s": statistics.median(times[timed.start : timed.stop]),
        "penalty_s": statistics.fmean(penalties[timed.start : timed.stop]),
        "interval": None if kept is None or settings["refresh"] == "certified" else kept.interval,
        "recall": None if kept is None else _recall(trainer),
    }


def timed_steps(steps: int, refreshes: list[int]) -> range:
    """Those of the second half, or as many whole intervals between refreshes as these have."""
    late = [step for step in refreshes if step >= steps // 2]
    return range(late[0], late[-1]) if len(late) > 1 else range(steps // 2, steps)


@torch.no_grad()
def _recall(trainer: Trainer) -> float:
    """Share of the most similar pairs of the decoder, as it is now, that the kept selection has."""
    x, config = trainer.sae.W_dec.T, trainer.config.penalty
    assert trainer.penalty.topk_pairs.pairs is not None
    kept = trainer.penalty.topk_pairs.pairs(x)
    exact = topk_pairs(x, config.fraction, similarity=config.similarity)
    key_of_kept, key_of_exact = (pairs.rows * x.shape[1] + pairs.cols for pairs in (kept, exact))
    return torch.isin(key_of_exact, key_of_kept).double().mean().item()


if __name__ == "__main__":
    main()
