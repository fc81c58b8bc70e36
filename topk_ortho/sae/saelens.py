"""The penalty as a plug-in for SAELens: their training SAEs with one more term in the loss.

Every class is one of theirs with `Ortho` before its name, and goes wherever theirs goes: into `SAETrainer`, its config
into ``LanguageModelSAERunnerConfig(sae=...)``. To what they minimise it adds

    coefficient * variance * loss(x)

- ``loss`` is `topk_ortho_loss` or `max_cosine_loss`;
- ``x`` is W_dec.T [d_in, d_sae], or the batch's feature activations [batch, d_sae];
- ``variance`` is the batch's, summed over d_in. SAELens's reconstruction term is a squared error summed over d_in,
  so ``variance`` times the fraction of variance unexplained: the coefficient is relative to that fraction, as
  `penalty.weight` of train.py is, and carries over to another model, layer or normalisation. (A matryoshka SAE has one
  reconstruction term for each of its widths.)
- ``coefficient`` rises to the config's `ortho_weight` by SAELens's own schedule.

The term is logged as "losses/topk_ortho_loss", without coefficient and variance as "metrics/topk_ortho_unweighted".
Checkpoints name the architecture "topk_ortho_..." and are loaded where this module has been imported; what is saved for
inference is the extended architecture's and needs nothing of ours.

Another architecture gets the penalty as the five below do, by mixing in `OrthoConfigMixin` and `OrthoMixin`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from topk_ortho import TopKOrthoLoss, max_cosine_loss

try:
    from sae_lens import saes
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
    from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
except ModuleNotFoundError as error:
    message = "topk_ortho.sae.saelens needs SAELens: pip install 'topk-ortho[saelens]'"
    raise ModuleNotFoundError(message, name=error.name) from error

Op = Literal["topk_pairs", "max_cosine"]
Target = Literal["decoder", "activations"]
Priority = Literal["firing-rate", "none"]

_FIRING_RATE_DECAY = 0.99


@dataclass(kw_only=True)
class OrthoConfigMixin(saes.TrainingSAEConfig):
    """Fields of the penalty; the architecture is called "topk_ortho_" and the name of the one that it extends."""

    inference_config_class: ClassVar[type[saes.SAEConfig]]
    """Config of the SAE that is saved for inference: that of the extended architecture."""

    ortho_weight: float = 0.3
    """Weight of the penalty, relative to the fraction of variance unexplained; 0 trains as without it, and still logs
    the unweighted loss."""
    ortho_warm_up_steps: int = 0
    """Steps over which the weight rises from 0."""
    ortho_op: Op = "topk_pairs"
    """The loss: "topk_pairs" is `topk_ortho_loss`, "max_cosine" is OrtSAE's `max_cosine_loss`."""
    ortho_target: Target = "decoder"
    """Columns that should not be similar: decoder directions, or the features' activations over the batch."""
    ortho_fraction: float = 1e-3
    """Share of all feature pairs that is penalised ("topk_pairs")."""
    ortho_tau: float | Literal["adaptive"] | None = None
    """Only pairs with |cosine| above this count ("topk_pairs"); "adaptive" is mean + n_std * std over all pairs."""
    ortho_n_std: float = 1.0
    """Standard deviations above the mean, for the adaptive tau."""
    ortho_similarity: Literal["abs", "positive"] = "positive"
    """Whether anti-parallel features count as similar ("topk_pairs")."""
    ortho_reduction: Literal["mean", "sum"] = "mean"
    """Whether squared cosines are averaged or summed over the selected pairs ("topk_pairs")."""
    ortho_priority: Priority = "firing-rate"
    """In each pair hold the feature that fires more often ("topk_pairs"); "none" moves both."""
    ortho_n_chunks: int = 1
    """Number of random chunks within which features are compared ("max_cosine"); 1 compares all with all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.ortho_weight < math.inf, "ortho_weight", self.ortho_weight, "0 or more")
        _require(self.ortho_warm_up_steps >= 0, "ortho_warm_up_steps", self.ortho_warm_up_steps, "0 or more")
        n_chunks = self.ortho_n_chunks
        _require(1 <= n_chunks <= self.d_sae // 2, "ortho_n_chunks", n_chunks, f"in [1, d_sae / 2 = {self.d_sae // 2}]")
        for name, words in (("ortho_op", Op), ("ortho_target", Target), ("ortho_priority", Priority)):
            _require(getattr(self, name) in get_args(words), name, getattr(self, name), f"one of {get_args(words)}")
        self.make_topk_ortho()(torch.eye(2))  # the op checks its own arguments

    def make_topk_ortho(self) -> TopKOrthoLoss:
        """`TopKOrthoLoss` of these fields."""
        return TopKOrthoLoss(
            self.ortho_fraction,
            tau=self.ortho_tau,
            n_std=self.ortho_n_std,
            similarity=self.ortho_similarity,
            reduction=self.ortho_reduction,
        )

    @classmethod
    def architecture(cls) -> str:
        """Name in SAELens's registry and in saved configs."""
        return f"topk_ortho_{super().architecture()}"

    def get_inference_config_class(self) -> type[saes.SAEConfig]:
        """Config of the SAE that is saved for inference, which knows nothing of the penalty."""
        return self.inference_config_class


