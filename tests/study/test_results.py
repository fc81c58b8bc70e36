"""Means, intervals and paired differences, against closed forms and scipy's tests on numbers made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.study.made_up import STUDY, finish, finish_all, plan
from topk_ortho.study.results import (
    collect,
    environment,
    mean_interval,
    metric_of,
    ratio_interval,
    shown,
    summarise,
)


def numbers(absorption, variance, seconds):
    return {"absorption_rate": absorption, "explained_variance": variance, "seconds": seconds, "device": "cpu"}


@pytest.fixture
def study(tmp_path):
    study = plan(tmp_path)
    finish_all(study, {
        "none": [numbers(0.7, 0.90, 10), numbers(0.8, 0.94, 11), numbers(0.9, 0.92, 12)],
        # the first seed failed
        "on,penalty.weight=10": [None, numbers(0.3, 0.90, 14), numbers(0.2, 0.86, 17)],
        # no variance is lost, and no time
        "on,penalty.weight=1": [numbers(0.6, 0.92, 9), numbers(0.6, 0.94, 9), numbers(0.6, 0.92, None)],
    })  # fmt: skip
    return study


def row_of(study, point, metric):
    table = summarise(study, collect(study))
    (row,) = table[(table["point"] == point) & (table["metric"] == metric)].to_dict("records")
    return row


def test_a_row_of_the_results_is_a_finished_run(study):
    results = collect(study).reset_index(drop=True)
    columns = ["variant", "seed", "penalty.weight", "absorption_rate", "explained_variance", "seconds"]
    assert list(results.columns) == columns
    expected = [
        ("none", 0, None, 0.7, 0.90, 10), ("none", 1, None, 0.8, 0.94, 11), ("none", 2, None, 0.9, 0.92, 12),
        ("on", 1, 10.0, 0.3, 0.90, 14), ("on", 2, 10.0, 0.2, 0.86, 17),
        ("on", 0, 1.0, 0.6, 0.92, 9), ("on", 1, 1.0, 0.6, 0.94, 9), ("on", 2, 1.0, 0.6, 0.92, None),
    ]  # fmt: skip
    pd.testing.assert_frame_equal(results, pd.DataFrame(expected, columns=columns))


def test_nested_numbers_get_dotted_names_and_only_numbers_count(tmp_path):
    study = plan(tmp_path)
    finish(study.runs[0], {"a": {"b": 1.5, "c": "text"}, "flag": True, "nothing": None, "versions": {"torch": "2"}})
    assert list(collect(study).columns) == ["variant", "seed", "penalty.weight", "a.b"]


def test_mean_and_interval(study):
    row = row_of(study, "none", "absorption_rate")
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom; the standard deviation is 0.1
    assert row["n"] == 3
    np.testing.assert_allclose([row["mean"], row["low"], row["high"]], [0.8, 0.8 - half, 0.8 + half])
    assert row["n_pairs"] == 0
    assert math.isnan(row["difference"])


def test_differences_are_paired_by_seed_and_a_failed_seed_is_left_out(study):
    row = row_of(study, "on,penalty.weight=10", "absorption_rate")
    assert (row["n"], row["n_pairs"]) == (2, 2)
    interval = stats.ttest_rel([0.3, 0.2], [0.8, 0.9]).confidence_interval()
    actual = [row["difference"], row["difference_low"], row["difference_high"]]
    np.testing.assert_allclose(actual, [-0.6, *interval])
    without_one = row_of(study, "on,penalty.weight=1", "seconds")
    assert (without_one["n"], without_one["n_pairs"], without_one["difference"]) == (2, 2, -1.5)


def test_a_single_value_has_no_interval_and_none_no_mean():
    assert mean_interval([0.25])[0] == 0.25
    assert np.isnan(mean_interval([0.25])[1:]).all()
    assert np.isnan(mean_interval([])).all()
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_a_metric_that_a_point_lacks_has_no_mean(tmp_path):
    study = plan(tmp_path)
    first, second = {"l0": 5.0}, {"l0": 5.0, "tau": 0.5}
    finish_all(study, {"none": [first] * 3, "on,penalty.weight=10": [second] * 3, "on,penalty.weight=1": [first] * 3})
    assert row_of(study, "none", "tau")["n"] == 0
    assert math.isnan(row_of(study, "none", "tau")["mean"])
    assert row_of(study, "on,penalty.weight=10", "tau")["mean"] == 0.5
    assert row_of(study, "on,penalty.weight=10", "tau")["n_pairs"] == 0
    assert "absorption_per_variance" not in set(summarise(study, collect(study))["metric"])


def test_no_finished_run_gives_empty_tables(tmp_path):
    study = plan(tmp_path)
    assert summarise(study, collect(study)).empty


def accepted_ratios(numerators, denominators, ratios):
    """The ratios that a t test does not reject, which is what Fieller's interval is."""
    differences = np.array(numerators)[:, None] - np.outer(denominators, ratios)
    return np.array(ratios)[stats.ttest_1samp(differences, 0).pvalue > 0.05]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_a_ratio_holds_what_a_t_test_accepts(sign):
    numerators = [0.50 * sign, 0.55 * sign, 0.47 * sign, 0.61 * sign, 0.52 * sign]
    denominators = [0.010, 0.013, 0.009, 0.016, 0.012]
    ratio = ratio_interval(numerators, denominators)
    accepted = accepted_ratios(numerators, denominators, np.arange(-100, 100, 0.01))
    assert ratio.value == pytest.approx(sum(numerators) / sum(denominators))
    assert (ratio.low, ratio.high) == (pytest.approx(min(accepted), abs=0.011), pytest.approx(max(accepted), abs=0.011))
    assert ratio.low < ratio.value < ratio.high


