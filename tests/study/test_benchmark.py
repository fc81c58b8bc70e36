"""SAEBench in a study: which runs it has still to judge, and which of its numbers join the results."""

import hashlib
import json
import math
import sys

import pytest

from tests.study.made_up import STUDY, finish, plan
from tests.study.test_execute import run
from topk_ortho.study.benchmark import SAEBENCH_METRICS, Benchmark
from topk_ortho.study.execute import _train_quietly
from topk_ortho.study.results import collect, shown, summarise

SAEBENCH = STUDY.replace('"toy-hierarchy"', '"minilm"').replace(
    "[variants.none]", 'saebench = { evals = ["absorption"], words = 50 }\n[variants.none]'
)
WEIGHTS = b"a dictionary"


def leave_result(run, letters=None, *, words=50, name="absorption", dictionary=WEIGHTS):
    """A result of SAEBench in the folder of a run, as far as a study reads it; of letters F1 score and absorption."""
    (run.config.out_dir / "sae").mkdir(exist_ok=True)
    (run.config.out_dir / "sae" / "sae_weights.safetensors").write_bytes(WEIGHTS)
    path = run.config.out_dir / "saebench" / name / f"seed-{run.seed}_custom_sae_eval_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    judged = {"dictionary": hashlib.sha256(dictionary).hexdigest(), "number_of_words": words, "seed": 42}
    letters = {"a": (0.25, 0.5)} if letters is None else letters
    with_latent = [rate for f1, rate in letters.values() if f1 >= 0.5]
    unstructured = {
        "letters": {letter: {"latent_f1": f1, "full_absorption_rate": rate} for letter, (f1, rate) in letters.items()},
        "mean_latent_f1": sum(f1 for f1, _ in letters.values()) / len(letters),
        "with_latent": len(with_latent),
        "mean_full_absorption_rate_with_latent": sum(with_latent) / len(with_latent) if with_latent else None,
        "judged": judged,
    }
    metrics = {"mean": {"mean_full_absorption_score": 0.5, "std_dev_full_absorption_score": math.nan}}
    path.write_text(json.dumps({"eval_result_metrics": metrics, "eval_result_unstructured": unstructured}))
    return path


def test_numbers_of_saebench_join_those_of_the_run_and_are_compared(tmp_path):
    study = plan(tmp_path, SAEBENCH)
    for number, planned in enumerate(study.runs[:6]):  # two points of three seeds
        finish(planned, {"explained_variance": 0.9})
        leave_result(planned, {"a": ([0.1, 0.2, 0.3, 0.4, 0.45, 0.35][number], 0.5)})
    results = collect(study)
    assert list(results.columns) == [
        "variant", "seed", "penalty.weight", "explained_variance",
        "saebench.absorption.mean.mean_full_absorption_score",
        "saebench.absorption.letters.a.latent_f1", "saebench.absorption.letters.a.full_absorption_rate",
        "saebench.absorption.mean_latent_f1",
        "saebench.absorption.with_latent",
    ]  # fmt: skip
    table = summarise(study, results)
    (row,) = table[(table["point"] == study.points[1].label) & (table["metric"] == SAEBENCH_METRICS[0].key)].to_dict(
        "records"
    )
    assert (row["n_pairs"], row["difference"]) == (3, pytest.approx(0.2))


def test_a_metric_is_shown_in_its_own_form():
    keys = [metric.key for metric in SAEBENCH_METRICS]
    assert [shown(key, 0.25) for key in keys] == ["0.250", "0.2", "25.0%", "25.0%"]


