"""Train a sparse autoencoder on a transformer's activations, with the top-k orthogonality penalty in its loss.

python train.py                                  # preset minilm: offline, minutes on two CPU cores
python train.py --penalty.target none            # the same without the penalty
python train.py --sae.n-features 8192 --steps 2000 --out-dir runs/wide
"""

import argparse
import os
import sys

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress bars say what runs

try:
    import tyro

    from topk_ortho.training.activations import load_activations
    from topk_ortho.training.config import PRESETS, TrainConfig
    from topk_ortho.training.trainer import Trainer, resolve_device
except ModuleNotFoundError as error:
    sys.exit(f"train.py needs {error.name}; install it with: pip install '.[train]'")


def main() -> None:
    """Parse, load, train, show; what the user can mend ends in one line."""
    try:
        config = parse(sys.argv[1:])
        activations = load_activations(config.model, config.text, config.cache_dir, resolve_device(config.device))
        trainer = Trainer(config, activations)
        show(config, trainer.fit())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


def parse(arguments: list[str]) -> TrainConfig:
    """The preset, with every option given put over it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="minilm")
    chosen, rest = first.parse_known_args(arguments)
    purpose = (__doc__ or "").splitlines()[0]
    description = f"{purpose}\n\nDefaults are those of --preset {chosen.preset}; presets: {', '.join(PRESETS)}."
    return tyro.cli(TrainConfig, default=PRESETS[chosen.preset], args=rest, description=description)


def show(config: TrainConfig, summary: dict[str, float]) -> None:
    """Print the result for a person."""
    penalty = config.penalty
    print(f"\n{config.sae.n_features} features at {config.model.hook} of {config.model.name}, {config.steps} steps")
    settings = "" if penalty.target == "none" else f", weight {penalty.weight}, {penalty.fraction:.2%} of the pairs"
    print(f"penalty: {penalty.target}{settings}")
    rows = {
        "explained variance (held out)": f"{summary['explained_variance']:.4f}",
        "L0 (held out)": f"{summary['l0']:.1f}",
        "dead features": f"{summary['dead_features']} ({summary['dead_fraction']:.1%})",
        "mean max decoder cosine": f"{summary['mean_max_decoder_cosine']:.4f}",
        "penalty": f"{summary['penalty']:.4f}",
        "training tokens/s": f"{summary['tokens_per_second']:,.0f}",
    }
    if "transformer_tokens_per_second" in summary:
        rows["transformer tokens/s"] = f"{summary['transformer_tokens_per_second']:,.0f}"
    for name, value in rows.items():
        print(f"  {name:<30} {value:>14}")
    print(f"saved in {config.out_dir}/: config.json, metrics.jsonl, summary.json, sae.safetensors")


if __name__ == "__main__":
    main()
