"""What SAELens has to know about a dictionary: which activations it is of, in SAELens's own words."""

from pathlib import Path
from typing import Any

from topk_ortho.activations.config import DOCUMENTATION, MINILM_ON_THE_HUB, ModelConfig, TextConfig
from topk_ortho.activations.smollm2 import SMOLLM2_ON_THE_HUB
from topk_ortho.activations.source import ActivationSource
from topk_ortho.training.config import TrainConfig

_ARCHITECTURE_NAMES = {"matryoshka": "matryoshka_batchtopk"}
"""Names of architectures for training in SAELens, where they differ from ours."""
_ON_THE_HUB = {"minilm": MINILM_ON_THE_HUB, "smollm2": SMOLLM2_ON_THE_HUB}
"""Names on the hub of the models that a package carries; those weights of smollm2 are not reduced to four bits."""


def saelens_metadata(config: TrainConfig, source: ActivationSource, summary: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a dictionary under the names of SAELens, as JSON.

    With those of a transformer's activations `sae_lens.ActivationsStore.from_sae` makes the activations again. What is
    known by no name there is in `training_config`, under the names of our settings.

    Parameters
    ----------
    config : TrainConfig
        The run.
    source : ActivationSource
        Its activations.
    summary : dict
        Its result; `l0` and `dead_features` are used.
    """
    metadata = {
        "trained_with": "topk_ortho",
        "sae_lens_training_version": None,  # SAELens takes its own version for it if there is none
        "training_architecture": _ARCHITECTURE_NAMES.get(config.sae.architecture, config.sae.architecture),
        "training_config": config.as_json(),
        "l0": summary["l0"],
        "num_dead_features": summary["dead_features"],
    }
    if config.source == "transformer":
        metadata |= _model(config.model) | _windows(config.text) | _special_tokens(source)
    return metadata


def _model(model: ModelConfig) -> dict[str, Any]:
    """Which model it is, by a name that is known outside this package, and how to load it."""
    name = _ON_THE_HUB.get(model.name, model.name)
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    return {
        "model_name": name,
        "model_class_name": "HookedTransformer",  # whose names hooks have
        "model_from_pretrained_kwargs": {} if model.dtype == "float32" else {"dtype": model.dtype},
        "hook_name": model.hook,
        "hook_head_index": None,
    }


def _windows(text: TextConfig) -> dict[str, Any]:
    """Which text the model read, and in which pieces."""
    is_on_the_hub = text.source not in DOCUMENTATION and not Path(text.source).is_file()
    return {
        "dataset_path": text.source if is_on_the_hub else None,  # SAELens would look for any other on the hub too
        "dataset_trust_remote_code": False,
        "context_size": text.context_size,
        "seqpos_slice": [None],  # the whole window
        "disable_concat_sequences": False,
    }


def _special_tokens(source: ActivationSource) -> dict[str, Any]:
    """Which special tokens were in a window, and which had no activations in the data."""
    from topk_ortho.activations.cache import TransformerActivations  # transformers and datasets take a second to import

    if not isinstance(source, TransformerActivations):
        return {}
    special = source.special_tokens
    return {
        "prepend_bos": special.opens_with_bos,
        "begin_batch_token": special.first,
        "sequence_separator_token": special.separator,
        "exclude_special_tokens": special.ids,
    }
