"""Who may import whom: the table of docs/design.md is what the imports are."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import trl_opsd


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_opsd"
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")

# Rooms that know tensors and nothing of models, data or trainers
TENSORS_ONLY = ("objective", "signal")
LIBRARIES = {"accelerate", "datasets", "deepspeed", "peft", "transformers", "trl", "vllm"}
OVERRIDES_TRL = {
    "trl_opsd.trainer.trainer": "SelfDistillationTrainer",
    "trl_opsd.bench.step": "ContextDistillationTrainer",  # not the library: what it is compared with
}


def table() -> dict[str, set[str]]:
    """The rooms that each room sees, in the order of the table."""
    rows = re.findall(r"^\| `([\w.]+)/?` \|.*\|([^|]*)\|$", DESIGN, re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)/?`", sees)) for room, sees in rows}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name, but for the front that hands out the public names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "trl_opsd":
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What is imported anywhere in a module: the full name, and what it is called there."""
    package = name if (ROOT / name.replace(".", "/")).is_dir() else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            base += [node.module] if node.module else []
            for alias in node.names:
                yield ".".join([*base, alias.name]), alias.asname or alias.name


def room_of(name: str) -> str | None:
    """Room of a module or of what is imported; none for the package's version."""
    if name.startswith("trl_opsd.") and name.split(".")[1] in trl_opsd._MODULES:  # a public name
        name = trl_opsd._MODULES[name.split(".")[1]]
    parts = name.split(".")
    if parts[0] != "trl_opsd" or len(parts) == 1 or parts[1] == "__version__":
        return None
    return parts[1] if (PACKAGE / parts[1]).is_dir() else f"{parts[1]}.py"


def arrows() -> dict[tuple[str, str], list[str]]:
    """The modules that import from another room, by the two rooms."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, tree in modules().items():
        for target, _ in imports(name, tree):
            rooms = (room_of(name), room_of(target))
            if rooms[1] is not None and rooms[0] != rooms[1]:
                found.setdefault(rooms, []).append(name)
    return found


def test_every_room_is_in_the_table():
    rooms = {room_of(name) for name in modules()} - {"__main__.py"}
    assert set(table()) == rooms


def test_rooms_import_what_the_table_says_they_see():
    sees = table()
    found = arrows()
    for (room, other), places in found.items():
        assert other in sees[room], f"{room} does not see {other}: {sorted(set(places))}"
    for room, others in sees.items():
        assert others <= {other for its, other in found if its == room}, f"{room} does not import all that it sees"


def test_rooms_see_only_those_above_them():
    order = list(table())
    for room, others in table().items():
        below = [other for other in others if order.index(other) > order.index(room)]
        assert not below, f"{room} sees {below}, below it in the table"


@pytest.mark.parametrize("room", TENSORS_ONLY)
def test_rooms_of_tensors_know_nothing_else(room):
    known = {
        (target.split(".")[0], name)
        for name, tree in modules().items()
        if room_of(name) == room
        for target, _ in imports(name, tree)
    }
    assert not [pair for pair in known if pair[0] in LIBRARIES]
    assert not table()[room]


def overridden(name: str, tree: ast.Module) -> Iterator[str]:
    """The private methods of TRL and its friends that classes of a module define anew, also inside functions."""
    targets = {alias: target for target, alias in imports(name, tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        methods = {its.name for its in node.body if isinstance(its, ast.FunctionDef | ast.AsyncFunctionDef)}
        private = {method for method in methods if method.startswith("_") and not method.endswith("__")}
        for base in node.bases if private else ():
            first, _, rest = ast.unparse(base).partition("[")[0].partition(".")
            target = targets.get(first, f"{name}.{first}") + (f".{rest}" if rest else "")
            module, _, attribute = target.rpartition(".")
            try:
                theirs = getattr(import_module(module), attribute).__mro__
            except (ImportError, AttributeError, ValueError):  # a builtin, or of a library that is not installed
                continue
            for owner in theirs:
                if owner.__module__.split(".")[0] in LIBRARIES:
                    yield from (f"{node.name}.{method}" for method in private & vars(owner).keys())


def test_one_file_of_the_library_overrides_private_methods_of_trl():
    found = {name: set(overridden(name, tree)) for name, tree in modules().items()}
    assert "SelfDistillationTrainer._compute_loss" in found["trl_opsd.trainer.trainer"]
    classes = {name: {method.split(".")[0] for method in methods} for name, methods in found.items() if methods}
    assert classes == {name: {owner} for name, owner in OVERRIDES_TRL.items()}


def test_trainer_stays_a_list_of_short_files():
    files = sorted((PACKAGE / "trainer").rglob("*.py"))
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert max(lines.values()) <= 500, lines
    functions = [
        (f"{path.name}:{node.name}", node.end_lineno - node.lineno + 1)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert not [(name, length) for name, length in functions if length > 60]


def test_page_names_every_file_of_the_trainer():
    table = DESIGN.split("| file of `trainer/` | holds |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+\.py)`", table)) | {"trainer.py", "__init__.py"}
    assert named == {path.name for path in (PACKAGE / "trainer").rglob("*.py")}
