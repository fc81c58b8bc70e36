import json
import math

import pytest

from topk_ortho.training.config import TrainConfig
from topk_ortho.training.loggers import json_lines, open_loggers, tensorboard

METRICS = [{"step": step, "loss": 1 / step, "tau": None, "density_histogram": {"counts": [1, 2]}} for step in (1, 2, 3)]


def test_json_lines_keep_what_was_before_a_step_and_cut_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with json_lines(path, 0) as log:
        for metrics in METRICS:
            log(metrics)
    assert [json.loads(line) for line in path.read_text().splitlines()] == METRICS
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with json_lines(path, 2) as log:
        log({"step": 3})
        assert len(path.read_text().splitlines()) == 3, "a line is there as soon as it is logged"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert "loss" not in json.loads(path.read_text().splitlines()[-1])
    with json_lines(path, 0):
        assert path.read_text() == ""


def test_json_lines_may_be_cut_by_another_field(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with json_lines(path, 0) as log:
        for step, until in ((10, 110), (20, 120)):
            log({"step": step, "until": until})
    with json_lines(path, 115, written_at="until"):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path, 0) as log:
        for metrics in METRICS:
            log(metrics)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "loss"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])


def test_what_is_not_defined_goes_nowhere(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path, 0) as log:
        log({"step": 1, "loss": math.nan, "fvu": math.inf, "tau": None, "l0": 2})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "l0"}
    with json_lines(tmp_path / "metrics.jsonl", 0) as log, pytest.raises(ValueError, match="JSON"):
        log({"step": 1, "loss": math.nan})  # it is no JSON
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_wandb_gets_the_numbers_and_keeps_its_identity(tmp_path, monkeypatch):
    """wandb itself starts a process and a network; what it is asked to do is enough."""
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments["id"])
        assert arguments["config"]["steps"] == 600
        return Run()

    monkeypatch.setattr("wandb.init", init)
    config = TrainConfig(out_dir=tmp_path, loggers=("wandb",))
    for step in (0, 2):
        with open_loggers(config, tmp_path, step) as log:
            log(METRICS[0])
    assert calls[0] == calls[3]
    assert calls[1:3] == [(1, {"step": 1, "loss": 1.0}), "finish"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    loggers = open_loggers(TrainConfig(out_dir=tmp_path, loggers=("wandb",)), tmp_path, 0)
    with pytest.raises(ValueError, match="loggers needs the package wandb: pip install wandb"):
        loggers.__enter__()
