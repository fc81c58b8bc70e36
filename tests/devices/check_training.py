"""A run on the second device: it takes the steps that it takes on the CPU, and is saved, resumed and exported."""

import json
from contextlib import contextmanager

import pytest
import sae_lens
import torch

from tests.activations.sources import sparse_mixtures
from topk_ortho.sae import SparseAutoencoder
from topk_ortho.training.checkpoint import latest_checkpoint
from topk_ortho.training.config import PenaltyConfig, SAEConfig, TrainConfig
from topk_ortho.training.run_folder import open_run
from topk_ortho.training.trainer import Trainer

ARCHITECTURES = ["standard", "topk", "batchtopk", "jumprelu", "matryoshka"]
SOURCE = sparse_mixtures(n_shards=6)
N_DEAD = 9


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    monkeypatch.setattr("topk_ortho.training.results.write_report", lambda *_: None)


@contextmanager
def open_trainer(where, out_dir, *, source=SOURCE, resume=False, sae=None, penalty=None, **settings):
    sizes = {"n_features": 32, "l0": 3, "initial_threshold": 0.3}
    config = TrainConfig(
        device=str(where), out_dir=out_dir, autocast="off", sae=SAEConfig(**sizes | (sae or {})),
        penalty=PenaltyConfig(**{"fraction": 0.05} | (penalty or {})),
        **{"steps": 3, "batch_size": 50, "eval_every": 2, "held_out_tokens": 150, "checkpoint_every": 2} | settings,
    )  # fmt: skip
    with open_run(config, resume=resume, overwrite=False) as run:
        trainer = Trainer(config, source, run)
        try:
            yield trainer
        finally:
            trainer.batches.close()


def silence_some(trainer):
    """Make the first features dead."""
    trainer.sae.b_enc.data[:N_DEAD] = -100.0
    trainer.dead_features.tokens_since_fired[:N_DEAD] = 10**9


def tensors_of(trainer):
    moments = [moment for state in trainer.optimizer.state.values() for moment in state.values()]
    modules = (trainer.sae, trainer.penalty, trainer.dead_features)
    return [*moments, *(tensor for module in modules for tensor in module.state_dict().values())]


def assert_on(where, tensors):
    assert {tensor.device.type for tensor in tensors} == {torch.device(where).type}


PENALTIES = {
    "decoder": {},
    "activations": {"target": "activations"},
    "max_cosine_of_decoder": {"op": "max_cosine", "n_chunks": 2},
    "max_cosine_of_activations": {"target": "activations", "op": "max_cosine", "n_chunks": 2},
}
STEPS = [
    *((architecture, "auxk", "activations") for architecture in ARCHITECTURES),
    ("topk", "auxk", "decoder"),
    ("topk", "resample", "max_cosine_of_activations"),
    ("standard", "resample", "max_cosine_of_decoder"),
]


@pytest.mark.parametrize(("architecture", "dead_features", "penalty"), STEPS)
def test_steps_are_those_of_the_cpu(architecture, dead_features, penalty, device, tmp_path):
    sae = {"architecture": architecture, "dead_features": dead_features, "resample_every": 1}
    results = []
    for where in ("cpu", device):
        with open_trainer(where, tmp_path / where, sae=sae, penalty=PENALTIES[penalty], steps=5) as trainer:
            silence_some(trainer)
            for _ in range(2):
                step = trainer.train_step(trainer.next_batch())
                assert (step.auxiliary > 0) == (dead_features == "auxk")
            assert trainer.dead_features.mask.any() == (dead_features == "auxk")
            assert step.penalty > 0
            assert_on(where, tensors_of(trainer))
            terms = [term for term in step if isinstance(term, torch.Tensor)]
            assert_on(where, terms)
            trainer.metrics(step)
            results.append(
                [tensor.cpu() for tensor in (*terms, trainer.sae.W_dec.detach(), trainer.sae.b_enc.detach())]
            )
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-4)


def test_a_run_is_saved_and_goes_on_on_either_device(device, tmp_path):
    sae = {"architecture": "batchtopk", "dead_features": "resample", "resample_every": 1}
    options = {"sae": sae, "penalty": {"target": "activations", "tau": "adaptive"}, "steps": 4}
    with open_trainer(device, tmp_path / "whole", **options) as whole:
        silence_some(whole)
        whole.fit()
    last = tmp_path / "whole" / "checkpoints" / "step-00000004"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (tmp_path / "whole" / "summary.json").unlink()
    checkpoint, _ = latest_checkpoint(last.parent, lambda _: None)
    assert checkpoint.step == 2
    assert_on("cpu", checkpoint.tensors.values())
    for where in (device, "cpu"):  # the first leaves step 4 undone
        with open_trainer(where, tmp_path / "whole", **options, resume=True) as trainer:
            assert trainer.step == 2
            assert_on(where, tensors_of(trainer))
            trainer.evaluation()  # with the pairs of the evaluation before
            for _ in range(2):
                trainer.train_step(trainer.next_batch())
            for name, expected in whole.sae.state_dict().items():
                torch.testing.assert_close(trainer.sae.state_dict()[name].cpu(), expected.cpu(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "jumprelu"])
def test_what_a_run_leaves_is_on_the_cpu(architecture, device, tmp_path):
    with open_trainer(device, tmp_path / "run", sae={"architecture": architecture}) as trainer:
        summary = trainer.fit()
        sae = trainer.inference_sae()
    assert isinstance(sae, SparseAutoencoder)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == summary["device"]
    assert torch.device(summary["device"]).type == torch.device(device).type
    x = trainer.held_out.float()
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "run" / "sae")
    reconstruction = sae(x.to(device)).reconstruction
    torch.testing.assert_close(loaded(x), reconstruction.cpu(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loaded.to(device)(x.to(device)), reconstruction, rtol=1e-3, atol=1e-4)


class SourceOn:
    """Activations that are on a device."""

    def __init__(self, source, device):
        self._device = device
        self._shards = source.shards
        self.name, self.tokens_per_second, self.d_in = source.name, source.tokens_per_second, source.d_in
        self.shard_sizes, self.identity, self.left_out = source.shard_sizes, source.identity, source.left_out

    def shard(self, number):
        return self._shards[number].to(self._device)


@pytest.mark.parametrize("trains_on_cpu", [False, True])
def test_activations_may_be_on_either_device(trains_on_cpu, device, tmp_path):
    where, options = "cpu" if trains_on_cpu else device, {"penalty": PENALTIES["activations"]}
    with open_trainer("cpu", tmp_path / "expected", **options) as trainer:
        expected = trainer.fit()["explained_variance"]
    with open_trainer(where, tmp_path / "run", source=SourceOn(SOURCE, device), **options) as trainer:
        assert trainer.fit()["explained_variance"] == pytest.approx(expected, rel=1e-2, abs=1e-3)
