"""What `train.py --help` prints: the settings that most people change, on one page."""

import textwrap
from pathlib import Path

from topk_ortho.training.config import TrainConfig, flatten
from topk_ortho.training.presets import PRESETS

_WIDTH = 33
"""Columns of an option with its value"""
_SETTINGS = {
    "The activations": {
        "source": "transformer, or synthetic data with known features: synthetic, synthsaebench",
        "model.name": "a transformer: minilm, smollm2, a name on the hub, or a folder",
        "model.hook": "where in it, as TransformerLens names it",
        "text.source": "what it reads: python-docs, installed-docs, a file, or a data set on the hub",
        "text.n_tokens": "how many tokens of it",
        "cache_dir": "where activations are kept, for the next run on the same text",
    },
    "The dictionary": {
        "sae.architecture": "standard, topk, batchtopk, jumprelu or matryoshka",
        "sae.n_features": "its size",
        "sae.l0": "active features of a token",
    },
    "The penalty": {
        "penalty.target": "decoder, activations or none",
        "penalty.weight": "relative to the fraction of variance unexplained",
        "penalty.fraction": "share of all pairs of features that is penalised",
        "penalty.every": "steps between two uses; the weight is multiplied by it",
        "penalty.encoder_inhibition": "weight of the term on the pairs' encoders, relative to the penalty's",
    },
    "Training": {
        "steps": "optimizer steps",
        "batch_size": "tokens in a step",
        "lr": "peak learning rate of Adam",
        "seed": "of weights, order of tokens and synthetic data",
        "device": "a torch device; auto is a GPU where there is one",
        "out_dir": "folder of the run",
    },
}
_EXAMPLES = """\
python train.py                                          # offline, minutes on two CPU cores
python train.py --preset toy-hierarchy                   # synthetic data: how much is absorbed?
python train.py --penalty.target none                    # the default without the penalty
python train.py --sae.n-features 16384 --out-dir runs/wide
python train.py --out-dir runs/wide --resume             # go on where it was interrupted
torchrun --nproc-per-node 2 train.py                     # two processes hold the dictionary together"""


def help_page(preset: str, config: TrainConfig, file: Path | None = None) -> str:
    """The page, with the values of a configuration: a preset, with the settings of a file over it if there is one."""
    shown = preset if file is None else f"{preset}, with those of {file} over it"
    values = flatten(config.as_json())
    lines = ["usage: train.py [--preset NAME] [--config FILE] [--SETTING VALUE ...]", ""]
    lines += ["Train a sparse autoencoder with an orthogonality penalty in its loss.", ""]
    lines += [
        _line("--preset NAME", f"start from the settings of a preset; those shown here are of {shown}:"),
        textwrap.indent(textwrap.fill(", ".join(PRESETS), 80, break_on_hyphens=False), " " * (_WIDTH + 4)),
        _line("--config FILE", "settings from a TOML file, or from the config.json of a run"),
        _line("--resume", "go on with the run in --out-dir; with more --steps, also one that is finished"),
        _line("--auto-resume", "the same, or begin where there is none: for jobs that are started again"),
        _line("--overwrite", "replace the run in --out-dir once the new one is finished"),
        _line("--help-all", f"all {len(values)} settings, explained"),
    ]
    for title, settings in _SETTINGS.items():
        lines += ["", f"{title}:"]
        for name, text in settings.items():
            lines.append(_line(f"--{name.replace('_', '-')} {values[name]}", text))
    lines += ["", "Examples:", *(f"  {line}" for line in _EXAMPLES.splitlines())]
    return "\n".join(lines) + "\n"


def _line(option: str, text: str) -> str:
    if len(option) > _WIDTH:
        return f"  {option}\n{' ' * (_WIDTH + 4)}{text}"
    return f"  {option:<{_WIDTH}}  {text}"
