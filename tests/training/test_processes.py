"""Processes that train together do what one does, and stop together."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.together import run_together
from tests.training import runs
from topk_ortho.training.checkpoint import CheckpointError, checkpoints, load_checkpoint
from topk_ortho.training.processes import refuse_what_cannot_be_trained_together


def assert_same_run(expected: Path, actual: Path, *, within: float = 2e-3) -> None:
    """Equal weights and metrics, but for what rounding becomes in 50 steps."""
    reference, found = (load_file(run / "sae" / "sae_weights.safetensors") for run in (expected, actual))
    assert reference.keys() == found.keys()
    for name, tensor in reference.items():
        assert found[name].shape == tensor.shape
        worst = (found[name] - tensor).abs().max().item()
        assert worst <= within * tensor.abs().max().item(), f"{name} differs by {worst}"
    before, after = runs.lines(expected), runs.lines(actual)
    assert [line.keys() for line in before] == [line.keys() for line in after]
    for line, other in zip(before, after, strict=True):
        for name, value in line.items():
            if isinstance(value, int | float):
                assert other[name] == pytest.approx(value, rel=10 * within, abs=10 * within), name


RUNS = {
    "standard": {"sae": {"architecture": "standard"}},
    "topk": {"sae": {"architecture": "topk"}, "penalty": {"op": "max_cosine", "n_chunks": 3}},
    "batchtopk": {"penalty": {"tau": "adaptive", "every": 2, "reduction": "sum", "weight": 0.01}},
    "jumprelu": {"sae": {"architecture": "jumprelu", "dead_features": "resample", "resample_every": 15}},
    "matryoshka": {"sae": {"architecture": "matryoshka"}, "penalty": {"target": "none"}},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process, made once."""
    folders: dict[str, Path] = {}

    def run(name: str, changes: dict[str, Any]) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "run"
            run_together(1, 1, folders[name].parent, runs.fit, runs.config_of(folders[name], **changes))
        return folders[name]

    return run


@pytest.mark.parametrize(
    ("name", "n_ranks", "n_batch_parts"),
    [
        *((name, 3, 1) for name in RUNS),
        ("batchtopk", 2, 2),
        ("jumprelu", 2, 2),
        ("standard", 4, 2),
        ("matryoshka", 4, 2),
    ],
)
def test_50_steps_are_those_of_one_process(name: str, n_ranks: int, n_batch_parts: int, alone: Any, tmp_path: Path):
    config = runs.config_of(tmp_path / "run", **RUNS[name])
    assert run_together(n_ranks, n_batch_parts, tmp_path, runs.fit, config) == [50] * n_ranks
    assert_same_run(alone(name, RUNS[name]), tmp_path / "run")


SPREAD = {
    "activations": {"penalty": {"target": "activations", "tau": 0.05}},
    "positive": {"penalty": {"similarity": "abs", "priority": "none"}},
}
IN_WHOLE = {
    "adaptive": {"penalty": {"refresh": "adaptive"}},
    "inhibition": {"penalty": {"encoder_inhibition": 2.0}},
    "random": {"penalty": {"op": "random_pairs"}},
}


@pytest.mark.parametrize(
    ("name", "n_batch_parts"), [*((name, 1) for name in SPREAD), *((name, 2) for name in IN_WHOLE)]
)
def test_every_penalty_is_that_of_one_process(name: str, n_batch_parts: int, alone: Any, tmp_path: Path):
    changes = (SPREAD | IN_WHOLE)[name] | {"steps": 20, "eval_every": 10}
    run_together(2, n_batch_parts, tmp_path, runs.fit, runs.config_of(tmp_path / "run", **changes))
    assert_same_run(alone(name, changes), tmp_path / "run")


@pytest.mark.parametrize(("before", "after"), [((1, 1), (3, 1)), ((3, 1), (2, 2)), ((2, 1), (1, 1)), ((2, 1), (2, 1))])
def test_any_number_of_processes_goes_on_from_a_checkpoint(
    before: tuple[int, int], after: tuple[int, int], alone: Any, tmp_path: Path
):
    """All of them stop where one of them gets a signal."""
    name, out_dir = "jumprelu", tmp_path / "run"
    config = runs.config_of(out_dir, **RUNS[name])
    assert run_together(*before, tmp_path, runs.interrupted, config, 22) == [23] * before[0]
    (path,) = checkpoints(out_dir / "checkpoints")
    assert load_checkpoint(path).step == 23
    assert not (out_dir / "summary.json").exists()
    run_together(*after, tmp_path, runs.resumed, config)
    assert_same_run(alone(name, RUNS[name]), out_dir)
    if before == after:
        run_together(*before, tmp_path, runs.fit, runs.config_of(tmp_path / "whole", **RUNS[name]))
        expected, actual = (load_file(run / "sae" / "sae_weights.safetensors") for run in (tmp_path / "whole", out_dir))
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
        assert runs.lines(out_dir)[-1] == runs.lines(tmp_path / "whole")[-1]


