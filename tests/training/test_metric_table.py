from pathlib import Path

from topk_ortho.training.metric_table import METRICS, as_markdown, headlines

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = ["Explained variance", "L0", "Dead features", "Mean max decoder cosine", "Training tokens/s"]


def test_the_table_in_the_documentation_is_this_one():
    assert f"\n\n{as_markdown()}\n\n" in (ROOT / "docs/metrics.md").read_text()


def test_every_metric_stands_once():
    keys = [metric.key for metric in METRICS]
    assert len(keys) == len(set(keys))


def test_headlines_of_a_run_without_optional_metrics():
    lines = list(headlines({"explained_variance": 0.84217, "l0": float("nan"), "dead_fraction": 0.2471}))
    assert [line.metric.title for line in lines] == ALWAYS
    assert [line.value for line in lines] == ["0.842", "not measured", "24.7%", "not measured", "not measured"]
    assert not any(line.detail for line in lines)


def test_optional_headlines_follow_and_details_need_all_their_values():
    lines = list(headlines({"mcc": 0.5, "mcc_parent": 0.25, "f1": 1, "dead_fraction": 0.5, "dead_features": 2048}))
    assert [line.metric.title for line in lines] == [*ALWAYS, "MCC", "F1"]
    details = {line.metric.title: line.detail for line in lines if line.detail}
    assert details == {"Dead features": "2,048 features."}


def test_an_optional_metric_that_is_not_defined_is_named():
    lines = list(headlines({"ce_loss_recovered": None, "ce_loss_clean": 3.2, "absorption_rate": float("nan")}))
    assert [(line.metric.title, line.value) for line in lines[len(ALWAYS) :]] == [
        ("CE loss recovered", "not measured"), ("Absorption rate", "not measured"),
    ]  # fmt: skip
