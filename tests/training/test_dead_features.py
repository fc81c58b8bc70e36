import pytest
import torch

from topk_ortho.sae import StandardSAE
from topk_ortho.training.config import SAEConfig, TrainConfig
from topk_ortho.training.dead_features import DeadFeatures

DEAD = torch.tensor([1, 4, 5])


@pytest.fixture
def sae():
    sae = StandardSAE(6, 10, generator=torch.Generator().manual_seed(0))
    sae.b_dec.data = torch.randn(6, generator=torch.Generator().manual_seed(1))
    return sae


def dead_features(seed=0, **settings):
    """For dictionaries of 10 features of width 6, as `sae` is."""
    config = TrainConfig(sae=SAEConfig(n_features=10, l0=2, **settings))
    return DeadFeatures(config, 6, torch.Generator().manual_seed(seed))


def is_dead():
    return torch.zeros(10, dtype=torch.bool).index_fill(0, DEAD, True)


def inputs(seed=2):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_active", [2, 3, 10])
def test_auxiliary_loss_is_its_definition(sae, n_active):
    x, residual = inputs(), inputs(3)
    total = 0.0
    for row, error in zip(x, residual, strict=True):
        pre = {i: (sae.W_enc[i] @ (row - sae.b_dec) + sae.b_enc[i]).item() for i in DEAD.tolist()}
        kept = sorted(pre, key=pre.get, reverse=True)[:n_active]
        guess = sum(pre[i] * sae.W_dec[i] for i in kept)
        total += (error - guess).square().sum().item()
    actual = dead_features(auxk=n_active).auxiliary_loss(sae, x, residual, is_dead())
    assert actual.item() == pytest.approx(total / residual.square().sum().item(), rel=1e-5)


def test_auxiliary_loss_of_a_residual_of_zero_is_finite(sae):
    assert dead_features(auxk=2).auxiliary_loss(sae, inputs(), torch.zeros(8, 6), is_dead()).isfinite()


def test_auxiliary_loss_moves_dead_features_alone(sae):
    residual = inputs(3).requires_grad_()
    dead_features(auxk=2).auxiliary_loss(sae, inputs(), residual, is_dead()).backward()
    for weights in (sae.W_enc, sae.W_dec):
        assert set(weights.grad.any(dim=1).nonzero().squeeze(1).tolist()) <= set(DEAD.tolist())
        assert weights.grad.any()
    assert residual.grad is None


def test_nothing_dead_costs_nothing(sae):
    none = torch.zeros(10, dtype=torch.bool)
    assert dead_features().auxiliary_loss(sae, inputs(), inputs(3), none).item() == 0


@pytest.mark.parametrize("settings", [{"dead_features": "none"}, {"dead_features": "resample"}, {"auxk_weight": 0.0}])
def test_no_auxiliary_loss_unless_it_is_asked_for(settings, sae):
    assert dead_features(**settings).auxiliary_loss(sae, inputs(), inputs(3), is_dead()).item() == 0


def test_without_a_number_half_the_width_of_dead_features_is_used(sae):
    whole, asked = (
        d.auxiliary_loss(sae, inputs(), inputs(3), is_dead()) for d in (dead_features(), dead_features(auxk=3))
    )
    assert whole == asked


def test_no_more_dead_features_are_expected_than_there_are_features():
    config = TrainConfig(sae=SAEConfig(n_features=10, l0=1))
    assert DeadFeatures(config, 40, torch.Generator()).n_active == 10


def test_resampling_restarts_dead_features_at_the_worst_token(sae):
    x, residual = inputs(), torch.zeros(8, 6)
    residual[3] = 1.0  # no other token is reconstructed badly
    optimizer = torch.optim.Adam(sae.parameters())
    sae(x).reconstruction.square().sum().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in sae.named_parameters()}
    length = before["W_enc"][~is_dead()].norm(dim=1).mean()
    dead_features().resample(sae, optimizer, x, residual, is_dead())

    direction = torch.nn.functional.normalize(x[3] - sae.b_dec, dim=0)
    torch.testing.assert_close(sae.W_dec.detach()[DEAD], direction.expand(3, 6).detach())
    torch.testing.assert_close(sae.W_enc.detach()[DEAD], (0.2 * length * direction).expand(3, 6).detach())
    assert not sae.b_enc[DEAD].any()
    for name, parameter in sae.named_parameters():
        if name == "b_dec":
            continue
        state = optimizer.state[parameter]
        assert not state["exp_avg"][DEAD].any()
        assert not state["exp_avg_sq"][DEAD].any()
        assert torch.equal(parameter[~is_dead()], before[name][~is_dead()])
        assert torch.equal(state["exp_avg"][~is_dead()], moments[name][~is_dead()])


def test_resampling_prefers_bad_tokens(sae):
    residual = torch.ones(8, 6)
    residual[3] = 3.0
    optimizer = torch.optim.Adam(sae.parameters())
    counts = torch.zeros(8)
    for seed in range(100):
        dead_features(seed).resample(sae, optimizer, inputs(), residual, is_dead())
        directions = torch.nn.functional.normalize(inputs() - sae.b_dec, dim=1)
        counts += torch.bincount((sae.W_dec[DEAD] @ directions.T).argmax(dim=1), minlength=8)
    # squared error 9 times as large, squared again: 81 to 1
    assert counts[3] / 300 == pytest.approx(81 / 88, abs=0.06)
    assert counts[3] < 300


def test_all_dead_can_be_resampled(sae):
    everything = torch.ones(10, dtype=torch.bool)
    dead_features().resample(sae, torch.optim.Adam(sae.parameters()), inputs(), inputs(3), everything)
    assert sae.W_enc.isfinite().all()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10))
