"""What annotators are asked, and what the teacher reads of what they say."""

import json

import pytest
from datasets import Dataset
from rollouts import make_rollouts

from trl_opsd.context import AnsweredContext, Rollouts, SampledContext, make_context
from trl_opsd.context.diagnosis import ERRORS, STEPS


PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is {6} + 7?"}]
ROW = {"prompt": PROMPT, "solution": "6 + 7 = 13."}
GROUP = make_rollouts([1.0, 0.0, None], ["Add {6} to 7. It is 13.", "It is 14.", "Hm."])
KEY = [{"first": 2, "last": 2, "type": "final_verification"}, {"start": 0, "end": 3, "type": "key_formula"}]


def of(index):
    return Rollouts(GROUP, index)


def always_key(row, rollout, start=0):
    return [{"start": start, "end": start + 3, "type": "key_formula"}]


class Silent:
    """No annotator: it cannot be asked."""


class Broken:
    def __init__(self, says):
        self.says = says

    def __call__(self, asked):
        return self.says


def test_the_policy_is_asked_about_numbered_segments():
    context = make_context("diagnosis", {"annotator_kwargs": {"max_new_tokens": 64}})
    assert isinstance(context, SampledContext)
    assert not isinstance(context, AnsweredContext)
    assert context.columns == ("solution",)
    assert context.sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64}

    system, asked = context.sample_messages(ROW, of(0))
    assert system == PROMPT[0]
    for text in ("What is {6} + 7?", "6 + 7 = 13.", "[1] Add {6} to 7.\n[2] It is 13.\n", "right answer", *STEPS):
        assert text in asked["content"]
    assert not any(error in asked["content"] for error in ERRORS)
    example = asked["content"].rpartition("Example: ")[2]
    assert json.loads(example)[0]["type"] in STEPS

    _, asked = context.sample_messages(ROW, of(1))
    assert all(error in asked["content"] for error in ERRORS)
    assert not any(step in asked["content"].rpartition("Example")[0] for step in STEPS)
    assert context.sample_messages(ROW, of(2)) is None  # neither right nor wrong
    assert context.sample_messages(ROW, None) is None


def test_without_a_reference():
    context = make_context("diagnosis", {"column": None})
    assert context.columns == ()
    asked = context.sample_messages({"prompt": PROMPT}, of(0))[1]["content"]
    assert "reference" not in asked


@pytest.mark.parametrize("index", [0, 1])
def test_the_teacher_reads_types_alone(index):
    context = make_context("diagnosis")
    said = json.dumps(KEY if index == 0 else [{"first": 1, "last": 1, "type": "off_by_one"}])
    system, read = context.teacher_messages(ROW, of(index), said)
    assert system == PROMPT[0]
    labels = "key formula, final verification" if index == 0 else "off by one"
    assert f": {labels}." in read["content"]
    assert "What is {6} + 7?" in read["content"]
    for piece in ("Add", "It is", "13", "14"):
        assert piece not in read["content"]
    for nothing in (None, "[]", "I do not know.", json.dumps([{"first": 9, "last": 9, "type": "insight"}])):
        assert context.teacher_messages(ROW, of(index), nothing) is None
    assert context.teacher_messages(ROW, None) is None
    assert context.teacher_messages(ROW, of(2), None) is None


def test_kinds_follow_from_what_is_right():
    """Types of the other kind are unknown."""
    context = make_context("diagnosis")
    marks = context.marks(ROW, of(0), [*KEY, {"first": 1, "last": 1, "type": "sign_error"}])
    assert [(its.start, its.end, its.kind) for its in marks.spans] == [(0, 3, "key"), (14, 23, "key")]
    assert marks.num_dropped == 1
    assert [its.kind for its in context.marks(ROW, of(1), [{"first": 1, "last": 1, "type": "sign_error"}]).spans] == [
        "error"
    ]


def test_a_function_answers():
    context = make_context("diagnosis", {"annotator": f"{__name__}.always_key", "annotator_kwargs": {"start": 1}})
    assert isinstance(context, AnsweredContext)
    assert not isinstance(context, SampledContext)
    said = context.answers([(ROW, of(0)), None, (ROW, of(2)), (ROW, of(1))])
    assert said == [always_key(ROW, GROUP[0], 1), None, None, always_key(ROW, GROUP[1], 1)]
    assert "key formula" in context.teacher_messages(ROW, of(0), said[0])[1]["content"]
    assert context.answers([None]) == [None]


@pytest.mark.parametrize(
    ("says", "message"),
    [([1], "gave 1 annotations of 1 rollouts, of type int"), ([], r"gave 0 annotations of 1 rollouts\. It gives one")],
)
def test_an_annotator_that_says_something_else(says, message):
    context = make_context("diagnosis", {"annotator": f"{__name__}.Broken", "annotator_kwargs": {"says": says}})
    with pytest.raises(ValueError, match=message):
        context.answers([(ROW, of(0))])


def test_a_column_is_about_the_completion_of_the_dataset():
    context = make_context("diagnosis", {"annotator": "columns", "column": None})
    assert context.columns == ("spans",)
    row = {**ROW, "spans": json.dumps(KEY), "completion": "Add {6} to 7. It is 13."}
    assert context.answers([(row, of(0)), (row, of(1))]) == [json.dumps(KEY), None]
    as_messages = {**row, "completion": [{"role": "assistant", "content": row["completion"]}]}
    assert context.answers([(as_messages, of(0)), (as_messages, of(1))]) == [json.dumps(KEY), None]
    context.read_dataset(Dataset.from_list([row]))
    with pytest.raises(ValueError, match=r"annotates the column `completion`, which the training set lacks\. Add it"):
        context.read_dataset(Dataset.from_list([{**ROW, "spans": "[]"}]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"annotator": "polcy"}, r"`annotator='polcy'` is none of \['columns', 'server'\]"),
        ({"annotator": "no_such_module.annotate"}, "cannot be imported"),
        ({"annotator": f"{__name__}.KEY"}, "cannot be called. Name a function, or a class with `__call__`"),
        ({"annotator": f"{__name__}.Silent"}, "cannot be called"),
        ({"annotator_kwargs": {"temprature": 1.0}}, r"takes \['max_new_tokens', 'temperature'\]"),
        ({"most_spans": 0}, "must be at least 1"),
        ({"most_of_it": 0.0}, "must be in"),
        ({"most_spam": 1}, "do not fit `privileged_context='diagnosis'`"),
        ({"ask_template": "{prompt} {segments} {task}"}, "has no '{labels}'"),
        ({"template": "{diagnosis}"}, "has no '{prompt}'"),
        ({"annotator": "columns", "annotator_kwargs": {"colum": "a"}}, "do not fit `annotator='columns'`"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_context("diagnosis", kwargs)


def test_it_needs_rewards():
    with pytest.raises(ValueError, match="needs rewards, which tell correct rollouts from wrong ones"):
        make_context("diagnosis").check_run(8, has_rewards=False, has_feedback=True)
