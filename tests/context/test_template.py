import copy

import pytest
from datasets import Dataset

from trl_opsd.context import TemplateContext
from trl_opsd.data import validate_rows


def user(content):
    return {"role": "user", "content": content}


def last_turn(template, prompt="Why?", **columns):
    (message,) = TemplateContext(template).teacher_messages({"prompt": [user(prompt)], **columns}, None)
    assert message["role"] == "user"
    return message["content"]


def test_placeholders():
    context = TemplateContext("{hint} / {prompt} / {answer} / {hint}")

    assert context.columns == ("hint", "answer")
    assert last_turn(context.template, hint="Think.", answer=42, unused="x") == "Think. / Why? / 42 / Think."


def test_no_placeholder_but_the_prompt_needs_no_column():
    assert TemplateContext("Be brief. {prompt}").columns == ()


def test_doubled_braces_are_literal():
    context = TemplateContext("{prompt} Use \\boxed{{}} and {{answer}}.")

    assert context.columns == ()
    assert last_turn(context.template) == "Why? Use \\boxed{} and {answer}."


@pytest.mark.parametrize("text", ["{solution}", "{0}", "{}", "\\frac{1}{2}", "{{x}}", "{", "}", "{prompt}"])
def test_braces_in_the_data_are_inserted_verbatim(text):
    assert last_turn("{prompt} | {solution}", prompt=text, solution="s") == f"{text} | s"
    assert last_turn("{prompt} | {solution}", solution=text) == f"Why? | {text}"


@pytest.mark.parametrize("column", ["my hint", "meta.hint", "hints[0]", "0", "self"])
def test_columns_of_any_name(column):
    # Names with dots are what `Dataset.flatten` makes
    context = TemplateContext(f"{{prompt}} {{{column}}}")

    assert context.columns == (column,)
    assert last_turn(context.template, **{column: "Think."}) == "Why? Think."


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Solve it: {solution}", r"has no '\{prompt\}'"),
        ("", r"has no '\{prompt\}'"),
        ("{{prompt}}", r"has no '\{prompt\}'"),
        ("{prompt} {}", "placeholder without a name"),
        ("{prompt} {:>3}", "placeholder without a name"),
        ("{prompt} {solution", "is malformed: .*literal braces doubled"),
        ("{prompt} }", "is malformed: .*literal braces doubled"),
        ("{prompt} \\boxed{", "is malformed: .*literal braces doubled"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=message):
        TemplateContext(template)


@pytest.mark.parametrize("template", ["{prompt:d}", "{prompt} {hint!x}", "{prompt} {hint:{width}}"])
def test_template_that_could_never_be_filled_in(template):
    with pytest.raises(ValueError, match="template"):
        TemplateContext(template)


def test_unknown_column_is_found_by_the_validation():
    dataset = Dataset.from_list([{"prompt": "Why?", "hint": "Think."}])

    assert validate_rows(dataset, TemplateContext("{prompt} {hint}").columns) is dataset
    with pytest.raises(ValueError, match="no column `hnt`; its columns are `prompt`, `hint`"):
        validate_rows(dataset, TemplateContext("{prompt} {hnt}").columns)


def test_only_the_last_user_turn_is_rewritten():
    prompt = [
        {"role": "system", "content": "You are {kind}."},
        user("First"),
        {"role": "assistant", "content": "Yes?"},
        user("Second"),
    ]

    messages = TemplateContext("{prompt} ({hint})").teacher_messages({"prompt": prompt, "hint": "psst"}, None)

    assert messages == [*prompt[:3], user("Second (psst)")]


def test_turns_after_the_last_user_turn_are_kept():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    prompt = [user("First"), user("Second"), call, {"role": "tool", "content": "4"}]

    messages = TemplateContext("{prompt}!").teacher_messages({"prompt": prompt}, None)

    assert messages == [user("First"), user("Second!"), call, {"role": "tool", "content": "4"}]


def test_typed_text_parts_are_joined():
    parts = [{"type": "text", "text": "Why "}, {"type": "text", "text": "{not}?"}]

    assert last_turn("<{prompt}> {hint}", prompt=parts, hint="psst") == "<Why {not}?> psst"


def test_other_keys_of_the_turn_are_kept():
    messages = TemplateContext("{prompt}!").teacher_messages({"prompt": [{**user("Why?"), "name": "Ada"}]}, None)

    assert messages == [{"role": "user", "name": "Ada", "content": "Why?!"}]


@pytest.mark.parametrize("content", ["Why?", [{"type": "text", "text": "Why?"}]])
def test_row_is_not_changed(content):
    row = {"prompt": [{"role": "system", "content": "Hi"}, user(content)], "hint": "psst"}
    before = copy.deepcopy(row)

    messages = TemplateContext("{prompt} {hint}").teacher_messages(row, None)
    messages.append(user("more"))

    assert row == before