def test_a_step_is_saved_again_by_fewer_processes(tmp_path: Path):
    """The files of those that are no longer there do not stay."""
    config = runs.config_of(tmp_path / "run", steps=2, checkpoint_every=1)
    run_together(3, 1, tmp_path, runs.fit, config)
    (tmp_path / "run" / "summary.json").unlink()
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert len(list(last.glob("shard-*.safetensors"))) == 3
    (last / "manifest.json").write_text("torn")
    run_together(1, 1, tmp_path, runs.resumed, config)
    assert sorted(path.name for path in last.iterdir()) == ["manifest.json", "state.safetensors"]


def test_a_file_that_is_damaged_or_too_many_is_named(tmp_path: Path):
    run_together(2, 1, tmp_path, runs.fit, runs.config_of(tmp_path / "run", steps=1))
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(path).step == 1
    second = next(path.glob("shard-00002-*"))
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"the sha256 of shard-00002-.* is not the one"):
        load_checkpoint(path)
    second.write_bytes(content)
    (path / "shard-00003-model-00001-of-00001.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not know shard-00003-"):
        load_checkpoint(path)


def test_a_checkpoint_that_one_rank_cannot_write_is_said_and_all_go_on(tmp_path: Path):
    config = runs.config_of(tmp_path / "run", steps=3, checkpoint_every=2)
    said = run_together(2, 1, tmp_path, runs.fit_with_a_full_disk, config)
    assert "could not be written" in said[0]
    assert "earlier checkpoints are as they were" in said[0]
    assert said[1] == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert (tmp_path / "run" / "summary.json").exists()


REFUSED = {
    "batch_size": ({"batch_size": 95}, 2, "batch_size must be a multiple of data_parallel = 2, got 95"),
    "n_features": ({"sae": {"n_features": 2, "l0": 1}}, 1, "sae.n_features must be large enough that each of 3"),
    "compile": ({"compile": True}, 1, "compile must be false with 3 processes"),
    "pairs_every": ({"pairs_every": 5}, 1, "pairs_every must be 0 with 3 processes"),
    "c2r": ({"penalty": {"op": "c2r"}}, 3, "penalty.op must be topk_pairs or max_cosine with 3 processes"),
    "activations": ({"penalty": {"target": "activations"}}, 3, "penalty.target must be decoder or none"),
    "random_pairs": ({"penalty": {"op": "random_pairs"}}, 1, "penalty.op must be topk_pairs or max_cosine"),
    "refresh": ({"penalty": {"refresh": "certified"}}, 1, "penalty.refresh must be exact where each process holds"),
    "inhibition": ({"penalty": {"encoder_inhibition": 1.0}}, 1, "penalty.encoder_inhibition must be 0 where each"),
}


def parallel_of(n_features_parts: int, n_batch_parts: int) -> Any:
    sizes = {"world": n_features_parts * n_batch_parts, "features": n_features_parts, "batch": n_batch_parts}
    return SimpleNamespace(**{name: SimpleNamespace(size=size) for name, size in sizes.items()})


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_together_is_refused_by_name(name: str, tmp_path: Path):
    changes, n_batch_parts, message = REFUSED[name]
    parallel = parallel_of(3, 1) if n_batch_parts == 1 else parallel_of(1, n_batch_parts)
    config = runs.config_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_what_cannot_be_trained_together(config, parallel)
    if "penalty" in changes:  # nothing is penalised, so nothing is in the way
        without = replace(config, penalty=replace(config.penalty, target="none"))
        refuse_what_cannot_be_trained_together(without, parallel)


def test_data_parallel_divides_the_number_of_processes(tmp_path: Path):
    with pytest.raises(AssertionError, match="data_parallel must divide the number of processes, which is 3, got 2"):
        run_together(3, 2, tmp_path, runs.fit)
