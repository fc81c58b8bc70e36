"""The plug-in inside the real SAELens: its trainer, its checkpoints, its files."""

import dataclasses
import importlib.util
import itertools
import json
import pickle
import signal
import subprocess
import sys

import pytest
import sae_lens
import torch
from datasets import Dataset
from sae_lens import registry
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests import oracle
from tests.tolerances import float64
from topk_ortho import max_cosine_loss, topk_pairs
from topk_ortho.sae import saelens

D_IN, D_SAE, BATCH = 12, 32, 64
BUFFERS = {"topk_ortho.state", "ortho_firing_rate"}

CASES = {
    "standard": ("Standard", {"l1_coefficient": 0.1, "l1_warm_up_steps": 3}),
    "topk": ("TopK", {"k": 4}),
    # with rescaling too, sparse activations have no backward pass in SAELens 6.54 on the CPU
    "topk_sparse": ("TopK", {"k": 4, "use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("BatchTopK", {"k": 4}),
    "jumprelu": ("JumpReLU", {"l0_coefficient": 0.01, "l0_warm_up_steps": 3}),
    "matryoshka_batchtopk": ("MatryoshkaBatchTopK", {"k": 4, "matryoshka_widths": [8, D_SAE]}),
}
every_case = pytest.mark.parametrize("case", CASES)


def classes(case, *, base=False):
    name = CASES[case][0]
    module, prefix = (sae_lens, "") if base else (saelens, "Ortho")
    return getattr(module, f"{prefix}{name}TrainingSAE"), getattr(module, f"{prefix}{name}TrainingSAEConfig")


def build(case, *, base=False, **settings):
    torch.manual_seed(0)
    sae_class, config_class = classes(case, base=base)
    return sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **CASES[case][1] | settings))


