import pytest
from tiny import make_tokenizer

from trl_opsd.eval.benchmark import Problem
from trl_opsd.eval.chat import ChatFormat


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


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None

    with pytest.raises(ValueError, match=r"no chat template.*`chat_template_path`.*`apply_chat_template`"):
        ChatFormat(tokenizer)
    with pytest.raises(ValueError, match="`system_prompt` needs a chat template"):
        ChatFormat(tokenizer, system_prompt="Be kind.", apply_chat_template=False)
    assert ChatFormat(tokenizer, apply_chat_template=False).encode("1")
