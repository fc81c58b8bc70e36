"""Train a sparse autoencoder on a transformer's activations, with an orthogonality penalty in its loss.

python train.py                                  # preset minilm: offline, minutes on two CPU cores
python train.py --preset toy-hierarchy           # known true features: how much absorption is there?
python train.py --penalty.target none            # the default without the penalty
python train.py --sae.n-features 8192 --steps 2000 --out-dir runs/wide
python train.py --config my.toml                 # settings from a file
python train.py --out-dir runs/wide --resume     # go on where the run was interrupted
python train.py --out-dir runs/wide --resume --steps 3000       # make a run longer
torchrun --nproc-per-node 2 train.py             # two processes hold the dictionary together
python train.py --overwrite                      # replaces the run that is there, once this one is finished
python train.py --help                           # the settings that most people change; --help-all explains all
"""

import argparse
import io
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress bars say what runs

try:  # what reads the command line; torch and all that needs it are imported by whatever trains
    import tyro

    from topk_ortho.activations.config import expanded
    from topk_ortho.training.config import TrainConfig
    from topk_ortho.training.help_page import help_page
    from topk_ortho.training.interrupt import Interrupted, SignalGuard
    from topk_ortho.training.presets import PRESETS
    from topk_ortho.training.settings import check_arguments, with_settings
except ModuleNotFoundError as error:
    sys.exit(f"train.py needs {error.name}; install it with: pip install '.[train]'")
except KeyboardInterrupt:
    sys.exit(130)

_UNNAMED = Path("runs/<preset>")
"""Stands for a folder that the user has not named"""
_SWITCHES = ("--resume", "--auto-resume", "--auto_resume", "--overwrite", "--help", "-h", "--help-all", "--help_all")
"""Options beside the settings that take no value"""


def main() -> None:
    """Parse, load, train, show; what the user can mend ends in one line."""
    with SignalGuard(_stop) as guard:
        try:
            config, mode = _parse_once(sys.argv[1:])
            _train(config, mode, guard)
        except SystemExit:
            raise
        except BaseException as error:
            # a library may have made another error of it
            if guard.received or isinstance(error, KeyboardInterrupt):
                number = guard.received or signal.SIGINT
                _say(f"stopped by {number.name}; what was saved is kept")
                sys.exit(128 + number)
            if isinstance(error, ModuleNotFoundError):
                sys.exit(f"train.py needs {error.name}; install it with: pip install '.[train]'")
            if isinstance(error, ValueError | OSError | FloatingPointError):
                sys.exit(f"train.py: {error}")
            if isinstance(error, MemoryError | RuntimeError) and "allocate" in str(error):  # torch's words
                sys.exit(f"train.py: out of memory: {str(error).splitlines()[0]}")
            raise


def _train(config: TrainConfig, mode: dict[str, bool], guard: SignalGuard) -> None:
    """Train, with the processes that torchrun has started, and show the result."""
    from topk_ortho.distributed.ranks import FailedOnFirst
    from topk_ortho.training.processes import LostRanks, open_processes, open_source_together
    from topk_ortho.training.run_folder import open_run_together
    from topk_ortho.training.trainer import Trainer

    try:
        with open_processes(config) as parallel, open_run_together(config, parallel.world, **mode) as run:
            source = open_source_together(config, parallel)
            summary = Trainer(config, source, run, parallel).fit()
        if _is_first_process():
            show(config, summary)
    except Interrupted as interruption:
        flags = "--resume" if run.folder == config.out_dir else "--overwrite --resume"
        _say(f"{interruption}; --out-dir {config.out_dir} {flags} goes on from there")
        sys.exit(interruption.exit_code)
    except LostRanks as error:
        sys.exit(f"train.py: {error}; --resume goes on from the latest checkpoint, if there is one")
    except FailedOnFirst as error:
        if guard.received:
            raise KeyboardInterrupt from error
        sys.exit(1)


