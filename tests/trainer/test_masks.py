"""What tools and environments write is in the completion and read, but it is not what the model is trained on."""

import pytest
import torch
from peft import LoraConfig
from plain_loop import Method, Row, loss_and_gradient
from tiny import make_model, make_tokenizer
from trl import GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from trl_opsd import SelfDistillationTrainer


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
ANSWERS = ["So it is 7.<|im_end|>", "I guess 12.<|im_end|>", "No.<|im_end|>", "It is what it is.<|im_end|>"]
# What the model writes in each row of a batch
TURNS = [(CALL, ANSWERS[0]), *((answer,) for answer in ANSWERS[1:])]


def length_reward(completions, **kwargs):
    return [float(len(completion[-1]["content"])) for completion in completions]


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """The first rollout of each batch calls `add` and then answers, the others answer at once."""

    def generate(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        texts = [CALL, *ANSWERS[1:]] if len(prompt_ids) == 4 else ANSWERS[: len(prompt_ids)]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(reward_funcs=length_reward, **settings):
        names = ("tools", "rollout_func", "environment_factory", "peft_config")
        arguments = {name: settings.pop(name) for name in names if name in settings}
        rows = settings.pop("train_dataset", dataset)
        settings = {
            "divergence": "forward_kl",
            "teacher": "live",
            "loss_type": "dapo",
            "temperature": 1.0,
            "distillation_temperature": 1.0,
            "max_completion_length": 300,
            "num_generations": 2,
            **settings,
        }
        trainer = SelfDistillationTrainer(
            model=make_model(tokenizer),
            args=SelfDistillationTrainer.config_class(**{**training_args, **settings}),
            reward_funcs=reward_funcs,
            train_dataset=rows,
            processing_class=tokenizer,
            **arguments,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


@pytest.fixture
def rows(dataset):
    return [row for row in dataset.select(range(2)) for _ in range(2)]


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First number.
        b: Second number.
    """
    add.calls.append((a, b))
    return a + b


class Abacus:
    """An environment with a tool, which says what it is about and counts its uses."""

    def reset(self, **row):
        self.calls = []
        return f" Your abacus has {len(row['answer'])} rods."

    def add(self, a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        self.calls.append((a, b))
        return a + b

    def get_reward(self):
        return float(len(self.calls))


class Silence:
    """An environment with another tool, which adds nothing to the prompt."""

    def reset(self, **row):
        pass

    def listen(self) -> str:
        """
        Listen.

        Returns:
            What was heard.
        """
        return "nothing"


def read_and_written(batch, tokenizer):
    """The completions as text, and their parts that are in the loss."""
    completions, mask = batch["completion_ids"], batch["completion_mask"].bool()
    in_loss = batch["divergence_mask"].bool()
    assert not (in_loss & ~mask).any()
    decode = tokenizer.decode
    return (
        [decode(ids[its]) for ids, its in zip(completions, mask, strict=True)],
        [decode(ids[its]) for ids, its in zip(completions, in_loss, strict=True)],
    )


def plain_rows(trainer, batch, turns):
    """The rollouts, in which the model wrote its turns: the first begins a completion and the last ends it."""
    rows = []
    for row, its in enumerate(turns):
        prompt, teacher_prompt, completion = (
            batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist()
            for name in ("prompt", "teacher_prompt", "completion")
        )
        lengths = [len(trainer.processing_class(turn, add_special_tokens=False)["input_ids"]) for turn in its]
        others = len(completion) - sum(lengths)
        by_student = [1] * lengths[0] + [0] * others + [1] * sum(lengths[1:])
        advantage = batch["advantages"][row].item()
        rows.append(Row(prompt, teacher_prompt, completion, by_student, advantage=advantage))
    return rows


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_trained_on(trainer, batch, turns, coefficient=0.0):
    """The loss, its gradient and the counts are those of the tokens that the model wrote: its turns of each row."""
    tokenizer = trainer.processing_class
    num_written = sum(len(tokenizer("".join(its), add_special_tokens=False)["input_ids"]) for its in turns)
    assert batch["num_divergence_tokens"] == num_written
    assert trainer._num_generated_tokens == num_written
    rows = plain_rows(trainer, batch, turns)
    method = Method(loss_type="dapo", policy_loss_coef=coefficient)
    expected_loss, expected_gradient = loss_and_gradient(trainer.model, trainer.model, rows, method)
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    expected = torch.cat([value.flatten() for value in expected_gradient.values()])
    torch.testing.assert_close(gradient(trainer.model, loss).double(), expected, rtol=1e-3, atol=1e-5)
    divergence, _ = loss_and_gradient(trainer.model, trainer.model, rows, Method(loss_type="dapo"))
    assert trainer.statistics["train"].take()["distillation_loss"] == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_what_a_tool_returns_is_read_and_not_learned(make_trainer, scripted, rows, tokenizer, coefficient):
    add.calls = []
    trainer = make_trainer(tools=[add], policy_loss_coef=coefficient)
    batch = trainer._generate_and_score_completions(rows)
    assert add.calls == [(3, 4)]
    read, written = read_and_written(batch, tokenizer)
    assert "<tool_response>\n7\n</tool_response>" in read[0]
    assert written == ["".join(its) for its in TURNS]
    check_trained_on(trainer, batch, TURNS, coefficient)


def test_a_run_counts_the_tokens_of_the_model_only(make_trainer, scripted, tokenizer):
    add.calls = []
    trainer = make_trainer(tools=[add])
    trainer.train()
    assert add.calls == 2 * [(3, 4)]
    written = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in [CALL, *ANSWERS])
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tools/call_frequency"] for entry in steps] == [0.25, 0.25]
    assert [entry["num_generated_tokens"] for entry in steps] == [written, 2 * written]
    assert [entry["completions/mean_length"] for entry in steps] == [written / 4, written / 4]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_passes_share_a_loss_by_what_the_model_wrote(make_trainer, scripted, rows, loss_type):
    """A pass with a long answer of a tool counts no more for it."""
    add.calls = []
    settings = {"tools": [add], "policy_loss_coef": 1.0, "loss_type": loss_type}
    trainer = make_trainer(**settings)
    batch = trainer._generate_and_score_completions(rows)
    expected = gradient(trainer.model, trainer._compute_loss(trainer.model, batch))
    cut = make_trainer(**settings, max_tokens_per_microbatch=1500)
    assert len(cut.loss.networks.passes({**batch, "student_mask": batch["divergence_mask"]})) > 1
    loss = cut._compute_loss(cut.model, batch)
    loss.backward()
    actual = torch.cat([p.grad.flatten() for p in cut.model.parameters() if p.grad is not None])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_rates_of_grpos_loss_count_what_the_model_wrote(make_trainer, scripted, rows, tokenizer):
    add.calls = []
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = make_trainer(tools=[add], beta=0.1, policy_loss_coef=1.0, peft_config=adapter)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # away from the reference model
            parameter.data.fill_(0.1)
    batch = trainer._generate_and_score_completions(rows)
    halves = [
        {
            name: value[part] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in batch.items()
        }
        for part in (slice(0, 2), slice(2, 4))
    ]

    def logged_kl(*micro_batches):
        trainer.statistics["train"].take()
        for micro_batch in micro_batches:
            trainer._compute_loss(trainer.model, micro_batch)
        return trainer.statistics["train"].take()["kl"]

    kls = [logged_kl(half) for half in halves]
    counts = [half["divergence_mask"].sum().item() for half in halves]
    assert kls[0] != pytest.approx(kls[1], rel=0.01)
    expected = sum(kl * count for kl, count in zip(kls, counts, strict=True)) / sum(counts)
    assert logged_kl(*halves) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_what_an_environment_says_in_a_rollout_function_is_not_learned(make_trainer, rows, tokenizer, coefficient):
    turns = [
        ("Let me look.", "[a wall]", "Left."),
        ("Hm", "[nothing]", " no"),
        ("Go", "[?!]", "!"),
        ("W", "[w w]", "W"),
    ]

    def rollout(prompts, trainer):
        encoded = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in three] for three in turns]
        return {
            "prompt_ids": trainer._tokenize_prompts(prompts)[0],
            "completion_ids": [[*first, *said, *last] for first, said, last in encoded],
            "env_mask": [[1] * len(first) + [0] * len(said) + [1] * len(last) for first, said, last in encoded],
            "logprobs": None,
        }

    trainer = make_trainer(rollout_func=rollout, policy_loss_coef=coefficient)
    batch = trainer._generate_and_score_completions(rows)
    read, written = read_and_written(batch, tokenizer)
    assert read == ["".join(three) for three in turns]
    assert written == [first + last for first, _, last in turns]
    check_trained_on(trainer, batch, [(first, last) for first, _, last in turns], coefficient)


def test_an_empty_rollout_of_an_environment_counts_as_no_token(make_trainer, rows):
    def rollout(prompts, trainer):
        return {
            "prompt_ids": trainer._tokenize_prompts(prompts)[0],
            "completion_ids": [[], [20, 21, 22], [23, 24], [25]],
            "env_mask": [[], [1, 0, 1], [0, 1], [1]],
            "logprobs": None,
        }

    trainer = make_trainer(rollout_func=rollout)
    batch = trainer._generate_and_score_completions(rows)
    assert batch["divergence_mask"].tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert batch["tool_mask"][0, 0] == 0
    assert batch["num_divergence_tokens"] == 4
    assert trainer._num_generated_tokens == 4


def test_an_environment_is_reset_asked_and_rewarded_and_its_answers_are_not_learned(
    make_trainer, scripted, rows, tokenizer
):
    made = []

    def factory():
        made.append(Abacus())
        return made[-1]

    trainer = make_trainer(environment_factory=factory, reward_funcs=None)
    batch = trainer._generate_and_score_completions(rows)
    assert [environment.calls for environment in made] == [[(3, 4)], [], [], []]
    read, written = read_and_written(batch, tokenizer)
    assert "<tool_response>\n7\n</tool_response>" in read[0]
    assert written == ["".join(its) for its in TURNS]
    for index, row in enumerate(rows):
        for side in ("prompt", "teacher_prompt"):
            prompt = tokenizer.decode(batch[f"{side}_ids"][index][batch[f"{side}_mask"][index].bool()])
            assert f"{row['prompt'][0]['content']} Your abacus has {len(row['answer'])} rods." in prompt
            assert '"name": "add"' in prompt
        assert row["solution"] in prompt
    assert trainer._generation.rewards.tolist() == [[1.0], [0.0], [0.0], [0.0]]
    check_trained_on(trainer, batch, TURNS)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/Abacus/mean"] == 0.25


def test_what_an_environment_says_of_a_rollout_reaches_the_teacher(make_trainer, scripted, rows, tokenizer):
    class Judge(Abacus):
        @property
        def feedback(self):
            return f"Beads moved: {len(self.calls)}."

    trainer = make_trainer(environment_factory=Judge, reward_funcs=None, privileged_context="feedback")
    batch = trainer._generate_and_score_completions(rows)
    for index, ids in enumerate(batch["teacher_prompt_ids"]):
        assert f"Beads moved: {int(index == 0)}." in tokenizer.decode(ids)


@pytest.mark.parametrize("is_list", [False, True])
def test_an_environment_that_brings_its_prompts_needs_no_data(make_trainer, tokenizer, is_list):
    class Riddle(Abacus):
        resets = 0

        def reset(self, **row):
            Riddle.resets += 1
            self.calls, self.number = [], Riddle.resets
            riddle = f"Riddle {self.number}."
            return [{"type": "text", "text": riddle}] if is_list else riddle

        @property
        def feedback(self):
            return f"The answer was {10 * self.number}."

    trainer = make_trainer(
        train_dataset=None,
        environment_factory=Riddle,
        reward_funcs=None,
        privileged_context="feedback",
        max_completion_length=4,
        num_generations=2,
    )
    batch = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(2)])
    for index in range(len(batch["prompt_ids"])):
        prompt, read = (tokenizer.decode(batch[f"{side}_ids"][index]) for side in ("prompt", "teacher_prompt"))
        assert f"Riddle {index + 1}." in prompt
        assert f"Riddle {index + 1}." in read
        assert f"The answer was {10 * (index + 1)}." in read
        assert "The answer was" not in prompt
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert trainer.state.log_history[0]["context_rate"] == 1.0


def test_without_data_and_environment_there_is_nothing_to_train_on(make_trainer):
    with pytest.raises(ValueError, match="train_dataset"):
        make_trainer(train_dataset=None, privileged_context="concise")


@pytest.mark.parametrize("settings", [{"policy_loss_coef": 1.0}, {"privileged_context": "peers"}])
def test_only_an_environment_that_has_rewards_stands_in_for_reward_functions(make_trainer, settings):
    make_trainer(environment_factory=Abacus, reward_funcs=None, **settings)
    with pytest.raises(ValueError, match=r"needs (`reward_funcs`|rewards)"):
        make_trainer(environment_factory=Silence, reward_funcs=None, **settings)


def test_the_teacher_is_told_of_the_tools_of_its_rows_environment(make_trainer, scripted, rows, tokenizer):
    names = ["abacus", "abacus", "silence", "silence"]
    trainer = make_trainer(environment_factory={"abacus": Abacus, "silence": Silence})
    batch = trainer._generate_and_score_completions(
        [{**row, "environment": name} for row, name in zip(rows, names, strict=True)]
    )
    for index, name in enumerate(names):
        for side in ("prompt", "teacher_prompt"):
            prompt = tokenizer.decode(batch[f"{side}_ids"][index][batch[f"{side}_mask"][index].bool()])
            assert ('"name": "add"' in prompt) == (name == "abacus")
            assert ('"name": "listen"' in prompt) == (name == "silence")
