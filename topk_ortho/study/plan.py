"""A study file: the training runs that it asks for, and the figures to draw of them.

Everything in the file is checked here, before a run starts: all configurations are built.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topk_ortho.study.benchmark import Benchmark
from topk_ortho.study.named import STUDIES, named_studies
from topk_ortho.training.config import TrainConfig, flatten
from topk_ortho.training.presets import PRESETS
from topk_ortho.training.run_folder import is_finished
from topk_ortho.training.settings import apply_settings, list_settings, read_settings

_GIVEN_OTHERWISE = {"seed": "`seeds` of the study gives it", "out_dir": "each run has a folder in that of the study"}
"""Settings that are not a variant's to choose, and why."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Figure(_Table):
    title: str = Field(min_length=1)
    caption: str = Field(min_length=1)
    variants: list[str] = []
    """The variants that it shows; empty for all"""


class Front(_Figure):
    """A metric against another, with a mark for every point."""

    kind: Literal["front"]
    x: str
    y: str


class Curve(_Figure):
    """A metric against a setting that the study sweeps, with a line for every variant."""

    kind: Literal["curve"]
    x: str
    y: str


class Heatmap(_Figure):
    """A metric over two settings that the study sweeps, with a panel for every variant."""

    kind: Literal["heatmap"]
    x: str
    y: str
    metric: str


class Steps(_Figure):
    """A metric of metrics.jsonl or pairs.jsonl over the training steps, with a line for every point."""

    kind: Literal["steps"]
    y: str


class Lags(_Figure):
    """How many pairs two selections share, against the steps between them, with a line for every point."""

    kind: Literal["lags"]


class _SAEBench(_Table):
    evals: list[Literal["absorption", "core"]] = Field(min_length=1)
    words: int | None = Field(None, ge=1)


FigureSpec = Annotated[Front | Curve | Heatmap | Steps | Lags, Field(discriminator="kind")]


class _StudyFile(_Table):
    description: str = Field(min_length=1)
    preset: str | list[str]
    seeds: list[int] = Field(min_length=1)
    baseline: str
    base: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    figures: list[FigureSpec] = []
    saebench: _SAEBench | None = None


class Point(NamedTuple):
    """A variant at one place of its grid: what is trained with several seeds."""

    variant: str
    swept: dict[str, Any]
    """Values of the settings that the variant sweeps, by their dotted names"""
    config: TrainConfig
    """The run of the first seed; its out_dir is the folder of the point"""

    @property
    def label(self) -> str:
        """The variant and its swept settings, as in ``decoder,penalty.weight=0.3``."""
        return ",".join([self.variant, *(f"{name}={_as_name(value)}" for name, value in self.swept.items())])


class PlannedRun(NamedTuple):
    """One training run of a study."""

    point: Point
    seed: int
    config: TrainConfig
    benchmark: Benchmark | None
    """What SAEBench measures on it; None if the study does not ask for that"""

    @property
    def is_done(self) -> bool:
        """Whether training is finished and SAEBench, if the study asks for it, has judged the dictionary.

        Raises
        ------
        ValueError
            If its folder holds a run of other settings.
        """
        return is_finished(self.config) and (not self.benchmark or self.benchmark.has_judged(self.config.out_dir))

    @property
    def name(self) -> str:
        """What the run is called, and where its folder lies in ``runs/``."""
        return f"{self.point.label}/seed-{self.seed}"


class Study(NamedTuple):
    """A study that has been checked."""

    text: str
    """The study file, with what the command line changed in it"""
    description: str
    baseline: str
    seeds: list[int]
    points: list[Point]
    runs: list[PlannedRun]
    figures: list[FigureSpec]
    changes: dict[str, dict[str, Any]]
    """For every variant, the settings that it changes, by their dotted names as they stand in the file"""

    def baseline_of(self, point: Point) -> Point | None:
        """The point that another is compared with: the baseline's, at the same values of what the baseline sweeps."""
        settings = flatten(point.config.as_json()) | point.swept  # a preset that is swept is no setting of its own
        for other in self.points:
            is_baseline = other.variant == self.baseline != point.variant
            if is_baseline and all(settings.get(name) == value for name, value in other.swept.items()):
                return other
        return None


