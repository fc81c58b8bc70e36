"""Which features fire, how often, and two ways to revive those that stopped."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.optim import Optimizer

from topk_ortho.distributed.parallel import Parallel
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
    parallel : Parallel, optional
        The processes that train together, this one alone by default. Each counts its part of the features, which are
        the n_features of what follows.

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

    def __init__(self, config: TrainConfig, d_in: int, generator: torch.Generator, parallel: Parallel | None = None):
        super().__init__()
        self.config = config
        self.n_active = config.sae.auxk or min(config.sae.n_features, max(1, d_in // 2))
        self.generator = generator
        self.parallel = Parallel.alone() if parallel is None else parallel
        firing_rate = torch.zeros(config.sae.n_features)[self.parallel.rows_here(config.sae.n_features)]
        self.register_buffer("firing_rate", firing_rate.clone())
        self.register_buffer("tokens_since_fired", torch.zeros_like(firing_rate, dtype=torch.int64))

    @property
    def mask(self) -> Tensor:
        """Whether each feature is dead, bool [n_features]."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def n_dead(self, n_tokens: int) -> int:
        """Features of all processes that were silent for `dead_after_tokens`, or for all n_tokens of a shorter run."""
        window = max(1, min(self.config.dead_after_tokens, n_tokens))
        return int(self.parallel.features.sum((self.tokens_since_fired >= window).sum()))

    @torch.no_grad()
    def count(self, features: Tensor | ActiveFeatures) -> None:
        """Take in the features [batch, n_features] of a training step."""
        counts = self.parallel.batch.sum(firing_counts(features))
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
        config, parallel = self.config.sae, self.parallel
        if config.dead_features != "auxk" or config.auxk_weight == 0:
            return residual.new_zeros(())
        n_dead = int(parallel.features.sum(dead.sum()))
        if n_dead == 0:
            return residual.new_zeros(())
        pre_activations = linear(sae.centred(x), sae.W_enc[numbers], sae.b_enc[numbers])
        active = parallel.largest_in_rows(pre_activations.detach(), min(self.n_active, n_dead))
        features = torch.zeros_like(pre_activations).flatten()
        features = features.scatter(0, active, pre_activations.flatten()[active]).view_as(pre_activations)
        residual = residual.detach()
        reconstruction = features.float() @ sae.W_dec[numbers]
        error = parallel.sum_features(reconstruction.to(residual.dtype)) - residual  # not in the dtype of autocast
        squares = parallel.batch.sum(torch.stack([residual.square().sum(), x.detach().square().sum()]))
        explained = torch.maximum(squares[0], torch.finfo(residual.dtype).eps * squares[1])
        return parallel.sum_batch(error.square().sum()) / explained

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
        numbers, parallel = dead.nonzero().squeeze(1), self.parallel
        n_dead: list[int] = parallel.features.gather_objects(numbers.numel())
        if sum(n_dead) == 0:
            return
        first_row, n_rows = len(x) * parallel.batch.rank, parallel.n_rows(x)
        x, residual = (parallel.batch.gather(part, first_row, n_rows) for part in (x, residual))
        error = residual.double().square().sum(dim=1).cpu()
        weights = error.square() + 1e-30
        chosen = torch.multinomial(weights, sum(n_dead), replacement=True, generator=self.generator)
        first = sum(n_dead[: parallel.features.rank])
        directions = normalize(x[chosen[first : first + numbers.numel()].to(x.device)] - sae.b_dec, dim=1)
        n_alive = self.config.sae.n_features - sum(n_dead)
        length = 1.0
        if n_alive:
            length = float(parallel.features.sum(torch.linalg.vector_norm(sae.W_enc[~dead], dim=1).sum())) / n_alive
        sae.W_dec[numbers] = directions
        sae.W_enc[numbers] = directions * (_ENCODER_SHRINK * length)
        sae.b_enc[numbers] = 0.0
        for parameter in (sae.W_dec, sae.W_enc, sae.b_enc):
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in optimizer.state[parameter]:
                    optimizer.state[parameter][moment][numbers] = 0.0
        self.tokens_since_fired[dead] = 0
