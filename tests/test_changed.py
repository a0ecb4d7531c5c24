from types import ModuleType, SimpleNamespace

import pytest

from trl_opsd.changed import changed


@pytest.mark.parametrize("target", [SimpleNamespace(), ModuleType("module")])
def test_values_come_back_whatever_happens(target):
    target.one, target.two, target.three = 1, 2, 3
    with changed(target, one="other", two=None):
        assert (target.one, target.two, target.three) == ("other", None, 3)
    assert (target.one, target.two, target.three) == (1, 2, 3)
    with pytest.raises(KeyError), changed(target, one="other", two=None):
        raise KeyError
    assert (target.one, target.two, target.three) == (1, 2, 3)


def test_an_attribute_that_is_not_there_is_not_made():
    target = SimpleNamespace()
    with pytest.raises(AttributeError, match="missing"), changed(target, missing=1):
        pass
    assert not hasattr(target, "missing")