def load_study(source: str, out_dir: Path, *, preset: str | None = None, seeds: list[int] | None = None) -> Study:
    """Read a study and build the configurations of all its runs.

    Parameters
    ----------
    source : str
        Name of a study of this package, or path of a TOML file.
    out_dir : Path
        Folder of the study, in whose ``runs/`` every run gets a folder.
    preset : str, optional
        Takes the place of the study's own preset; the settings of the study are laid over it.
    seeds : list of int, optional
        Take the place of the study's own seeds.

    Raises
    ------
    ValueError
        If something in the file is unknown, of the wrong type, out of range, empty, or there twice; the message names
        it.
    """
    path = STUDIES / f"{source}.toml" if source in named_studies() else Path(source)
    if not path.is_file():
        raise ValueError(f"{source} is neither a file nor one of the studies {', '.join(named_studies())}")
    content = read_settings(path)
    text = path.read_text("utf-8-sig")
    overrides = {name: value for name, value in (("preset", preset), ("seeds", seeds)) if value is not None}
    if overrides:
        document = tomlkit.parse(text)
        document.update(overrides)
        text = tomlkit.dumps(document)
    try:
        return _checked(_StudyFile.model_validate(content | overrides), text, out_dir)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_problem(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(file: _StudyFile, text: str, out_dir: Path) -> Study:
    """The study of a file whose tables have the right names and types."""
    if file.baseline not in file.variants:
        raise ValueError(f"baseline must be one of the variants {', '.join(file.variants)}, got {file.baseline!r}")
    _refuse_duplicates("seeds", file.seeds)
    points = []
    for variant, overrides in file.variants.items():
        if not re.fullmatch(r"\w[\w.+-]*", variant):
            raise ValueError(f"variants: a name may have letters, digits and _ . + -, got {variant!r}")
        try:
            points += _points(variant, _merged(file.base, overrides), file.preset, out_dir / "runs")
        except ValueError as error:
            raise ValueError(f"variant {variant}: {error}") from error
    for number, figure in enumerate(file.figures):
        _check_figure(figure, f"figures.{number}", file.variants, points)
    benchmark = Benchmark(file.saebench.evals, file.saebench.words) if file.saebench else None
    if benchmark:
        _refuse_duplicates("saebench.evals", benchmark.evals)
        for point in points:
            _check_judged(point)
    runs = [
        PlannedRun(p, seed, replace(p.config, seed=seed, out_dir=p.config.out_dir / f"seed-{seed}"), benchmark)
        for p in points
        for seed in file.seeds
    ]
    changes = {variant: flatten(overrides) for variant, overrides in file.variants.items()}
    return Study(text, file.description, file.baseline, file.seeds, points, runs, file.figures, changes)


def _points(variant: str, settings: dict[str, Any], preset: str | list[str], runs: Path) -> list[Point]:
    """The points of a variant's grid, each with its configuration; several presets are a part of the grid."""
    preset = settings.pop("preset", preset)
    presets = preset if isinstance(preset, list) else [preset]
    unknown = [name for name in presets if not isinstance(name, str) or name not in PRESETS]
    if unknown or not presets:
        got = unknown[0] if unknown else presets
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or a list of some, got {got!r}")
    flat = flatten(settings)
    for given, by in _GIVEN_OTHERWISE.items():
        if given in flat:
            raise ValueError(f"{given} cannot be set here: {by}")
    grid = {setting: value for setting, value in flat.items() if _is_grid(setting, value)}
    points = []
    for name, *values in itertools.product(presets, *grid.values()):
        config = apply_settings(PRESETS[name], _chosen(settings, dict(zip(grid, values, strict=True))))
        canonical = flatten(config.as_json())
        swept = {"preset": name} if isinstance(preset, list) else {}
        point = Point(variant, swept | {setting: canonical[setting] for setting in grid}, config)
        points.append(point._replace(config=replace(config, out_dir=runs / point.label)))
    _refuse_duplicates("the grid", [point.label.removeprefix(f"{variant},") for point in points])
    return points


def _is_grid(setting: str, value: Any) -> bool:
    """Whether a value is a list of values to try, rather than the value of a setting that is itself a list."""
    if not isinstance(value, list) or any(isinstance(item, dict) for item in value):
        return False
    if setting in list_settings():
        return any(isinstance(item, list) for item in value)
    if not value:
        raise ValueError(f"{setting} must be a value or a list of values to try, got an empty list")
    return True


def _chosen(settings: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings, with one value in the place of each list of values to try."""
    return {
        name: _chosen(value, values, f"{prefix}{name}.")
        if isinstance(value, dict)
        else values.get(f"{prefix}{name}", value)
        for name, value in settings.items()
    }


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, with those of `above` in the place of the ones below, table by table."""
    return {**below} | {
        name: _merged(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value
        for name, value in above.items()
    }


def _check_judged(point: Point) -> None:
    """Refuse a variant whose dictionaries SAEBench cannot judge, as far as its settings tell."""
    if point.config.source != "transformer":
        raise ValueError(f"variant {point.variant}: saebench needs source transformer, got {point.config.source}")
    hook = point.config.model.hook
    if not re.fullmatch(r"blocks\.\d+\.hook_resid_post", hook):
        raise ValueError(f"variant {point.variant}: saebench needs model.hook blocks.N.hook_resid_post, got {hook}")


def _check_figure(figure: Any, where: str, variants: Mapping[str, Any], points: Sequence[Point]) -> None:
    """Refuse a figure of a variant that there is not, or over a setting that none of its variants sweeps."""
    for variant in figure.variants:
        if variant not in variants:
            raise ValueError(f"{where}.variants must be of {', '.join(variants)}, got {variant!r}")
    shown = [point for point in points if not figure.variants or point.variant in figure.variants]
    axes = {"curve": ("x",), "heatmap": ("x", "y")}.get(figure.kind, ())
    settings = {getattr(figure, axis) for axis in axes}
    if not any(settings <= point.swept.keys() for point in shown):
        swept = ", ".join(sorted({name for point in shown for name in point.swept})) or "there are none"
        raise ValueError(
            f"{where}: {' and '.join(axes)} must be settings that one of its variants sweeps ({swept}), "
            f"got {' and '.join(sorted(settings))}"
        )


def _refuse_duplicates(what: str, values: Sequence[Any]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"{what} must have each value once, got {value} {count} times")


def _as_name(value: Any) -> str:
    """A value of a setting as a part of a folder's name; 1.0 and 1 are the same."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value).removesuffix(".0")
    return re.sub(r"[^\w.+-]", "-", text)


def _first_problem(error: ValidationError) -> str:
    """What is wrong with the first entry of a study file that pydantic refuses."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) > 1:
            return f"unknown name {name}"
        near = get_close_matches(name, _StudyFile.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_StudyFile.model_fields)}"
        return f"unknown name {name}; {hint}"
    return f"{name}: {first['msg']}, got {first['input']!r}"
