import pytest
from datasets import Dataset, IterableDataset

from trl_opsd.data import to_prompts


MESSAGES = [{"role": "user", "content": "2 + 2?"}]


def make(streaming=False, **columns):
    dataset = Dataset.from_dict(columns)
    return dataset.to_iterable_dataset() if streaming else dataset


def untyped_stream(rows):
    """A stream that does not know its columns, as one from a generator does not."""
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_prompt_column_stays_exactly_as_it_is(streaming):
    dataset = make(streaming, prompt=["2 + 2?", " "], problem=["x", "y"])

    assert to_prompts(dataset) is dataset


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("alias", ["problem", "question", "query", "instruction"])
def test_alias_becomes_a_user_message(alias, streaming, caplog):
    dataset = to_prompts(make(streaming, **{alias: ["2 + 2?"], "solution": ["4"]}))

    assert next(iter(dataset)) == {alias: "2 + 2?", "solution": "4", "prompt": MESSAGES}
    assert f"`{alias}` column becomes the prompt" in caplog.text


def test_stream_that_does_not_know_its_columns():
    dataset = to_prompts(untyped_stream([{"problem": "2 + 2?"}, {"problem": "3 + 3?"}]))

    assert [row["prompt"][0]["content"] for row in dataset] == ["2 + 2?", "3 + 3?"]


@pytest.mark.parametrize("streaming", [False, True])
def test_column_mapping(streaming):
    dataset = make(streaming, text=["2 + 2?"], reference=["4"], level=[3])

    row = next(iter(to_prompts(dataset, column_mapping={"text": "prompt", "reference": "solution"})))

    assert row == {"text": "2 + 2?", "reference": "4", "level": 3, "prompt": MESSAGES, "solution": "4"}


def test_column_mapping_of_messages_keeps_them():
    dataset = to_prompts(make(chat=[MESSAGES]), column_mapping={"chat": "prompt"})

    assert dataset[0]["prompt"] == MESSAGES


def test_column_mapping_can_move_a_column_out_of_the_way():
    dataset = make(prompt=["wrapped"], problem=["2 + 2?"])

    row = to_prompts(dataset, column_mapping={"problem": "prompt", "prompt": "old_prompt"})[0]

    assert row == {"problem": "2 + 2?", "prompt": MESSAGES, "old_prompt": "wrapped"}


@pytest.mark.parametrize("streaming", [False, True])
def test_template_and_system_prompt(streaming):
    dataset = make(streaming, problem=["2 + 2?"], unit=["cm"], digits=[1])

    dataset = to_prompts(
        dataset, prompt_template="{problem}\nUse {digits} digit in {unit}: \\boxed{{}}", system_prompt="Be {brief}."
    )

    assert next(iter(dataset))["prompt"] == [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "2 + 2?\nUse 1 digit in cm: \\boxed{}"},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_prompts(streaming):
    dataset = make(streaming, problem=["2 + 2?", None], unit=["cm", "cm"])

    assert [row["prompt"] for row in to_prompts(dataset, plain_prompts=True)] == ["2 + 2?", None]
    templated = to_prompts(dataset, prompt_template="Q ({unit}):", plain_prompts=True)
    assert [row["prompt"] for row in templated] == ["Q (cm):", "Q (cm):"]


def test_template_reads_alias_and_original_prompt():
    assert to_prompts(make(question=["2 + 2"]), prompt_template="{prompt}?")[0]["prompt"] == MESSAGES
    assert to_prompts(make(prompt=["2 + 2"]), prompt_template="{prompt}?")[0]["prompt"] == MESSAGES


def test_text_is_not_read_as_a_template():
    dataset = make(problem=["{unit} {0} {problem!r}"], unit=["cm"])

    assert to_prompts(dataset, prompt_template="{problem}")[0]["prompt"][0]["content"] == "{unit} {0} {problem!r}"


def test_system_prompt_goes_before_messages():
    prompt = to_prompts(make(prompt=[MESSAGES]), system_prompt="Be brief.")[0]["prompt"]

    assert prompt == [{"role": "system", "content": "Be brief."}, *MESSAGES]


@pytest.mark.parametrize("streaming", [False, True])
def test_null_stays_null_for_the_validation_to_find(streaming):
    dataset = to_prompts(make(streaming, problem=["2 + 2?", None]), system_prompt="Be brief.")

    assert [row["prompt"] is None for row in dataset] == [False, True]


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"text": ["x"], "id": [1]}, {}, r"columns are `text`, `id`.*`column_mapping`"),
        ({"problem": ["x"], "query": ["x"]}, {}, r"more than one .*: `problem`, `query`"),
        ({"text": ["x"]}, {"column_mapping": {"txt": "prompt"}}, r"maps the column `txt`, .* only the columns `text`"),
        (
            {"a": ["x"], "b": ["x"]},
            {"column_mapping": {"a": "prompt", "b": "prompt"}},
            r"more than one column to `prompt`",
        ),
        (
            {"prompt": ["x"], "problem": ["x"]},
            {"column_mapping": {"problem": "prompt"}},
            r"already has a column `prompt`.*prompt: original_prompt",
        ),
        ({"problem": ["x"]}, {"prompt_template": "{problm}"}, r"\{problm\}, .* only the columns `problem`"),
        (
            {"problem": ["x"]},
            {"prompt_template": r"{problem} \boxed{}"},
            r"placeholder without a name.*doubled: \{\{ and",
        ),
        ({"problem": ["x"]}, {"prompt_template": "{problem"}, r"`prompt_template` .* is malformed.*braces doubled"),
        ({"problem": ["x"]}, {"prompt_template": "{problem!r}"}, r"\{problem\} with a format or a conversion"),
        ({"problem": ["x"]}, {"prompt_template": "{problem.real}"}, r"placeholder \{problem\.real\}"),
        ({"problem": ["x", None]}, {"prompt_template": "{problem}"}, r"`problem` of row 1 holds nothing"),
        ({"problem": [1.0, float("nan")]}, {"prompt_template": "{problem}"}, r"`problem` of row 1 holds nothing"),
        ({"prompt": [MESSAGES]}, {"prompt_template": "{prompt}"}, r"`prompt` of row 0 holds list"),
        ({"prompt": ["x"]}, {"system_prompt": "s"}, r"`prompt` of row 0 is a plain string.*prompt_template"),
        ({"prompt": ["x"]}, {"plain_prompts": True}, r"`plain_prompts` has no effect on .*`prompt_template`"),
        ({"problem": ["x"]}, {"plain_prompts": True, "system_prompt": "s"}, r"`system_prompt` needs conv.*`plain_p"),
        ({"a": [MESSAGES]}, {"plain_prompts": True, "column_mapping": {"a": "prompt"}}, r"row 0 is a conversation"),
        (
            {"prompt": [[{"role": "system", "content": "s"}, *MESSAGES]]},
            {"system_prompt": "s"},
            r"row 0 already has a system message",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_errors(columns, arguments, message, streaming):
    with pytest.raises(ValueError, match=message):
        list(to_prompts(make(streaming, **columns), **arguments))
