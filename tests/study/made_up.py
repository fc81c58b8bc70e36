"""Studies whose runs were not trained: their numbers are made up."""

import json

from topk_ortho.study.plan import load_study

STUDY = """
description = "Made-up numbers."
preset = "toy-hierarchy"
seeds = [0, 1, 2]
baseline = "none"
[variants.none]
penalty.target = "none"
penalty.weight = 0.3
[variants.on]
penalty.weight = [10, 1]
"""


def plan(folder, text=STUDY):
    folder.mkdir(exist_ok=True)
    (folder / "my.toml").write_text(text)
    return load_study(str(folder / "my.toml"), folder)


def finish(run, summary, rows=(), pairs=None):
    """Leave in the folder of a run what training would; lines of pairs.jsonl only if there are any."""
    run.config.out_dir.mkdir(parents=True)
    (run.config.out_dir / "config.json").write_text(json.dumps(run.config.as_json()))
    (run.config.out_dir / "summary.json").write_text(json.dumps(summary))
    (run.config.out_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if pairs is not None:
        (run.config.out_dir / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def finish_all(study, numbers, rows=()):
    """Finish the runs for which there are numbers: of a point, one summary for each seed, None for one that failed."""
    for run in study.runs:
        summary = numbers[run.point.label][run.seed]
        if summary is not None:
            finish(run, summary, rows)
