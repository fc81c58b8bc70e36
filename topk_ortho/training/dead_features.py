"""Which features fire, how often, and two ways to revive those that stopped."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topk_ortho.sae import ActiveFeatures, SparseAutoencoder, firing_counts
from topk_ortho.training.config import TrainConfig

_ENCODER_SHRINK = 0.2
_FIRING_RATE_DECAY = 0.99  # per step: an average over about the last 100 batches


class DeadFeatures(nn.Module):
    """Counts when features fire, and revives those that stopped as the configuration says.

    Parameters
    ----------
    config : TrainConfig
        The run: `dead_after_tokens`, and what is done about dead features.
    d_in : int
        Width of the activations.
    generator : torch.Generator
        Draws the tokens at which features are restarted.

    Attributes
    ----------
    firing_rate : Tensor, float32 [n_features]
        Share of tokens on which each feature fires, an exponential average over batches.
    tokens_since_fired : Tensor, int64 [n_features]
        Training tokens since each feature fired last, or was restarted.
    """

    firing_rate: Tensor
    tokens_since_fired: Tensor

    def __init__(self, config: TrainConfig, d_in: int, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.n_active = config.sae.auxk or max(1, d_in // 2)
        self.generator = generator
        self.register_buffer("firing_rate", torch.zeros(config.sae.n_features))
        self.register_buffer("tokens_since_fired", torch.zeros(config.sae.n_features, dtype=torch.int64))

    @property
    def mask(self) -> Tensor:
        """Whether each feature is dead, bool [n_features]."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def n_dead(self, n_tokens: int) -> int:
        """Number of features that have not fired for `dead_after_tokens` training tokens, or at all in fewer."""
        window = max(1, min(self.config.dead_after_tokens, n_tokens))
        return int((self.tokens_since_fired >= window).sum())

    @torch.no_grad()
    def count(self, features: Tensor | ActiveFeatures) -> None:
        """Take in the features [batch, n_features] of a training step."""
        counts = firing_counts(features)
        self.firing_rate.lerp_(counts / self.config.batch_size, 1 - _FIRING_RATE_DECAY)
        self.tokens_since_fired += self.config.batch_size
        self.tokens_since_fired[counts > 0] = 0

    def auxiliary_loss(self, sae: SparseAutoencoder, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """`auxiliary_loss` if the configuration asks for it, else 0."""
        config = self.config.sae
        if config.dead_features != "auxk" or config.auxk_weight == 0:
            return residual.new_zeros(())
        return auxiliary_loss(sae, x, residual, dead, self.n_active)

    def resamples_after(self, step: int) -> bool:
        """Whether dead features are restarted once so many steps are done; none are in the last fifth of the run."""
        config = self.config.sae
        is_due = step % config.resample_every == 0 and step <= 0.8 * self.config.steps
        return config.dead_features == "resample" and is_due

    def resample(self, sae: SparseAutoencoder, optimizer: Optimizer, x: Tensor, residual: Tensor, dead: Tensor) -> None:
        """Restart dead features, see `resample`; their count begins anew."""
        resample(sae, optimizer, x, residual, dead, self.generator)
        self.tokens_since_fired[dead] = 0


def auxiliary_loss(sae: SparseAutoencoder, x: Tensor, residual: Tensor, dead: Tensor, n_active: int) -> Tensor:
    """Squared error of the dead features' reconstruction of what the others leave over, mean over the batch, [] [1]_.

    Parameters
    ----------
    sae : SparseAutoencoder
        The dictionary.
    x, residual : Tensor, shape [batch, d_in]
        Activations, and what their reconstruction misses of them; the residual is taken as given.
    dead : Tensor, shape [n_features], bool
        Features that stopped firing.
    n_active : int
        Dead features that a token may use, those of the largest pre-activations. These are used as they are, below 0
        too, so that a feature far from firing gets a gradient as well. If fewer are dead, the loss is scaled down in
        proportion.

    References
    ----------
    .. [1] Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, appendix A.2.
    """
    numbers = dead.nonzero().squeeze(1)
    if numbers.numel() == 0:
        return residual.new_zeros(())
    pre_activations = torch.nn.functional.linear(x - sae.b_dec, sae.W_enc[numbers], sae.b_enc[numbers])
    largest = pre_activations.topk(min(n_active, numbers.numel()), dim=1, sorted=False)
    features = torch.zeros_like(pre_activations).scatter(1, largest.indices, largest.values)
    error = features.float() @ sae.W_dec[numbers] - residual.detach()
    return error.square().sum(dim=1).mean() * min(1.0, numbers.numel() / n_active)


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    optimizer: Optimizer,
    x: Tensor,
    residual: Tensor,
    dead: Tensor,
    generator: torch.Generator,
) -> None:
    """Restart dead features at tokens that are reconstructed badly [1]_, in place.

    A token is drawn with probability proportional to its squared error squared; a feature's directions become the
    token's, its encoder's 0.2 times as long as the living ones' are on average, its bias 0, and Adam forgets it.

    Parameters
    ----------
    sae, x, residual, dead
        As in `auxiliary_loss`.
    optimizer : Optimizer
        Adam over the SAE's parameters.
    generator : torch.Generator
        Draws the tokens.

    References
    ----------
    .. [1] Bricken et al., "Towards monosemanticity", 2023, section "Neuron resampling".
    """
    numbers = dead.nonzero().squeeze(1)
    if numbers.numel() == 0:
        return
    error = residual.double().square().sum(dim=1).cpu()
    chosen = torch.multinomial(error.square() + 1e-30, numbers.numel(), replacement=True, generator=generator)
    directions = torch.nn.functional.normalize(x[chosen.to(x.device)] - sae.b_dec, dim=1)
    alive = sae.W_enc[~dead]
    length = torch.linalg.vector_norm(alive, dim=1).mean() if alive.shape[0] else 1.0
    sae.W_dec[numbers] = directions
    sae.W_enc[numbers] = directions * (_ENCODER_SHRINK * length)
    sae.b_enc[numbers] = 0.0
    for parameter in (sae.W_dec, sae.W_enc, sae.b_enc):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment][numbers] = 0.0
