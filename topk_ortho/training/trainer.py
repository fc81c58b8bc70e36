"""The training loop.

    loss = FVU + sparsity_weight * sparsity + auxk_weight * auxiliary + penalty_weight * penalty

FVU is the fraction of variance unexplained, mean ||x - x_rec||**2 / V, V the total variance of the training
activations; of a Matryoshka SAE, the mean over its nested reconstructions. Every term is free of the activations'
scale. Weights, gradients and Adam's moments are float32; autocast concerns the SAE's matrix products alone.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from topk_ortho import TopKPairs, pair_jaccard
from topk_ortho.activations.batches import Batches, Stopped
from topk_ortho.activations.source import ActivationSource, generator_of, split_shards
from topk_ortho.evaluation import evaluate, mean_max_cosine, source_metrics
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder, firing_counts, keep_normalized
from topk_ortho.training.build import build_sae, resolve_device
from topk_ortho.training.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint
from topk_ortho.training.config import TrainConfig
from topk_ortho.training.dead_features import auxiliary_loss, resample
from topk_ortho.training.interrupt import Interrupted, SignalGuard
from topk_ortho.training.loggers import open_loggers
from topk_ortho.training.penalty import Penalty, PenaltyTerm
from topk_ortho.training.results import prepare_folder, save_results
from topk_ortho.training.resume import find_checkpoint
from topk_ortho.training.schedules import decay, warmup
from topk_ortho.training.stopwatch import Stopwatch, peak_memory_bytes

_FIRING_RATE_DECAY = 0.99  # per step: an average over the last 100 batches

_PAIR_TENSORS = ("rows", "cols", "values", "threshold")


class StepResult(NamedTuple):
    """One step, for the log: terms are unweighted tensors [] on the device."""

    loss: Tensor
    unexplained: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    penalty: Tensor
    penalty_weight: float
    gradient_norm: Tensor
    features: Tensor | ActiveFeatures
    """[batch, n_features]"""


class Trainer:
    """Trains a dictionary on activations and measures it on tokens held out.

    Parameters
    ----------
    config : TrainConfig
        The run.
    source : ActivationSource
        Its activations; some shards are held out.
    resume : bool
        Go on from the latest good checkpoint in the run's folder, bit by bit as if it had not been interrupted; from
        the beginning if there is none.
    """

    def __init__(self, config: TrainConfig, source: ActivationSource, *, resume: bool = False):
        self.config = config
        self.source = source
        self.device = resolve_device(config.device)
        self.generator = generator_of("trainer", config.seed)
        checkpoint = find_checkpoint(config, resume)

        self.held_out_shards, training = split_shards(source, config.held_out_tokens, config.seed)
        self.held_out = torch.cat([source.shard(number) for number in self.held_out_shards])
        position = checkpoint.step if checkpoint else 0
        self.batches = Batches(source, training, config.batch_size, config.buffer_tokens, config.seed, position)

        self.sae = build_sae(config.sae, source.d_in, self.generator).to(self.device)
        self.model: Callable[[Tensor], Any] = torch.compile(self.sae) if config.compile else self.sae
        self.penalty = Penalty(config.penalty, self.generator).to(self.device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr, fused=True)
        keep_normalized(self.optimizer, self.sae.W_dec, config.sae.decoder_norm)

        self.step = 0
        self.firing_rate = torch.zeros(config.sae.n_features, device=self.device)
        self.tokens_since_fired = torch.zeros(config.sae.n_features, dtype=torch.int64, device=self.device)
        self.variance, self.scale = 1.0, 1.0
        self.seconds = 0.0  # of training, without evaluations
        self._step_of_last_line = 0
        self.best: dict[str, Any] | None = None
        self.pairs: TopKPairs | None = None
        self.stopwatch = Stopwatch(self.device)
        if checkpoint is None:
            try:
                self._measure_activations()
            except BaseException:  # Ctrl-C too: the thread would go on to the end of its buffer
                self.batches.close()
                raise
        else:
            self._restore(checkpoint)
            self._step_of_last_line = self.step

    def fit(self) -> dict[str, Any]:
        """Train for the configured steps; returns the summary, which is saved too.

        Raises
        ------
        Interrupted
            After SIGINT or SIGTERM; a checkpoint has been saved.
        FloatingPointError
            If training diverged.
        """
        config = self.config
        prepare_folder(config, self.step)
        loggers = open_loggers(config, self.step)
        with (
            SignalGuard(self.batches.stop) as guard,
            tqdm(total=config.steps, initial=self.step, desc="sae", unit=" steps", mininterval=0.5) as progress,
        ):
            try:
                evaluation = self.evaluation() if self.step == config.steps else {}
                while self.step < config.steps:
                    with self.stopwatch.measure("data"):
                        x = next(self.batches).to(self.device, non_blocking=True)
                    result = self.train_step(x)
                    progress.update()
                    if self._is_due(config.log_every, config.eval_every, config.checkpoint_every):
                        metrics = self.metrics(result)
                        progress.set_postfix_str(
                            f"unexplained {metrics['unexplained']:.3f}, L0 {metrics['l0']:.0f}, "
                            f"penalty {metrics['penalty']:.4f}, dead {metrics['dead_fraction']:.0%}"
                        )
                        if self._is_due(config.eval_every, config.checkpoint_every):
                            evaluation = self.evaluation()
                            metrics |= evaluation
                        for logger in loggers:
                            logger.log(metrics)
                        if self._is_due(config.checkpoint_every):
                            self.save(evaluation["explained_variance"])
                    if guard.received:
                        raise Stopped
            except Stopped as stopped:
                assert guard.received
                self.seconds += sum(self.stopwatch.read().values())
                self.save()
                raise Interrupted(guard.received, self.step) from stopped
            finally:
                self.batches.close()
                for logger in loggers:
                    logger.close()
        summary = self._summary(evaluation)
        save_results(config, self.inference_sae(), summary)
        return summary

    def train_step(self, x: Tensor) -> StepResult:
        """One optimizer step on x [batch, d_in], activations as the source gives them."""
        config = self.config
        rise = warmup(self.step, config.warmup_fraction * config.steps)
        fall = decay(self.step, config.steps, config.decay_fraction * config.steps)
        with self.stopwatch.measure("sae"):
            x = x * self.scale
            with self._autocast():
                output = self.model(x)
                dead = self.tokens_since_fired >= config.dead_after_tokens
                residual = x - output.reconstruction.float()
                auxiliary = self._auxiliary(x, residual, dead)
                sparsity = self.sae.sparsity(output, self.variance)
            unexplained = residual.square().sum(dim=1).mean() / self.variance
            inner = [(x - r.float()).square().sum(dim=1).mean() / self.variance for r in output.inner]
            loss = (
                torch.stack([unexplained, *inner]).mean()
                + config.sae.sparsity_weight * rise * sparsity
                + config.sae.auxk_weight * auxiliary
            )
            self._count_firing(output.features)
        weight = self.penalty.weight(self.step, config.steps)
        term = self._penalty(output.features) if weight else None
        with self.stopwatch.measure("sae"):
            self.optimizer.zero_grad()
            if term is None:
                loss.backward()
            else:
                torch.autograd.backward([loss, term.target], [None, weight * term.gradient])
            gradient_norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), config.clip_norm or math.inf)
            self.optimizer.param_groups[0]["lr"] = config.lr * min(rise, fall)
            self.optimizer.step()
            self.sae.project()
            self.sae.observe(output.features)
            self.step += 1
            if self._resamples():
                resample(self.sae, self.optimizer, x, residual.detach(), dead, self.generator)
                self.tokens_since_fired[dead] = 0
        penalty = loss.new_zeros(()) if term is None else term.value
        return StepResult(
            loss=loss.detach(),
            unexplained=unexplained.detach(),
            sparsity=sparsity.detach(),
            auxiliary=auxiliary.detach(),
            penalty=penalty,
            penalty_weight=weight,
            gradient_norm=gradient_norm,
            features=output.features,
        )

    def metrics(self, result: StepResult) -> dict[str, Any]:
        """What every line of metrics.jsonl has; waits for the device."""
        numbers = result._replace(features=firing_counts(result.features).sum())
        terms = {name: float(value) for name, value in numbers._asdict().items()}
        if not all(map(math.isfinite, terms.values())):
            raise FloatingPointError(self._diverged(str(terms)))
        seconds, n_steps = self.stopwatch.read(), self.step - self._step_of_last_line
        self._step_of_last_line = self.step
        self.seconds += sum(seconds.values())
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "lr": self.optimizer.param_groups[0]["lr"],
            "l0": terms.pop("features") / self.config.batch_size,
            **terms,
            "dead_fraction": self.n_dead() / self.config.sae.n_features,
            "tokens_per_second": n_steps * self.config.batch_size / sum(seconds.values()),
            **{f"{part}_ms": 1e3 * seconds.get(part, 0.0) / n_steps for part in ("data", "sae", "penalty")},
            "memory_bytes": peak_memory_bytes(self.device),
        }

    def evaluation(self) -> dict[str, Any]:
        """What the dictionary is like now, on held-out tokens.

        `pair_jaccard` compares the most similar pairs with those of the evaluation before.
        """
        sae = self.inference_sae()
        measured = evaluate(sae, self._held_out_batches())
        pairs, before = self.penalty.select(sae, sae.encode(next(self._held_out_batches()))), self.pairs
        self.pairs = pairs
        return {
            "explained_variance": measured["explained_variance"],
            "normalized_mse": measured["normalized_mse"],
            "held_out_l0": measured["l0"],
            "mean_max_decoder_cosine": mean_max_cosine(sae.W_dec),
            "pair_threshold": pairs.threshold.item(),
            "pair_jaccard": None if before is None else pair_jaccard(before, pairs),
            "tau": pairs.tau,
            "density_histogram": measured["density_histogram"],
            **source_metrics(sae, self.source, self.held_out_shards),
        }

    def inference_sae(self) -> SparseAutoencoder:
        """A copy of the SAE in eval mode, for activations as the source gives them."""
        sae = copy.deepcopy(self.sae).eval().requires_grad_(False)
        sae.divide_scale(self.scale)
        return sae

    def n_dead(self) -> int:
        """Features that have not fired for `dead_after_tokens` training tokens, or at all if there were fewer."""
        window = max(1, min(self.config.dead_after_tokens, self.step * self.config.batch_size))
        return int((self.tokens_since_fired >= window).sum())

    def save(self, explained_variance: float | None = None) -> None:
        """Write a checkpoint, and remove those that are no longer kept; what cannot be written is said, not fatal.

        With an explained variance it is a candidate for the best.
        """
        before = self.best
        if explained_variance is not None and (before is None or explained_variance > before["value"]):
            self.best = {"step": self.step, "value": explained_variance}
        folder = self.config.out_dir / "checkpoints"
        try:
            save_checkpoint(folder, self._checkpoint())
        except OSError as error:
            self.best = before
            tqdm.write(f"{error}; earlier checkpoints are as they were", file=sys.stderr)
            return
        best_step = None if self.best is None else self.best["step"]
        prune_checkpoints(folder, self.step, self.config.keep_checkpoints, best_step)

    def _checkpoint(self) -> Checkpoint:
        """Everything that decides the rest of the run. Which batches are next follows from the step."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"penalty.{name}": tensor for name, tensor in self.penalty.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
        tensors["firing_rate"] = self.firing_rate
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["generator"] = self.generator.get_state()
        values = {name: getattr(self, name) for name in ("variance", "scale", "seconds", "best")}
        if self.pairs is not None:
            tensors |= {f"pairs.{name}": getattr(self.pairs, name) for name in _PAIR_TENSORS}
            values["pairs"] = {"tau": self.pairs.tau, "n_features": self.pairs.n_features, "k": self.pairs.k}
        return Checkpoint(self.step, tensors, values, self.config.as_json())

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint."""

        def under(prefix: str) -> dict[str, Tensor]:
            start = len(prefix) + 1
            return {n[start:]: tensor for n, tensor in checkpoint.tensors.items() if n.startswith(f"{prefix}.")}

        self.step = checkpoint.step
        self.sae.load_state_dict(under("sae"))
        self.penalty.load_state_dict(under("penalty"))
        state = self.optimizer.state_dict()
        state["state"] = {number: under(f"optimizer.{number}") for number in state["param_groups"][0]["params"]}
        self.optimizer.load_state_dict(state)
        self.firing_rate.copy_(checkpoint.tensors["firing_rate"])
        self.tokens_since_fired.copy_(checkpoint.tensors["tokens_since_fired"])
        self.generator.set_state(checkpoint.tensors["generator"])
        values = dict(checkpoint.values)
        if numbers := values.pop("pairs", None):
            tensors: dict[str, Any] = {name: tensor.to(self.device) for name, tensor in under("pairs").items()}
            self.pairs = TopKPairs(**tensors, **numbers)
        for name, value in values.items():
            setattr(self, name, value)

    def _summary(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """The run in numbers, from its last evaluation."""
        penalty = 0.0
        if self.config.penalty.target != "none":
            features = self.sae.encode(next(self._held_out_batches()) * self.scale)
            penalty = self.penalty(self.sae, features, self.firing_rate).value.item()
        n_dead = self.n_dead()
        of_the_moment = ("density_histogram", "pair_jaccard", "tau", "held_out_l0")
        return {
            "steps": self.step,
            "tokens": self.step * self.config.batch_size,
            "seconds": self.seconds,
            "tokens_per_second": self.step * self.config.batch_size / self.seconds,
            "transformer_tokens_per_second": self.source.tokens_per_second,
            "l0": evaluation["held_out_l0"],
            **{name: value for name, value in evaluation.items() if name not in of_the_moment},
            "dead_features": n_dead,
            "dead_fraction": n_dead / self.config.sae.n_features,
            "penalty": penalty,
            "device": str(self.device),
        }

    def _is_due(self, *every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is due after this one."""
        return self.step == self.config.steps or any(n and self.step % n == 0 for n in every)

    def _autocast(self) -> torch.autocast:
        wanted = self.config.autocast
        is_on = wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_on)

    def _auxiliary(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Error of the dead features' reconstruction of the residual, relative to the variance of x."""
        config = self.config.sae
        if config.dead_features != "auxk" or config.auxk_weight == 0:
            return residual.new_zeros(())
        n_active = config.auxk or max(1, self.source.d_in // 2)
        return auxiliary_loss(self.sae, x, residual, dead, n_active) / self.variance

    def _resamples(self) -> bool:
        """Whether dead features are restarted after this step."""
        config = self.config.sae
        is_due = self.step % config.resample_every == 0 and self.step <= 0.8 * self.config.steps
        return config.dead_features == "resample" and is_due

    def _penalty(self, features: Tensor | ActiveFeatures) -> PenaltyTerm:
        try:
            with self.stopwatch.measure("penalty"):
                term: PenaltyTerm = self.penalty(self.sae, features, self.firing_rate)
                return term
        except ValueError as error:  # the config is checked, so only NaN, Inf and overflow are left
            raise FloatingPointError(self._diverged(str(error))) from error

    @torch.no_grad()
    def _count_firing(self, features: Tensor | ActiveFeatures) -> None:
        counts = firing_counts(features)
        self.firing_rate.lerp_(counts / self.config.batch_size, 1 - _FIRING_RATE_DECAY)
        self.tokens_since_fired += self.config.batch_size
        self.tokens_since_fired[counts > 0] = 0

    def _measure_activations(self) -> None:
        """Mean, scale and total variance of the first tokens that are shuffled together."""
        tokens = self.batches.pool
        # in float64, a few at a time: a buffer in float64 can be larger than memory
        mean = torch.stack([part.double().sum(dim=0) for part in tokens.split(8_192)]).sum(dim=0) / len(tokens)
        variance = sum((part.double() - mean).square().sum().item() for part in tokens.split(8_192)) / len(tokens)
        mean_square = variance + mean.square().sum().item()
        if variance == 0:
            raise ValueError(f"all activations at {self.source.name} are equal: there is nothing to learn")
        if self.config.sae.normalize_activations == "rms":
            self.scale = (self.source.d_in / mean_square) ** 0.5
        self.variance = variance * self.scale**2
        self.sae.b_dec.data.copy_(mean * self.scale)

    def _held_out_batches(self) -> Iterator[Tensor]:
        """Held-out activations as the source gives them, [<= batch_size, d_in], float32, on the device."""
        return (x.to(self.device).float() for x in self.held_out.split(self.config.batch_size))

    def _diverged(self, what: str) -> str:
        return f"training diverged by step {self.step}: {what}; a lower lr may help"
