import pytest
from rollouts import make_rollouts

from trl_opsd.context import PlanContext, ReflectionContext, Rollouts, SampledContext, SolutionContext


ROW = {"prompt": [{"role": "user", "content": "Why?"}], "solution": "Because of A.", "answer": "42"}
ROLLOUTS = Rollouts(make_rollouts([0.0, 1.0], ["Mine.", "Other."]), 0)


def test_plan_shows_the_policy_the_solution_and_the_teacher_only_the_plan():
    context = PlanContext()
    (asked,) = context.sample_messages(ROW, None)
    (told,) = context.teacher_messages(ROW, None, "First A.")

    assert (context.columns, context.reads_rollouts) == (("solution",), False)
    assert asked["content"].startswith("Why?\n\n")
    assert "Because of A." in asked["content"]
    assert told["content"].startswith("Why?\n\n")
    assert "First A." in told["content"]
    assert "Because" not in told["content"]


def test_reflection_shows_the_policy_its_attempt_and_the_answer():
    context = ReflectionContext()
    (asked,) = context.sample_messages(ROW, ROLLOUTS)
    (told,) = context.teacher_messages(ROW, ROLLOUTS, "I slipped.")

    assert (context.columns, context.reads_rollouts) == (("answer",), True)
    assert "Mine." in asked["content"]
    assert "Other." not in asked["content"]
    assert "42" in asked["content"]
    assert "I slipped." in told["content"]
    assert "Mine." not in told["content"]
    assert context.sample_messages(ROW, None) is None


@pytest.mark.parametrize("context", [PlanContext(), ReflectionContext()])
@pytest.mark.parametrize("sampled", [None, "", " \n", "<think> going on", "<think>So.</think>"])
def test_nothing_sampled_no_context(context, sampled):
    assert context.teacher_messages(ROW, ROLLOUTS, sampled) is None


def test_reasoning_is_left_out():
    (told,) = PlanContext().teacher_messages(ROW, None, "<think>\nHm.\n</think>\n\nFirst A.")

    assert "plan >>>\nFirst A.\n<<<" in told["content"]


def test_own_templates_and_columns():
    context = PlanContext("answer", "{plan} {prompt} {hint}", max_new_tokens=7, temperature=0.5)
    asks = ReflectionContext(sample_template="{prompt} {attempt} {note}", template="{prompt} {reflection}")

    assert context.columns == ("hint", "answer")
    assert context.sampling == {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "max_new_tokens": 7}
    assert asks.columns == ("note",)
    assert asks.sample_messages({**ROW, "note": "n"}, ROLLOUTS)[0]["content"] == "Why? Mine. n"


@pytest.mark.parametrize(
    ("context_class", "kwargs", "message"),
    [
        (PlanContext, {"template": "{prompt}"}, r"has no '\{plan\}'"),
        (ReflectionContext, {"template": "{prompt}"}, r"has no '\{reflection\}'"),
        (ReflectionContext, {"sample_template": "{prompt}"}, r"has no '\{attempt\}'"),
        (PlanContext, {"sample_template": "{solution}"}, r"has no '\{prompt\}'"),
        (PlanContext, {"max_new_tokens": 0}, "`max_new_tokens` of the plan context must be at least 1, got 0"),
        (PlanContext, {"temperature": -1.0}, "`temperature` of the plan context must be at least 0"),
    ],
)
def test_errors(context_class, kwargs, message):
    with pytest.raises(ValueError, match=message):
        context_class(**kwargs)


def test_a_context_that_samples_is_known_by_its_method():
    assert isinstance(PlanContext(), SampledContext)
    assert not isinstance(SolutionContext(), SampledContext)
