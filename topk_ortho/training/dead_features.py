"""Which features fire, how often, and two ways to revive those that stopped."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.optim import Optimizer

from topk_ortho.sae import ActiveFeatures, SparseAutoencoder, firing_counts
from topk_ortho.training.config import TrainConfig

_ENCODER_SHRINK = 0.2
_FIRING_RATE_DECAY = 0.99  # per step: an average over about the last 100 batches


class DeadFeatures(nn.Module):
    """Counts when features fire, and revives those that stopped in the way that the configuration names.

    Parameters
    ----------
    config : TrainConfig
        The run: after how many tokens a feature counts as dead, and what is done about it.
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

    References
    ----------
    .. [1] Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, appendix A.2.
    .. [2] Bricken et al., "Towards monosemanticity", 2023, section "Neuron resampling".
    """

    firing_rate: Tensor
    tokens_since_fired: Tensor

    def __init__(self, config: TrainConfig, d_in: int, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.n_active = config.sae.auxk or min(config.sae.n_features, max(1, d_in // 2))
        self.generator = generator
        self.register_buffer("firing_rate", torch.zeros(config.sae.n_features))
        self.register_buffer("tokens_since_fired", torch.zeros(config.sae.n_features, dtype=torch.int64))

    @property
    def mask(self) -> Tensor:
        """Whether each feature is dead, bool [n_features]."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def n_dead(self, n_tokens: int) -> int:
        """Number of features that have been silent for `dead_after_tokens`, or for all n_tokens of a shorter run."""
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
        """Share of the residual that the dead features cannot reconstruct, [] [1]_.

        It is the squared error of their reconstruction over the squared norm of the residual, both summed over the
        batch, so that the pull on dead features does not fade as the dictionary gets better. A token uses the `auxk`
        dead features of the largest pre-activations. These are taken as they are, below 0 too, so that a feature far
        from firing gets a gradient as well. The loss is 0 if the configuration revives features in another way.

        Parameters
        ----------
        sae : SparseAutoencoder
            The dictionary.
        x, residual : Tensor, shape [batch, d_in]
            Activations, and what their reconstruction misses of them; no gradient goes into the residual.
        dead : Tensor, shape [n_features], bool
            Features that stopped firing.
        """
        numbers = dead.nonzero().squeeze(1)
        config = self.config.sae
        if config.dead_features != "auxk" or config.auxk_weight == 0 or numbers.numel() == 0:
            return residual.new_zeros(())
        pre_activations = linear(x - sae.b_dec, sae.W_enc[numbers], sae.b_enc[numbers])
        largest = pre_activations.topk(min(self.n_active, numbers.numel()), dim=1, sorted=False)
        features = torch.zeros_like(pre_activations).scatter(1, largest.indices, largest.values)
        residual = residual.detach()
        error = features.float() @ sae.W_dec[numbers] - residual
        rounding = torch.finfo(residual.dtype).eps * x.detach().square().sum()
        return error.square().sum() / torch.maximum(residual.square().sum(), rounding)

    def resamples_after(self, step: int) -> bool:
        """Whether dead features are restarted when so many steps are done; none are in the last fifth of the run."""
        config = self.config.sae
        is_due = step % config.resample_every == 0 and step <= 0.8 * self.config.steps
        return config.dead_features == "resample" and is_due

    @torch.no_grad()
    def resample(self, sae: SparseAutoencoder, optimizer: Optimizer, x: Tensor, residual: Tensor, dead: Tensor) -> None:
        """Restart dead features at tokens that are reconstructed badly, in place [2]_.

        Each feature draws a token, with a probability proportional to the square of the token's squared error, and
        takes its direction. The encoder's row gets 0.2 times the mean length of the rows of living features. The bias
        becomes 0, and so do the moments of Adam. The arguments are those of `auxiliary_loss` and the optimizer.
        """
        numbers = dead.nonzero().squeeze(1)
        if numbers.numel() == 0:
            return
        error = residual.double().square().sum(dim=1).cpu()
        weights = error.square() + 1e-30
        chosen = torch.multinomial(weights, numbers.numel(), replacement=True, generator=self.generator)
        directions = normalize(x[chosen.to(x.device)] - sae.b_dec, dim=1)
        alive = sae.W_enc[~dead]
        length = torch.linalg.vector_norm(alive, dim=1).mean() if alive.shape[0] else 1.0
        sae.W_dec[numbers] = directions
        sae.W_enc[numbers] = directions * (_ENCODER_SHRINK * length)
        sae.b_enc[numbers] = 0.0
        for parameter in (sae.W_dec, sae.W_enc, sae.b_enc):
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in optimizer.state[parameter]:
                    optimizer.state[parameter][moment][numbers] = 0.0
        self.tokens_since_fired[dead] = 0
