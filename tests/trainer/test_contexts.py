"""Contexts that read rollouts, feedback or what the policy writes for them, in a trainer."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


def says_why(completions, log_extra, **kwargs):
    log_extra("feedback", [f"Why {index}?" if index % 2 == 0 else None for index in range(len(completions))])
    return [float(index % 2) for index in range(len(completions))]


def says_more(completions, log_extra, **kwargs):
    log_extra("feedback", ["More."] * len(completions))
    return [None] * len(completions)


async def says_later(completions, log_extra, **kwargs):
    log_extra("feedback", ["Later."] * len(completions))
    return [None] * len(completions)


def counts(completions, log_extra, **kwargs):
    log_extra("feedback", [len(completion[0]["content"]) for completion in completions])
    return [0.0] * len(completions)


def forgets(completions, log_extra, **kwargs):
    log_extra("feedback", ["One."])
    return [0.0] * len(completions)


@pytest.fixture
def make_trainer(tokenizer, model, dataset, training_args):
    def make(reward_funcs=None, train_dataset=dataset, model=model, **settings):
        return SelfDistillationTrainer(
            model,
            reward_funcs=reward_funcs,
            args=SelfDistillationConfig(**{**training_args, **settings}),
            train_dataset=train_dataset,
            processing_class=tokenizer,
        )

    return make


def teacher_prompts(trainer, rows):
    """What the teacher reads of each row, `None` without a context, and the batch."""
    batch = trainer._generate_and_score_completions(rows)
    prompts = [
        trainer.processing_class.decode(ids[mask.bool()]) if given else None
        for ids, mask, given in zip(
            batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], batch["has_context"], strict=True
        )
    ]
    return prompts, batch


def pairs(dataset):
    return [row for row in dataset.select(range(2)) for _ in range(2)]


FEEDBACK = {"privileged_context": "feedback", "context_kwargs": {"template": "{prompt} [{feedback}]"}}


def test_feedback_of_reward_functions_reaches_the_teacher(make_trainer, dataset):
    trainer = make_trainer([says_why, says_more, says_later], num_generations=2, **FEEDBACK)
    prompts, batch = teacher_prompts(trainer, pairs(dataset))

    for index, prompt in enumerate(prompts):
        first = f"Why {index}?\n\n" if index % 2 == 0 else ""
        assert f"[{first}More.\n\nLater.]" in prompt
    assert batch["rewards"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert list(trainer._logs["extra"]["feedback"])[1] == "More.\n\nLater."  # in the table of completions


def test_rollout_without_feedback_is_left_out(make_trainer, dataset):
    trainer = make_trainer([says_why], num_generations=2, **FEEDBACK)
    prompts, batch = teacher_prompts(trainer, pairs(dataset))

    assert [prompt is None for prompt in prompts] == [False, True, False, True]
    assert not batch["divergence_mask"][1].any()
    assert batch["divergence_mask"][0].any()


def test_static_feedback_of_the_dataset(make_trainer, dataset):
    rows = dataset.add_column("feedback", [f"Note {index}." for index in range(len(dataset))])
    trainer = make_trainer(train_dataset=rows, remove_unused_columns=True, **FEEDBACK)
    trainer.train()

    assert [entry["context_rate"] for entry in trainer.state.log_history if "context_rate" in entry] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("reward_func", "message"),
    [
        (counts, "The reward function `counts` gives int as feedback on completion 0 of its batch. Give text"),
        (forgets, "The reward function `forgets` gives feedback on 1 completions of 4"),
    ],
)
def test_feedback_that_is_no_text_for_each_completion(make_trainer, reward_func, message):
    with pytest.raises(ValueError, match=message):
        make_trainer([reward_func], num_generations=2).train()


def test_peers_and_streams(make_trainer, dataset):
    trainer = make_trainer([says_why], num_generations=4, privileged_context="peers", success_threshold=0.5)
    rows = [dataset[0]] * 4
    prompts, batch = teacher_prompts(trainer, rows)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)

    assert [
        f"attempt >>>\n{texts[3 if index == 1 else 1]}\n<<<" in prompt for index, prompt in enumerate(prompts)
    ] == [True] * 4
    assert batch["correct"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert batch["success_rate"].tolist() == [0.5] * 4
    # Whatever has a row for each rollout is shuffled and split with it
    trainer.train()
    for micro_batch in trainer._buffered_inputs:
        for name in ("rewards", "correct", "success_rate", "has_context"):
            assert micro_batch[name].shape == (4,)
        assert torch.equal(micro_batch["has_context"], micro_batch["divergence_mask"].any(1))


def test_threshold_is_of_the_weighted_sum(make_trainer, dataset):
    for threshold, correct in ((0.6, [0.0] * 4), (0.5, [0.0, 1.0] * 2)):
        trainer = make_trainer([says_why], num_generations=2, reward_weights=[0.5], success_threshold=threshold)
        assert trainer._generate_and_score_completions(pairs(dataset))["correct"].tolist() == correct


def test_without_rewards_nothing_is_known(make_trainer, dataset):
    batch = make_trainer()._generate_and_score_completions(list(dataset.select(range(4))))

    for name in ("rewards", "correct", "success_rate"):
        assert batch[name].isnan().all()
        assert batch[name].dtype == torch.float32


@pytest.mark.parametrize("name", ["plan", "reflection"])
def test_the_policy_writes_what_the_teacher_reads(make_trainer, dataset, name):
    settings = {"privileged_context": name, "context_kwargs": {"max_new_tokens": 5}, "num_generations": 2}
    trainer = make_trainer([says_why], **settings)
    asked, sample = [], trainer.sample

    def recorded(prompt_ids, sampling, stream):
        assert stream > 1  # evaluations have stream 1
        asked.append((prompt_ids, sampling, sample(prompt_ids, sampling, stream)))
        return asked[-1][2]

    trainer.sample = recorded
    prompts, batch = teacher_prompts(trainer, pairs(dataset))
    ((questions, sampling, answers),) = asked
    decode = trainer.processing_class.decode
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)

    assert (sampling.max_new_tokens, sampling.temperature) == (5, 1.0)
    assert max(map(len, answers)) <= 5
    by_prompt = name == "plan"
    assert len(questions) == (2 if by_prompt else 4)
    for index, prompt in enumerate(prompts):
        number = index // 2 if by_prompt else index
        written = decode(answers[number], skip_special_tokens=True).strip()
        assert (prompt is None) == (not written)
        assert prompt is None or f"{name} >>>\n{written}\n<<<" in prompt
        question, row = decode(questions[number]), dataset[index // 2]
        assert row["solution" if by_prompt else "answer"] in question
        assert by_prompt or texts[index] in question
    trainer.train()
    history = trainer.state.log_history[0]
    assert 0 < history["context_samples/mean_length"] <= 5
    assert 0 <= history["context_samples/truncated_rate"] <= 1
    assert math.isfinite(history["loss"])


def test_the_policy_is_asked_as_the_student_is(make_trainer, dataset, monkeypatch):
    trainer = make_trainer(
        privileged_context="plan",
        chat_template_kwargs={"enable_thinking": False},
        teacher_chat_template_kwargs={"enable_thinking": True},
    )
    asked = []
    monkeypatch.setattr(trainer, "sample", lambda prompt_ids, sampling, stream: asked.extend(prompt_ids) or prompt_ids)
    trainer._generate_and_score_completions(list(dataset.select(range(4))))
    closed = [trainer.processing_class.decode(ids).endswith("<think>\n\n</think>\n\n") for ids in asked]
    assert closed == [True] * 4


def test_no_other_context_samples(make_trainer, dataset, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "sample", None)
    trainer._generate_and_score_completions(list(dataset.select(range(4))))


def test_controls(make_trainer, dataset):
    rows = list(dataset.select(range(4)))
    solutions = [row["solution"] for row in dataset]
    for name in ("none", "other_solution", "partial_solution", "shuffled_solution"):
        prompts, batch = teacher_prompts(make_trainer(privileged_context=name), rows)
        for row, prompt in zip(rows, prompts, strict=True):
            if name == "shuffled_solution":
                assert prompt is None  # one sentence
                continue
            assert row["prompt"][0]["content"] in prompt
            assert f"\n{row['solution']}\n" not in prompt
            assert any(f"\n{solution}\n" in prompt for solution in solutions) == (name == "other_solution")
        if name == "none":
            assert torch.equal(batch["teacher_prompt_ids"], batch["prompt_ids"])


@pytest.mark.parametrize(
    ("settings", "reward_funcs", "message"),
    [
        ({"privileged_context": "peer"}, [says_why], "Did you mean `peers`"),
        (
            {"privileged_context": "peers", "context_kwargs": {"corect": 1}},
            [says_why],
            r"\(correct: int = 1, .*corect",
        ),
        ({"privileged_context": "peers"}, [says_why], "`num_generations` of at least 2, got 1"),
        ({"privileged_context": "peers", "num_generations": 2}, None, "needs rewards"),
        ({"privileged_context": "feedback"}, None, "needs something that gives feedback"),
        ({"privileged_context": "plan", "context_kwargs": {"max_new_tokens": 0}}, None, "must be at least 1, got 0"),
    ],
)
def test_refused_before_the_model_is_loaded(make_trainer, settings, reward_funcs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_funcs, model=Unloaded(), **settings)


class Unloaded:
    """A model of which nothing but its configuration may be asked."""

    class config:
        _name_or_path = name_or_path = "unloaded"


def test_prompt_that_leaves_no_room_to_answer_is_refused(make_trainer, dataset, model):
    long = Dataset.from_list([{**dataset[0], "solution": "much " * 30}] * 4)
    room = model.config.max_position_embeddings
    settings = {"privileged_context": "plan", "context_kwargs": {"max_new_tokens": room - 100}}
    with pytest.raises(
        ValueError, match="Row 0 of `train_dataset`: The prompt that PlanContext has the policy answer"
    ):
        make_trainer(train_dataset=long, **settings)
    trainer = make_trainer(train_dataset=long, overlong_teacher_prompt="skip", **settings)
    assert not trainer._generate_and_score_completions(list(long))["has_context"].any()


class Remembering:
    """Reads nothing, and keeps the prompts and rewards that it has seen."""

    columns = ()
    reads_rollouts = False

    def __init__(self):
        self.seen = []

    def teacher_messages(self, row, rollouts):
        assert rollouts is None
        return row["prompt"]

    def remember(self, groups):
        self.seen += [
            [row["prompt"][-1]["content"], [rollout.reward for rollout in rollouts]] for row, rollouts in groups
        ]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def by_length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def test_a_context_with_a_memory_sees_what_is_trained_on_and_goes_on_from_it(
    tokenizer, dataset, training_args, tmp_path
):
    settings = {"privileged_context": f"{__name__}.Remembering", "num_generations": 2, "save_strategy": "steps"}
    args = {**training_args, **settings, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}

    def make():
        return SelfDistillationTrainer(
            make_model(tokenizer),
            by_length,
            SelfDistillationConfig(**args),
            train_dataset=dataset,
            eval_dataset=dataset.select(range(4)),
            processing_class=tokenizer,
        )

    whole = make()
    whole.train()
    assert len(whole.context.seen) == 4  # two prompts a step, and none of an evaluation
    assert {len(rewards) for _, rewards in whole.context.seen} == {2}
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.context.seen == whole.context.seen
