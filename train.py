"""Train a sparse autoencoder on a transformer's activations, with an orthogonality penalty in its loss.

python train.py                                  # preset minilm: offline, minutes on two CPU cores
python train.py --preset toy-hierarchy           # known true features: how much absorption is there?
python train.py --penalty.target none            # the default without the penalty
python train.py --sae.n-features 8192 --steps 2000 --out-dir runs/wide
python train.py --config my.toml --resume        # settings from a file; go on where the run was interrupted
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress bars say what runs

try:
    import tyro

    from topk_ortho.training.build import open_source, resolve_device
    from topk_ortho.training.config import TrainConfig
    from topk_ortho.training.interrupt import Interrupted
    from topk_ortho.training.presets import PRESETS
    from topk_ortho.training.trainer import Trainer
except ModuleNotFoundError as error:
    sys.exit(f"train.py needs {error.name}; install it with: pip install '.[train]'")


def main() -> None:
    """Parse, load, train, show; what the user can mend ends in one line."""
    try:
        config, resume = parse(sys.argv[1:])
        source = open_source(config, resolve_device(config.device))
        show(config, Trainer(config, source, resume=resume).fit())
    except Interrupted as interruption:
        print(f"train.py: {interruption}; --resume goes on from there", file=sys.stderr)
        sys.exit(interruption.exit_code)
    except KeyboardInterrupt:
        print("train.py: interrupted; what was saved is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


def parse(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration, and whether to resume: a preset, a file's settings over it, the command line's over both."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--out-dir", "--out_dir", type=Path)
    chosen, rest = first.parse_known_args(arguments)
    preset = PRESETS[chosen.preset or "minilm"]
    out_dir = chosen.out_dir or preset.out_dir
    settings: list[str] = []
    if chosen.config is not None:
        settings = list(_as_arguments(_read_settings(chosen.config)))
    elif chosen.resume and chosen.preset is None and (out_dir / "config.json").is_file():
        settings = list(_as_arguments(_read_settings(out_dir / "config.json")))  # the run's own
    if chosen.out_dir is not None:
        rest += ["--out-dir", str(chosen.out_dir)]
    config = tyro.cli(TrainConfig, default=preset, args=settings + rest, description=_description(chosen.preset))
    return config, chosen.resume


def _description(preset: str | None) -> str:
    purpose = (__doc__ or "").splitlines()[0]
    return (
        f"{purpose}\n\n"
        f"--preset NAME: start from the settings of one of {', '.join(PRESETS)}; those shown here are of "
        f"{preset or 'minilm'}.\n"
        "--config FILE: take settings from a TOML file, or from the config.json of a run.\n"
        "--resume: go on from the latest checkpoint in --out-dir, with the settings of that run."
    )


def _read_settings(path: Path) -> dict[str, Any]:
    """Settings of a TOML file, or of a JSON file such as a run's config.json."""
    try:
        text = path.read_text()
        settings: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings


def _as_arguments(settings: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """{"sae": {"n_features": 64}} as --sae.n-features 64: one parser checks both."""
    for name, value in settings.items():
        option = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _as_arguments(value, f"{option}.")
        elif isinstance(value, bool):
            head, _, last = option.rpartition(".")
            no = f"{head}.no-{last}" if head else f"--no-{option[2:]}"
            yield option if value else no
        elif isinstance(value, list):
            yield from (option, *map(str, value))
        else:
            yield from (option, str(value))


def show(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print the result for a person."""
    penalty = config.penalty
    where = f"{config.model.hook} of {config.model.name}" if config.source == "transformer" else "synthetic activations"
    print(f"\n{config.sae.architecture}, {config.sae.n_features} features on {where}, {config.steps} steps")
    share = f", {penalty.fraction:.2%} of the pairs" if penalty.op == "topk_pairs" else ""
    settings = "" if penalty.target == "none" else f", {penalty.op}, weight {penalty.weight}{share}"
    print(f"penalty: {penalty.target}{settings}")
    rows = {
        "explained variance": ("explained_variance", ".4f"),
        "L0": ("l0", ".1f"),
        "dead features": ("dead_fraction", ".1%"),
        "mean max decoder cosine": ("mean_max_decoder_cosine", ".4f"),
        "cross-entropy loss recovered": ("ce_loss_recovered", ".3f"),
        "absorption rate": ("absorption_rate", ".3f"),
        "excess absorption": ("excess_absorption", ".3f"),
        "parent recall": ("parent_recall", ".3f"),
        "MCC (parents, children)": ("mcc", ".3f"),
        "F1": ("f1", ".3f"),
        "training tokens/s": ("tokens_per_second", ",.0f"),
        "transformer tokens/s": ("transformer_tokens_per_second", ",.0f"),
    }
    for name, (key, form) in rows.items():
        if summary.get(key) is not None:
            value = format(summary[key], form)
            if key == "mcc":
                value += f" ({summary['mcc_parent']:.3f}, {summary['mcc_child']:.3f})"
            print(f"  {name:<30} {value:>22}")
    print(f"measured on held-out tokens; report: {config.out_dir}/report.html, dictionary: {config.out_dir}/sae/")


if __name__ == "__main__":
    main()
