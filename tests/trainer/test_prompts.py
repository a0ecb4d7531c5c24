"""What student and teacher read of the prompts that data sets really hold."""

import pytest
from datasets import Dataset
from tiny import CHAT_TEMPLATE, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing

from trl_opsd import OPSDConfig, OPSDTrainer


# Qwen3's own template leaves out, without a word, a content that is no string
QWEN3 = CHAT_TEMPLATE.replace("message['content']", "(message['content'] if message['content'] is string else '')")


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture
def read(training_args, monkeypatch):
    """The prompts, as text, that a step of training gives to student and teacher."""

    def read(tokenizer, prompt, **settings):
        rows = {"prompt": prompt, "solution": "It is 4.", "completion": settings.pop("completion", "4")}
        trainer = OPSDTrainer(
            make_model(tokenizer),
            args=OPSDConfig(**{**training_args, "max_steps": 1, **settings}),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([rows] * 4),
        )
        batches = []
        make = trainer._generate_and_score_completions
        monkeypatch.setattr(
            trainer, "_generate_and_score_completions", lambda *args: batches.append(make(*args)) or batches[-1]
        )
        trainer.train()

        def text(name):
            ids, mask = (batches[0][f"{name}_{what}"][0] for what in ("ids", "mask"))
            return tokenizer.decode(ids[mask.bool()])

        student, teacher = map(tokenizer.decode, trainer.preview_prompts())
        assert (text("prompt"), text("teacher_prompt")) == (student, teacher)
        return student, teacher, text("completion")

    return read


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN3], ids=["ChatML", "Qwen3"])
def test_text_in_parts_is_text(read, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompt = [
        {"role": "system", "content": parts("Be ", "brief.")},
        {"role": "user", "content": parts("Hello")},
        {"role": "assistant", "content": parts("Hi.")},
        {"role": "user", "content": parts("What is ", "2 + 2?")},
    ]
    joined = [{**message, "content": "".join(part["text"] for part in message["content"])} for message in prompt]
    student, teacher, _ = read(tokenizer, prompt)
    assert (student, teacher) == read(tokenizer, joined)[:2]
    assert "user\nWhat is 2 + 2?<|im_end|>" in student


def test_a_completion_in_parts_is_text(read):
    settings = {"completions": "dataset", "completion": [{"role": "assistant", "content": parts("It ", "is")}]}
    assert read(make_tokenizer(), [{"role": "user", "content": "2 + 2?"}], **settings)[2] == "It is<|im_end|>"


def test_a_context_is_given_text(read, tmp_path, monkeypatch):
    (tmp_path / "hinted.py").write_text(
        "class Hint:\n    columns = ()\n    def teacher_messages(self, row, rollouts):\n"
        "        return [{'role': 'user', 'content': row['prompt'][-1]['content'] + ' Think.'}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prompt = [{"role": "user", "content": parts("2 + 2?")}]
    assert "user\n2 + 2? Think.<|im_end|>" in read(make_tokenizer(), prompt, privileged_context="hinted.Hint")[1]


def test_a_context_of_ones_own_may_read_lists(training_args, tmp_path, monkeypatch):
    (tmp_path / "several.py").write_text(
        "class Several:\n    columns = ('solutions',)\n    def teacher_messages(self, row, rollouts):\n"
        "        return [{'role': 'user', 'content': ' or '.join(row['solutions'])}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = make_tokenizer()
    rows = Dataset.from_list([{"prompt": "2 + 2 =", "solutions": ["4", "four"]}] * 4)
    args = OPSDConfig(**training_args, privileged_context="several.Several")
    trainer = OPSDTrainer(make_model(tokenizer), args=args, processing_class=tokenizer, train_dataset=rows)
    assert tokenizer.decode(trainer.preview_prompts()[1]) == "4 or four"


def test_no_think_tag_after_a_plain_prompt(read):
    """No template was applied, so there is no think block that was closed, and none to open."""
    settings = {"context_kwargs": {"template": "{prompt} ({solution})"}}
    assert read(make_tokenizer(), "2 + 2 =", **settings)[:2] == ("2 + 2 =", "2 + 2 = (It is 4.)")
    # unless it is asked for
    settings["teacher_generation_prefix"] = "<think>"
    assert read(make_tokenizer(), "2 + 2 =", **settings)[1] == "2 + 2 = (It is 4.)<think>"
    conversation = [{"role": "user", "content": "2 + 2?"}]
    assert read(make_tokenizer(), conversation)[1].endswith("<think>\n")


@pytest.mark.parametrize("last", ["<|im_end|>", "<unk>", "<|im_end|> <unk>"])
@pytest.mark.parametrize("first", ["", "<|im_start|> "])
def test_a_plain_prompt_does_not_end(read, first, last):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first}$A {last}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*first.split(), *last.split()}],
    )
    settings = {"context_kwargs": {"template": "{prompt} ({solution})"}}
    first = first.strip()
    assert read(tokenizer, "2 + 2 =", **settings)[:2] == (f"{first}2 + 2 =", f"{first}2 + 2 = (It is 4.)")


def test_an_end_that_the_prompt_spells_out_stays(read):
    assert read(make_tokenizer(), "2 + 2<|im_end|>")[0] == "2 + 2<|im_end|>"


def test_a_token_that_only_the_student_reads(training_args, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "class Own:\n    columns = ()\n    def teacher_messages(self, row, rollouts):\n"
        "        return [{'role': 'user', 'content': 'Say 4.'}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_tokens(["[THINK]", "[UNUSED]"])  # more tokens than embeddings are no fault while they are not used
    args = OPSDConfig(**training_args, privileged_context="own.Own")
    for prompt in ("2 + 2 =", "[THINK] 2 + 2 ="):
        rows = Dataset.from_list([{"prompt": prompt}] * 4)
        trainer = OPSDTrainer(model, args=args, processing_class=tokenizer, train_dataset=rows)
        if "THINK" not in prompt:
            trainer.train()
    with pytest.raises(ValueError, match=r"'\[THINK\]' is token 106 of the tokenizer"):
        trainer.train()
