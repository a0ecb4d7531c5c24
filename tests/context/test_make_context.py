import os
import sys

import pytest
from rollouts import make_rollouts

from trl_opsd.context import (
    AnswerContext,
    ConciseContext,
    Rollouts,
    SolutionContext,
    TemplateContext,
    make_context,
)


MODULE = """
from trl_opsd.context import SolutionContext

class Hint(SolutionContext):
    pass

class Peer:
    columns = ()

    def __init__(self, least=1.0):
        self.least = least

    def teacher_messages(self, row, rollouts):
        if rollouts is None or rollouts.rewards[rollouts.index] >= self.least:
            return None
        best = max(zip(rollouts.rewards, rollouts.texts))[1]
        return [{"role": "user", "content": row["prompt"][-1]["content"] + best}]

class NoColumns:
    def teacher_messages(self, row, rollouts):
        return row["prompt"]

class NoMethod:
    columns = ()

def function(): ...
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module in the working directory."""
    (tmp_path / "own_contexts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.delitem(sys.modules, "own_contexts", raising=False)
    yield "own_contexts"
    sys.modules.pop("own_contexts", None)


@pytest.mark.parametrize(
    ("name", "kwargs", "context_class"),
    [
        ("solution", None, SolutionContext),
        ("answer", {}, AnswerContext),
        ("concise", None, ConciseContext),
        ("template", {"template": "{prompt}"}, TemplateContext),
        ("trl_opsd.context.AnswerContext", None, AnswerContext),
    ],
)
def test_shipped_contexts(name, kwargs, context_class):
    assert type(make_context(name, kwargs)) is context_class


def test_kwargs_reach_the_class():
    assert make_context("solution", {"column": "proof"}).columns == ("proof",)
    assert "20 %" in make_context("concise", {"mode": "percent", "percent": 20}).template


def test_class_in_the_working_directory(module):
    context = make_context(f"{module}.Hint", {"column": "hint"})

    assert type(context).__name__ == "Hint"
    assert context.columns == ("hint",)


def test_class_that_reads_rollouts_and_may_have_nothing_to_say(module):
    context = make_context(f"{module}.Peer", {"least": 0.5})
    row = {"prompt": [{"role": "user", "content": "Why?"}]}
    rollouts = make_rollouts([1.0, 0.0], ["So.", "No."])

    assert context.teacher_messages(row, None) is None
    assert context.teacher_messages(row, Rollouts(rollouts, 0)) is None
    assert context.teacher_messages(row, Rollouts(rollouts, 1)) == [{"role": "user", "content": "Why?So."}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("solutoin", r"`privileged_context='solutoin'` is none of \['solution', .*Did you mean `solution`"),
        ("own_contexts.Missing", "`privileged_context='own_contexts.Missing'` cannot be imported: .*Missing"),
        ("own_contexts.NoColumns", "is no privileged context: it needs an attribute `columns`"),
        ("own_contexts.NoMethod", "is no privileged context: .* a method `teacher_messages"),
        ("own_contexts.function", "is no privileged context"),
        ("os.path", "`privileged_context='os.path'`"),
    ],
)
def test_names_that_are_no_context(module, name, message):
    with pytest.raises(ValueError, match=message):
        make_context(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "fault"),
    [
        ("solution", {"colum": "proof"}, "colum"),
        ("template", None, "template"),
        ("own_contexts.Peer", {"most": 1}, "most"),
    ],
)
def test_kwargs_that_do_not_fit(module, name, kwargs, fault):
    with pytest.raises(ValueError, match=f"do not fit `privileged_context='{name}'`, .*: .*{fault}"):
        make_context(name, kwargs)
