import pytest

from trl_opsd.context import AnswerContext, ConciseContext, SolutionContext


ROW = {
    "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is \\frac{6}{2}?"}],
    "solution": "Divide {6} by 2.",
    "answer": "3",
    "proof": "By induction.",
}


def last_turn(context):
    system, message = context.teacher_messages(ROW, None)
    assert system == ROW["prompt"][0]
    return message["content"]


@pytest.mark.parametrize(
    ("context_class", "column", "secret"),
    [(SolutionContext, "solution", "Divide {6} by 2."), (AnswerContext, "answer", "3")],
)
def test_column_is_read_after_the_question(context_class, column, secret):
    context = context_class()
    question, _, rest = last_turn(context).partition("\n\n")

    assert context.columns == (column,)
    assert question == "What is \\frac{6}{2}?"
    assert rest.count(secret) == 1
    assert "Divide" not in rest or context_class is SolutionContext


def test_solution_stands_between_fences_and_is_followed_by_the_instruction():
    before, _, after = last_turn(SolutionContext()).partition("Divide {6} by 2.")

    assert before.endswith(">>>\n")
    assert after.startswith("\n<<<")
    assert "your own words" in after
    assert "do not copy" in after


@pytest.mark.parametrize("context_class", [SolutionContext, AnswerContext])
def test_renamed_column(context_class):
    context = context_class(column="proof")

    assert context.columns == ("proof",)
    assert "By induction." in last_turn(context)


@pytest.mark.parametrize("context_class", [SolutionContext, AnswerContext])
def test_own_template(context_class):
    context = context_class(column="proof", template="{prompt} Psst: {proof}, {answer}")

    assert context.columns == ("proof", "answer")
    assert last_turn(context) == "What is \\frac{6}{2}? Psst: By induction., 3"
    with pytest.raises(ValueError, match=r"has no '\{proof\}'"):
        context_class(column="proof", template="{prompt} Psst: nothing")
    with pytest.raises(ValueError, match=r"has no '\{prompt\}'"):
        context_class(template="")


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({}, "Answer directly"),
        ({"mode": "uniform"}, "do not restate the problem"),
        ({"mode": "percent"}, "about 50 % fewer tokens"),
        ({"mode": "percent", "percent": 20}, "about 20 % fewer tokens"),
        ({"mode": "percent", "percent": 80}, "about 80 % fewer tokens"),
        ({"mode": "difficulty"}, "brevity second"),
    ],
)
def test_concise_instruction_stands_in_front_of_the_question(kwargs, says):
    context = ConciseContext(**kwargs)
    instruction, _, question = last_turn(context).partition("\n\n")

    assert context.columns == ()  # no ground truth
    assert says in instruction
    assert "{" not in instruction
    assert question == "What is \\frac{6}{2}?"


def test_concise_modes_differ():
    assert len({last_turn(ConciseContext(mode)) for mode in ("uniform", "percent", "difficulty")}) == 3


def test_concise_own_template():
    assert last_turn(ConciseContext(template="Be brief. {prompt}")) == "Be brief. What is \\frac{6}{2}?"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "short"}, r"`mode` of the concise context must be one of \['uniform', 'percent', 'difficulty'\]"),
        ({"percent": 0}, "`percent` of the concise context must be between 1 and 99, got 0"),
        ({"percent": 100}, "`percent` .* got 100"),
        ({"template": "Be brief."}, r"has no '\{prompt\}'"),
    ],
)
def test_concise_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConciseContext(**kwargs)
