import copy
import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from rollouts import make_rollouts
from tiny import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_opsd.context import (
    Rollouts,
    SolutionContext,
    TeacherPrompt,
    TemplateContext,
    rendering,
    thinking_prefix,
    without_end,
)


PLAIN = {"prompt": "2 + 2?", "hint": "4"}
CHAT = {"prompt": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "2 + 2?"}], "hint": "4"}
TEMPLATE = "{prompt} ({hint})"
CHAT_TEXT = "<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\n2 + 2? (4)<|im_end|>\n<|im_start|>assistant\n"

ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


def make_prompt(tokenizer, context=None, **options):
    settings = {"chat_template_kwargs": {}, "generation_prefix": "", "max_length": None, "skip_overlong": False}
    return TeacherPrompt(context or TemplateContext(TEMPLATE), tokenizer, **{**settings, **options})


def render(tokenizer, row, context=None, **options):
    return tokenizer.decode(make_prompt(tokenizer, context, **options).token_ids(row, None))


class Fixed:
    """Context that answers with what it is given, and remembers what it was asked."""

    columns = ()

    def __init__(self, messages):
        self.messages = messages

    def teacher_messages(self, row, rollouts):
        self.asked = (copy.deepcopy(row), rollouts)
        return self.messages


@pytest.fixture
def bos_tokenizer():
    tokenizer = make_tokenizer("<bos>")
    tokenizer.chat_template = "{{- bos_token }}" + CHAT_TEMPLATE
    return tokenizer


# Text


def test_plain_prompt_sees_no_chat_template(tokenizer):
    assert render(tokenizer, PLAIN) == "2 + 2? (4)"


def test_conversation_goes_through_the_chat_template(tokenizer):
    assert render(tokenizer, CHAT) == CHAT_TEXT


