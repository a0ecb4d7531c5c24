"""docs/methods.md says of every method what its file says."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from trl import GRPOConfig

from trl_opsd import SelfDistillationConfig
from trl_opsd.methods import METHODS, TRAINABLE, config_class


DOCS = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def rows(heading):
    """The table below a heading, without its own."""
    lines = DOCS.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]


def shown(cell):
    """The `name=value` of a cell."""
    return dict(re.findall(r"`(\w+)=(.+?)`", cell))


def default(field):
    return field.default if field.default is not MISSING else field.default_factory()


def test_every_method_has_its_row():
    assert [row[1] for row in rows("The methods")] == [f"`{name}`" for name in METHODS]
    assert [row[0] for row in rows("Defaults")][1:] == [f"`{name}`" for name in TRAINABLE]


@pytest.mark.parametrize("name", METHODS)
def test_row_of_a_method(name):
    method = config_class(name).method
    [row] = [row for row in rows("The methods") if row[1] == f"`{name}`"]
    assert row[0] == method.name
    assert row[2] == f"[{method.paper}](https://huggingface.co/papers/{method.paper})"
    assert row[3] == method.status
    assert all(cell.strip() for cell in row[4:])
    assert len(row) == 6


@pytest.mark.parametrize("name", METHODS)
def test_defaults_of_a_method(name):
    config = config_class(name)
    by_name = {field.name: field for field in fields(config)}
    stated = {key: repr(default(by_name[key])) for key in config.__annotations__ if key in by_name}
    [row] = [row for row in rows("Defaults") if row[0] == f"`{name}`"]
    assert shown(row[1]) == stated


def test_defaults_of_all():
    theirs = {field.name: default(field) for field in fields(GRPOConfig)}
    ours = {field.name: default(field) for field in fields(SelfDistillationConfig)}
    stated = {name: repr(value) for name, value in ours.items() if name in theirs and value != theirs[name]}
    assert shown(rows("Defaults")[0][1]) == stated
