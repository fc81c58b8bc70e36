"""Settings from a file, TOML or JSON such as a run's config.json, put over a configuration."""

import json
import tomllib
from contextlib import suppress
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_C = TypeVar("_C")
_ALLOWED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    NoneType: '"None"',
}


def with_settings(base: _C, path: Path) -> _C:
    """A configuration with the settings of a file in place of its own; what the file does not name stays.

    TOML has no null, so "None" stands for it wherever a setting may be None.

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
        config: _C = _replace(base, settings, "")
        return config
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _replace(config: Any, settings: dict[str, Any], prefix: str) -> Any:
    """A configuration with other settings; the names of its own begin with the prefix."""
    types = get_type_hints(type(config))
    changes = {}
    for name, value in settings.items():
        if name not in types:
            near = get_close_matches(name, types, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(types)}"
            raise ValueError(f"unknown setting {prefix}{name}; {hint}")
        if is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} must be a table of settings, got {value!r}")
            changes[name] = _replace(getattr(config, name), value, f"{prefix}{name}.")
        else:
            try:
                changes[name] = _convert(value, types[name])
            except TypeError as error:
                raise ValueError(f"{prefix}{name} must be {_allowed(types[name])}, got {value!r}") from error
    return replace(config, **changes)


def _convert(value: Any, kind: Any) -> Any:
    """A value of a file as the type that a setting is annotated with; raises TypeError if it is none."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        # None first, so that "None" is not taken for a string
        for option in sorted(options, key=lambda option: option is not NoneType):
            with suppress(TypeError):
                return _convert(value, option)
    elif get_origin(kind) is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(_convert(item, options[0]) for item in value)
    elif kind is NoneType:
        if value in (None, "None"):
            return None
    elif kind is Path:
        if isinstance(value, str):
            return Path(value)
    elif type(value) is kind:  # exactly: True is no number
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise TypeError


def _allowed(kind: Any) -> str:
    """In words, what `_convert` takes for a type."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_allowed, options))
    if get_origin(kind) is Literal:
        return " or ".join(f'"{word}"' for word in options)
    if get_origin(kind) is tuple:
        return f"a list, each item {_allowed(options[0])}"
    return _ALLOWED[kind]