def batches():
    """Sparse sums of directions that come in similar pairs."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(24, D_IN, generator=generator)
    directions[1::2] = directions[::2] + 0.5 * directions[1::2]
    while True:
        amounts = torch.rand(BATCH, 24, generator=generator)
        yield (amounts * (torch.rand(BATCH, 24, generator=generator) < 0.15)) @ directions


def trainer_of(sae, n_steps, skip=0):
    cfg = SAETrainerConfig(total_training_samples=n_steps * BATCH, train_batch_size_samples=BATCH, lr=3e-3, lr_end=3e-3)
    return sae_lens.SAETrainer(cfg, sae, itertools.islice(batches(), skip, None))


def forward(sae, x, weight, step=0):
    coefficients = {"l1": 0.1, "l0": 0.01, "topk_ortho": weight}
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=step, is_logging_step=False
        )
    )


def expected_loss(cfg, x):
    if cfg.ortho_op == "max_cosine":
        return float((oracle.max_cosines(x)[0] ** 2).mean())
    k = oracle.k_of(D_SAE, cfg.ortho_fraction)
    selected = oracle.select(x, k, cfg.ortho_tau, cfg.ortho_n_std, cfg.ortho_similarity)
    return oracle.loss_of(selected.values, cfg.ortho_reduction)


def assert_term(sae, base, weight=0.7):
    """The loss exceeds the base's by weight * variance * the oracle's loss, which is what the outputs say."""
    x = next(batches())
    output = forward(sae, x, weight)
    target = sae.W_dec.T if sae.cfg.ortho_target == "decoder" else output.feature_acts.to_dense()
    loss = expected_loss(sae.cfg, float64(target))
    penalty = weight * float64(x).var(axis=0).sum() * loss
    assert loss > 0
    assert output.metrics["topk_ortho_unweighted"].item() == pytest.approx(loss, rel=1e-5)
    assert output.losses["topk_ortho_loss"].item() == pytest.approx(penalty, rel=1e-5)
    without = forward(base, x, weight).loss.item()
    assert output.loss.item() - without == pytest.approx(penalty, rel=1e-5, abs=1e-6 * without)
    assert sum(output.losses.values()).item() == pytest.approx(output.loss.item(), rel=1e-6)


@every_case
@pytest.mark.parametrize("target", ["decoder", "activations"])
def test_term_is_weight_times_variance_times_loss(case, target):
    assert_term(build(case, ortho_target=target, ortho_fraction=0.1), build(case, base=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ortho_fraction": 0.2},
        {"ortho_fraction": 0.5, "ortho_tau": 0.3},
        {"ortho_fraction": 0.5, "ortho_tau": "adaptive"},
        {"ortho_fraction": 0.5, "ortho_tau": "adaptive", "ortho_n_std": 0.5},
        {"ortho_fraction": 0.2, "ortho_similarity": "abs"},
        {"ortho_fraction": 0.2, "ortho_reduction": "sum"},
        {"ortho_op": "max_cosine"},
        {"ortho_op": "max_cosine", "ortho_target": "activations"},
    ],
    ids=str,
)
def test_every_field_reaches_the_op(settings):
    assert_term(build("standard", **settings), build("standard", base=True))


def test_chunks_of_max_cosine_follow_from_the_step():
    sae = build("standard", ortho_op="max_cosine", ortho_n_chunks=4)
    x = next(batches())
    random_state = torch.get_rng_state()
    losses = [forward(sae, x, 1.0, step).metrics["topk_ortho_unweighted"] for step in (7, 8, 7)]
    expected = [max_cosine_loss(sae.W_dec.T, 4, generator=torch.Generator().manual_seed(step)) for step in (7, 8, 7)]
    assert losses == expected
    assert losses[0] != losses[1]
    assert torch.equal(torch.get_rng_state(), random_state)


@every_case
@pytest.mark.parametrize("op", ["topk_pairs", "max_cosine"])
def test_weight_zero_trains_as_the_base_class(case, op):
    base = trainer_of(build(case, base=True), n_steps=15).fit().state_dict()
    ours = trainer_of(build(case, ortho_weight=0, ortho_op=op, ortho_n_chunks=2), n_steps=15).fit().state_dict()
    assert set(ours) - set(base) == BUFFERS
    assert all(torch.equal(ours[name], base[name]) for name in base)


@pytest.mark.parametrize(("case", "op"), [*((case, "topk_pairs") for case in CASES), ("standard", "max_cosine")])
def test_penalty_spreads_the_decoder(case, op):
    def mean_max_cosine(weight):
        sae = build(case, ortho_weight=weight, ortho_op=op, ortho_fraction=0.1)
        trainer_of(sae, n_steps=40).fit()
        return oracle.max_cosines(float64(sae.W_dec.T))[0].mean()

    assert mean_max_cosine(weight=1) < 0.6 * mean_max_cosine(weight=0)


def test_warm_up():
    sae = build("topk", ortho_weight=0.8, ortho_warm_up_steps=4)
    trainer = trainer_of(sae, n_steps=6)
    weights = []
    for x in itertools.islice(batches(), 6):
        output = trainer.step(x)
        scale = float64(x).var(axis=0).sum() * output.metrics["topk_ortho_unweighted"].item()
        weights.append(output.losses["topk_ortho_loss"].item() / scale)
    assert weights == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-5)


@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.float32) for case in CASES), ("topk", torch.bfloat16)])
def test_firing_rate_is_an_exponential_average_in_float32(case, dtype):
    sae, expected = build(case, ortho_priority="none").to(dtype), torch.zeros(D_SAE)
    for x in itertools.islice(batches(), 5):
        active = forward(sae, x.to(dtype), 0.3).feature_acts.to_dense() > 0
        expected = 0.99 * expected + 0.01 * active.sum(dim=0) / BATCH
    assert len(expected.unique()) > 5
    torch.testing.assert_close(sae.ortho_firing_rate, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("priority", ["firing-rate", "none"])
def test_the_rarer_feature_of_a_pair_moves(priority):
    sae = build("topk", ortho_priority=priority)  # of 496 pairs the default fraction selects one
    for x in itertools.islice(batches(), 3):
        output = forward(sae, x, 0.3)
    gradient = torch.autograd.grad(output.losses["topk_ortho_loss"], sae.W_dec)[0]
    pairs = topk_pairs(sae.W_dec.T, k=1, similarity="positive")
    rarer, other = sorted((pairs.rows.item(), pairs.cols.item()), key=lambda j: sae.ortho_firing_rate[j].item())
    assert sae.ortho_firing_rate[rarer] < sae.ortho_firing_rate[other]
    moved = gradient.norm(dim=1).nonzero().flatten().tolist()
    assert moved == ([rarer] if priority == "firing-rate" else sorted([rarer, other]))


@every_case
def test_resumed_run_equals_an_uninterrupted_one(case, tmp_path):
    settings = {"ortho_warm_up_steps": 15, "ortho_fraction": 0.1}
    whole = trainer_of(build(case, **settings), n_steps=20).fit()

    first = trainer_of(build(case, **settings), n_steps=10)
    first.fit()
    first.save_checkpoint("half", base_path=tmp_path)
    resumed = build(case, **settings)
    resumed.W_dec.data.zero_()  # all comes from the checkpoint
    second = trainer_of(resumed, n_steps=20, skip=10)
    second.load_trainer_state(tmp_path / "half")
    resumed.load_weights_from_checkpoint(tmp_path / "half")
    second.fit()

    expected = whole.state_dict()
    assert set(resumed.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert set(expected) >= BUFFERS


@every_case
def test_saved_model_loads_as_a_training_sae(case, tmp_path):
    sae = trainer_of(build(case, ortho_weight=0.5), n_steps=3).fit()
    sae.save_model(tmp_path)
    loaded = sae_lens.TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is classes(case)[0]
    assert loaded.cfg.ortho_weight == 0.5
    # SAELens rounds the threshold of batchtopk, a float64
    kept = {name: value.float() for name, value in sae.state_dict().items()}
    assert all(torch.equal(value, kept[name]) for name, value in loaded.state_dict().items())
    x = next(batches())
    assert torch.equal(forward(loaded, x, 0.5).loss, forward(sae, x, 0.5).loss)


@every_case
def test_inference_model_is_that_of_the_base_class(case, tmp_path):
    sae = trainer_of(build(case, ortho_fraction=0.1), n_steps=10).fit()
    base = build(case, base=True)
    base.load_state_dict({name: value for name, value in sae.state_dict().items() if name not in BUFFERS})
    paths = {"ours": sae.save_inference_model(tmp_path / "ours"), "base": base.save_inference_model(tmp_path / "base")}

    weights = {name: load_file(path) for name, (path, _) in paths.items()}
    assert set(weights["ours"]) == set(weights["base"])
    assert all(torch.equal(weights["ours"][name], value) for name, value in weights["base"].items())
    configs = {name: json.loads(path.read_text()) for name, (_, path) in paths.items()}
    metadata = configs["ours"].pop("metadata")
    assert metadata["training_architecture"] == sae.cfg.architecture()
    assert metadata["training_architecture_details"]["ortho_fraction"] == 0.1
    del configs["base"]["metadata"]
    assert configs["ours"] == configs["base"]

    x = next(batches())
    loaded = {name: sae_lens.SAE.load_from_disk(tmp_path / name) for name in paths}
    assert type(loaded["ours"]) is type(loaded["base"])
    assert torch.equal(loaded["ours"](x), loaded["base"](x))
    assert loaded["ours"](x).count_nonzero() > 0


@every_case
def test_config_survives_dictionaries_json_and_pickle(case):
    cfg = build(case, ortho_weight=0.5, ortho_tau="adaptive", ortho_target="activations").cfg
    assert cfg.architecture() == f"topk_ortho_{CASES[case][0].lower().replace('matryoshka', 'matryoshka_')}"
    assert sae_lens.TrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    for its_class in classes(case):
        assert pickle.loads(pickle.dumps(its_class)) is its_class
    assert registry.get_sae_training_class(cfg.architecture()) == classes(case)


@every_case
def test_fields_of_the_base_class_keep_their_order_and_defaults(case):
    def fields(config_class):
        return [(f.name, f.default, f.default_factory) for f in dataclasses.fields(config_class)]

    base = fields(classes(case, base=True)[1])
    ours = fields(classes(case)[1])
    assert ours[: len(base)] == base
    assert all(name.startswith("ortho_") for name, *_ in ours[len(base) :])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ortho_weight": -0.1}, "ortho_weight must be 0 or more, got -0.1"),
        ({"ortho_weight": float("nan")}, "ortho_weight must be 0 or more, got nan"),
        ({"ortho_warm_up_steps": -1}, "ortho_warm_up_steps must be 0 or more, got -1"),
        ({"ortho_op": "topk"}, r"ortho_op must be one of \('topk_pairs', 'max_cosine'\), got topk"),
        ({"ortho_target": "encoder"}, "ortho_target must be one of .*, got encoder"),
        ({"ortho_priority": "norm"}, "ortho_priority must be one of .*, got norm"),
        ({"ortho_n_chunks": 17}, r"ortho_n_chunks must be in \[1, d_sae / 2 = 16\], got 17"),
        ({"ortho_fraction": 1.5}, "fraction must be in"),
        ({"ortho_tau": 1.0}, "tau must be"),
        ({"ortho_similarity": "negative"}, "similarity must be"),
        ({"ortho_reduction": "max"}, "reduction must be"),
    ],
)
def test_config_refuses_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        build("standard", **settings)


@pytest.fixture
def _signals():
    """SAELens's runner replaces these handlers for good."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.filterwarnings("ignore")  # SAELens's and TransformerLens's own
