"""The studies that come with the package. This file needs the standard library alone, so that --help is quick."""

import tomllib
from pathlib import Path

STUDIES = Path(__file__).parent / "studies"
"""Folder of their files, NAME.toml each."""


def named_studies() -> dict[str, str]:
    """The names of the studies, with their descriptions."""
    files = sorted(STUDIES.glob("*.toml"))
    return {path.stem: " ".join(tomllib.loads(path.read_text("utf-8"))["description"].split()) for path in files}
