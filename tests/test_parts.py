import os
import sys

import pytest

from trl_opsd.parts import import_object, make_part


MODULE = """
class Part:
    def __init__(self, size, shade="red"):
        self.size, self.shade = size, shade

value = 3
"""


class Shipped:
    def __init__(self, size: int = 1):
        self.size = size


SHIPPED = {"shipped": Shipped, "lazy": "own_parts.Part"}


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    yield
    sys.modules.pop("own_parts", None)


def test_shipped_part_by_its_name():
    assert make_part("slot", "shipped", None, SHIPPED).size == 1
    assert make_part("slot", "shipped", {"size": 2}, SHIPPED).size == 2


@pytest.mark.parametrize("name", ["lazy", "own_parts.Part"])
def test_part_by_an_import_path_in_the_working_directory(name):
    part = make_part("slot", name, {"size": 2, "shade": "blue"}, SHIPPED)

    assert (type(part).__name__, part.size, part.shade) == ("Part", 2, "blue")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shiped", r"`slot='shiped'` is none of \['shipped', 'lazy'\], .* Did you mean `shipped`\?"),
        ("other", r"`slot='other'` is none of \['shipped', 'lazy'\], nor the import path of a class\. Choose one"),
        ("", "`slot=''` is none of"),
        (".Part", "`slot='.Part'` is none of"),
        ("no_such_module.Part", "`slot='no_such_module.Part'` cannot be imported: No module named 'no_such_module'"),
        ("own_parts.Missing", "`slot='own_parts.Missing'` cannot be imported: .*no attribute 'Missing'"),
        ("own_parts.value", "`slot='own_parts.value'` is of type int, not a class"),
    ],
)
def test_names_that_are_no_part(name, message):
    with pytest.raises(ValueError, match=message):
        make_part("slot", name, None, SHIPPED)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "shipped",
            {"sise": 2},
            r"The arguments {'sise': 2} do not fit `slot='shipped'`, .*\(size: int = 1\): .*sise",
        ),
        ("own_parts.Part", None, r"do not fit `slot='own_parts.Part'`, which takes \(size, shade='red'\): .*'size'"),
    ],
)
def test_arguments_that_do_not_fit_are_shown_beside_the_signature(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_part("slot", name, kwargs, SHIPPED)


def test_error_inside_the_module_is_shown_as_it_is(tmp_path):
    (tmp_path / "own_parts.py").write_text("1 / 0")

    with pytest.raises(ZeroDivisionError):
        make_part("slot", "own_parts.Part", None, SHIPPED)


@pytest.mark.parametrize("path", ["name", "", ".own_parts.Part", "own_parts.", "own_parts.Missing"])
def test_what_is_no_import_path(path):
    with pytest.raises(ImportError):
        import_object(path)
