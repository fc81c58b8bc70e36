"""Two ways to revive features that stopped firing."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from topk_ortho.sae import SparseAutoencoder

_ENCODER_SHRINK = 0.2


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
