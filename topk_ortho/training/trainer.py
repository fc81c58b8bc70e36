"""The training loop.

    loss = FVU + sparsity_weight * sparsity + auxk_weight * auxiliary + penalty_weight * penalty

FVU is the fraction of variance unexplained, mean ||x - x_rec||**2 / V, where V is the total variance of the training
activations; for a Matryoshka SAE it is the mean over its nested reconstructions. No term depends on the activations'
scale. Weights, gradients and Adam's moments are float32; autocast concerns the SAE's matrix products alone.

Several processes can train together, see `topk_ortho.distributed.parallel`. Each has its part of the features, with
their gradients and moments, and its rows of a batch; every number that is logged is that of all. The first one writes.
"""

import copy
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from topk_ortho.activations.batches import Batches, Stopped, read_part
from topk_ortho.activations.source import ActivationSource, generator_of, mean_and_variance, split_shards
from topk_ortho.activations.synthetic import KnownActivations
from topk_ortho.device import resolve_device
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.evaluation import (
    PairStability,
    PairWindows,
    evaluate,
    mean_max_cosine,
    mean_stability,
    pair_relations,
    ratio,
    source_metrics,
)
from topk_ortho.files import write_whole
from topk_ortho.sae import (
    ActiveFeatures,
    BatchTopKSAE,
    JumpReLUSAE,
    SAEOutput,
    SparseAutoencoder,
    TopKSAE,
    firing_counts,
    keep_normalized,
)
from topk_ortho.sae.saved import read_saelens, start_from_saved
from topk_ortho.training.build import build_sae
from topk_ortho.training.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint
from topk_ortho.training.config import TrainConfig, differences, flatten
from topk_ortho.training.dead_features import DeadFeatures
from topk_ortho.training.interrupt import Interrupted, SignalGuard
from topk_ortho.training.loggers import Log, open_loggers, open_pairs_log
from topk_ortho.training.penalty import Penalty, PenaltyTerm
from topk_ortho.training.results import save_results
from topk_ortho.training.run_folder import Run
from topk_ortho.training.schedules import annealed, decay, warmup
from topk_ortho.training.stopwatch import Stopwatch, peak_memory_bytes

_SAVED_NUMBERS = ("variance", "scale", "seconds", "best")
_ECHO = 5.0
"""Seconds after a signal in which torchrun may send it again"""
_PENALISED_TOKENS = 1_024
"""Held-out tokens over which activations are compared: how similar they are depends on how many tokens there are."""