def _is_first_process() -> bool:
    """Whether this is rank 0 of the processes that torchrun has started, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def _parse_once(arguments: list[str]) -> tuple[TrainConfig, dict[str, bool]]:
    """`parse`, where the first of several processes speaks for all."""
    if _is_first_process():
        return parse(arguments)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            return parse(arguments)
        except (ValueError, OSError):
            sys.exit(1)


def _say(message: str) -> None:
    """Print what all processes have to say, once."""
    if _is_first_process():
        print(f"train.py: {message}", file=sys.stderr)


def _stop() -> None:
    raise KeyboardInterrupt


def parse(arguments: list[str]) -> tuple[TrainConfig, dict[str, bool]]:
    """The configuration, and how `open_run` is to open its folder.

    A preset comes first, a file's settings over it, the command line's over both. A run without a folder of its own
    gets that of its preset or, if it has other settings, one named by them.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="minilm")
    first.add_argument("--config", type=Path)
    how = first.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true")
    how.add_argument("--auto-resume", "--auto_resume", action="store_true")
    first.add_argument("--overwrite", action="store_true")
    first.add_argument("--out-dir", "--out_dir")
    first.add_argument("--help", "-h", action="store_true")
    first.add_argument("--help-all", "--help_all", action="store_true")
    check_arguments(arguments, switches=_SWITCHES)
    chosen, rest = first.parse_known_args(arguments)
    resume = chosen.resume or chosen.auto_resume
    preset = PRESETS[chosen.preset]
    config, file = replace(preset, out_dir=_UNNAMED), chosen.config
    if file is None and resume and chosen.out_dir:
        from topk_ortho.training.run_folder import folder_to_resume

        folder = folder_to_resume(Path(expanded("out_dir", chosen.out_dir)), overwrite=chosen.overwrite)
        file = folder / "config.json" if (folder / "config.json").is_file() else None
    if file is not None:
        config = with_settings(config, file)
    if chosen.help:
        print(help_page(chosen.preset, config, file), end="")
        sys.exit()
    if chosen.out_dir:
        rest += ["--out-dir", chosen.out_dir]
    rest += ["--help"] * chosen.help_all
    config = tyro.cli(TrainConfig, default=config, args=rest, description=_description(chosen.preset))
    if config.out_dir == _UNNAMED:
        from topk_ortho.training.run_folder import digest_of

        digest = digest_of(config)
        name = chosen.preset if digest == digest_of(preset) else f"{chosen.preset}-{digest}"
        config = replace(config, out_dir=preset.out_dir.with_name(name))
    return config, {"resume": resume, "overwrite": chosen.overwrite, "start": not chosen.resume}


def _description(preset: str) -> str:
    purpose = (__doc__ or "").splitlines()[0]
    return (
        f"{purpose}\n\n"
        f"--preset NAME: start from the settings of one of {', '.join(PRESETS)}; those shown here are of "
        f"{preset}.\n"
        "--config FILE: take settings from a TOML file, or from the config.json of a run.\n"
        "--resume: go on from the latest checkpoint in --out-dir, with the settings of that run; with more --steps "
        "a finished one goes on too.\n"
        "--auto-resume: the same, or begin a run where there is none, for jobs that may be started again.\n"
        "--overwrite: replace the run in --out-dir, once the new one is finished."
    )


def show(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print the result for a person."""
    from topk_ortho.training.metric_table import headlines

    penalty = config.penalty
    where = f"{config.model.hook} of {config.model.name}" if config.source == "transformer" else "synthetic activations"
    print(f"\n{config.sae.architecture}, {config.sae.n_features} features on {where}, {config.steps} steps")
    share = f", {penalty.fraction:.2%} of the pairs" if penalty.op == "topk_pairs" else ""
    inhibition = f", encoder inhibition {penalty.encoder_inhibition:g} times that" if penalty.encoder_inhibition else ""
    settings = "" if penalty.target == "none" else f", {penalty.op}, weight {penalty.weight}{inhibition}{share}"
    print(f"penalty: {penalty.target}{settings}")
    for headline in headlines(summary):
        print(f"  {headline.metric.title:<24} {headline.value:>12}  {headline.detail}".rstrip())
    print(f"measured on held-out tokens; report: {config.out_dir}/report.html, dictionary: {config.out_dir}/sae/")


if __name__ == "__main__":
    main()
