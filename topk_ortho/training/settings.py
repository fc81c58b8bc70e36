"""Settings from a file, TOML or JSON such as a run's config.json, put over a configuration."""

import json
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from topk_ortho.training.config import TrainConfig


def with_settings(base: TrainConfig, path: Path) -> TrainConfig:
    """A configuration with the settings of a file in place of its own; what the file does not name stays.

    TOML has no null, so the string "None" stands for it.

    Raises
    ------
    ValueError
        If the file is not TOML or JSON, or a setting is unknown, of the wrong type or refused by the configuration. The
        message names the file and the setting.
    """
    try:
        text = path.read_text()
        settings: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    try:
        # JSON also for TOML: pydantic's strict mode then makes paths of strings and tuples of lists, and nothing else
        text = json.dumps(_put_over(base.as_json(), settings, ""), default=str)
        return TypeAdapter(TrainConfig).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_problem(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _put_over(base: Any, settings: Any, prefix: str) -> Any:
    """The base with the settings in place of its own, table by table; a prefix is the name of the table."""
    if not (isinstance(base, dict) and isinstance(settings, dict)):
        return None if settings == "None" else settings
    for name in settings:
        if name not in base:
            near = get_close_matches(name, base, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(base)}"
            raise ValueError(f"unknown setting {prefix}{name}; {hint}")
    return base | {name: _put_over(base[name], value, f"{prefix}{name}.") for name, value in settings.items()}


def _first_problem(error: ValidationError) -> str:
    """What is wrong with the first setting that pydantic refuses."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])  # the configuration's own words
    # a setting that may be of several types has a problem for each of them
    allowed = [p["msg"].removeprefix("Input should be ") for p in problems if _name_of(p) == _name_of(first)]
    return f"{_name_of(first)} must be {' or '.join(allowed)}, got {first['input']!r}"


def _name_of(problem: Any) -> str:
    """The name of a setting, such as sae.l0, or of an item, such as sae.widths.0, without the type that was tried."""
    first, *rest = problem["loc"]
    is_table = isinstance(TrainConfig().as_json().get(first), dict)
    return ".".join([first, *rest[:is_table], *(str(part) for part in rest[is_table:] if isinstance(part, int))])