class StepResult(NamedTuple):
    """What a step reports to the log. The terms of the loss are unweighted tensors [] on the device."""

    loss: Tensor
    """Everything that was minimised, without the penalty"""
    fvu: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    penalty: Tensor
    penalty_weight: float
    gradient_norm: Tensor
    """Norm before clipping"""
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
    run : Run
        Where it writes, and the checkpoint that it goes on from, bit by bit as if it had not been interrupted; see
        `open_run`. Another number of processes goes on from it too, but for rounding.
    parallel : Parallel, optional
        The processes that train together; this one alone by default. All of them make the same calls.

    Raises
    ------
    ValueError
        If the activations do not suit the run, or are not those that the checkpoint was made with.
    """

    def __init__(self, config: TrainConfig, source: ActivationSource, run: Run, parallel: Parallel | None = None):
        self.parallel = Parallel.alone() if parallel is None else parallel
        self.is_first = self.parallel.world.rank == 0
        self.config = config
        self.source = source
        self.folder = run.folder
        self.device = resolve_device(config.device)
        self.generator = generator_of("trainer", config.seed)
        checkpoint = run.checkpoint
        self.step = checkpoint.step if checkpoint else 0
        if checkpoint and (changes := differences(checkpoint.values["source"], source.identity)):
            raise ValueError(f"{self.folder} cannot be resumed, as its activations have changed: {changes}")

        self.held_out_shards, training = split_shards(source, config.held_out_tokens, config.seed)
        self.held_out = read_part(source, self.held_out_shards, self.parallel)
        if self.parallel.count_of_all(self.held_out[:, 0]) == 0:
            raise ValueError(f"{source.name}: the shards that are held out have no tokens, so nothing can be measured")
        self.batches = Batches(
            source, training, config.batch_size, config.buffer_tokens, config.seed, self.step, self.parallel
        )

        self.sae = build_sae(config.sae, source, self.generator, self.parallel).to(self.device)
        self._set_l0()
        self.model: Callable[[Tensor], Any] = torch.compile(self.sae) if config.compile else self.sae
        self.penalty = Penalty(config.penalty, self.generator, self.parallel).to(self.device)
        self.pairs = PairStability(self.parallel)
        self.pair_windows = PairWindows(config.pairs_every)
        self.dead_features = DeadFeatures(config, source.d_in, self.generator, self.parallel).to(self.device)
        self.sae.W_dec.requires_grad_(config.sae.train_decoder)
        self._trained = {name: weights for name, weights in self.sae.named_parameters() if weights.requires_grad}
        self.optimizer = torch.optim.Adam(self._trained.values(), lr=config.lr, fused=True)
        if config.sae.train_decoder:
            keep_normalized(self.optimizer, self.sae.W_dec, config.sae.decoder_norm)

        self.variance, self.scale = 1.0, 1.0  # total variance of the scaled activations; what they are scaled by
        self.seconds = 0.0  # time spent on training, without evaluations
        self.best: dict[str, Any] | None = None  # step and value of the checkpoint with the largest explained variance
        self.stopwatch = Stopwatch(self.device)
        self._step_of_last_line = self.step
        if checkpoint:
            self._restore(checkpoint)
            return
        try:
            self._fit_scale()
        except BaseException:  # also at Ctrl-C, or the thread would first fill its buffer
            self.batches.close()
            raise

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
        quiet: dict[str, Any] = {} if self.is_first else {"disable": True}  # a study has its own way to hide all bars
        with (
            SignalGuard(self.batches.stop, echo=0.0 if self.parallel.world.size == 1 else _ECHO) as guard,
            closing(self.batches),
            self._open_logs() as (log, log_pairs),
            tqdm(total=config.steps, initial=self.step, desc="sae", unit=" steps", mininterval=0.5, **quiet) as bar,
        ):
            try:
                evaluation = self.evaluation() if self.step == config.steps else {}
                while self.step < config.steps:
                    result = self.train_step(self.next_batch())
                    bar.update()
                    for line in self.pair_windows.lines(self.step, is_end=self.step == config.steps):
                        log_pairs(line)
                    # once in a while: log, evaluate, save
                    evaluates = self._is_due(config.eval_every, config.checkpoint_every)
                    if evaluates or self._is_due(config.log_every):
                        metrics = self.metrics(result)
                        bar.set_postfix_str(_in_short(metrics))
                        evaluation = self.evaluation() if evaluates else {}
                        log(metrics | evaluation)
                    if self._is_due(config.checkpoint_every):
                        self.save(evaluation["explained_variance"])
                    if guard.received and self.parallel.world.size == 1:  # several stop together, at the next batch
                        raise Stopped
            except Stopped as stopped:
                number = int(self.parallel.world.max(torch.tensor(guard.received or 0)))
                self.seconds += sum(self.stopwatch.read().values())
                self.save()
                raise Interrupted(signal.Signals(number), self.step) from stopped
        sae = self._whole_sae()
        summary = self._summary(evaluation) | self.parallel.world.on_first(partial(self._token_classes, sae))
        save = partial(save_results, config, self.source, self.folder, sae, summary)
        self.parallel.world.on_first(save)
        return summary

    def next_batch(self) -> Tensor:
        """The next batch [batch, d_in] as the source gives it, on the device; waits for it.

        Raises
        ------
        Stopped
            If `Batches.stop` was called, in any of the processes; in all of them.
        """
        with self.stopwatch.measure("data"):
            if self.parallel.world.size > 1:
                has_stopped = torch.tensor(int(self.batches.is_stopped_while_waiting()))
                if self.parallel.world.max(has_stopped):
                    raise Stopped
            return next(self.batches).to(self.device, non_blocking=True)

    def train_step(self, x: Tensor) -> StepResult:
        """One optimizer step on x [batch, d_in], activations as the source gives them: the rows of this process."""
        with self.stopwatch.measure("sae"):
            x = x * self.scale
            dead = self.dead_features.mask
            with self._autocast():
                output: SAEOutput = self.model(x)
                residual = x - output.reconstruction.float()
                auxiliary = self.dead_features.auxiliary_loss(self.sae, x, residual, dead)
                sparsity = self.sae.sparsity(output, self.variance)
            fvu = self._fraction_unexplained(residual)
            inner = [self._fraction_unexplained(x - reconstruction.float()) for reconstruction in output.inner]
            loss = (
                torch.stack([fvu, *inner]).mean()
                + self.config.sae.sparsity_weight * self._warmup() * sparsity
                + self.config.sae.auxk_weight * auxiliary
            )
            self.dead_features.count(output.features)
        if self.pair_windows.is_due(self.step + 1):
            self._note_pairs(output.features)
        weight = self.penalty.weight(self.step, self.config.steps)
        term = self._penalty(output.features) if weight else None
        with self.stopwatch.measure("sae"):
            gradient_norm = self._descend(loss, term, weight)
            self.sae.project()
            self.sae.observe(output.features)
            self.step += 1
            self._set_l0()
            if self.dead_features.resamples_after(self.step):
                self.dead_features.resample(self.sae, self.optimizer, x, residual.detach(), dead)
        return StepResult(
            loss=loss.detach(),
            fvu=fvu.detach(),
            sparsity=sparsity.detach(),
            auxiliary=auxiliary.detach(),
            penalty=loss.new_zeros(()) if term is None else term.value,
            penalty_weight=weight,
            gradient_norm=gradient_norm,
            features=output.features,
        )

    def metrics(self, result: StepResult) -> dict[str, Any]:
        """The values that every line of metrics.jsonl has, None for what is not defined; waits for the device."""
        terms = {name: float(value) for name, value in result._asdict().items() if name != "features"}
        if not all(map(math.isfinite, terms.values())):
            raise FloatingPointError(self._diverged(str(terms)))
        seconds, n_steps = self.stopwatch.read(), self.step - self._step_of_last_line
        self._step_of_last_line = self.step
        self.seconds += sum(seconds.values())
        return {
            "step": self.step,
            "tokens": self._n_tokens,
            "lr": self.optimizer.param_groups[0]["lr"],
            "l0": self.parallel.world.sum(firing_counts(result.features).sum()).item() / self.config.batch_size,
            **terms,
            "dead_fraction": self.dead_features.n_dead(self._n_tokens) / self.config.sae.n_features,
            "tokens_per_second": ratio(n_steps * self.config.batch_size, sum(seconds.values())),
            **{f"{part}_ms": ratio(1e3 * seconds.get(part, 0.0), n_steps) for part in ("data", "sae", "penalty")},
            "memory_bytes": int(self.parallel.world.max(torch.tensor(peak_memory_bytes(self.device)))),
            **self.penalty.refreshes(),
        }

    def evaluation(self) -> dict[str, Any]:
        """How good the dictionary is now, measured on held-out tokens; None for what is not defined on them.

        `pair_jaccard` compares the most similar pairs with those of the evaluation before. No value depends on the
        batch size of the training or of the transformer.

        Raises
        ------
        FloatingPointError
            If a value is NaN or infinite, as after a step that diverged.
        """
        sae = self.inference_sae()
        with self._divergence_is_named():
            measured = evaluate(sae, self.held_out)
            pairs = self.penalty.select(sae, sae.encode(self._penalised_tokens()))
            metrics = {
                "explained_variance": measured["explained_variance"],
                "normalized_mse": measured["normalized_mse"],
                "held_out_l0": measured["l0"],
                "mean_max_decoder_cosine": mean_max_cosine(sae.W_dec, self.parallel),
                "penalised_pairs": self.parallel.count_of_all(pairs.rows),
                "pair_threshold": pairs.threshold.item(),
                "pair_jaccard": self.pairs.jaccard_with_last(pairs),
                "tau": pairs.tau,
                "density_histogram": measured["density_histogram"],
            }
        not_finite = {name: x for name, x in metrics.items() if isinstance(x, float) and not math.isfinite(x)}
        if not_finite:
            raise FloatingPointError(self._diverged(str(not_finite)))
        return metrics | source_metrics(sae, self.source, self.held_out_shards)

    def inference_sae(self) -> SparseAutoencoder:
        """A copy of the SAE in eval mode, for activations as the source gives them: the part of this process."""
        sae = copy.deepcopy(self.sae).eval().requires_grad_(False)
        sae.divide_scale(self.scale)
        return sae

    def _whole_sae(self) -> SparseAutoencoder:
        """`inference_sae` with the features of all processes, on the first one; of no use on others."""
        sae, ranks = self.inference_sae(), self.parallel.features
        if ranks.size > 1:
            sae.cpu()  # it may be larger than the memory of one device
            for name, own in sae.named_parameters():
                whole = ranks.gather_on_first(own) if sae.is_of_features(name) else None
                if whole is not None:
                    own.data = whole
            sae.parallel = Parallel.alone()
        return sae

    def save(self, explained_variance: float | None = None) -> None:
        """Write a checkpoint, and remove those that are no longer kept.

        With an explained variance it is a candidate for the best. If it cannot be written, this is said on stderr and
        the run goes on.
        """
        before = self.best
        if explained_variance is not None and (before is None or explained_variance > before["value"]):
            self.best = {"step": self.step, "value": explained_variance}
        folder = self.folder / "checkpoints"
        try:
            save_checkpoint(folder, self._checkpoint(), self.parallel.world)
        except OSError as error:
            self.best = before
            if self.is_first:
                tqdm.write(f"{error}; earlier checkpoints are as they were", file=sys.stderr)
            return
        best_step = None if self.best is None else self.best["step"]
        if self.is_first:
            prune_checkpoints(folder, self.step, self.config.keep_checkpoints, best_step)

    def _parts(self) -> dict[str, torch.nn.Module | PairStability | PairWindows]:
        """The parts of a run that know their state, by their names in a checkpoint."""
        names = ("sae", "penalty", "pairs", "pair_windows", "dead_features")
        return {name: getattr(self, name) for name in names}

    def _checkpoint(self) -> Checkpoint:
        """Everything that decides the rest of the run. Which batches are next follows from the step."""
        parts: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        parts |= {"optimizer": self.optimizer.state_dict()["state"]}
        tensors = {"generator": self.generator.get_state()}
        for part, state in parts.items():
            for name, tensor in flatten(state).items():
                if self._is_of_features(part, name):
                    tensor = self.parallel.as_part_of(tensor.detach().cpu(), self.config.sae.n_features)
                tensors[f"{part}.{name}"] = tensor
        values = {name: getattr(self, name) for name in _SAVED_NUMBERS} | {"source": self.source.identity}
        return Checkpoint(self.step, tensors, values, self.config.as_json())

    def _is_of_features(self, part: str, name: str) -> bool:
        """Whether a tensor of a part of the run has a row for every feature."""
        if part == "dead_features":
            return True
        if part == "optimizer":  # 0.exp_avg is of the first parameter, and 0.step a number of steps
            number, _, moment = name.partition(".")
            return moment != "step" and self.sae.is_of_features(list(self._trained)[int(number)])
        return part == "sae" and self.sae.is_of_features(name)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint."""

        def stored(part: str) -> dict[str, Tensor]:
            return checkpoint.tensors_of(part, self.parallel, partial(self._is_of_features, part))

        for name, part in self._parts().items():
            part.load_state_dict(stored(name))
        state, moments = self.optimizer.state_dict(), stored("optimizer")
        state["state"] = {number: {} for number in state["param_groups"][0]["params"]}
        for name, tensor in moments.items():
            number, _, moment = name.partition(".")
            state["state"][int(number)][moment] = tensor
        self.optimizer.load_state_dict(state)
        self.generator.set_state(checkpoint.tensors["generator"])
        for name in _SAVED_NUMBERS:
            setattr(self, name, checkpoint.values[name])

    def _summary(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """The run in numbers, from its last evaluation; None for what is not defined."""
        penalty = 0.0
        if self.config.penalty.target != "none":
            sae = self.inference_sae()
            features = sae.encode(self._penalised_tokens())
            penalty = self.penalty(sae, features, self.dead_features.firing_rate).value.item()
        n_dead = self.dead_features.n_dead(self._n_tokens)
        of_the_moment = ("density_histogram", "pair_jaccard", "tau", "held_out_l0")
        return {
            "steps": self.step,
            "tokens": self._n_tokens,
            "seconds": self.seconds,
            "tokens_per_second": ratio(self._n_tokens, self.seconds),
            "transformer_tokens_per_second": self.source.tokens_per_second,
            "left_out_tokens": self.source.left_out,
            "l0": evaluation["held_out_l0"],
            **{name: value for name, value in evaluation.items() if name not in of_the_moment},
            "dead_features": n_dead,
            "dead_fraction": n_dead / self.config.sae.n_features,
            "penalty": penalty,
            "device": str(self.device),
            **self.penalty.refreshes(),
            **self._mean_stability(),
        }

    def _token_classes(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """How classes of tokens are absorbed in a whole dictionary; empty if it is not asked for."""
        if not self.config.token_classes:
            return {}
        # transformers and datasets take a second to import
        from topk_ortho.activations.cache import TransformerActivations
        from topk_ortho.evaluation.token_classes import token_class_metrics

        if not isinstance(self.source, TransformerActivations):
            raise ValueError(f"token_classes needs the activations of a transformer, not {self.source.name}")
        return token_class_metrics(sae, self.source, self.held_out_shards)

    def _mean_stability(self) -> dict[str, dict[str, float]]:
        """How stable the selected pairs were through the run, and what they stood for; empty if it was not measured."""
        if not self.config.pairs_every:
            return {}
        return mean_stability(map(json.loads, (self.folder / "pairs.jsonl").read_text().splitlines()))

    @property
    def _n_tokens(self) -> int:
        """Training tokens seen so far."""
        return self.step * self.config.batch_size

    def _is_due(self, *every: int) -> bool:
        """Whether something is due now that is done every so many steps (never if that is 0) and at the end."""
        return self.step == self.config.steps or any(n and self.step % n == 0 for n in every)

    def _warmup(self) -> float:
        return warmup(self.step, self.config.warmup_fraction * self.config.steps)

    def _set_l0(self) -> None:
        """Take the number of active features of the next step, where it changes."""
        settings = self.config.sae
        if settings.l0_start is not None:
            assert isinstance(self.sae, TopKSAE | BatchTopKSAE | JumpReLUSAE)
            n_steps = settings.l0_anneal_fraction * self.config.steps
            self.sae.l0 = annealed(settings.l0_start, settings.l0, self.step, n_steps)

    def _autocast(self) -> torch.autocast:
        wanted = self.config.autocast
        is_on = wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_on)

    def _penalty(self, features: Tensor | ActiveFeatures) -> PenaltyTerm:
        with self._divergence_is_named(), self.stopwatch.measure("penalty"):
            term: PenaltyTerm = self.penalty(self.sae, features, self.dead_features.firing_rate)
            return term

    def _note_pairs(self, features: Tensor | ActiveFeatures) -> None:
        """Note the pairs that the penalty selects in this step, in its own batch, before the weights move.

        Without a penalty these are the pairs of the decoder that it would select. So are they for a penalty of another
        op, and in a step that goes without.
        """
        step = self.step + 1
        with self._divergence_is_named():
            pairs = self.penalty.select(self.sae, features)
        relations = {}
        if self.pair_windows.begins(step) and isinstance(self.source, KnownActivations):
            relations = pair_relations(pairs, self.sae.W_dec, self.source.truth)
        self.pair_windows.note(step, pairs, relations)

    def _descend(self, loss: Tensor, term: PenaltyTerm | None, weight: float) -> Tensor:
        """Move the weights against the gradient of the loss and the weighted penalty; returns the gradient's norm."""
        config = self.config
        self.optimizer.zero_grad()
        if term is None:
            loss.backward()
        else:
            gradients = [weight * gradient for gradient in term.gradients]
            torch.autograd.backward([loss, *term.targets], [None, *gradients])
        for weights in self._trained.values():
            if weights.grad is not None:
                weights.grad = self.parallel.batch.sum(weights.grad.contiguous())
        gradient_norm = self._gradient_norm()
        torch.nn.utils.clip_grads_with_norm_(self._trained.values(), config.clip_norm or math.inf, gradient_norm)
        fall = decay(self.step, config.steps, config.decay_fraction * config.steps)
        self.optimizer.param_groups[0]["lr"] = config.lr * min(self._warmup(), fall)
        self.optimizer.step()
        return gradient_norm

    def _gradient_norm(self) -> Tensor:
        """The norm of the gradient in the weights of all processes."""
        by_place: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, weights in self._trained.items():
            if weights.grad is not None:
                by_place[self.sae.is_of_features(name)].append(weights.grad)
        of_features, of_all = (torch.nn.utils.get_total_norm(by_place[place]) for place in (True, False))
        return (self.parallel.features.sum(of_features.square()) + of_all.square()).sqrt()

    def _fraction_unexplained(self, residual: Tensor) -> Tensor:
        """Mean squared norm of the residuals [batch, d_in] of all processes, relative to the total variance."""
        mean = residual.square().sum(dim=1).sum() / self.parallel.n_rows(residual)
        return self.parallel.sum_batch(mean) / self.variance

    def _fit_scale(self) -> None:
        """Take scale, total variance and the SAE's centre from the first tokens that are shuffled together."""
        mean, variance = mean_and_variance(self.batches.pool, self.parallel.world)
        if variance == 0:
            raise ValueError(
                f"all activations at {self.source.name} are equal up to rounding: there is nothing to learn"
            )
        if self.config.sae.normalize_activations == "rms":
            self.scale = (self.source.d_in / (variance + mean.square().sum().item())) ** 0.5
        self.variance = variance * self.scale**2
        if self.config.init_from is None:
            self.sae.b_dec.data.copy_(mean * self.scale)
            return
        saved = read_saelens(self.config.init_from)
        is_free = self.config.sae.decoder_norm == "none"
        start_from_saved(self.sae, saved if is_free else saved.of_unit_length(), self.scale)

    def _penalised_tokens(self) -> Tensor:
        """The held-out tokens [n, d_in] over which activations are compared, float32, on the device."""
        n_held = self.parallel.world.gather_objects(len(self.held_out))
        start, total = sum(n_held[: self.parallel.world.rank]), min(_PENALISED_TOKENS, sum(n_held))
        own = self.held_out[: max(0, total - start)].float()
        return self.parallel.world.gather(own, start, total).to(self.device)

    @contextmanager
    def _open_logs(self) -> Iterator[tuple[Log, Log]]:
        """Write the configuration, and open the logs of metrics and of windows of pairs; only the first process."""
        if not self.is_first:
            yield lambda metrics: None, lambda line: None
            return
        with (
            open_loggers(self.config, self.folder, self.step) as log,
            open_pairs_log(self.config, self.folder, self.step) as log_pairs,
        ):
            write_whole(self.folder / "config.json", json.dumps(self.config.as_json(), indent=2) + "\n")
            if self.step < self.config.steps:  # a run that was finished with fewer steps is unfinished again
                (self.folder / "summary.json").unlink(missing_ok=True)
            yield log, log_pairs

    @contextmanager
    def _divergence_is_named(self) -> Iterator[None]:
        """Name the cause of errors that NaN, Inf and overflow bring about, as only divergence leads to these.

        Where weights and their squares are finite, features have norms, and the error has another cause.
        """
        try:
            yield
        except ValueError as error:
            if all(weights.square().sum().isfinite() for weights in self.sae.parameters()):
                raise
            raise FloatingPointError(self._diverged(str(error))) from error

    def _diverged(self, what: str) -> str:
        return f"training diverged by step {self.step}: {what}; a lower lr may help"


def _in_short(metrics: dict[str, Any]) -> str:
    """The few metrics that stand beside the progress bar."""
    return (
        f"FVU {metrics['fvu']:.3f}, L0 {metrics['l0']:.0f}, penalty {metrics['penalty']:.4f}, "
        f"dead {metrics['dead_fraction']:.0%}"
    )
