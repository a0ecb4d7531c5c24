"""A playbook that grows, shrinks, and goes on after a resume."""

import json
from dataclasses import replace

import pytest
from rollouts import make_rollouts

from trl_opsd.context import Memory, PlaybookContext, Rollouts, SampledContext, make_context


PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
ROW, OTHER = {"prompt": PROMPT}, {"prompt": "Who?"}
[RIGHT] = make_rollouts([1.0], ["<think>Hm.</think>Because."])
[WRONG] = make_rollouts([0.0], ["Just so."], ["That is no reason."])
[QUIET] = make_rollouts([0.0], ["Just so."])
SHORT = {"template": "{prompt}|{known}", "shown": "{title}: {text}"}


def saying(text):
    return replace(WRONG, said=text)


def lesson(text):
    return saying(f"It jumps.\nLESSON: {text}\nHELPFUL: none\nHARMFUL: none")


def learn(context, *texts):
    context.remember([(ROW, [lesson(text)]) for text in texts])


def read(context, rollout, said=None, row=ROW):
    messages = context.teacher_messages(row, Rollouts([rollout], 0), said)
    return messages[-1]["content"]


def told(context):
    return [its["text"] for its in context.lessons]


def test_it_is_one_that_samples_and_remembers():
    context = make_context("playbook", {"max_new_tokens": 64})
    assert isinstance(context, SampledContext)
    assert isinstance(context, Memory)
    assert context.sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64}


def test_where_nothing_is_known_the_teacher_reads_the_student_s_prompt():
    context = PlaybookContext()
    for said in (None, "", "LESSON: Think.", "<think>It jumps."):
        assert context.teacher_messages(ROW, Rollouts([QUIET], 0), said) == PROMPT
    [unknown] = make_rollouts([None])
    assert context.teacher_messages(ROW, Rollouts([unknown], 0)) == PROMPT
    assert context.teacher_messages(ROW, None) is None


def test_a_success_is_its_own_demonstration():
    assert read(PlaybookContext(**SHORT), RIGHT) == "Why?|a correct attempt: Because."
    assert "Hm." in read(PlaybookContext(strip_thinking=False, **SHORT), RIGHT)


def test_a_failure_is_reflected_on():
    context = PlaybookContext(**SHORT)
    attempt, feedback = "an attempt that failed: Just so.", "feedback on it: That is no reason."
    said = "<think>?</think>It jumps.\n**LESSON:** Think.\nHELPFUL: 1\nharmful: none"
    assert read(context, WRONG, said) == f"Why?|{attempt}\n\n{feedback}\n\na reflection on it: It jumps."
    assert read(context, WRONG) == f"Why?|{attempt}\n\n{feedback}"
    assert read(context, QUIET, "It jumps.") == f"Why?|{attempt}\n\na reflection on it: It jumps."


def test_the_policy_is_asked_about_failures_alone():
    context = PlaybookContext()
    learn(context, "Give a reason.")
    system, asked = context.sample_messages(ROW, Rollouts([WRONG], 0))
    assert system == PROMPT[0]
    for text in ("Why?", "Just so.", "That is no reason.", "1. Give a reason.", "LESSON:", "HELPFUL:", "HARMFUL:"):
        assert text in asked["content"]
    assert context.sample_messages(ROW, Rollouts([RIGHT], 0)) is None
    assert context.sample_messages(ROW, Rollouts(make_rollouts([None]), 0)) is None
    assert context.sample_messages(ROW, None) is None


def test_lessons_are_for_all_problems_and_solutions_for_their_own():
    context = PlaybookContext(**SHORT)
    context.remember([(ROW, [RIGHT]), (OTHER, [lesson("Look closely.")])])
    solution = "an earlier solution that is correct: Because."
    lessons = "lessons from other problems: 1. Look closely."
    assert read(context, QUIET) == f"Why?|{lessons}\n\n{solution}"
    as_messages = {"prompt": [{"role": "user", "content": "Who?"}]}
    assert read(context, QUIET, row=as_messages) == f"Who?|{lessons}"
    context.remember([(OTHER, [RIGHT])])
    assert read(context, QUIET, row=as_messages) == f"Who?|{lessons}\n\n{solution}"


