"""Help and docstrings of fields are one text."""

import ast
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest
from trl import TrlParser

from trl_opsd.help import did_you_mean, help_from_docstring


PACKAGE = Path(__file__).parents[1] / "trl_opsd"


def parsed_classes():
    """Every dataclass of the package whose fields are flags: those that inherit from another and state none too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            decorators = [ast.unparse(one) for one in getattr(node, "decorator_list", ())]
            if isinstance(node, ast.ClassDef) and "help_from_docstring" in decorators:
                yield getattr(import_module(module), node.name)


CLASSES = list(parsed_classes())


def test_the_classes_are_found():
    bench = {"BenchArguments", "LossArguments", "StepArguments", "TeacherArguments"}
    library = {"SelfDistillationConfig", "EngineArguments", "EvalArguments", "PromptArguments", "GenerateArguments"}
    assert bench | library <= {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls):
    undocumented = [f.name for f in fields(cls) if f.name in cls.__annotations__ and "help" not in f.metadata]
    assert not undocumented
    # The text of all entries, and no other: their names, types and headings are not help
    for field in fields(cls):
        if field.name in cls.__annotations__:
            assert field.metadata["help"][-1] in ".)"
            assert "*optional*" not in field.metadata["help"]
            assert "> Parameters" not in field.metadata["help"]
    assert TrlParser([cls]).format_help()


@help_from_docstring
@dataclass
class Settings:
    """
    Settings.

    Args:
        > First

        height (`float`, *optional*, defaults to `1.0`):
            At most 90 % of [`~some.Thing`], see [the page](https://example.org/a), in `metres`:

            - `"low"`: little.
            - `"high"`: much.

        > Second

        depth (`dict[str, Any]` or `str`, *optional*):
            Another
            one.

    Raises:
        ValueError: Never.
    """

    height: float = 1.0
    depth: str | None = None
    secret: int = 0


@help_from_docstring
@dataclass
class More(Settings):
    """
    More settings.

    Args:
        height (`float`):
            Not of this class.
        width (`int`, *optional*, defaults to `2`):
            Breadth.
    """

    width: int = 2


def test_help_is_the_docstring_in_plain_text():
    found = {field.name: field.metadata.get("help") for field in fields(More)}
    assert found == {
        "height": "At most 90 %% of Thing, see the page (https://example.org/a), in `metres`: - 'low': little. - "
        "'high': much.",
        "depth": "Another one.",
        "secret": None,
        "width": "Breadth.",
    }
    assert "At most 90 % of Thing" in TrlParser([More]).format_help()


def test_names_that_come_close():
    assert did_you_mean("heigt", ["height", "depth"]) == "Did you mean `height`?"
    assert did_you_mean("xyzzy", ["height", "depth"]) == "Choose from: height, depth."
    assert did_you_mean("xyzzy", ["height"], "There is help.") == "There is help."
