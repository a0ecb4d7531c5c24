"""What a user gets by installing the package and importing it."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trl_opsd
from trl_opsd.methods import METHODS


ROOT = Path(__file__).parents[1]


def imported_by(statement):
    """Top-level modules that a statement brings into a fresh interpreter."""
    code = f"{statement}\nimport json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    ["import trl_opsd", "import trl_opsd; trl_opsd.__version__; dir(trl_opsd)", "import trl_opsd.cli"],
)
def test_import_is_light(statement):
    heavy = {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy"}
    assert not imported_by(statement) & heavy


@pytest.mark.slow
def test_every_module_can_be_imported_where_python_has_nothing_of_unix():
    """Windows has none of these. The libraries are there already: on this system, they are made of them."""
    code = """
import importlib, pkgutil, sys
import datasets, psutil, trl
sys.modules |= dict.fromkeys(("resource", "fcntl", "pwd", "termios"))
import trl_opsd
for module in pkgutil.walk_packages(trl_opsd.__path__, "trl_opsd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    # What completion and tables of contents show before anything has been asked for
    code = "import trl_opsd, json; print(json.dumps([name for name in dir(trl_opsd) if not name.startswith('_')]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(json.loads(result.stdout)) >= {*trl_opsd.__all__} - {"__version__"}
    assert set(trl_opsd.__all__) == {*trl_opsd._MODULES, "__version__"}
    assert {place.partition(".")[2] for place in METHODS.values()} <= {*trl_opsd.__all__}
    for name in trl_opsd.__all__:
        value = getattr(trl_opsd, name)
        if isinstance(value, type):
            assert value.__name__ == name
            assert value.__module__ == trl_opsd._MODULES[name]


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'trl_opsd' has no attribute 'OPSDTrianer'"):
        _ = trl_opsd.OPSDTrianer


def test_version_is_the_installed_one():
    assert trl_opsd.__version__ == version("trl-opsd")


def test_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        [entry_points] = [name for name in shipped if name.endswith(".dist-info/entry_points.txt")]
        assert "trl-opsd = trl_opsd.cli:main" in archive.read(entry_points).decode()
    recipes = {f"trl_opsd/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trl_opsd").rglob("*")
        if path.suffix in (".py", ".yaml", ".jsonl")
    }
    assert recipes | modules | {"trl_opsd/py.typed"} <= shipped
    assert not [name for name in shipped if name.startswith(("tests/", "recipes/", "docs/"))]


def test_the_page_of_versions_says_what_is_allowed_and_tested():
    """The range is pyproject's, the release tested that of the development environment."""
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {its.name: str(its.specifier) for its in map(Requirement, allowed)}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    table = (ROOT / "docs" / "quickstart.md").read_text().split("\n## Versions\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| ([\d.]+\d)", table, re.MULTILINE)
    assert {"trl", "transformers", "torch", "peft", "accelerate", "datasets"} == {name for name, *_ in rows}
    for name, said, tested in rows:
        assert Requirement(f"{name}{said}") == Requirement(f"{name}{ranges[name]}")
        assert tested == pinned[name]
        assert tested in Requirement(f"{name}{said}").specifier