def test_language_model_runner_trains_and_resumes(tmp_path):
    model = HookedTransformer(
        HookedTransformerConfig(n_layers=1, d_model=D_IN, d_head=4, n_ctx=8, d_vocab=30, act_fn="relu", seed=0)
    )
    tokens = torch.randint(30, (64, 8), generator=torch.Generator().manual_seed(0))

    def run(**settings):
        cfg = sae_lens.LanguageModelSAERunnerConfig(
            sae=classes("batchtopk")[1](d_in=D_IN, d_sae=D_SAE, k=4, ortho_weight=0.5),
            hook_name="blocks.0.hook_resid_post",
            context_size=8,
            prepend_bos=False,
            train_batch_size_tokens=32,
            n_batches_in_buffer=4,
            store_batch_size_prompts=4,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
            checkpoint_path=str(tmp_path / "checkpoints"),
            save_final_checkpoint=True,
            output_path=str(tmp_path / "output"),
            verbose=False,
            **settings,
        )
        assert sae_lens.LanguageModelSAERunnerConfig.from_dict(cfg.to_dict()).sae == cfg.sae
        data = Dataset.from_dict({"tokens": tokens.tolist()})
        return sae_lens.LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=model).run()

    first = run(training_tokens=320)
    [checkpoint] = tmp_path.glob("checkpoints/*/final_320")
    again = run(training_tokens=320, resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in again.state_dict().items())
    further = run(training_tokens=640, resume_from_checkpoint=str(checkpoint))
    assert further.ortho_firing_rate.sum() > first.ortho_firing_rate.sum()
    assert type(sae_lens.SAE.load_from_disk(tmp_path / "output")) is sae_lens.JumpReLUSAE


def test_second_import_registers_the_newer_classes(monkeypatch):
    monkeypatch.setattr(registry, "SAE_TRAINING_CLASS_REGISTRY", dict(registry.SAE_TRAINING_CLASS_REGISTRY))
    spec = importlib.util.find_spec("topk_ortho.sae.saelens")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.OrthoTopKTrainingSAE is not saelens.OrthoTopKTrainingSAE
    assert registry.get_sae_training_class("topk_ortho_topk")[0] is again.OrthoTopKTrainingSAE


def test_a_subclass_of_ones_own_takes_no_name_in_the_registry():
    before = dict(registry.SAE_TRAINING_CLASS_REGISTRY)
    type("Own", (saelens.OrthoTopKTrainingSAE,), {})
    assert before == registry.SAE_TRAINING_CLASS_REGISTRY


def test_sae_lens_is_imported_by_the_plug_in_alone():
    code = """
import sys
import topk_ortho.sae
assert "sae_lens" not in sys.modules
sys.modules["sae_lens"] = None  # as if it were not installed
import topk_ortho.sae.saelens
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: topk_ortho.sae.saelens needs SAELens: pip install 'topk-ortho[saelens]'"
    )
