"""Train the runs of a study and compare its variants: python -m topk_ortho.study NAME_OR_FILE.toml --out-dir DIR."""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Check, train, compare, show; exits with status 1 if a run failed, and 128 + n if signal n stopped the study."""
    options = _parser().parse_args(arguments)
    try:
        status = _run(options)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"study: {error}")
    sys.exit(status)


def _run(options: argparse.Namespace) -> int:
    # imported here, as they take seconds and --help needs none of them
    from filelock import FileLock, Timeout

    from topk_ortho.files import write_whole
    from topk_ortho.study.execute import LOCAL, train_runs
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
        failures, stopped_by = train_runs(
            runs, jobs=options.jobs, threads=options.threads, backend=options.backend or LOCAL
        )
        if stopped_by:
            n_finished = sum(is_finished(run.config) for run in runs)
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
    print(f"{len(results)} runs are finished; results in {out_dir}/results.csv and {out_dir}/report.html")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topk_ortho.study",
        description=(__doc__ or "").split(":")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="name of a study, or a TOML file")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for everything that the study leaves")
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--preset")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT")
    parser.add_argument("--backend")
    return parser


if __name__ == "__main__":
    main()
