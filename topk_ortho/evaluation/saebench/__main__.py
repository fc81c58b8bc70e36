"""Judge saved dictionaries by SAEBench: python -m topk_ortho.evaluation.saebench SAE_DIR [--evals NAME ...]."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topk_ortho.activations.config import TextConfig
    from topk_ortho.evaluation.saebench.output import Evaluation
    from topk_ortho.evaluation.saebench.subject import Subject

_EVALS = ("absorption", "core", "sparse_probing")
INSTALL = "pip install 'topk-ortho[eval]' && pip install --no-deps sae-bench==0.6.0"


def main(arguments: list[str] | None = None) -> None:
    """Run the evaluations that have no result yet, write SAEBench's JSON, and say what came out."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"saebench: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"saebench: needs {error.name}; install SAEBench with: {INSTALL}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"saebench: lower --batch-size: {str(error).splitlines()[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topk_ortho.evaluation.saebench",
        description="Judge a saved dictionary of a language model by SAEBench.",
    )
    parser.add_argument(
        "sae_dir", type=Path, metavar="SAE_DIR", help="a dictionary in SAELens's format, or a run of train.py"
    )
    parser.add_argument(
        "--evals", nargs="+", choices=_EVALS, default=["absorption", "core"], help="default: %(default)s"
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="the language model; default: what the metadata name")
    parser.add_argument("--out-dir", type=Path, metavar="DIR", help="folder of the results; default: SAE_DIR/saebench")
    parser.add_argument("--overwrite", action="store_true", help="measure anew what has a result")
    parser.add_argument(
        "--words", type=int, metavar="N", help="absorption: words drawn from the vocabulary; default: all, as SAEBench"
    )
    parser.add_argument(
        "--text", default="python-docs", metavar="SOURCE",
        help="core: a file, a data set on the hub, python-docs or installed-docs, as text.source of train.py",
    )  # fmt: skip
    parser.add_argument("--context-size", type=int, default=128, metavar="N", help="core: tokens in a window of text")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="core: batches; default: %(default)s")
    parser.add_argument(
        "--probing-data", type=Path, nargs="+", default=[], metavar="FILE",
        help="sparse_probing: files with the columns text and label; default: SAEBench's data sets, from the hub",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows in one forward pass")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s, as SAEBench's")
    parser.add_argument("--device", default="auto", help="a torch device; auto is CUDA where there is one")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="where activations of words are kept")
    parser.add_argument("--allow-untrained", action="store_true", help="judge a dictionary that was never trained")
    return parser


def _run(options: argparse.Namespace) -> None:
    # imported here, as they take seconds and --help needs none of them
    from topk_ortho.activations.config import TextConfig
    from topk_ortho.device import resolve_device
    from topk_ortho.evaluation.saebench.output import read_result, result_path, write_result
    from topk_ortho.evaluation.saebench.subject import check_subject, load_subject
    from topk_ortho.files import user_cache

    for name in ("words", "context_size", "batches", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    subject = load_subject(
        options.sae_dir, model=options.model, batch_size=options.batch_size, device=resolve_device(options.device)
    )
    n_tokens = options.batches * options.batch_size * options.context_size
    text = TextConfig(source=options.text, context_size=options.context_size, n_tokens=n_tokens)
    check_subject(subject, text, allow_untrained=options.allow_untrained)
    out_dir = options.out_dir or options.sae_dir / "saebench"
    cache_dir = options.cache_dir or user_cache() / "saebench"
    for name in options.evals:
        evaluation, measure, judged = _evaluation(name, options, subject, text, cache_dir)
        path = result_path(evaluation, subject, out_dir)
        if path.is_file() and not options.overwrite:
            result = read_result(path, judged)
        else:
            # SAEBench speaks on the standard output, which is for results
            with tempfile.TemporaryDirectory() as work_dir, redirect_stdout(sys.stderr):
                output = measure(Path(work_dir))
            result = write_result(evaluation, output, judged, path)
        print(f"{name}: {evaluation.summary(result)}\n  {path}")


def _evaluation(
    name: str, options: argparse.Namespace, subject: Subject, text: TextConfig, cache_dir: Path
) -> tuple[Evaluation, Callable[[Path], Any], dict[str, Any]]:
    """One of the evaluations, what measures it with a folder to work in, and what its result depends on."""
    from topk_ortho.activations.text import Text
    from topk_ortho.files import sha256_of

    judged = {"dictionary": subject.weights_sha256, "model": subject.transformer.weights_identity}
    match name:
        case "absorption":
            from topk_ortho.evaluation.saebench.absorption import ABSORPTION, measure_absorption

            measure = partial(measure_absorption, subject, options.words, seed=options.seed, cache_dir=cache_dir)
            return ABSORPTION, measure, judged | {"number_of_words": options.words, "seed": options.seed}
        case "core":
            from topk_ortho.evaluation.saebench.core import CORE, measure_core

            sizes = {name: getattr(options, name) for name in ("context_size", "batches", "batch_size")}
            read = Text(text).identity
            return (
                CORE,
                lambda _: measure_core(subject, text, n_batches=options.batches),
                judged | {"text": read} | sizes,
            )
        case _:
            from topk_ortho.evaluation.saebench.sparse_probing import SPARSE_PROBING, measure_sparse_probing

            measure = partial(measure_sparse_probing, subject, options.probing_data, seed=options.seed)
            data = {path.stem: sha256_of(path) for path in options.probing_data}
            return SPARSE_PROBING, measure, judged | {"data": data, "seed": options.seed}


if __name__ == "__main__":
    main()
