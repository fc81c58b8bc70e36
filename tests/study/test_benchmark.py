"""SAEBench in a study: which runs it has still to judge, and which of its numbers join the results."""

import json
import math

import pandas as pd
import pytest

from tests.study.made_up import STUDY, finish, plan
from tests.study.test_execute import NONE, SMALL, run, write
from topk_ortho.study.benchmark import SAEBENCH_METRICS, Benchmark
from topk_ortho.study.execute import LOG
from topk_ortho.study.results import collect, shown, summarise

SAEBENCH = STUDY.replace("[variants.none]", 'saebench = { evals = ["absorption"], words = 50 }\n[variants.none]')


def leave_result(run, *, words=50, f1=0.25, name="absorption"):
    """A result of SAEBench in the folder of a run, as far as a study reads it."""
    path = run.config.out_dir / "saebench" / name / f"seed-{run.seed}_custom_sae_eval_results.json"
    path.parent.mkdir(parents=True)
    judged = {"dictionary": "ab", "number_of_words": words, "seed": 42}
    unstructured = {"letters": {"a": {"latent_f1": f1}}, "mean_latent_f1": f1, "with_latent": 0, "judged": judged}
    unstructured["mean_full_absorption_rate_with_latent"] = None
    metrics = {"mean": {"mean_full_absorption_score": 0.5, "std_dev_full_absorption_score": math.nan}}
    path.write_text(json.dumps({"eval_result_metrics": metrics, "eval_result_unstructured": unstructured}))


def test_numbers_of_saebench_join_those_of_the_run_and_are_compared(tmp_path):
    study = plan(tmp_path, SAEBENCH)
    for number, planned in enumerate(study.runs[:6]):  # two points of three seeds
        finish(planned, {"explained_variance": 0.9})
        leave_result(planned, f1=[0.1, 0.2, 0.3, 0.4, 0.6, 0.5][number])
    results = collect(study)
    assert list(results.columns) == [
        "variant", "seed", "penalty.weight", "explained_variance",
        "saebench.absorption.mean.mean_full_absorption_score",
        "saebench.absorption.letters.a.latent_f1", "saebench.absorption.mean_latent_f1",
        "saebench.absorption.with_latent",
    ]  # fmt: skip
    table = summarise(study, results)
    (row,) = table[(table["point"] == study.points[1].label) & (table["metric"] == SAEBENCH_METRICS[0].key)].to_dict(
        "records"
    )
    assert (row["n_pairs"], row["difference"]) == (3, pytest.approx(0.3))


def test_a_metric_is_shown_in_its_own_form():
    keys = [metric.key for metric in SAEBENCH_METRICS]
    assert [shown(key, 0.25) for key in keys] == ["0.250", "0.2", "25.0%", "25.0%"]


def test_a_run_is_done_when_it_is_trained_and_judged(tmp_path):
    study = plan(tmp_path, SAEBENCH)
    first, second, third = study.runs[:3]
    assert not first.is_done
    finish(first, {})
    assert not first.is_done
    leave_result(first)
    assert first.is_done
    finish(second, {})
    leave_result(second, words=60)
    assert not second.is_done
    assert "saebench.absorption.with_latent" not in collect(study).iloc[1].dropna()
    finish(third, {})
    leave_result(third, name="core", words=None)
    assert not third.is_done
    assert third._replace(benchmark=Benchmark(["core"])).is_done
    assert third._replace(benchmark=None).is_done


def test_a_dictionary_that_cannot_be_judged_is_a_failed_run_but_stays_trained(tmp_path, capsys):
    pytest.importorskip("sae_bench", reason="needs SAEBench, which make test installs")
    study = write(tmp_path, 'saebench = { evals = ["absorption"] }' + SMALL + NONE)
    for _ in range(2):
        assert run(study, "--out-dir", tmp_path / "out") == 1
        assert "none/seed-0 failed: saebench: the metadata in" in capsys.readouterr().err
    assert (tmp_path / "out" / "runs" / "none" / "seed-0" / LOG).read_text().count("starting at step") == 1
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == 1


def test_without_saebench_the_study_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("topk_ortho.study.__main__.find_spec", lambda name: None)
    study = write(tmp_path, 'saebench = { evals = ["absorption"] }' + SMALL + NONE)
    message = run(study, "--out-dir", tmp_path / "out")
    assert "the study asks for SAEBench; install it with: pip install 'topk-ortho[eval]' && pip" in message
    assert not (tmp_path / "out" / "runs").exists()
