"""The training loop.

    loss = FVU + l1_weight * L1 / sqrt(V) + penalty_weight * penalty

FVU is the fraction of variance unexplained, mean ||x - x_rec||**2 / V; V the total variance of the training
activations; L1 the mean over tokens of sum_i features_i (decoder directions have unit length). Every term is free of
the activations' scale.
"""

import json
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from topk_ortho.sae import StandardSAE, normalize_after_step
from topk_ortho.training.activations import Activations, batches
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.metrics import evaluate, mean_max_cosine
from topk_ortho.training.penalty import Penalty

_FIRING_RATE_DECAY = 0.99  # per step: an average over the last 100 batches


class Losses(NamedTuple):
    """Terms of one step, unweighted, and what the progress bar shows beside them."""

    unexplained: Tensor
    """[] fraction of variance unexplained"""
    l1: Tensor
    """[] mean L1 norm of the features / sqrt(V)"""
    penalty: Tensor
    """[] topk_ortho_loss of the target"""
    l0: Tensor
    """[] mean number of active features"""


class Trainer:
    """Trains a dictionary on activations and measures it on tokens held out.

    Parameters
    ----------
    config : TrainConfig
        The run.
    activations : Activations
        All tokens; some windows are held out.
    """

    def __init__(self, config: TrainConfig, activations: Activations):
        self.config = config
        self.device = resolve_device(config.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        training, self.held_out = self._split(activations.windows)
        self.mean = training.mean(dim=0, dtype=torch.float32)
        self.variance = training.float().var(dim=0, correction=0).sum().item()
        if self.variance == 0:
            raise ValueError(f"all activations at {config.model.hook} are equal: there is nothing to learn")
        self.transformer_tokens_per_second = activations.tokens_per_second
        self.activations: Iterator[Tensor] = batches(training, config.batch_size, self.generator)

        self.sae = StandardSAE(activations.d_in, config.sae.n_features, generator=self.generator)
        self.sae.b_dec.data.copy_(self.mean)
        self.sae.to(self.device)
        self.penalty = Penalty(config.penalty).to(self.device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr)
        normalize_after_step(self.optimizer, self.sae.W_dec)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)

        self.step = 0
        self.firing_rate = torch.zeros(config.sae.n_features, device=self.device)
        self.tokens_since_fired = torch.zeros(config.sae.n_features, dtype=torch.int64, device=self.device)

    def fit(self) -> dict[str, float]:
        """Train for the configured steps; returns the summary, which is saved too."""
        out_dir = self.config.out_dir
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "sae.safetensors"):  # of an earlier run
            (out_dir / name).unlink(missing_ok=True)
        (out_dir / "config.json").write_text(json.dumps(self.config.as_json(), indent=2) + "\n")
        started = time.perf_counter()
        with (
            (out_dir / "metrics.jsonl").open("w") as log,
            tqdm(total=self.config.steps, desc="sae", unit=" steps", mininterval=0.5) as progress,
        ):
            while self.step < self.config.steps:
                losses = self.train_step(next(self.activations).to(self.device))
                progress.update()
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    metrics = self.metrics(losses)
                    log.write(json.dumps(metrics) + "\n")
                    log.flush()
                    progress.set_postfix_str(
                        f"unexplained {metrics['unexplained']:.3f}, L1 {metrics['l1']:.2f}, "
                        f"penalty {metrics['penalty']:.4f}, L0 {metrics['l0']:.0f}"
                    )
        seconds = time.perf_counter() - started
        summary = self.summary() | {"tokens_per_second": self.step * self.config.batch_size / seconds}
        if self.transformer_tokens_per_second is not None:
            summary["transformer_tokens_per_second"] = self.transformer_tokens_per_second
        save_file(self.sae.state_dict(), out_dir / "sae.safetensors")
        (out_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def train_step(self, x: Tensor) -> Losses:
        """One optimizer step on x [batch, d_in]."""
        reconstruction, features = self.sae(x)
        unexplained = (x - reconstruction).square().sum(dim=1).mean() / self.variance
        l1 = features.sum(dim=1).mean() / self.variance**0.5
        self._count_firing(features)
        try:
            penalty = self.penalty(self.sae.W_dec, features, self.firing_rate)
        except ValueError as error:  # the config is checked, so only NaN, Inf and overflow are left
            raise FloatingPointError(self._diverged(str(error))) from error
        l1_weight = self.config.sae.l1_weight * self._warmup(self.step)
        loss = unexplained + l1_weight * l1 + self.config.penalty.weight * penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        l0 = (features > 0).sum(dim=1).float().mean()
        return Losses(*(term.detach() for term in (unexplained, l1, penalty, l0)))

    def metrics(self, losses: Losses) -> dict[str, float]:
        """One line of metrics.jsonl; reads the losses back from the device."""
        terms = {name: term.item() for name, term in losses._asdict().items()}
        if not all(map(math.isfinite, terms.values())):
            raise FloatingPointError(self._diverged(str(terms)))
        return {"step": self.step, "tokens": self.step * self.config.batch_size} | terms | {"dead": self.n_dead()}

    def summary(self) -> dict[str, float]:
        """What the dictionary is like now, on the tokens held out; the penalty of activations is of the first batch."""
        held_out = (x.float().to(self.device) for x in self.held_out.split(self.config.batch_size))
        with torch.no_grad():
            features = self.sae.encode(self.held_out[: self.config.batch_size].float().to(self.device))
            penalty = self.penalty(self.sae.W_dec, features, self.firing_rate).item()
        n_dead = self.n_dead()
        return evaluate(self.sae, held_out) | {
            "dead_features": n_dead,
            "dead_fraction": n_dead / self.config.sae.n_features,
            "mean_max_decoder_cosine": mean_max_cosine(self.sae.W_dec),
            "penalty": penalty,
        }

    def n_dead(self) -> int:
        """Features that have not fired for `dead_after_tokens` training tokens, or at all if there were fewer."""
        window = max(1, min(self.config.dead_after_tokens, self.step * self.config.batch_size))
        return int((self.tokens_since_fired >= window).sum())

    @torch.no_grad()
    def _count_firing(self, features: Tensor) -> None:
        fired = features > 0
        self.firing_rate.lerp_(fired.float().mean(dim=0), 1 - _FIRING_RATE_DECAY)
        self.tokens_since_fired += features.shape[0]
        self.tokens_since_fired[fired.any(dim=0)] = 0

    def _diverged(self, what: str) -> str:
        return f"training diverged by step {self.step}: {what}; a lower lr may help"

    def _split(self, windows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(training, held-out) tokens [n, d_in]; whole windows are held out, though a document may be in both."""
        order = torch.randperm(len(windows), generator=self.generator).tolist()
        n_held_out = min(max(1, round(self.config.held_out_fraction * len(windows))), len(windows) - 1)
        held_out, training = ([windows[i] for i in part] for part in (order[:n_held_out], order[n_held_out:]))
        return torch.cat(training), torch.cat(held_out)

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.config.warmup_steps + 1))

    def _lr_factor(self, step: int) -> float:
        decay_steps = self.config.steps / 5
        return min(self._warmup(step), max(0.0, (self.config.steps - step) / decay_steps))


def resolve_device(device: str) -> torch.device:
    """The device that the word "auto" or a torch device string means."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # "meta" has no data
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
