import datetime

import pytest
from datasets import Dataset, IterableDataset

from trl_opsd.data import to_prompts, validate_rows


USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def make(streaming=False, prompt=USER["content"], **columns):
    """Two good rows followed by one with the given values."""
    good = {"prompt": [USER] if isinstance(prompt, list) else "2 + 2?", **dict.fromkeys(columns, "fine")}
    dataset = Dataset.from_list([good, good, {"prompt": prompt, **columns}])
    return dataset.to_iterable_dataset() if streaming else dataset


def text_parts(*texts):
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


@pytest.mark.parametrize(
    "prompt",
    [
        "2 + 2?",
        [USER],
        [{"role": "system", "content": ""}, USER],
        [USER, ASSISTANT, USER],
        # A tool's result may stand last.
        [USER, {"role": "tool", "content": "4"}],
    ],
)
def test_good_rows_come_back_unchanged(prompt):
    dataset = make(prompt=prompt, solution="4", other="")

    assert validate_rows(dataset, ["solution"]) is dataset


def test_good_stream_keeps_its_rows_and_columns():
    dataset = make(streaming=True, prompt=[USER], solution="4", other="")

    checked = validate_rows(dataset, ["solution"])

    assert checked.features == dataset.features
    assert list(checked) == list(dataset)


def test_text_parts():
    assert validate_rows(Dataset.from_dict({"prompt": [text_parts("2 +", " 2?")]}), [])
    with pytest.raises(ValueError, match=r"row 0: `prompt` has a user turn, message number 0, that is empty"):
        validate_rows(Dataset.from_dict({"prompt": [text_parts(" ", "")]}), [])


@pytest.mark.parametrize("streaming", [False, True])
def test_assistant_turn_that_calls_a_tool_needs_no_content(streaming):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    history = [{**USER, "tool_calls": None}, call, {"role": "tool", "content": "4", "tool_calls": None}]

    list(validate_rows(make(streaming, prompt=history), []))
    with pytest.raises(ValueError, match=r"row 2: `prompt` has a message, number 1, whose content is neither"):
        list(validate_rows(make(streaming, prompt=[USER, {**ASSISTANT, "content": None}, USER]), []))


BAD_ROWS = [
    ({"solution": None}, r"`solution` is null"),
    ({"solution": ""}, r"`solution` is empty"),
    ({"solution": " \n\t"}, r"`solution` is empty"),
    ({"prompt": ""}, r"`prompt` is empty"),
    ({"prompt": "  "}, r"`prompt` is empty"),
    ({"prompt": None}, r"`prompt` is null"),
    ({"prompt": []}, r"`prompt` is empty"),
    ({"prompt": [{"role": "system", "content": "Be brief."}]}, r"`prompt` has no user turn"),
    ({"prompt": [USER, ASSISTANT]}, r"`prompt` ends in an assistant turn"),
    ({"prompt": [{"role": "user", "content": " "}]}, r"`prompt` has a user turn, message number 0, that is empty"),
    ({"prompt": [{"role": None, "content": "2 + 2?"}]}, r"`prompt` has a message, number 0, .* `role` and `content`"),
    ({"prompt": [USER, {"role": "user", "content": None}]}, r"`prompt` has a message, number 1, whose content is nei"),
]


@pytest.mark.parametrize(("values", "message"), BAD_ROWS)
def test_bad_row(values, message):
    with pytest.raises(ValueError, match=rf"^eval_dataset, row 2: {message}"):
        validate_rows(make(**{"solution": "4", **values}), ["solution"], name="eval_dataset")


@pytest.mark.parametrize(("values", "message"), BAD_ROWS)
def test_bad_row_of_a_stream_is_found_when_it_is_read(values, message):
    rows = iter(validate_rows(make(streaming=True, **{"solution": "4", **values}), ["solution"]))

    assert next(rows)["solution"] == "fine"
    next(rows)
    with pytest.raises(ValueError, match=rf"^train_dataset, row 2: {message}"):
        next(rows)


