"""Public docstrings are numpydoc, and say what every argument is."""

import inspect

import pytest
from numpydoc.validate import validate

import topk_ortho
from topk_ortho import distributed

CHECKS = {
    "GL06": "a section of unknown name",
    "GL07": "sections in the wrong order",
    "GL08": "no docstring",
    "SS01": "no summary",
    "PR01": "an argument is not documented",
    "PR02": "an unknown argument is documented",
    "PR03": "arguments in the wrong order",
    "PR07": "an argument has no description",
    "RT03": "a return value has no description",
}


# the fields of a NamedTuple have docstrings of their own
@pytest.mark.parametrize("name", sorted({*topk_ortho.__all__} - {"NearestColumns", "TopKPairs"}))
def test_numpydoc(name):
    errors = [error for error in validate(f"topk_ortho.{name}")["errors"] if error[0] in CHECKS]
    assert not errors


@pytest.mark.parametrize("name", distributed.__all__)
def test_numpydoc_of_distributed_ops(name):
    errors = [error for error in validate(f"topk_ortho.distributed.{name}")["errors"] if error[0] in CHECKS]
    assert not errors


@pytest.mark.parametrize("name", topk_ortho.__all__)
def test_section_titles_stand_on_a_line_of_their_own(name):
    lines = inspect.getdoc(getattr(topk_ortho, name)).splitlines()
    underlined = [line for line in lines if "---" in line]
    assert all(set(line) == {"-"} for line in underlined)
