"""Settings as users write them: from a file, TOML or JSON such as a run's config.json, and on the command line."""

import codecs
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from topk_ortho.activations.config import expanded
from topk_ortho.training.config import TrainConfig, adapter, flatten

_ALLOWED = {
    "bool_type": "true or false",
    "dataclass_type": "a table of settings",
    "float_type": "a number",
    "int_type": "an integer",
    "string_type": "a string",
    "tuple_type": "a list",
}
"""What a setting may be, by the type of pydantic's error; others have pydantic's words."""


def with_settings(base: TrainConfig, path: Path) -> TrainConfig:
    """A configuration with the settings of a file in place of its own; what the file does not name stays.

    The file is JSON if its name ends in .json or its text begins with a brace, else TOML. TOML has no null, so the
    string "None" stands for it.

    Raises
    ------
    ValueError
        If the file is not TOML or JSON, or a setting is unknown, of the wrong type or refused by the configuration. The
        message names the file and the setting.
    """
    path = Path(expanded("config", str(path)))
    settings = read_settings(path)
    try:
        return apply_settings(base, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a file of settings, unchecked.

    Raises
    ------
    ValueError
        If the file, which the message names, is not TOML or JSON, or holds no table.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file of settings, such as {path / 'config.json'}")
    text = _read_text(path)
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    settings = _parse_json(text, path) if is_json else _parse_toml(text, path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings, which are a table of names and values")
    return settings


def apply_settings(base: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration with nested settings, as a file has them, in place of its own.

    Raises
    ------
    ValueError
        If a setting, which the message names, is unknown, of the wrong type or refused by the configuration.
    """
    # JSON also for TOML: pydantic's strict mode then makes paths of strings and tuples of lists, and nothing else
    text = json.dumps(_put_over(base.as_json(), settings, ""), default=str)
    try:
        return adapter().validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from error


def list_settings() -> set[str]:
    """Names of the settings whose value is a list, such as sae.widths."""
    kinds = {name: (annotation, *get_args(annotation)) for name, annotation in _annotations(TrainConfig)}
    return {name for name, kind in kinds.items() if tuple in [get_origin(part) for part in kind]}


def check_arguments(arguments: Sequence[str], switches: Sequence[str]) -> None:
    """Refuse arguments of a command line of which the parser's own message would not name the setting.

    Parameters
    ----------
    arguments : sequence of str
        The whole command line.
    switches : sequence of str
        Options beside the settings that take no value, such as --resume.

    Raises
    ------
    ValueError
        If a setting is given an empty value, or an option that takes none any value; or if what is given a value is
        not a setting but a group of them, such as --penalty.
    """
    groups = {name for name, value in TrainConfig().as_json().items() if isinstance(value, dict)}
    flags = [name for name, value in flatten(TrainConfig().as_json()).items() if isinstance(value, bool)]
    takes_none = dict.fromkeys(switches, "leave it out to turn it off")
    takes_none |= {f"--{no}{name}": f"it is --{name} or --no-{name}" for name in flags for no in ("", "no-")}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        option, has_equals, rest = argument.partition("=")
        value = rest if has_equals else None if following.startswith("-") else following
        if not option.startswith("--") or value is None:
            continue
        if option in takes_none:
            raise ValueError(f"{option} takes no value, got {value!r}; {takes_none[option]}")
        if not value.strip():
            raise ValueError(f"{option} must have a value, got an empty one")
        if option.removeprefix("--") in groups:
            meant = _setting_for(option.removeprefix("--"), value).replace("_", "-")
            raise ValueError(f"{option} is a group of settings; did you mean --{meant} {value}?")


def _setting_for(group: str, value: str) -> str:
    """The first setting of a group that has a value among its words, or takes a number if it is one, or takes text."""
    is_number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value) is not None
    settings = [(name, kind) for name, kind in _annotations(TrainConfig) if name.startswith(f"{group}.")]
    with_the_word = [name for name, kind in settings if value in _words(kind)]
    of_its_kind = [name for name, kind in settings if (kind in (int, float)) == is_number]
    return [*with_the_word, *of_its_kind][0]


def _words(kind: Any) -> list[Any]:
    """The words that a type allows, also as one of several."""
    return [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]


def _read_text(path: Path) -> str:
    """The text of a file, which is UTF-8 or, as some editors and shells of Windows write it, UTF-16 with a mark."""
    content = path.read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it must be text in UTF-8 ({error})") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; a file of settings names at least one, such as steps")
    return text


def _parse_json(text: str, path: Path) -> Any:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{path} gives {twice[0]} more than once; one value is allowed")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}{_line(text, error.lineno)}") from error


def _parse_toml(text: str, path: Path) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        line = _line(text, int(place[1]) if place else len(text.splitlines()))
        is_python = re.search(r"=\s*(True|False|None)\b", line)
        hint = "; true and false are written small, None in quotes" if is_python else ""
        raise ValueError(f"{path} cannot be read as TOML: {error}{line}{hint}") from error


def _line(text: str, number: int) -> str:
    """A line of a file, for the end of a message about it."""
    lines = text.splitlines()
    return f", which is {lines[number - 1].strip()!r}" if number <= len(lines) else ""


def _put_over(base: Any, settings: Any, prefix: str) -> Any:
    """The base with the settings in place of its own, table by table; a prefix is the name of the table."""
    if not (isinstance(base, dict) and isinstance(settings, dict)):
        if settings == "":
            raise ValueError(f"{prefix.removesuffix('.')} must have a value, got an empty one")
        return None if settings == "None" else settings
    for name in settings:
        if name not in base:
            raise ValueError(f"unknown setting {prefix}{name}; {_hint(base, name, prefix)}")
    return base | {name: _put_over(base[name], value, f"{prefix}{name}.") for name, value in settings.items()}


def _hint(table: dict[str, Any], name: str, prefix: str) -> str:
    """What the user may have meant by a name that a table does not have."""
    everywhere = flatten(TrainConfig().as_json())
    if name in everywhere:
        return f"it is {name.rpartition('.')[2]} in the table {name.rpartition('.')[0]}"
    wanted = name.lower().replace("-", "_")
    near = get_close_matches(wanted, table, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [full for full in everywhere if full.rpartition(".")[2] == wanted]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"there are {', '.join(table)}"


def _first_problem(error: ValidationError) -> str:
    """What is wrong with the first setting that pydantic refuses."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])  # the configuration's own words
    name = _name_of(first)
    # a setting that may be of several types has a problem for each of them, but for None
    allowed = [
        _ALLOWED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
        for problem in problems
        if _name_of(problem) == name
    ]
    if NoneType in get_args(dict(_annotations(TrainConfig)).get(name)):
        allowed.append("'None'")
    return f"{name} must be {' or '.join(allowed)}, got {first['input']!r}"


def _name_of(problem: Any) -> str:
    """The name of a setting, such as sae.l0, or of an item, such as sae.widths.0, without the type that was tried."""
    first, *rest = problem["loc"]
    is_table = isinstance(TrainConfig().as_json().get(first), dict)
    return ".".join([first, *rest[:is_table], *(str(part) for part in rest[is_table:] if isinstance(part, int))])


def _annotations(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by their dotted names, such as sae.widths, with their types."""
    for name, annotation in get_type_hints(config).items():
        if is_dataclass(annotation):
            yield from _annotations(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", annotation