def test_first_row_of_a_stream_is_checked_at_once():
    with pytest.raises(ValueError, match=r"row 0: `solution` is null"):
        validate_rows(Dataset.from_dict({"prompt": ["x"], "solution": [None]}).to_iterable_dataset(), ["solution"])


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_name_those_present(streaming):
    with pytest.raises(ValueError, match=r"no column `solution`; its columns are `prompt`, `answer`"):
        validate_rows(make(streaming, answer="4"), ["solution"])


@pytest.mark.parametrize("streaming", [False, True])
def test_empty(streaming):
    dataset = IterableDataset.from_generator(lambda: iter([])) if streaming else Dataset.from_dict({"prompt": []})

    with pytest.raises(ValueError, match=r"train_dataset is empty"):
        validate_rows(dataset, ["solution"])


@pytest.mark.parametrize("dtype", [3, 0, 0.5, False])
def test_values_other_than_text(dtype):
    assert validate_rows(Dataset.from_dict({"prompt": ["x"], "level": [dtype]}), ["level"])


def test_prompt_of_another_type():
    with pytest.raises(ValueError, match=r"row 0: `prompt` is of type int"):
        validate_rows(Dataset.from_dict({"prompt": [3]}), [])


def test_rows_are_counted_as_the_dataset_orders_them():
    dataset = make(solution="").select([2, 0])

    with pytest.raises(ValueError, match=r"row 0: `solution` is empty"):
        validate_rows(dataset, ["solution"])


def test_rows_made_by_a_transform():
    dataset = Dataset.from_dict({"n": [1, 2]})
    dataset.set_transform(lambda rows: {"prompt": [f"{n}?" if n < 2 else "" for n in rows["n"]]})

    with pytest.raises(ValueError, match=r"row 1: `prompt` is empty"):
        validate_rows(dataset, [])


def test_other_formats_do_not_matter():
    dataset = make(prompt=[USER], solution="4").with_format("numpy")

    assert validate_rows(dataset, ["solution"]) is dataset


def test_template_result_is_found_empty():
    with pytest.raises(ValueError, match=r"row 0: `prompt` has a user turn, message number 0, that is empty"):
        validate_rows(to_prompts(Dataset.from_dict({"problem": [" "]})), [])


def test_rows_are_read_in_batches():
    """Row by row, a dataset of thirty thousand would take ten times as long."""
    sizes = []

    def read(rows):
        sizes.append(len(rows["prompt"]))
        return rows

    dataset = Dataset.from_dict({"prompt": [[USER]] * 2_500, "solution": ["4"] * 2_500}).with_transform(read)

    validate_rows(dataset, ["solution"])

    assert sizes == [1, 1000, 1000, 500]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "is NaN, which is how pandas writes a missing value"),
        (["a solution", "another"], "is of type list, and the teacher would read Python's notation of it"),
        ({"text": "a solution"}, "is of type dict"),
        (b"a solution", "is of type bytes"),
    ],
)
def test_values_that_are_no_text(streaming, value, problem):
    rows = [{"prompt": "2 + 2?", "solution": value}] * 2
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=f"train_dataset, row 0: `solution` {problem}"):
        validate_rows(dataset.to_iterable_dataset() if streaming else dataset, ["solution"])


@pytest.mark.parametrize("value", [4, 4.5, True, datetime.date(2024, 2, 29)])
def test_values_that_are_written_as_themselves(value):
    validate_rows(Dataset.from_list([{"prompt": "2 + 2?", "solution": value}]), ["solution"])


def test_who_reads_lists_may_have_them():
    rows = Dataset.from_list([{"prompt": "2 + 2?", "solutions": ["4", "four"], "score": float("nan")}])
    assert validate_rows(rows, ["solutions"], structured=["solutions"]) is rows
    says_nothing = Dataset.from_list([{"prompt": "2 + 2?", "completion": [{"role": "assistant", "content": " "}]}])
    with pytest.raises(ValueError, match="row 0: `completion` has messages without text"):
        validate_rows(says_nothing, ["completion"], structured=["completion"])
    with pytest.raises(ValueError, match="`score` is NaN"):
        validate_rows(rows, ["solutions", "score"], structured=["solutions", "score"])