def test_absorption_is_compared_letter_by_letter(tmp_path):
    """Over the letters that have a latent in both dictionaries; a seed without one is not compared."""
    study = plan(tmp_path, SAEBENCH)
    of_letters = [
        {"a": (0.6, 0.30), "b": (0.7, 0.10), "c": (0.9, 0.00)},
        {"a": (0.6, 0.40), "b": (0.1, 0.90), "c": (0.1, 0.90)},
        {"a": (0.1, 0.40), "b": (0.5, 0.20)},
        {"a": (0.5, 0.20), "b": (0.6, 0.15), "c": (0.2, 0.70)},  # -0.1 and +0.05
        {"a": (0.9, 0.50), "b": (0.9, 0.10), "c": (0.9, 0.00)},  # +0.1
        {"a": (0.9, 0.10), "b": (0.4, 0.00)},
    ]
    for planned, letters in zip(study.runs[:6], of_letters, strict=True):
        finish(planned, {"explained_variance": 0.9})
        leave_result(planned, letters)
    table = summarise(study, collect(study))
    table = table[table["metric"] == "saebench.absorption.mean_full_absorption_rate_with_latent"]
    row = table[table["point"] == study.points[1].label].iloc[0]
    assert (row["n"], row["n_pairs"]) == (3, 2)
    assert row["mean"] == pytest.approx((0.175 + 0.2 + 0.1) / 3)
    assert row["difference"] == pytest.approx((-0.025 + 0.1) / 2)


def test_a_run_is_done_when_it_is_trained_and_judged(tmp_path):
    study = plan(tmp_path, SAEBENCH)
    first, second, third = study.runs[:3]
    assert not first.is_done
    finish(first, {})
    assert not first.is_done
    path = leave_result(first)
    assert first.is_done
    finish(second, {})
    for others in ({"words": 60}, {"words": None}, {"dictionary": b"another"}):
        leave_result(second, **others)
        assert not second.is_done
    assert "saebench.absorption.with_latent" not in collect(study).iloc[1].dropna()
    finish(third, {})
    leave_result(third, name="core", words=None)
    assert not third.is_done
    assert third._replace(benchmark=Benchmark(["core"])).is_done
    assert third._replace(benchmark=None).is_done
    for foreign in ("", "{}", '{"eval_result_unstructured": null}', '{"eval_result_unstructured": {"judged": {}}}'):
        path.write_text(foreign)
        assert not first.is_done
    assert "saebench.absorption.with_latent" not in collect(study).columns


def test_what_is_missing_is_judged_with_the_settings_of_the_run(tmp_path, monkeypatch):
    """And an error is that of a run, which stays trained."""
    study = plan(tmp_path, SAEBENCH.replace('["absorption"]', '["core", "absorption"]'))
    planned = study.runs[0]
    finish(planned, {})
    leave_result(planned, words=60)
    leave_result(planned, name="core", words=None)
    calls = []

    def main(arguments):
        calls.append(arguments)
        sys.exit("saebench: no")

    monkeypatch.setattr("topk_ortho.evaluation.saebench.__main__.main", main)
    assert planned.benchmark.judge(planned.config) == "saebench: no"
    folder, *options = calls[0]
    assert folder == str(planned.config.out_dir)
    size = planned.config.model.batch_size
    assert " ".join(options) == f"--evals absorption --overwrite --words 50 --device auto --batch-size {size}"
    assert _train_quietly(planned, 1) == "saebench: no"
    leave_result(planned)
    assert planned.benchmark.judge(planned.config) is None
    assert len(calls) == 2


def test_judged_runs_need_no_saebench(tmp_path, monkeypatch):
    monkeypatch.setattr("topk_ortho.study.__main__.find_spec", lambda name: None)
    study = plan(tmp_path, SAEBENCH)
    for planned in study.runs:
        finish(planned, {})
        leave_result(planned)
    assert run(tmp_path / "my.toml", "--out-dir", tmp_path) == 0


def test_without_saebench_the_study_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("topk_ortho.study.__main__.find_spec", lambda name: None)
    plan(tmp_path, SAEBENCH)
    message = run(tmp_path / "my.toml", "--out-dir", tmp_path / "out")
    assert "the study asks for SAEBench; install it with: pip install 'topk-ortho[eval]' && pip" in message
    assert not (tmp_path / "out" / "runs").exists()
