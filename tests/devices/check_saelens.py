"""The plug-in for SAELens on the second device."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from topk_ortho.sae import saelens

CLASSES = {
    "standard": (saelens.OrthoStandardTrainingSAE, saelens.OrthoStandardTrainingSAEConfig, {}),
    "topk": (saelens.OrthoTopKTrainingSAE, saelens.OrthoTopKTrainingSAEConfig, {"k": 4}),
    "jumprelu": (saelens.OrthoJumpReLUTrainingSAE, saelens.OrthoJumpReLUTrainingSAEConfig, {}),
}
PENALTIES = [
    {},
    {"ortho_target": "activations"},
    {"ortho_op": "max_cosine", "ortho_n_chunks": 2},
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_a_training_step(name, penalty, device):
    sae_class, config_class, settings = CLASSES[name]
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    weights, losses = None, []
    for where in ("cpu", device):
        sae = sae_class(config_class(d_in=12, d_sae=32, device=where, ortho_fraction=0.1, **settings, **penalty))
        weights = weights or sae.state_dict()
        sae.load_state_dict(weights)
        coefficients = {"l1": 0.1, "l0": 0.01, "topk_ortho": 0.5}
        step = TrainStepInput(
            sae_in=x.to(where), coefficients=coefficients, dead_neuron_mask=None, n_training_steps=1,
            is_logging_step=False,
        )  # fmt: skip
        output = sae.training_forward_pass(step)
        output.loss.backward()
        assert sae.ortho_firing_rate.device == sae.topk_ortho.state.device == sae.W_dec.grad.device == sae.W_dec.device
        losses.append(output.losses["topk_ortho_loss"].detach().cpu())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-5)
    assert losses[0] > 0
