"""What the report and the figures of a study show, on made-up numbers."""

import re

import pytest

from tests.study.made_up import STUDY, finish, finish_all, plan
from tests.training.test_report import Page
from topk_ortho.study.figures import draw_figures
from topk_ortho.study.report import write_report
from topk_ortho.study.results import collect, summarise

FIGURES = """
[[figures]]
kind = "front"
x = "explained_variance"
y = "absorption_rate"
title = "Cost"
caption = "Lower right is best."
[[figures]]
kind = "curve"
x = "penalty.weight"
y = "absorption_rate"
title = "Weight"
caption = "A curve."
[[figures]]
kind = "steps"
y = "fvu"
title = "Training"
caption = "Over the steps."
variants = ["on"]
[[figures]]
kind = "steps"
y = "not.there"
title = "Nothing"
caption = "Empty."
"""
ROWS = [{"step": 10, "fvu": 0.8}, {"step": 20, "fvu": 0.4, "explained_variance": 0.6}]


def summary(absorption, variance, **more):
    return {"absorption_rate": absorption, "explained_variance": variance, "seconds": 10.0, "secret.number": 7.0} | more


NUMBERS = {
    "none": [summary(0.6, 0.90), summary(0.7, 0.92), summary(0.8, 0.91)],
    "on,penalty.weight=10": [summary(0.1, 0.80), None, summary(0.2, 0.82)],
    "on,penalty.weight=1": [summary(0.2, 0.89), summary(0.3, 0.91), summary(0.4, 0.90)],
}


def report(folder, text=STUDY + FIGURES, numbers=NUMBERS, failures=None):
    study = plan(folder, text)
    finish_all(study, numbers, ROWS)
    results = collect(study)
    write_report(study, folder, results, summarise(study, results), failures or {})
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def page(folder):
    return report(folder, failures={"on,penalty.weight=10/seed-1": "ValueError: <too bad>"})


def words(element):
    """The texts of an element and of those in it, with blanks between them."""
    return " ".join(" ".join(element.itertext()).split())


def rows_of(page):
    table = page.all("table")[0]
    return [[words(cell) for cell in row if cell.tag in ("td", "th")] for row in table.iter("tr")]


def test_the_table_has_means_intervals_and_paired_differences(page):
    header, none, strong, weak = rows_of(page)
    assert header == [
        "variant", "runs", "Explained variance ↑", "Absorption rate ↓", "Absorption removed per variance lost ↑",
        "Absorption removed per extra second ↑",
    ]  # fmt: skip
    # the half widths are t * s / sqrt(n): 4.303 * 0.1 / sqrt(3) for three seeds, 12.71 * 0.0707 / sqrt(2) for two
    assert none == ["none", "3", "0.910 ± 0.025", "70.0% ± 24.8%", "", ""]
    assert weak == [
        "on, penalty.weight=1", "3", "0.900 ± 0.025 -0.010 ± 0.000", "30.0% ± 24.8% -40.0% ± 0.0%",
        "40.00 [40.00, 40.00]", "no extra time",
    ]  # fmt: skip
    assert strong[:4] == ["on, penalty.weight=10", "2", "0.810 ± 0.127 -0.095 ± 0.064", "15.0% ± 63.5% -55.0% ± 63.5%"]


def test_a_difference_is_marked_where_its_interval_leaves_out_zero(page):
    spans = {page.text(span): span.get("class") for span in page.all("span")}
    assert spans["-40.0% ± 0.0%"] == "clear"
    assert spans["-55.0% ± 63.5%"] == "difference"


def test_the_page_shows_named_metrics_alone_and_says_what_they_mean(page):
    assert "secret.number" not in page.text()
    assert "How often a parent's feature is silent" in page.text()
    assert "fvu: Fraction of variance unexplained" in page.text()


def test_failed_runs_changes_and_the_way_to_reproduce_are_told(page):
    text = words(page.root)
    assert "on,penalty.weight=10/seed-1 ValueError: <too bad>" in text
    assert "on penalty.weight = [10, 1]" in text
    assert "python -m topk_ortho.study study.toml --out-dir again trains the 9 runs anew" in text
    assert "Made-up numbers." in text
    assert "have not been trained yet" not in text


def test_figures_have_titles_captions_and_alternative_texts(page, folder):
    images = page.all("img")
    texts = [image.get("alt") for image in images]
    assert texts[0] == (
        "Scatter plot of Absorption rate at Explained variance. none: 70.0% at 0.910. "
        "on,penalty.weight=10: 15.0% at 0.810. on,penalty.weight=1: 30.0% at 0.900."
    )
    assert texts[1] == (
        "Line chart of Absorption rate against penalty.weight. on: 30.0% at 1.0, 15.0% at 10.0. none: 70.0%."
    )
    assert texts[2] == (
        "Line chart of fvu over the training steps. on,penalty.weight=10: from 0.8 at step 10 to 0.4 at step 20. "
        "on,penalty.weight=1: from 0.8 at step 10 to 0.4 at step 20."
    )
    assert len(images) == 3
    assert "Not drawn, as no finished run has its metrics: Nothing." in page.text()
    files = {path.name for path in (folder / "figures").iterdir()}
    assert files == {f"{name}.{suffix}" for name in ("1-front", "2-curve", "3-steps") for suffix in ("png", "svg")}


