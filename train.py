"""Train a sparse autoencoder on a transformer's activations, with an orthogonality penalty in its loss.

python train.py                                  # preset minilm: offline, minutes on two CPU cores
python train.py --preset toy-hierarchy           # known true features: how much absorption is there?
python train.py --penalty.target none            # the default without the penalty
python train.py --sae.n-features 8192 --steps 2000 --out-dir runs/wide
python train.py --config my.toml --resume        # settings from a file; go on where the run was interrupted
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress bars say what runs

try:
    import tyro

    from topk_ortho.training.build import open_source, resolve_device
    from topk_ortho.training.config import TrainConfig
    from topk_ortho.training.interrupt import Interrupted
    from topk_ortho.training.metric_table import headlines
    from topk_ortho.training.presets import PRESETS
    from topk_ortho.training.settings import with_settings
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
    config = PRESETS[chosen.preset or "minilm"]
    own = (chosen.out_dir or config.out_dir) / "config.json"  # of the run that is resumed
    if chosen.config is not None:
        config = with_settings(config, chosen.config)
    elif chosen.resume and chosen.preset is None and own.is_file():
        config = with_settings(config, own)
    if chosen.out_dir is not None:
        rest += ["--out-dir", str(chosen.out_dir)]
    return tyro.cli(TrainConfig, default=config, args=rest, description=_description(chosen.preset)), chosen.resume


def _description(preset: str | None) -> str:
    purpose = (__doc__ or "").splitlines()[0]
    return (
        f"{purpose}\n\n"
        f"--preset NAME: start from the settings of one of {', '.join(PRESETS)}; those shown here are of "
        f"{preset or 'minilm'}.\n"
        "--config FILE: take settings from a TOML file, or from the config.json of a run.\n"
        "--resume: go on from the latest checkpoint in --out-dir, with the settings of that run."
    )


def show(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print the result for a person."""
    penalty = config.penalty
    where = f"{config.model.hook} of {config.model.name}" if config.source == "transformer" else "synthetic activations"
    print(f"\n{config.sae.architecture}, {config.sae.n_features} features on {where}, {config.steps} steps")
    share = f", {penalty.fraction:.2%} of the pairs" if penalty.op == "topk_pairs" else ""
    settings = "" if penalty.target == "none" else f", {penalty.op}, weight {penalty.weight}{share}"
    print(f"penalty: {penalty.target}{settings}")
    for headline in headlines(summary):
        print(f"  {headline.metric.title:<24} {headline.value:>12}  {headline.detail}".rstrip())
    print(f"measured on held-out tokens; report: {config.out_dir}/report.html, dictionary: {config.out_dir}/sae/")


if __name__ == "__main__":
    main()
