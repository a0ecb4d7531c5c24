"""What the teacher reads of other rollouts and of feedback. A text such as `y2` is that of rollout 2."""

import re

import pytest
from rollouts import make_rollouts

from trl_opsd.context import FeedbackContext, PeersContext, Rollouts


ROW = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], "solution": "Sol."}


def content(context, rollouts, index, row=ROW):
    messages = context.teacher_messages(row, Rollouts(rollouts, index))
    if messages is None:
        return None
    assert messages[0] == row["prompt"][0]
    assert messages[1]["content"].startswith("Why?\n\n")
    return messages[1]["content"]


def read(context, rollouts, index):
    """The rollouts that are shown, in order."""
    text = content(context, rollouts, index)
    return None if text is None else re.findall(r"\by\d\b", text)


def everyone_reads(context, rewards, **made):
    rollouts = make_rollouts(rewards, **made)
    return [read(context, rollouts, index) for index in range(len(rollouts))]


def test_only_one_is_correct():
    assert everyone_reads(PeersContext(), [1.0, 0.0, 0.0, 0.0]) == [None, ["y0"], ["y0"], ["y0"]]


def test_the_own_one_can_be_included():
    assert everyone_reads(PeersContext(include_own=True), [1.0, 0.0, 0.0, 0.0]) == [["y0"]] * 4


def test_two_correct_and_one_wrong_rollout_without_the_own_one():
    context = PeersContext(correct=2, wrong=1)

    assert everyone_reads(context, [1.0, 1.0, 0.0, 0.0]) == [
        ["y1", "y2"],
        ["y0", "y2"],
        ["y0", "y1", "y3"],
        ["y0", "y1", "y2"],
    ]


def test_own_text_is_told_by_position_and_not_by_text():
    rollouts = make_rollouts([1.0, 1.0, 0.0, 0.0], ["y5", "y5", "y6", "y6"])
    context = PeersContext(correct=2, wrong=2)

    assert read(context, rollouts, 0) == ["y5", "y6", "y6"]
    assert read(context, rollouts, 2) == ["y5", "y5", "y6"]
    assert read(PeersContext(), make_rollouts([1.0], ["y5"]), 0) is None


def test_nobody_is_correct():
    rewards = [0.0, 0.0, 0.0]

    assert everyone_reads(PeersContext(), rewards) == [None] * 3
    assert everyone_reads(PeersContext(wrong=1), rewards) == [["y1"], ["y0"], ["y0"]]
    assert everyone_reads(PeersContext(wrong=1, wrong_alone=False), rewards) == [None] * 3


def test_what_is_not_known_is_neither_correct_nor_wrong():
    assert everyone_reads(PeersContext(wrong=2), [None, None, 1.0]) == [["y2"], ["y2"], None]


def test_right_and_wrong_are_told_apart():
    text = content(PeersContext(wrong=1), make_rollouts([1.0, 0.0, 0.0]), 2)

    assert "a correct attempt >>>\ny0\n<<<" in text
    assert "an attempt that is wrong >>>\ny1\n<<<" in text


@pytest.mark.parametrize(
    ("feedback", "shown"), [(False, [False] * 2), (True, [True] * 2), ("without_correct", [True, False])]
)
def test_feedback_is_that_of_the_own_rollout(feedback, shown):
    rollouts = make_rollouts([1.0, 0.0], feedback=["of 0", "of 1"])
    texts = [content(PeersContext(feedback=feedback), rollouts, index) or "" for index in range(2)]

    assert [f"of {index}" in text for index, text in enumerate(texts)] == shown
    assert "of 1" not in texts[0]


def test_reference_solution_stands_in_for_a_correct_rollout():
    context = PeersContext(fallback="solution")
    rollouts = make_rollouts([1.0, 0.0])

    assert context.columns == ("solution",)
    assert "Sol." in content(context, rollouts, 0)
    assert "Sol." not in content(context, rollouts, 1)


@pytest.mark.parametrize(
    ("text", "left"),
    [("<think>\ny8\n</think>\n\ny1", "y1"), ("y8</think>y1", "y1"), ("y1", "y1"), ("<think>y8", None), (" ", None)],
)
def test_reasoning_is_stripped_on_demand(text, left):
    rollouts = make_rollouts([0.0, 1.0], ["y0", text])

    assert read(PeersContext(strip_thinking=True), rollouts, 0) == (None if left is None else [left])
    whole = PeersContext().teacher_messages(ROW, Rollouts(rollouts, 0))
    assert whole is None if not text.strip() else text in whole[1]["content"]


def test_own_template_and_columns():
    context = PeersContext(template="{prompt}\n\n{peers} {solution}")

    assert context.columns == ("solution",)
    assert content(context, make_rollouts([0.0, 1.0]), 0).endswith("y1\n<<< end >>> Sol.")
    with pytest.raises(ValueError, match=r"has no '\{peers\}'"):
        PeersContext(template="{prompt}")


def test_what_is_shown_can_be_worded():
    context = PeersContext(template="{prompt}\n\n{peers}", shown="{text} is {title}.", wrong=1)

    shown = "y1 is a correct attempt.\n\ny0 is an attempt that is wrong."
    assert content(context, make_rollouts([0.0, 1.0, 1.0]), 2) == f"Why?\n\n{shown}"
    for wording in ("{title}", "{text} {solution}"):
        with pytest.raises(ValueError, match=r"`shown` of the peers context has the placeholder \{text\}"):
            PeersContext(shown=wording)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"correct": 0}, "`correct=0` and `wrong=0`"),
        ({"wrong": -1}, "`wrong=-1`"),
        ({"feedback": "sometimes"}, "must be true, false or 'without_correct', got 'sometimes'"),
    ],
)
def test_arguments_that_show_nothing(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PeersContext(**kwargs)


@pytest.mark.parametrize("context", [PeersContext(), FeedbackContext()])
def test_waits_for_the_rollouts(context):
    assert context.reads_rollouts
    assert context.teacher_messages(ROW, None) is None


def test_peers_need_company_and_rewards():
    PeersContext().check_run(2, True, False)
    with pytest.raises(ValueError, match="`num_generations` of at least 2, got 1"):
        PeersContext().check_run(1, True, True)
    with pytest.raises(ValueError, match="needs rewards"):
        PeersContext().check_run(2, False, True)


def test_feedback_context():
    rollouts = make_rollouts([0.0, 0.0], feedback=["Line 3 fails.", None])

    without = content(FeedbackContext(), rollouts, 0)
    assert "Line 3 fails." in without
    assert "y0" not in without
    assert read(FeedbackContext(attempt=True), rollouts, 0) == ["y0"]
    assert content(FeedbackContext(), rollouts, 1) is None
    assert content(FeedbackContext(template="{prompt}\n\n{feedback}!"), rollouts, 0) == "Why?\n\nLine 3 fails.!"
    with pytest.raises(ValueError, match=r"has no '\{attempt\}'"):
        FeedbackContext(attempt=True, template="{prompt} {feedback}")
    with pytest.raises(ValueError, match="needs something that gives feedback"):
        FeedbackContext().check_run(1, True, False)
