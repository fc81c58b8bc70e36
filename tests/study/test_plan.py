"""Which runs a study file asks for, and what is refused before one starts."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import train
from topk_ortho.study.named import named_studies
from topk_ortho.study.plan import load_study
from topk_ortho.training.presets import PRESETS

HEAD = 'description = "A test."\npreset = "toy-hierarchy"\nseeds = [3, 5]\nbaseline = "none"\n'
NONE = '[variants.none]\npenalty.target = "none"\n'


def load(tmp_path, text, **overrides):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return load_study(str(path), tmp_path / "out", **overrides)


def test_grids_are_products_and_every_point_has_every_seed(tmp_path):
    study = load(
        tmp_path, HEAD + '[base]\nsteps = 7\n[variants.none]\npenalty.target = "none"\n'
        "[variants.both]\nsteps = 8\nsae.l0 = 4\n"
        '[variants.both.penalty]\nweight = [1, 0.5]\ntau = ["adaptive", "None"]\n',
    )  # fmt: skip
    assert [run.name for run in study.runs] == [
        "none/seed-3", "none/seed-5",
        "both,penalty.weight=1,penalty.tau=adaptive/seed-3", "both,penalty.weight=1,penalty.tau=adaptive/seed-5",
        "both,penalty.weight=1,penalty.tau=None/seed-3", "both,penalty.weight=1,penalty.tau=None/seed-5",
        "both,penalty.weight=0.5,penalty.tau=adaptive/seed-3", "both,penalty.weight=0.5,penalty.tau=adaptive/seed-5",
        "both,penalty.weight=0.5,penalty.tau=None/seed-3", "both,penalty.weight=0.5,penalty.tau=None/seed-5",
    ]  # fmt: skip
    preset, last = PRESETS["toy-hierarchy"], study.runs[-1]
    assert last.config == replace(
        preset, steps=8, seed=5, out_dir=tmp_path / "out" / "runs" / last.name, sae=replace(preset.sae, l0=4),
        penalty=replace(preset.penalty, weight=0.5, tau=None),
    )  # fmt: skip
    assert study.runs[0].config.steps == 7
    assert study.points[1].swept == {"penalty.weight": 1.0, "penalty.tau": "adaptive"}


def test_a_setting_that_is_a_list_needs_a_list_of_lists_to_be_swept(tmp_path):
    fixed = load(tmp_path, HEAD + NONE + "[variants.m]\nsae.widths = [72, 288]\nloggers = []\n")
    assert (fixed.points[1].config.sae.widths, fixed.points[1].swept) == ((72, 288), {})
    swept = load(tmp_path, HEAD + NONE + '[variants.m]\nsae.widths = [[72, 288], "None"]\n')
    assert [point.config.sae.widths for point in swept.points] == [None, (72, 288), None]
    assert [point.label for point in swept.points] == ["none", "m,sae.widths=72-288", "m,sae.widths=None"]


def test_several_presets_are_a_part_of_the_grid_and_each_has_its_baseline(tmp_path):
    text = HEAD.replace('"toy-hierarchy"', '["toy-hierarchy", "toy-zipf"]') + NONE + "[variants.a]\nsae.l0 = [3, 4]\n"
    study = load(tmp_path, text)
    assert [point.label for point in study.points] == [
        "none,preset=toy-hierarchy",
        "none,preset=toy-zipf",
        *(f"a,preset=toy-{name},sae.l0={l0}" for name in ("hierarchy", "zipf") for l0 in (3, 4)),
    ]
    assert [point.config.synthetic.zipf_exponent for point in study.points] == [0, 1, 0, 0, 1, 1]
    compared_with = [study.baseline_of(point) for point in study.points]
    assert [point and point.swept["preset"] for point in compared_with] == [
        None, None, "toy-hierarchy", "toy-hierarchy", "toy-zipf", "toy-zipf",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"variant none: preset must be one of minilm, .*, got \[\]"):
        load(tmp_path, HEAD.replace('"toy-hierarchy"', "[]") + NONE)


def test_a_variant_may_have_its_own_preset_and_the_command_line_takes_the_place_of_the_study_s(tmp_path):
    text = HEAD + NONE + '[variants.gemma]\npreset = "gemma-2-2b"\n'
    assert [point.config.source for point in load(tmp_path, text).points] == ["synthetic", "transformer"]
    study = load(tmp_path, text + "# kept\n", preset="minilm", seeds=[7])
    assert [point.config.model.name for point in study.points] == ["minilm", "google/gemma-2-2b"]
    written = tomllib.loads(study.text)
    assert (written["preset"], written["seeds"], "# kept" in study.text) == ("minilm", [7], True)


def test_a_point_is_compared_with_the_baseline_at_the_same_values(tmp_path):
    study = load(tmp_path, HEAD + "[base]\nsae.l0 = [4, 5]\n" + NONE + "[variants.on]\npenalty.weight = [1, 2]\n")
    compared = {p.label: b and b.label for p in study.points for b in [study.baseline_of(p)]}
    assert compared == {
        "none,sae.l0=4": None, "none,sae.l0=5": None,
        "on,sae.l0=4,penalty.weight=1": "none,sae.l0=4", "on,sae.l0=4,penalty.weight=2": "none,sae.l0=4",
        "on,sae.l0=5,penalty.weight=1": "none,sae.l0=5", "on,sae.l0=5,penalty.weight=2": "none,sae.l0=5",
    }  # fmt: skip
    fixed = load(tmp_path, HEAD + "[variants.none]\nsae.l0 = [4, 5]\n[variants.on]\nsae.l0 = 6\n")
    assert fixed.baseline_of(fixed.points[2]) is None


FIGURE = '[[figures]]\ntitle = "T"\ncaption = "C"\n'
REFUSED = {
    "unknown_setting": (
        HEAD + NONE + "[variants.x]\npenalty.wieght = 1\n",
        "variant x: unknown setting penalty.wieght; did you mean penalty.weight?",
    ),
    "unknown_in_a_grid": (
        HEAD + NONE + "[variants.x]\nn_features = [8, 16]\n",
        "variant x: unknown setting n_features; did you mean sae.n_features?",
    ),
    "wrong_type": (HEAD + NONE + '[variants.x]\nsteps = [7, "8"]\n', "variant x: steps must be an integer, got '8'"),
    "out_of_range": (
        HEAD + "[base]\npenalty.fraction = 2\n" + NONE,
        "variant none: penalty.fraction must be in (0, 1], got 2.0",
    ),
    "empty_grid": (
        HEAD + NONE + "[variants.x]\nsteps = []\n",
        "variant x: steps must be a value or a list of values to try, got an empty list",
    ),
    "twice_in_a_grid": (
        HEAD + NONE + "[variants.x]\nlr = [1, 0.5, 1.0]\n",
        "variant x: the grid must have each value once, got lr=1 2 times",
    ),
    "seed_twice": (HEAD.replace("[3, 5]", "[3, 3]") + NONE, "seeds must have each value once, got 3 2 times"),
    "negative_seed": (HEAD.replace("[3, 5]", "[3, -1]") + NONE, "seed must be in [0, 2**63), got -1"),
    "no_seed": (HEAD.replace("[3, 5]", "[]") + NONE, "seeds: List should have at least 1 item"),
    "seed_is_given": (HEAD + NONE + "[variants.x]\nseed = 4\n", "variant x: seed cannot be set here"),
    "out_dir_is_given": (HEAD + '[base]\nout_dir = "x"\n' + NONE, "variant none: out_dir cannot be set here"),
    "no_such_baseline": (
        HEAD.replace('"none"', '"nothing"') + NONE,
        "baseline must be one of the variants none, got 'nothing'",
    ),
    "no_variant": (HEAD + "[variants]\n", "variants: Dictionary should have at least 1 item"),
    "nothing_but_a_name": ('description = "x"\n', "preset is missing"),
    "unknown_name": (HEAD + "seed = 3\n" + NONE, "unknown name seed; did you mean seeds?"),
    "unknown_preset": (HEAD.replace("toy-hierarchy", "toy") + NONE, "variant none: preset must be one of minilm, "),
    "a_name_that_is_a_path": (
        HEAD + NONE + '[variants."a/b"]\n',
        "variants: a name may have letters, digits and _ . + -, got 'a/b'",
    ),
    "unknown_option_of_saebench": (
        HEAD + 'saebench = { evals = ["absorption"], word = 3 }\n' + NONE,
        "unknown name saebench.word",
    ),
    "no_such_evaluation": (
        HEAD + 'saebench = { evals = ["scr"] }\n' + NONE,
        "saebench.evals.0: Input should be 'absorption' or 'core', got 'scr'",
    ),
    "no_evaluation": (HEAD + "saebench = { evals = [] }\n" + NONE, "saebench.evals: List should have at least 1 item"),
    "evaluation_twice": (
        HEAD + 'saebench = { evals = ["core", "core"] }\n' + NONE,
        "saebench.evals must have each value once, got core 2 times",
    ),
    "saebench_of_synthetic_data": (
        HEAD + 'saebench = { evals = ["core"] }\n' + NONE,
        "variant none: saebench needs source transformer, got synthetic",
    ),
    "saebench_elsewhere": (
        HEAD.replace("toy-hierarchy", "minilm") + 'saebench = { evals = ["core"] }\n'
        '[base]\nmodel.hook = "blocks.3.hook_mlp_out"\n' + NONE,
        "variant none: saebench needs model.hook blocks.N.hook_resid_post, got blocks.3.hook_mlp_out",
    ),
    "no_words": (
        HEAD + 'saebench = { evals = ["absorption"], words = 0 }\n' + NONE,
        "saebench.words: Input should be greater than or equal to 1, got 0",
    ),
    "variant_twice": (HEAD + NONE + NONE, "cannot be read as TOML"),
    "unknown_kind": (
        HEAD + NONE + FIGURE + 'kind = "pie"\n',
        "figures.0: Input tag 'pie' found using 'kind' does not match",
    ),
    "figure_lacks_a_metric": (HEAD + NONE + FIGURE + 'kind = "front"\nx = "l0"\n', "figures.0.front.y is missing"),
    "figure_of_no_variant": (
        HEAD + NONE + FIGURE + 'kind = "steps"\ny = "l0"\nvariants = ["x"]\n',
        "figures.0.variants must be of none, got 'x'",
    ),
    "not_swept": (
        HEAD + NONE + FIGURE + 'kind = "curve"\nx = "lr"\ny = "l0"\n',
        "figures.0: x must be settings that one of its variants sweeps (there are none), got lr",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_anything_runs(name, tmp_path):
    text, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"my\.toml.*" + re.escape(message)):
        load(tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_neither_study_nor_file_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"tyo is neither a file nor one of the studies .*seed.*toy"):
        load_study("tyo", tmp_path)


@pytest.mark.parametrize("name", named_studies())
def test_named_studies_are_valid(name, tmp_path):
    study = load_study(name, tmp_path)
    assert study.runs
    assert json.dumps(study.runs[0].config.as_json())


def test_the_presets_of_the_original_experiment_are_the_runs_of_the_study(tmp_path):
    config, _ = train.parse(["--preset", "seed-run-2", "--out_dir=run_2"])  # the original command's form
    assert config == replace(PRESETS["seed-run-2"], out_dir=Path("run_2"))
    study = load_study("seed", tmp_path)
    points = {point.variant: point.config for point in study.points}
    kinds = {f"run_{n}-{target}" for n in range(1, 6) for target in ("activations", "decoder")}
    assert points.keys() == {"none"} | kinds
    expected = {
        1: {"tau": 0.1, "fraction": 0.001, "weight": 0.3}, 2: {"tau": "adaptive", "fraction": 0.001, "weight": 0.3},
        3: {"tau": 0.1, "fraction": 0.0005, "weight": 0.3}, 4: {"tau": 0.1, "fraction": 0.002, "weight": 0.3},
        5: {"tau": 0.1, "fraction": 0.001, "weight": 0.5},
    }  # fmt: skip
    for number, settings in expected.items():
        preset = PRESETS[f"seed-run-{number}"]
        baseline = PRESETS["seed-baseline"]
        penalty = replace(baseline.penalty, target="activations", similarity="abs", priority="none", **settings)
        assert preset == replace(baseline, penalty=penalty, out_dir=preset.out_dir)
        assert points[f"run_{number}-activations"] == replace(
            preset, out_dir=points[f"run_{number}-activations"].out_dir
        )
        assert points[f"run_{number}-decoder"].penalty == replace(preset.penalty, target="decoder")