def test_a_lesson_is_added_once():
    context = PlaybookContext(most_characters=20)
    learn(context, "Think.", "  think ", "none", "None.", "", "Look closely.", "A lesson that is too long to be kept.")
    learn(context, "THINK!")
    assert told(context) == ["Think.", "Look closely."]
    assert context.rates([], [])["playbook/dropped_lessons"] == (0, 1)


def test_a_lesson_that_is_too_long_is_counted():
    context = PlaybookContext(most_characters=20)
    learn(context, "Think.", "A lesson that is too long to be kept.", "A lesson that is too long to be kept!")
    assert told(context) == ["Think."]
    assert context.rates([], [])["playbook/dropped_lessons"] == (1, 1)


def test_what_harms_as_much_as_it_helps_is_dropped():
    """Numbers are those that were shown, and those that are none do not count."""
    context = PlaybookContext(prune_every=2)
    learn(context, "One", "Two", "Three")
    context.remember([(ROW, [saying("HELPFUL: 1, 3 and 3\nHARMFUL: 1 2 0 4 99999999"), saying("HELPFUL: 1")])])
    assert told(context) == ["One", "Three"]
    assert [(its["helpful"], its["harmful"]) for its in context.lessons] == [(2, 1), (1, 0)]
    assert context.rates([], [])["playbook/dropped_lessons"] == (1, 1)
    assert context.rates([], [])["playbook/lessons"] == (2, 1)


def test_what_nobody_has_used_for_long_is_dropped():
    context = PlaybookContext(prune_every=1, stale_after=2)
    learn(context, "One", "Two")
    context.remember([(ROW, [saying("HELPFUL: 2")])])
    assert told(context) == ["One", "Two"]
    context.remember([])
    assert told(context) == ["Two"]


def test_a_playbook_over_its_budget_keeps_what_helps():
    context = PlaybookContext(most_lessons=2)
    learn(context, "One", "Two")
    context.remember([(ROW, [saying("HELPFUL: 1\nLESSON: Three"), lesson("Four")])])
    assert told(context) == ["One", "Four"]


def test_solutions_have_a_budget_too():
    context = PlaybookContext(most_solutions=1)
    context.remember([(ROW, [RIGHT]), (OTHER, [RIGHT])])
    assert "earlier solution" not in str(context.teacher_messages(ROW, Rollouts([QUIET], 0)))
    assert "earlier solution" in str(
        context.teacher_messages({"prompt": [{"role": "user", "content": "Who?"}]}, Rollouts([QUIET], 0))
    )


def test_a_resumed_run_goes_on_with_it():
    context, resumed = PlaybookContext(), PlaybookContext()
    learn(context, "One", "Two")
    context.remember([(ROW, [RIGHT, saying("HELPFUL: 2")])])
    state = context.state_dict()
    before = json.dumps(state)
    resumed.load_state_dict(json.loads(before))
    for one in (context, resumed):
        learn(one, "Three")
        one.remember([(ROW, [saying("HARMFUL: 2, 1")])])
    assert json.dumps(state) == before
    assert resumed.state_dict() == context.state_dict()
    assert told(context) == ["Three"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"most_lessons": 0}, "`most_lessons` of the playbook context must be at least 1"),
        ({"prune_every": 0}, "`prune_every`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"temperature": -1.0}, "`temperature` of the playbook context must be at least 0"),
        ({"shown": "{title}"}, "`shown` of the playbook context has the placeholder"),
        ({"template": "{prompt}"}, "has no '{known}'"),
        ({"sample_template": "{prompt} {attempt} {feedback}"}, "has no '{playbook}'"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PlaybookContext(**kwargs)


def test_it_needs_rewards():
    with pytest.raises(ValueError, match="needs rewards, which tell correct rollouts from failures"):
        PlaybookContext().check_run(1, has_rewards=False, has_feedback=True)