@pytest.mark.parametrize("with_bos", [False, True])
def test_teacher_without_context_reads_what_the_student_reads(tokenizer, bos_tokenizer, with_bos):
    tokenizer = bos_tokenizer if with_bos else tokenizer
    prompt = make_prompt(tokenizer, TemplateContext("{prompt}"))

    # As GRPOTrainer tokenizes prompts
    chat = tokenizer.apply_chat_template([CHAT["prompt"]], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.token_ids(CHAT, None) == chat["input_ids"][0]
    assert prompt.token_ids(PLAIN, None) == tokenizer(text=[PLAIN["prompt"]])["input_ids"][0]


def test_row_is_not_changed(tokenizer):
    for row in (PLAIN, CHAT):
        before = copy.deepcopy(row)
        make_prompt(tokenizer).token_ids(row, None)
        assert row == before


def test_context_gets_messages_the_whole_row_and_the_rollouts(tokenizer):
    context = Fixed([{"role": "user", "content": "Hm"}])
    rollouts = Rollouts(make_rollouts([1.0, 0.0]), 1)

    ids = make_prompt(tokenizer, context).token_ids(PLAIN, rollouts)

    assert context.asked == ({"prompt": [{"role": "user", "content": "2 + 2?"}], "hint": "4"}, rollouts)
    assert tokenizer.decode(ids) == "Hm"
    make_prompt(tokenizer, context).token_ids(CHAT, None)
    assert context.asked == (CHAT, None)


def test_several_messages_for_a_plain_prompt_become_paragraphs(tokenizer):
    context = Fixed([{"role": "user", "content": "Hm"}, {"role": "user", "content": "2 + 2?"}])

    assert render(tokenizer, PLAIN, context) == "Hm\n\n2 + 2?"


@pytest.mark.parametrize("row", [PLAIN, CHAT])
def test_no_context_no_prompt(tokenizer, row):
    assert make_prompt(tokenizer, Fixed(None)).token_ids(row, None) is None
    assert make_prompt(tokenizer, Fixed(None), max_length=1).token_ids(row, None) is None


def test_chat_template_kwargs(tokenizer):
    assert render(tokenizer, CHAT, chat_template_kwargs=ON) == CHAT_TEXT
    assert render(tokenizer, CHAT, chat_template_kwargs=OFF) == CHAT_TEXT + "<think>\n\n</think>\n\n"


def test_other_chat_template(tokenizer):
    template = "{{ messages | length }}{{ '>' if add_generation_prompt }}"

    assert render(tokenizer, CHAT, chat_template=template) == "2>"
    prompt = make_prompt(tokenizer)
    prompt.chat_template = template
    assert tokenizer.decode(prompt.token_ids(CHAT, None)) == "2>"


def test_tools_reach_the_chat_template(tokenizer):
    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        return a + b

    tokenizer.chat_template = (
        "{%- if tools is defined and tools is not none %}tools:{% for tool in tools %}"
        "{{- tool['function']['name'] }};{% endfor %}{% endif %}" + CHAT_TEMPLATE
    )
    prompt = make_prompt(tokenizer)

    assert tokenizer.decode(prompt.token_ids(CHAT, None, [add])) == "tools:add;" + CHAT_TEXT
    assert tokenizer.decode(prompt.token_ids(CHAT, None, [])) == CHAT_TEXT  # some templates stumble over none at all
    assert tokenizer.decode(prompt.token_ids(CHAT, None)) == CHAT_TEXT
    assert tokenizer.decode(prompt.token_ids(PLAIN, None, [add])) == "2 + 2? (4)"


@pytest.mark.parametrize(("row", "text"), [(PLAIN, "2 + 2? (4)"), (CHAT, CHAT_TEXT)])
def test_generation_prefix_stands_last(tokenizer, bos_tokenizer, row, text):
    assert render(tokenizer, row, generation_prefix="<think>\n") == text + "<think>\n"
    assert render(bos_tokenizer, row, generation_prefix="<think>\n") == "<bos>" + text + "<think>\n"


# Special tokens and length


@pytest.mark.parametrize("row", [PLAIN, CHAT, {**PLAIN, "prompt": "<bos>2 + 2?"}])
def test_exactly_one_bos(bos_tokenizer, row):
    ids = make_prompt(bos_tokenizer).token_ids(row, None)

    assert ids[0] == bos_tokenizer.bos_token_id
    assert ids.count(bos_tokenizer.bos_token_id) == 1


def test_bos_further_on_in_the_prompt_is_the_users(bos_tokenizer):
    ids = make_prompt(bos_tokenizer, TemplateContext("Read: {prompt}")).token_ids({"prompt": "<bos>2"}, None)

    assert bos_tokenizer.decode(ids) == "<bos>Read: <bos>2"


def test_tokenizer_without_bos_loses_no_token(tokenizer):
    assert tokenizer.bos_token_id is None
    assert render(tokenizer, {"prompt": "aa"}, TemplateContext("{prompt}")) == "aa"
    assert render(tokenizer, {"prompt": ""}, TemplateContext("{prompt}")) == ""


@pytest.mark.parametrize(("row", "text"), [(PLAIN, "2 + 2? (4)"), (CHAT, CHAT_TEXT)])
def test_never_truncated(tokenizer, row, text):
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(4)

    assert render(tokenizer, row, generation_prefix="<think>\n") == text + "<think>\n"


@pytest.mark.parametrize("row", [PLAIN, CHAT])
def test_budget(tokenizer, row):
    options = {"generation_prefix": "<think>\n"}
    length = len(make_prompt(tokenizer, **options).token_ids(row, None))

    for skip in (False, True):
        exact = make_prompt(tokenizer, **options, max_length=length, skip_overlong=skip)
        assert len(exact.token_ids(row, None)) == length
    assert make_prompt(tokenizer, **options, max_length=length - 1, skip_overlong=True).token_ids(row, None) is None
    with pytest.raises(
        ValueError,
        match=rf"has {length} tokens, 3 more than the budget of {length - 3}\. It is never truncated: raise "
        r"`max_teacher_prompt_length` .*`overlong_teacher_prompt='skip'`",
    ):
        make_prompt(tokenizer, **options, max_length=length - 3).token_ids(row, None)


# Thinking


@pytest.mark.parametrize(
    ("student", "teacher", "prefix"),
    [
        (OFF, ON, "<think>\n"),
        (OFF, {}, "<think>\n"),  # on is the template's default
        (ON, ON, ""),
        ({}, {}, ""),
        (OFF, OFF, ""),
        (ON, OFF, ""),
    ],
)
def test_thinking_prefix(tokenizer, student, teacher, prefix):
    assert thinking_prefix(tokenizer, student, teacher) == prefix


def test_thinking_prefix_aligns_the_two_sides(tokenizer):
    prefix = thinking_prefix(tokenizer, OFF, ON)

    student = render(tokenizer, CHAT, TemplateContext("{prompt}"), chat_template_kwargs=OFF)
    teacher = render(tokenizer, CHAT, chat_template_kwargs=ON, generation_prefix=prefix)

    assert student.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert teacher.endswith("<|im_start|>assistant\n<think>\n")


def test_template_that_opens_the_think_block_itself_needs_no_prefix(tokenizer):
    both_ends = "{%- endif %}{%- endif %}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(both_ends, "{%- else %}{{- '<think>\n' }}" + both_ends)
    assert render(tokenizer, CHAT, chat_template_kwargs=ON).endswith("assistant\n<think>\n")

    assert thinking_prefix(tokenizer, OFF, ON) == ""


def test_thinking_prefix_without_the_switch(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert thinking_prefix(tokenizer, OFF, ON) == ""
    assert thinking_prefix(tokenizer, OFF, ON, chat_template=CHAT_TEMPLATE) == "<think>\n"


def test_thinking_prefix_without_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    assert thinking_prefix(tokenizer, OFF, ON) == ""
    assert thinking_prefix(tokenizer, OFF, ON, chat_template=CHAT_TEMPLATE) == "<think>\n"


# Whole datasets

ROWS = Dataset.from_list(
    [{"prompt": "1?", "solution": "x" * length} for length in (5, 10, 200, 5, 300)],
)


def solution_prompt(tokenizer, **options):
    return make_prompt(tokenizer, SolutionContext(template="{prompt} {solution}"), **options)


def test_check_names_the_row_over_budget(tokenizer):
    with pytest.raises(ValueError, match=r"Row 2 of `eval_dataset`: The teacher's prompt has 203 tokens, 153 more"):
        solution_prompt(tokenizer, max_length=50).check_rows(ROWS, "eval_dataset")


def test_check_passes_within_the_budget(tokenizer, caplog):
    for options in ({}, {"max_length": 303}, {"max_length": 303, "skip_overlong": True}):
        solution_prompt(tokenizer, **options).check_rows(ROWS, "train_dataset")
    assert not caplog.records


def test_check_counts_rows_to_skip(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        solution_prompt(tokenizer, max_length=50, skip_overlong=True).check_rows(ROWS, "train_dataset")

    (record,) = caplog.records
    assert "2 of 5 rows of `train_dataset`" in record.getMessage()


def test_check_counts_no_row_whose_context_needs_the_rollouts(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        make_prompt(tokenizer, Fixed(None), max_length=50, skip_overlong=True).check_rows(ROWS, "train_dataset")

    assert not caplog.records


@pytest.fixture
def second_of_two_processes(monkeypatch):
    """The second of two processes, given what the first has found."""

    def become(found):
        state = SimpleNamespace(process_index=1, num_processes=2, is_local_main_process=False, is_main_process=False)
        monkeypatch.setattr(rendering, "PartialState", lambda: state)
        monkeypatch.setattr(rendering, "gather_object", lambda own: [found, *own])

    return become


def test_each_process_checks_its_share(tokenizer, second_of_two_processes):
    second_of_two_processes((0, 70, None))
    asked = []

    class Listening(Fixed):
        def teacher_messages(self, row, rollouts):
            asked.append(row["solution"])

    prompt = make_prompt(tokenizer, Listening(None), max_length=50)
    prompt.check_rows(ROWS, "train_dataset")
    assert prompt.longest == 70  # of the other process; here the rollouts will tell, within the budget
    assert asked == [ROWS[1]["solution"], ROWS[3]["solution"]]


def test_all_processes_hear_of_the_first_row_over_budget(tokenizer, second_of_two_processes):
    second_of_two_processes((0, 0, (2, "It is too long.")))
    with pytest.raises(ValueError, match="Row 2 of `train_dataset`: It is too long"):  # this one's rows are not
        solution_prompt(tokenizer, max_length=50).check_rows(ROWS, "train_dataset")
    with pytest.raises(ValueError, match="Row 1 of `train_dataset`: The teacher's prompt has"):
        solution_prompt(tokenizer, max_length=1).check_rows(ROWS, "train_dataset")


def test_check_leaves_streams_alone(tokenizer):
    def rows():
        raise AssertionError("The stream was read.")
        yield

    solution_prompt(tokenizer, max_length=1).check_rows(IterableDataset.from_generator(rows), "train_dataset")


@pytest.mark.parametrize("row", [PLAIN, CHAT])
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("a hint", "returned str"),
        (("a", "b"), "returned tuple"),
        ([], "returned an empty list"),
        (["a hint"], "returned the message 'a hint'"),
        ([{"role": "user"}], "returned the message {'role': 'user'}"),
        ([{"content": "a hint"}], "returned the message {'content': 'a hint'}"),
        ([{"role": "user", "content": 4}], "whose content is 4"),
        ([{"role": "user", "content": [{"type": "image"}]}], "whose content is"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "an assistant turn at the end"),
    ],
    ids=str,
)
def test_contexts_that_return_no_messages(tokenizer, row, returned, said):
    class Hint:
        columns = ()

        def teacher_messages(self, row, rollouts):
            return returned

    prompt = make_prompt(tokenizer, Hint())
    with pytest.raises(ValueError, match=f"The privileged context Hint .*{said}.*a list of messages"):
        prompt.token_ids(row, None)
    with pytest.raises(ValueError, match="Row 0 of `train_dataset`: The privileged context Hint"):
        make_prompt(tokenizer, Hint(), max_length=1000).check_rows(Dataset.from_list([row]), "train_dataset")


def test_a_context_may_return_text_in_parts(tokenizer):
    class Parts:
        columns = ()

        def teacher_messages(self, row, rollouts):
            return [{"role": "user", "content": [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]}]

    assert render(tokenizer, PLAIN, Parts()) == "2 + 2?"


@pytest.mark.parametrize(("template", "kept"), [("$A", 3), ("<s> $A", 4), ("$A </s>", 3), ("<s> $A </s> </s>", 4)])
def test_what_a_tokenizer_ends_with_goes_and_nothing_else(template, kept):
    # Its vocabulary lacks what is used to find out, so that the text is an unknown token, which is a special one
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    ids = tokenizer("one two three")["input_ids"]

    assert without_end(tokenizer, ids) == ids[:kept]
