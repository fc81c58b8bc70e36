"""What is saved is what SAELens computes."""

import json

import pytest
import sae_lens
import torch

from tests.sae.test_architectures import BUILD, dense, inputs, make
from topk_ortho.sae.export import save_saelens


@pytest.mark.parametrize("name", BUILD)
def test_saelens_loads_it_and_computes_the_same(name, tmp_path):
    sae, x = make(name), inputs(50)
    sae.observe(sae(x).features)
    sae.eval()
    if name == "jumprelu":
        sae.threshold.data = torch.linspace(0.0, 1.0, 20)
    save_saelens(sae, tmp_path / "sae", {"model_name": "minilm", "hook_name": "blocks.3.hook_resid_post"})
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    expected = sae(x)
    torch.testing.assert_close(loaded.encode(x), dense(expected.features))
    torch.testing.assert_close(loaded(x), expected.reconstruction)
    assert loaded.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    is_inference_jumprelu = name in ("batchtopk", "matryoshka", "jumprelu")
    assert loaded.cfg.architecture() == ("jumprelu" if is_inference_jumprelu else name)


def test_it_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "sae"
    save_saelens(make("standard"), folder, {})
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert json.loads((folder / "cfg.json").read_text())["d_sae"] == 20