class OrthoMixin(saes.TrainingSAE[Any]):
    """The penalty's term of the loss. A subclass that names its `config_class` is registered with SAELens.

    Attributes
    ----------
    topk_ortho : TopKOrthoLoss
        The loss of "topk_pairs", with its warm-start state.
    ortho_firing_rate : Tensor, float32 [d_sae]
        Share of tokens on which each feature fires: an exponential average with a decay of 0.99 a training step.
    """

    ortho_firing_rate: Tensor

    def __init_subclass__(cls, config_class: type[OrthoConfigMixin] | None = None, **arguments: Any):
        super().__init_subclass__(**arguments)
        if config_class is not None:
            # a module that is imported again registers its classes anew
            SAE_TRAINING_CLASS_REGISTRY.pop(config_class.architecture(), None)
            register_sae_training_class(config_class.architecture(), cls, config_class)

    def __init__(self, cfg: OrthoConfigMixin, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        device = self.W_dec.device
        self.topk_ortho = cfg.make_topk_ortho().to(device)
        self.register_buffer("ortho_firing_rate", torch.zeros(cfg.d_sae, device=device))

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """Coefficients of the extended SAE, and that of the penalty, "topk_ortho"."""
        ours = TrainCoefficientConfig(self.cfg.ortho_weight, self.cfg.ortho_warm_up_steps)
        return {**super().get_coefficients(), "topk_ortho": ours}  # type: ignore[safe-super]  # it is the extended SAE's

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The forward pass of the extended SAE, with the penalty added to its loss."""
        output = super().training_forward_pass(step_input)
        self._count_firing(output.feature_acts)
        loss = self._ortho_loss(output.feature_acts, step_input.n_training_steps)
        variance = step_input.sae_in.float().var(dim=0, correction=0).sum()
        penalty = step_input.coefficients["topk_ortho"] * variance * loss
        output.loss = output.loss + penalty
        output.losses["topk_ortho_loss"] = penalty
        output.metrics["topk_ortho_unweighted"] = loss.detach()
        return output

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """What the extended SAE saves, without what only the penalty needs."""
        super().process_state_dict_for_saving_inference(state_dict)
        for name in ("topk_ortho.state", "ortho_firing_rate"):
            del state_dict[name]

    @torch.no_grad()
    def _count_firing(self, feature_acts: Tensor) -> None:
        # these operations also take the sparse activations that a TopK SAE may have
        fired = feature_acts.bool().float().sum(0).to_dense() / feature_acts.shape[0]
        # back to float32, as SAE.to(dtype) casts buffers too
        self.ortho_firing_rate = self.ortho_firing_rate.float().lerp(fired, 1 - _FIRING_RATE_DECAY)

    def _ortho_loss(self, feature_acts: Tensor, step: int) -> Tensor:
        x = self.W_dec.T if self.cfg.ortho_target == "decoder" else feature_acts
        if self.cfg.ortho_op == "max_cosine":
            # chunks that follow from the step: a resumed run draws the same, and no other random number changes
            return max_cosine_loss(x, self.cfg.ortho_n_chunks, generator=torch.Generator().manual_seed(step))
        priority = self.ortho_firing_rate if self.cfg.ortho_priority == "firing-rate" else None
        result: Tensor = self.topk_ortho(x, priority)
        return result


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclass
class OrthoStandardTrainingSAEConfig(OrthoConfigMixin, saes.StandardTrainingSAEConfig):
    """`StandardTrainingSAEConfig` with the fields of the penalty."""

    inference_config_class = saes.StandardSAEConfig


class OrthoStandardTrainingSAE(OrthoMixin, saes.StandardTrainingSAE, config_class=OrthoStandardTrainingSAEConfig):
    """`StandardTrainingSAE` with the penalty."""


@dataclass
class OrthoTopKTrainingSAEConfig(OrthoConfigMixin, saes.TopKTrainingSAEConfig):
    """`TopKTrainingSAEConfig` with the fields of the penalty."""

    inference_config_class = saes.TopKSAEConfig


class OrthoTopKTrainingSAE(OrthoMixin, saes.TopKTrainingSAE, config_class=OrthoTopKTrainingSAEConfig):
    """`TopKTrainingSAE` with the penalty."""


@dataclass
class OrthoBatchTopKTrainingSAEConfig(OrthoConfigMixin, saes.BatchTopKTrainingSAEConfig):
    """`BatchTopKTrainingSAEConfig` with the fields of the penalty."""

    inference_config_class = saes.JumpReLUSAEConfig


class OrthoBatchTopKTrainingSAE(OrthoMixin, saes.BatchTopKTrainingSAE, config_class=OrthoBatchTopKTrainingSAEConfig):
    """`BatchTopKTrainingSAE` with the penalty."""


@dataclass
class OrthoJumpReLUTrainingSAEConfig(OrthoConfigMixin, saes.JumpReLUTrainingSAEConfig):
    """`JumpReLUTrainingSAEConfig` with the fields of the penalty."""

    inference_config_class = saes.JumpReLUSAEConfig


class OrthoJumpReLUTrainingSAE(OrthoMixin, saes.JumpReLUTrainingSAE, config_class=OrthoJumpReLUTrainingSAEConfig):
    """`JumpReLUTrainingSAE` with the penalty."""


@dataclass
class OrthoMatryoshkaBatchTopKTrainingSAEConfig(OrthoConfigMixin, saes.MatryoshkaBatchTopKTrainingSAEConfig):
    """`MatryoshkaBatchTopKTrainingSAEConfig` with the fields of the penalty."""

    inference_config_class = saes.JumpReLUSAEConfig


class OrthoMatryoshkaBatchTopKTrainingSAE(
    OrthoMixin, saes.MatryoshkaBatchTopKTrainingSAE, config_class=OrthoMatryoshkaBatchTopKTrainingSAEConfig
):
    """`MatryoshkaBatchTopKTrainingSAE` with the penalty."""
