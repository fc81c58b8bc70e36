"""Train the runs of a study and compare its variants: python -m topk_ortho.study NAME_OR_FILE.toml --out-dir DIR."""

import argparse
import json
import sys
import textwrap
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from topk_ortho.evaluation.saebench.__main__ import INSTALL
from topk_ortho.study.named import named_studies


def main(arguments: list[str] | None = None) -> None:
    """Check, train, compare, show; exits with status 1 if a run failed, and 128 + n if signal n stopped the study."""
    options = _parser().parse_args(arguments)
    try:
        status = _run(options)
    except ValueError as error:
        sys.exit(f"study: {error}")
    except ModuleNotFoundError as error:
        package = error.name if error.name in ("distributed", "ray") else "'topk-ortho[study]'"
        sys.exit(f"study: needs {error.name}; install it with: pip install {package}")
    sys.exit(status)


def _run(options: argparse.Namespace) -> int:
    # imported here, as they take seconds and --help needs none of them
    from filelock import FileLock, Timeout

    from topk_ortho.files import write_whole
    from topk_ortho.study.execute import train_runs
    from topk_ortho.study.plan import load_study
    from topk_ortho.study.report import write_report
    from topk_ortho.study.results import collect, environment, summarise
    from topk_ortho.training.run_folder import is_finished

    out_dir: Path = options.out_dir
    study = load_study(options.study, out_dir, preset=options.preset, seeds=options.seeds)
    variants = {point.variant for point in study.points}
    if unknown := sorted(set(options.only) - variants):
        raise ValueError(f"--only must name variants ({', '.join(sorted(variants))}), got {unknown[0]!r}")
    runs = [run for run in study.runs if not options.only or run.point.variant in options.only]
    for run in study.runs:
        is_finished(run.config)  # refuses a folder that holds another study's run
    if any(run.benchmark and not run.is_done for run in runs) and find_spec("sae_bench") is None:
        raise ValueError(f"the study asks for SAEBench; install it with: {INSTALL}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(out_dir / ".topk_ortho.lock").acquire(timeout=0))
        except Timeout as error:
            raise ValueError(
                f"{out_dir} is in use by another study: wait for it, or choose another --out-dir"
            ) from error
        if options.backend == "dask":
            from distributed import Client

            stack.enter_context(Client())
        elif options.backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        write_whole(out_dir / "study.toml", study.text)
        write_whole(out_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")
        failures, stopped_by = train_runs(runs, jobs=options.jobs, threads=options.threads, backend=options.backend)
        if stopped_by:
            n_finished = sum(run.is_done for run in runs)
            print(
                f"study: stopped by {stopped_by.name} with {n_finished} of {len(runs)} runs finished; the same command "
                "goes on from there",
                file=sys.stderr,
            )
            return 128 + stopped_by
        results = collect(study)
        summary = summarise(study, results)
        results.to_csv(out_dir / "results.csv", index=False)
        summary.to_csv(out_dir / "summary.csv", index=False)
        write_report(study, out_dir, results, summary, failures)
    (out_dir / "failures.json").unlink(missing_ok=True)
    if failures:
        write_whole(out_dir / "failures.json", json.dumps(failures, indent=2) + "\n")
        for name, reason in failures.items():
            print(f"study: {name} failed: {reason}", file=sys.stderr)
    n_finished = sum(run.is_done for run in study.runs)
    print(f"{n_finished} runs are finished; results in {out_dir}/results.csv and {out_dir}/report.html")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    studies = "\n".join(
        textwrap.fill(f"  {name}: {description}", 100, subsequent_indent="    ")
        for name, description in named_studies().items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m topk_ortho.study",
        description=(__doc__ or "").split(":")[0] + ".",
        epilog=f"The studies that come with the package:\n{studies}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="NAME_OR_FILE.toml", help="a study of the package, or a file")
    parser.add_argument(
        "--out-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for everything that the study leaves; if it was begun there, it goes on",
    )
    parser.add_argument(
        "--jobs", type=_jobs, default=-1, help="number of runs at a time; -1, the default, is one a core"
    )
    parser.add_argument("--threads", type=_at_least_1, default=1, help="threads of torch in each run (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of those of the study")
    parser.add_argument("--preset", help="in place of the study's, under the settings of its variants")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="VARIANT", help="train the runs of these variants alone"
    )
    parser.add_argument(
        "--backend",
        default="threading",
        help="where joblib lets the runs be trained: dask, ray, loky or another of its back ends; by default in "
        "processes of this machine",
    )
    return parser


def _at_least_1(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _jobs(text: str) -> int:
    return -1 if text == "-1" else _at_least_1(text)


if __name__ == "__main__":
    main()
