"""What the tests of `Parallel` run on every rank."""

import copy
import math
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from tests.activations.sources import numbered
from topk_ortho.activations.batches import Batches
from topk_ortho.activations.source import mean_and_variance
from topk_ortho.distributed.parallel import Parallel
from topk_ortho.distributed.ranks import FailedOnFirst
from topk_ortho.evaluation import evaluate
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder, StandardSAE
from topk_ortho.training.config import SAEConfig, TrainConfig
from topk_ortho.training.dead_features import DeadFeatures


def largest_in_rows(parallel: Parallel, values: Tensor, count: int) -> Tensor:
    """Which of the values of all are chosen, as a mask of those here."""
    own = values[:, parallel.rows_here(values.shape[1])]
    positions = parallel.largest_in_rows(own, count)
    assert torch.equal(positions, positions.unique())
    return torch.zeros(own.numel(), dtype=torch.bool).index_fill(0, positions, True).view_as(own)


def largest_of_batch(parallel: Parallel, values: Tensor, count: int) -> tuple[int, int, Tensor]:
    """The part of a batch and of the features, and the mask of those chosen there, of values above 0."""
    n_rows = len(values) // parallel.batch.size
    own = values.split(n_rows)[parallel.batch.rank][:, parallel.rows_here(values.shape[1])]
    candidates = (own.flatten() > 0).nonzero().squeeze(1)
    positions = parallel.largest_of_batch(own, candidates, count)
    mask = torch.zeros(own.numel(), dtype=torch.bool).index_fill(0, positions, True).view_as(own)
    return parallel.batch.rank, parallel.features.rank, mask


def dealt(parallel: Parallel, found: list[Tensor]) -> Tensor:
    """The numbers that end up here."""
    own = parallel.deal(found[parallel.world.rank])
    assert torch.equal(own, parallel.dealt_here(torch.cat(found).sort().values))
    return own


def batches(parallel: Parallel, sizes: list[int], batch_size: int, n: int) -> tuple[list[Tensor], set[int], int]:
    """Parts of batches, the shards that were read, and how many tokens of a pool are held."""
    source = numbered(sizes)
    arguments = (source, list(range(len(sizes))), batch_size, sum(sizes), 0, 0, parallel)
    with closing(Batches(*arguments)) as found:
        assert not found.is_stopped_while_waiting()
        n_held = len(found.pool)
        parts = [next(found) for _ in range(n)]
        found.stop()
        assert found.is_stopped_while_waiting()
        return parts, set(source.asked), n_held


def moments(parallel: Parallel, tokens: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of rows that are spread unevenly, none on the last rank of several."""
    size = parallel.world.size
    cuts = [0, *(len(tokens) * (n + 1) // max(1, size - 1) for n in range(size - 1)), len(tokens)]
    own = tokens[cuts[parallel.world.rank] : cuts[parallel.world.rank + 1]]
    return mean_and_variance(own, parallel.world)


def step_of(parallel: Parallel, kind: type[SparseAutoencoder], options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """Loss, gradients and evaluation of an SAE in float64, of the part of this process."""
    generator = torch.Generator().manual_seed(0)
    sae = kind(x.shape[1], 23, generator=generator, parallel=parallel, **options).double()
    with torch.no_grad():
        sae.b_dec += torch.linspace(-0.1, 0.1, x.shape[1]).double()
        sae.b_enc += 0.05
    own = x.split(len(x) // parallel.batch.size)[parallel.batch.rank]
    output = sae(own)
    reconstructions = [output.reconstruction, *output.inner]
    errors = torch.stack([(own - each).square().sum() for each in reconstructions]).sum()
    loss = parallel.sum_batch(errors) + sae.sparsity(output, 1.5)
    loss.backward()
    sae.observe(output.features)
    gradients = {}
    for name, weights in sae.named_parameters():
        if weights.grad is not None:
            gradient = parallel.batch.sum(weights.grad.contiguous())
            gradients[name] = parallel.gather_features(gradient, 23) if sae.is_of_features(name) else gradient
    features = output.features.to_dense() if isinstance(output.features, ActiveFeatures) else output.features
    kept = x[parallel.world.rank :: parallel.world.size].float()
    measured = evaluate(copy.deepcopy(sae).float().eval(), kept)
    return {
        "loss": loss.item(), "gradients": gradients, "measured": measured,
        "n_active": parallel.count_of_all(features.nonzero()[:, 0]),
        "threshold": sae.state_dict().get("threshold", torch.zeros(())).double().sum().item(),
    }  # fmt: skip


def on_first(parallel: Parallel, fails: bool) -> Any:
    """What `Ranks.on_first` does on every rank, and whether they can go on together."""

    def work() -> str:
        if fails:
            raise KeyError("no")
        return f"of rank {parallel.world.rank}"

    try:
        answer = parallel.world.on_first(work)
    except (KeyError, FailedOnFirst) as error:
        answer = type(error).__name__
    assert int(parallel.world.sum(torch.tensor(1))) == parallel.world.size
    return answer


def drawn(parallel: Parallel, n_features: int, d_in: int) -> Tensor:
    """The directions that are drawn here."""
    sae = StandardSAE(d_in, n_features, generator=torch.Generator().manual_seed(3), parallel=parallel)
    assert math.isclose(sae.W_enc.norm().item(), sae.W_dec.norm().item() * d_in / n_features, rel_tol=1e-4)
    return sae.W_dec.detach()


def revived(parallel: Parallel, dead: Tensor, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
    """Auxiliary loss and gradient of dead features, and the weights after they were restarted."""
    settings: dict[str, Any] = {"n_features": len(dead), "l0": 1, "auxk": 4}
    n_features, generator = len(dead), torch.Generator().manual_seed(5)
    sae = StandardSAE(x.shape[1], n_features, generator=generator, parallel=parallel)
    part = parallel.batch.rank
    own_x, own_residual = (rows.split(len(x) // parallel.batch.size)[part] for rows in (x, residual))
    own_dead = dead[parallel.rows_here(n_features)]
    features = DeadFeatures(TrainConfig(batch_size=len(x), sae=SAEConfig(**settings)), x.shape[1], generator, parallel)
    loss = features.auxiliary_loss(sae, own_x, own_residual, own_dead)
    gradient = torch.zeros_like(sae.W_dec)
    if loss.requires_grad:
        loss.backward()
        gradient = parallel.batch.sum(sae.W_dec.grad)
    features.tokens_since_fired += own_dead * 10**9
    n_dead = features.n_dead(10**9)
    features.resample(sae, torch.optim.Adam(sae.parameters()), own_x, own_residual, own_dead)
    found = {"gradient": gradient, "W_dec": sae.W_dec.detach(), "W_enc": sae.W_enc.detach()}
    whole = {name: parallel.gather_features(tensor, n_features) for name, tensor in found.items()}
    return whole | {"loss": loss.detach(), "n_dead": torch.tensor(n_dead), "left": torch.tensor(features.n_dead(10**9))}
