"""A dictionary that is read computes what SAELens computes from the same files."""

import json

import pytest
import sae_lens
import torch
from safetensors.torch import save_file

from tests.sae.test_architectures import BUILD, D_IN, N, dense, generator, inputs, make
from topk_ortho.sae.export import save_saelens
from topk_ortho.sae.saved import read_saelens, start_from_saved

SCALE, WEIGHTS = 3.0, "sae_weights.safetensors"


def written(folder, **settings):
    """Files of a dictionary with random weights, and what SAELens makes of them."""
    weights = {
        "W_enc": torch.randn(D_IN, N, generator=generator(5)),
        "W_dec": torch.randn(N, D_IN, generator=generator(6)),
        "b_enc": torch.randn(N, generator=generator(7)),
        "b_dec": torch.randn(D_IN, generator=generator(8)),
    }
    config = {
        "architecture": "standard", "d_in": D_IN, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {"sae_lens_version": "6.0.0"},
    } | settings  # fmt: skip
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return sae_lens.SAE.load_from_disk(folder)


@pytest.mark.parametrize("name", BUILD)
def test_what_was_saved_goes_on_at_another_scale(name, tmp_path):
    sae, x = make(name), inputs(50)
    sae.observe(sae(x).features)
    sae.eval()
    if name == "jumprelu":
        sae.threshold.data = torch.linspace(0.0, 1.0, N)
    save_saelens(sae, tmp_path / "sae", {})
    twin = BUILD[name]()
    start_from_saved(twin, read_saelens(tmp_path / "sae"), SCALE)
    twin.eval()
    torch.testing.assert_close(dense(twin(SCALE * x).features), SCALE * dense(sae(x).features))
    torch.testing.assert_close(twin(SCALE * x).reconstruction, SCALE * sae(x).reconstruction)
    if name == "jumprelu":
        assert twin.bandwidth == sae.bandwidth  # it is a setting of the run


@pytest.mark.parametrize("unit", [False, True], ids=["as_they_are", "unit_length"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}),
    ],
    ids=["plain", "input_not_centred", "rescaled"],
)
def test_forms_of_saelens(name, settings, unit, tmp_path):
    theirs, x = written(tmp_path / "sae", **settings), inputs(50)
    saved = read_saelens(tmp_path / "sae")
    if unit:
        saved = saved.of_unit_length()
        torch.testing.assert_close(torch.linalg.vector_norm(saved.W_dec, dim=1), torch.ones(N))
    ours = BUILD[name]().eval()
    start_from_saved(ours, saved, 1.0)
    torch.testing.assert_close(ours(x).reconstruction, theirs(x), rtol=1e-4, atol=1e-4)


def test_thresholds_follow_the_length(tmp_path):
    sae, x = make("jumprelu"), inputs(50)
    sae.W_dec.data *= torch.linspace(0.5, 2.0, N)[:, None]
    sae.W_dec.data[3] = 0
    save_saelens(sae, tmp_path / "sae", {})
    twin = BUILD["jumprelu"]()
    start_from_saved(twin, read_saelens(tmp_path / "sae").of_unit_length(), 1.0)
    torch.testing.assert_close(twin(x).reconstruction, sae(x).reconstruction)
    assert torch.equal(twin.W_dec[3], torch.zeros(D_IN))


def test_weights_of_another_architecture(tmp_path):
    """Thresholds become one for BatchTopK, and are left out where there is none."""
    sae = make("jumprelu")
    sae.threshold.data = torch.linspace(0.0, 2.0, N)
    save_saelens(sae, tmp_path / "sae", {})
    saved = read_saelens(tmp_path / "sae")
    batchtopk, standard = BUILD["batchtopk"](), BUILD["standard"]()
    for each in (batchtopk, standard):
        start_from_saved(each, saved, SCALE)
        assert torch.equal(each.W_enc, sae.W_enc)
    assert batchtopk.threshold == SCALE * sae.threshold.median()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "cfg.json").unlink(), "holds no dictionary in SAELens's format"),
        (lambda folder: (folder / "cfg.json").write_text("{"), "holds no dictionary in SAELens's format"),
        (
            lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"x"),
            "holds no dictionary in SAELens's format",
        ),
        (lambda folder: (folder / "cfg.json").write_text("[1]"), "holds no dictionary in SAELens's format"),
        (
            lambda folder: (folder / "cfg.json").write_text('{"architecture": "gated"}'),
            "holds a dictionary of architecture gated, not standard, topk, batchtopk, matryoshka_batchtopk, jumprelu",
        ),
        (lambda folder: save_file({"W_enc": torch.ones(2, 3)}, folder / WEIGHTS), "holds no .*: it lacks 'W_dec'"),
        (
            lambda folder: (folder / "cfg.json").write_text(
                '{"architecture": "standard", "normalize_activations": "layer_norm"}'
            ),
            "has normalize_activations = 'layer_norm', which must be folded into the weights first",
        ),
    ],
    ids=["no_config", "half_a_config", "damaged", "a_list", "gated", "other_weights", "normalised"],
)
def test_what_cannot_be_read_is_named(break_it, message, tmp_path):
    save_saelens(make("standard"), tmp_path / "sae", {})
    break_it(tmp_path / "sae")
    with pytest.raises(ValueError, match=f"sae {message}"):
        read_saelens(tmp_path / "sae")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_there_and_back_in_a_dtype_of_saelens(name, dtype, tmp_path):
    """SAELens loads it, holds it in another dtype and writes it again: what is read are its weights, rounded once."""
    sae = make(name)
    if name == "jumprelu":
        sae.threshold.data = torch.linspace(0.0, 1.0, N)
    save_saelens(sae.eval(), tmp_path / "sae", {})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae", dtype=str(dtype).removeprefix("torch."))
    assert all(weight.dtype == dtype for weight in theirs.parameters())
    theirs.save_model(tmp_path / "again")
    before, after = read_saelens(tmp_path / "sae"), read_saelens(tmp_path / "again")
    for expected, actual in zip(before, after, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert actual.dtype == torch.float32
            assert torch.equal(actual, expected.to(dtype).float())
    x = inputs(50)
    twin = BUILD[name]().eval()
    start_from_saved(twin, after, 1.0)
    on_rounded = theirs.to(torch.float32)
    torch.testing.assert_close(twin(x).reconstruction, on_rounded(x), rtol=1e-4, atol=1e-4)


def test_the_folder_of_a_run_is_not_that_of_its_dictionary(tmp_path):
    save_saelens(make("topk"), tmp_path / "sae", {})
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no dictionary .*; did you mean {tmp_path / 'sae'}\?"):
        read_saelens(tmp_path)
