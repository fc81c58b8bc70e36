"""How finished runs are compared, whoever trained them."""

import pytest

from tests.study.made_up import finish, plan
from tests.study.test_report import words
from tests.training.test_report import Page
from topk_ortho.compare import main, open_runs

ROWS = [{"step": 10, "explained_variance": 0.5}, {"step": 20, "explained_variance": 0.75}]


@pytest.fixture
def folder(tmp_path):
    """A study of three finished runs with these numbers."""
    study = plan(tmp_path)
    first, second, third = study.runs[0], study.runs[3], study.runs[6]
    finish(first, {"explained_variance": 0.9, "absorption_rate": 0.7, "l0": 5.0, "mcc": 0.5, "secret": 1}, ROWS)
    finish(second, {"explained_variance": 0.8, "absorption_rate": 0.1, "l0": 6.0, "mcc": 0.5, "secret": 2}, ROWS)
    finish(third, {"explained_variance": None, "absorption_rate": 0.4, "l0": 5.0, "mcc": 0.5}, ROWS)
    return tmp_path


def test_what_differs_is_shown_and_the_best_marked(folder, capsys):
    main([str(folder / "runs" / name / "seed-0") for name in ("none", "on,penalty.weight=10", "on,penalty.weight=1")])
    lines = {line.split("  ")[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["penalty.target"] == ["none", "decoder", "decoder"]
    assert lines["penalty.weight"] == ["0.3", "10.0", "1.0"]
    assert lines["Explained variance"] == ["variance", "0.900", "*", "0.800", "not", "measured"]
    assert lines["Absorption rate"] == ["rate", "70.0%", "10.0%", "*", "40.0%"]
    assert lines["L0"] == ["5.0", "6.0", "5.0"]
    assert not {"MCC", "secret", "seed", "out_dir"} & lines.keys()


def test_differences_to_a_baseline_stand_in_brackets(folder, capsys):
    main([str(folder), "--baseline", str(folder / "runs" / "on,penalty.weight=10" / "seed-0")])
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("Absorption rate"))
    assert line.split()[2:] == ["10.0%", "*", "70.0%", "(+60.0%)", "40.0%", "(+30.0%)"]
    assert "0.900 (+0.100) *" in output


def test_the_report_has_the_tables_and_the_curves(folder, tmp_path):
    main([str(folder), "--out-dir", str(tmp_path / "out")])
    page = Page(tmp_path / "out" / "report.html")
    assert "penalty.weight 0.3 1.0 10.0" in words(page.root)
    assert [page.text(cell) for cell in page.all("td") if cell.get("class") == "clear"] == ["0.900", "10.0%"]
    (image,) = page.all("img")
    assert image.get("alt") == (
        "Line chart of Explained variance over the training steps. "
        "none/seed-0: from 0.500 at step 10 to 0.750 at step 20. "
        "on,penalty.weight=1/seed-0: from 0.500 at step 10 to 0.750 at step 20. "
        "on,penalty.weight=10/seed-0: from 0.500 at step 10 to 0.750 at step 20."
    )
    assert "secret" not in page.text()


def test_runs_are_told_apart_by_what_differs_in_their_folders(folder):
    runs = open_runs([folder / "runs" / "none" / "seed-0", folder, folder / "runs" / "none" / "seed-0"])
    assert [run.label for run in runs] == ["none/seed-0", "on,penalty.weight=1/seed-0", "on,penalty.weight=10/seed-0"]


def test_equal_runs_are_said_to_be_equal(tmp_path, capsys):
    study = plan(tmp_path)
    for run in study.runs[:2]:
        finish(run, {"l0": 5.0})
    main([str(tmp_path)])
    output = capsys.readouterr().out
    assert "seed" in output
    assert "No metric differs." in output


def test_a_folder_without_a_finished_run_is_refused_by_name(folder, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"compare: .*unfinished is neither the folder of a finished run"):
        main([str(folder), str(tmp_path / "unfinished")])
    with pytest.raises(SystemExit, match="compare: at least 2 runs are needed, got 1"):
        main([str(folder / "runs" / "none" / "seed-0")])