def test_the_page_stands_alone(page):
    assert page.all("html")[0].get("lang") == "en"
    assert not page.all("script") + page.all("link")
    levels = [int(element.tag[1]) for element in page.root.iter() if re.fullmatch(r"h\d", element.tag)]
    assert all(after - before <= 1 for before, after in zip([0, *levels], levels, strict=False))


HEATMAP = """
[[figures]]
kind = "heatmap"
x = "penalty.weight"
y = "penalty.tau"
metric = "absorption_rate"
title = "Both"
caption = "Two settings."
"""


def test_a_heat_map_over_two_settings(tmp_path):
    text = STUDY.replace("[10, 1]", '[10, 1]\npenalty.tau = ["adaptive", 0.5]') + HEATMAP
    labels = [f"on,penalty.weight={w},penalty.tau={t}" for w in (10, 1) for t in ("adaptive", 0.5)]
    numbers = {label: [summary(0.1 * i, 0.9)] * 3 for i, label in enumerate(labels, start=1)}
    page = report(tmp_path, text, numbers | {"none": [None] * 3})
    assert page.all("img")[0].get("alt") == (
        "Heat map of Absorption rate over penalty.weight and penalty.tau. on, 10.0 and adaptive: 10.0%. "
        "on, 10.0 and 0.5: 20.0%. on, 1.0 and adaptive: 30.0%. on, 1.0 and 0.5: 40.0%."
    )
    assert "3 of the 15 runs of the study have not been trained yet" in page.text()


PAIRS = """
[[figures]]
kind = "lags"
title = "Lags"
caption = "Of two selections."
[[figures]]
kind = "steps"
y = "pair_relations.parent_child"
title = "Relations"
caption = "Over the steps."
"""


def test_how_the_selected_pairs_change(tmp_path):
    """Runs that noted no pairs are left out, and so is a lag that no window was long enough for."""
    study = plan(tmp_path, STUDY + PAIRS)
    for run in study.runs:
        if run.point.variant == "none":
            finish(run, summary(0.5, 0.9))
        else:
            jaccard = {"jaccard_lag_1": 0.9, "jaccard_lag_10": 0.5 + 0.1 * run.seed}
            lines = [{"step": 100, "parent_child": 0.25, **jaccard}, {"step": 200, "parent_child": 0.75, **jaccard}]
            finish(run, summary(0.5, 0.9, pair_stability=jaccard), pairs=lines)
    results = collect(study)
    write_report(study, tmp_path, results, summarise(study, results), {})
    texts = [image.get("alt") for image in Page(tmp_path / "report.html").all("img")]
    assert texts == [
        "Line chart of the pairs that two selections share against the steps between them. "
        "on,penalty.weight=10: from 90.0% at 1 to 60.0% at 10. on,penalty.weight=1: from 90.0% at 1 to 60.0% at 10.",
        "Line chart of parent child over the training steps. "
        "on,penalty.weight=10: from 25.0% at step 100 to 75.0% at step 200. "
        "on,penalty.weight=1: from 25.0% at step 100 to 75.0% at step 200.",
    ]


def test_a_curve_over_words_has_a_place_for_each(tmp_path):
    text = STUDY.replace("weight = [10, 1]", 'tau = ["adaptive", 0.5, "None"]') + FIGURES.split("[[figures]]")[2].join(
        ["[[figures]]", ""]
    ).replace("penalty.weight", "penalty.tau")
    numbers = {f"on,penalty.tau={tau}": [summary(0.5, 0.9)] * 3 for tau in ("adaptive", 0.5, None)}
    page = report(tmp_path, text, numbers | {"none": [None] * 3})
    assert page.all("img")[0].get("alt").endswith("on: 50.0% at adaptive, 50.0% at 0.5, 50.0% at None.")


def test_a_study_without_a_finished_run_says_so(tmp_path):
    page = report(tmp_path, numbers={label: [None] * 3 for label in NUMBERS}, failures={"none/seed-0": "bad"})
    assert "No run is finished." in page.text()
    assert not page.all("img")


def test_figures_of_an_earlier_study_in_the_folder_go(tmp_path):
    study = plan(tmp_path)
    (tmp_path / "figures").mkdir()
    for name in ("1-front.png", "1-front.svg", "mine.png"):
        (tmp_path / "figures" / name).touch()
    assert draw_figures(study, summarise(study, collect(study)), tmp_path / "figures") == []
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["mine.png"]
