import pytest
from tiny import make_tokenizer

from trl_opsd.eval.benchmark import Problem
from trl_opsd.eval.chat import ChatFormat
from trl_opsd.eval.scorer import score


PROBLEM = Problem("mine", "p", "1+1?", "2", "math", None)


def test_prompt_is_what_the_template_renders(tokenizer):
    chat = ChatFormat(tokenizer, chat_template_kwargs={"enable_thinking": False}, system_prompt="Be kind.")

    assert chat.rendered(PROBLEM)["prompt"] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("template_has_bos", [True, False])
def test_there_is_one_bos_at_most(template_has_bos):
    tokenizer = make_tokenizer(bos_token="<s>")
    if template_has_bos:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = ChatFormat(tokenizer).encode("1+1?")

    assert ids.count(tokenizer.bos_token_id) == int(template_has_bos)
    plain = ChatFormat(tokenizer, apply_chat_template=False).encode("1+1?")
    assert plain == [tokenizer.bos_token_id, *tokenizer("1+1?", add_special_tokens=False)["input_ids"]]


def test_another_chat_template(tokenizer):
    chat = ChatFormat(tokenizer, chat_template="Q: {{ messages[0]['content'] }} A:")

    assert chat.rendered(PROBLEM)["prompt"] == "Q: 1+1? A:"


def test_a_template_that_refuses_is_one_error(tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(ValueError, match=r"no system role.*`system_prompt`"):
        ChatFormat(tokenizer, chat_template=template, system_prompt="Be kind.").encode("1+1?")


def test_special_tokens_are_dropped_and_think_tags_kept(tokenizer):
    chat = ChatFormat(tokenizer)
    ids = tokenizer("<think>hm</think>2<|im_start|><|im_end|>", add_special_tokens=False)["input_ids"]

    assert chat.decode(chat.encode("1+1?"), ids) == "<think>hm</think>2"


def test_thinking_that_the_template_opened_is_thinking(tokenizer):
    chat = ChatFormat(tokenizer, chat_template="{{ messages[0]['content'] }}<think>\n")
    ids = tokenizer("hm</think>2", add_special_tokens=False)["input_ids"]

    assert chat.decode(chat.encode("1+1?"), ids) == "<think>\nhm</think>2"


FORMATS = {
    "GPT-OSS": (
        ["<|start|>", "<|end|>", "<|channel|>", "<|message|>"],
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "Gemma 4": (["<|channel>", "<channel|>"], "<|channel>thought\n", "<channel|>"),
    "Magistral": (["[THINK]", "[/THINK]"], "[THINK]", "[/THINK]"),
    "Command A": (
        ["<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"],
        "<|START_THINKING|>",
        "<|END_THINKING|><|START_RESPONSE|>",
    ),
    "Seed": (["<seed:think>", "</seed:think>"], "<seed:think>", "</seed:think>"),
    "Kimi": (["◁think▷", "◁/think▷"], "◁think▷", "◁/think▷"),
}


@pytest.mark.parametrize("opened_by_template", [False, True])
@pytest.mark.parametrize("model", FORMATS)
def test_thoughts_are_thoughts_however_they_are_marked(model, opened_by_template):
    special, opening, closing = FORMATS[model]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def graded(text):
        prompt, completion = (opening, text) if opened_by_template else ("", opening + text)
        return score(ChatFormat(tokenizer).decode(ids("2 + 2?" + prompt), ids(completion)), "4")

    for answer in ("4", "The answer is 4.", "#### 4", r"\boxed{4}"):
        assert graded("Perhaps the answer is 5?" + closing + answer).correct
    assert not graded("Perhaps the answer is 4?" + closing + "5").correct
    assert graded("The answer is 4.").answer is None  # cut off while thinking


def test_the_last_channel_is_the_answer():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": FORMATS["GPT-OSS"][0]})
    text = (
        "<|channel|>analysis<|message|>Say 5.<|end|><|start|>assistant<|channel|>commentary<|message|>I compute 5."
        "<|end|><|start|>assistant<|channel|>final<|message|>4"
    )
    decoded = ChatFormat(tokenizer).decode([], tokenizer(text, add_special_tokens=False)["input_ids"])
    assert score(decoded, "4").correct
    assert decoded.endswith("</think>4")


def test_marks_of_other_models_are_text(tokenizer):
    text = "[THINK] 4 <channel|>"
    assert ChatFormat(tokenizer).decode([], tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None

    with pytest.raises(ValueError, match=r"no chat template.*`chat_template_path`.*`apply_chat_template`"):
        ChatFormat(tokenizer)
    with pytest.raises(ValueError, match="`system_prompt` needs a chat template"):
        ChatFormat(tokenizer, system_prompt="Be kind.", apply_chat_template=False)
    assert ChatFormat(tokenizer, apply_chat_template=False).encode("1")