def test_a_ratio_has_no_interval_where_its_denominator_may_be_zero():
    numerators, denominators = [0.5, 0.6, 0.4], [0.01, -0.02, 0.03]
    ratio = ratio_interval(numerators, denominators)
    assert ratio.value == pytest.approx(75)
    assert np.isnan(ratio[1:]).all()
    assert max(accepted_ratios(numerators, denominators, [1e6, -1e6])) == 1e6
    assert ratio_interval([0.5], [0.01])[0] == 50
    assert np.isnan(ratio_interval([0.5], [0.01])[1:]).all()


def test_absorption_reduction_efficiency(study):
    variance = row_of(study, "on,penalty.weight=10", "absorption_per_variance")
    assert variance["mean"] == pytest.approx((0.5 + 0.7) / (0.04 + 0.06))
    assert variance["n"] == 2
    seconds = row_of(study, "on,penalty.weight=10", "absorption_per_second")
    assert seconds["mean"] == pytest.approx((0.5 + 0.7) / (3 + 5))
    assert seconds["note"] == "unbounded, as the cost may be none"  # 3 and 5 s: the mean is within 12.7 errors of 0
    for metric, note in (("absorption_per_variance", "no loss"), ("absorption_per_second", "no extra time")):
        row = row_of(study, "on,penalty.weight=1", metric)
        assert math.isnan(row["mean"])
        assert row["note"] == note
    table = summarise(study, collect(study))
    assert not set(table[table["point"] == "none"]["metric"]) & {"absorption_per_variance", "absorption_per_second"}


def test_values_are_shown_as_the_table_of_metrics_has_them():
    assert [shown("absorption_rate", 0.7241), shown("mcc", 0.5), shown("mcc", -0.25, "+")] == [
        "72.4%",
        "0.500",
        "-0.250",
    ]
    assert [shown("mcc", math.nan), shown("my.number", 1234.5678)] == ["not measured", "1235"]
    assert metric_of("my.number").title == "my.number"
    assert metric_of("pair_relations.parent_child").title == "parent child"
    assert shown("pair_relations.parent_child", 0.25) == "25.0%"


def test_the_environment_names_machine_versions_and_date():
    found = environment()
    assert {"date", "processor", "cores", "memory_bytes", "python", "torch", "topk_ortho"} <= found.keys()
    assert found["processor"]


def test_a_baseline_that_is_swept_is_compared_at_the_same_value(tmp_path):
    text = STUDY.replace("[variants.none]", "[base]\nsae.l0 = [4, 6]\n[variants.none]").replace("[10, 1]", "1")
    study = plan(tmp_path, text)
    for run in study.runs:
        finish(
            run, {"l0": {"none,sae.l0=4": 1, "none,sae.l0=6": 10, "on,sae.l0=4": 3, "on,sae.l0=6": 30}[run.point.label]}
        )
    assert row_of(study, "on,sae.l0=4", "l0")["difference"] == 2
    assert row_of(study, "on,sae.l0=6", "l0")["difference"] == 20
