"""Completions that are trained on in place of rollouts."""

import math
from dataclasses import fields
from functools import partial
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.sampling.sources import CompletionSource
from trl_opsd.signal import Advantage, Batch
from trl_opsd.trainer.batch import Generation
from trl_opsd.trainer.completing import Completing, Engines, encoded


ROW = {"prompt": [{"role": "user", "content": "What is 3 + 4?"}], "solution": "It is 7.", "answer": "7"}


@pytest.fixture
def make_trainer(tokenizer, model, dataset, training_args):
    def make(reward_funcs=None, **settings):
        return OPSDTrainer(
            model,
            reward_funcs=reward_funcs,
            args=OPSDConfig(**{**training_args, "gradient_accumulation_steps": 1, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


class Says:
    """An engine that answers prompts with a solution by "z", and others by "a"; what it is asked is kept."""

    def __init__(self, tokenizer):
        self.z, self.a = ([token, tokenizer.eos_token_id] for token in tokenizer.convert_tokens_to_ids(["z", "a"]))
        self.tokenizer, self.asked = tokenizer, []

    def __call__(self, trainer, prompt_ids, *args):
        texts = self.tokenizer.batch_decode(prompt_ids)
        self.asked.append(texts)
        return [list(self.z if "make" in text else self.a) for text in texts], None


@pytest.fixture
def says(tokenizer, monkeypatch):
    engine = Says(tokenizer)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args: engine(trainer, prompt_ids)
    )
    return engine


def odd_needs_z(prompts, completions, answer, log_metric, log_extra, **kwargs):
    """Rows with an odd answer are right with a "z", the one with answer 18 always, others never."""
    log_metric("graded", len(completions))
    log_extra("feedback", ["Try again."] * len(completions))
    texts = [completion[-1]["content"] for completion in completions]
    return [
        float((int(given) % 2 and text == "z") or given == "18") for given, text in zip(answer, texts, strict=True)
    ]


def half_of_them(completions, **kwargs):
    return [float(ord(completion[-1]["content"][:1] or "a") % 2) for completion in completions]


class TestHintedRetry:
    def test_right_retries_are_trained_on_as_answers_to_the_bare_prompt(self, make_trainer, dataset, says):
        trainer = make_trainer(odd_needs_z, completions="hinted_retry")
        rows = list(dataset.select(range(8)))
        answers = [int(row["answer"]) for row in rows]
        assert answers == [7, 19, 11, 117, 15, 17, 19, 11]
        rows[1]["answer"], rows[2]["answer"] = "18", "12"
        batch = trainer._generate_and_score_completions(rows)

        first, second = says.asked
        assert not any("make" in prompt for prompt in first)
        assert all("make" in prompt for prompt in second)
        assert len(second) == 7  # all but the one that was right at once
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(*(batch[f"completion_{n}"] for n in ("ids", "mask")), strict=True)
        ]
        assert ids == [says.a if index in (1, 2) else says.z for index in range(8)]
        prompts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        assert not any("make" in prompt for prompt in prompts)
        assert batch["correct"].tolist() == [float(index != 2) for index in range(8)]
        assert trainer._num_generated_tokens == 2 * (8 + 7)
        # Reward functions log what is trained on, once
        assert trainer._metrics["train"]["graded"] == [8.0]
        assert [row["prompt"] for row in trainer._generation.rows] == [row["prompt"] for row in rows]

        trainer.statistics["train"].reduce(trainer.accelerator.gather)
        logged = trainer.statistics["train"].take()
        assert logged["completions/off_policy_rate"] == 6 / 8
        assert logged["completions/retry_rate"] == 7 / 8
        assert logged["completions/retry_success_rate"] == pytest.approx(6 / 7)

    def test_the_threshold_is_that_of_success(self, make_trainer, dataset, says):
        trainer = make_trainer(odd_needs_z, completions="hinted_retry", success_threshold=0.0)
        trainer._generate_and_score_completions(list(dataset.select(range(4))))
        assert len(says.asked) == 1

    def test_trains(self, make_trainer):
        trainer = make_trainer(odd_needs_z, completions="hinted_retry")
        trainer.train()
        [*losses] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 2
        assert all(math.isfinite(loss) for loss in losses)
        assert "completions/retry_rate" in trainer.state.log_history[0]

    def test_evaluation_is_on_policy(self, make_trainer, dataset, says):
        trainer = make_trainer(odd_needs_z, completions="hinted_retry")
        trainer.model.eval()
        trainer._generate_and_score_completions(list(dataset.select(range(4))))
        assert len(says.asked) == 1

    @pytest.mark.usefixtures("deterministic")
    def test_resumed_equals_uninterrupted(self, make_trainer, model, tmp_path):
        initial = {name: value.clone() for name, value in model.state_dict().items()}
        settings = {"completions": "hinted_retry", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        found = []
        for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
            model.load_state_dict(initial)
            trainer = make_trainer(half_of_them, **settings)
            trainer.train(resume_from_checkpoint=resume)
            names = ("loss", "completions/retry_rate", "num_generated_tokens")
            found.append([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])
        assert found[0] == found[1]
        assert any(retries for _, retries, _ in found[0])


def test_the_teacher_is_sampled_without_vllm(make_trainer, dataset, monkeypatch):
    """What holds the policy is not asked, and asked again afterwards."""
    trainer = make_trainer(completions="teacher")
    trainer.use_vllm, found = True, []
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_single_turn",
        lambda trainer, ids, *args: (
            found.append((trainer.use_vllm, trainer.model_wrapped)),
            ([[5]] * len(ids), None),
        )[1],
    )
    policy = trainer.model_wrapped
    trainer.sampler.sample_teacher([[1], [2]], trainer.teacher)
    [(use_vllm, sampled)] = found
    assert not use_vllm
    assert sampled is not policy
    assert trainer.use_vllm
    assert trainer.model_wrapped is policy


@pytest.fixture
def refused(model_path, training_args, monkeypatch):
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loaded")
    )

    def check(match, reward_funcs=None, tools=None, **settings):
        settings = {**training_args, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **settings}
        with pytest.raises(ValueError, match=match):
            OPSDTrainer(
                model_path,
                reward_funcs=reward_funcs,
                args=OPSDConfig(**settings),
                train_dataset=Dataset.from_list([{**ROW, "completion": "7"}] * 4),
                tools=tools,
            )

    return check


class SilentContext:
    """It does not say whether it reads rollouts, so it does."""

    columns = ()

    def teacher_messages(self, row, rollouts):
        return row["prompt"]


def now() -> str:
    """Tell the time."""
    return "noon"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"completions": "hinted_rety"}, "Did you mean `hinted_retry`"),
        ({"completions": "datetime.date", "completions_kwargs": {"year": 1, "month": 1, "day": 1}}, "no subclass of"),
        ({"completions": "dataset", "completions_kwargs": {"lambda_": 0.5}}, "do not fit .*lmbda: float = 0.0"),
        ({"completions": "teacher", "completions_kwargs": {"lmbda": 1.0}}, "must be in"),
        ({"completions": "hinted_retry"}, "has to tell right from wrong. Pass `reward_funcs`"),
        ({"completions": "hinted_retry", "privileged_context": "none"}, "'none'` is none"),
        ({"completions": "hinted_retry", "privileged_context": "reflection"}, "neither reads rollouts nor samples"),
        ({"completions": "teacher", "privileged_context": "peers", "num_generations": 2}, "neither reads rollouts"),
        ({"completions": "teacher", "privileged_context": f"{__name__}.SilentContext"}, "neither reads rollouts"),
        ({"completions": "teacher", "divergence_support": "sampled_token"}, "replaces some of them"),
        ({"completions": "dataset", "tools": [now]}, "or drop `tools`"),
    ],
)
def test_refused_before_the_model_is_loaded(refused, settings, message):
    has_rewards = settings["completions"] == "hinted_retry" and "privileged_context" in settings
    has_rewards = has_rewards or settings.get("privileged_context") == "peers"
    refused(message, reward_funcs=odd_needs_z if has_rewards else None, **settings)


SERVED = {
    "teacher_server_base_url": "http://localhost:8000",
    "divergence_support": "teacher_top_k",
    "temperature": 1.0,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"completions": "teacher", "teacher": "external"}, "samples from weights that"),
        (
            {
                "completions": "dataset",
                "teacher": "live",
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_server_base_url": "http://localhost:8000",
            },
            "needs `completions='on_policy'`",
        ),
    ],
)
def test_teachers_on_servers(refused, settings, message, monkeypatch):
    monkeypatch.setattr("trl_opsd.trainer.preparation.check_vllm_installed", lambda: None)
    refused(message, **SERVED, **settings)


def test_what_vllm_alone_understands_of_generation(refused, monkeypatch):
    monkeypatch.setattr("trl_opsd.trainer.preparation.check_vllm_installed", lambda: None)
    settings = {"use_vllm": True, "vllm_mode": "colocate", "generation_kwargs": {"seed": 3}}
    refused("takes no `generation_kwargs", completions="teacher", **settings)


class Looks(Advantage):
    """Keeps what it is shown."""

    needs_scores = needs_reward = False
    seen: ClassVar[list[Batch]] = []

    def __call__(self, batch, scores):
        self.seen.append(batch)
        batch.log("looks/replaced", batch.replaced.sum(), torch.tensor(len(batch.replaced)))
        return batch.advantages


def test_parts_are_told_what_took_a_place_and_what_was_cut(make_trainer, says, monkeypatch):
    monkeypatch.setattr(Looks, "seen", [])
    says.a.pop()  # cut off before its end
    trainer = make_trainer(
        completions="teacher",
        completions_kwargs={"lmbda": 0.5},
        advantage=f"{__name__}.Looks",
        policy_loss_coef=1.0,
        max_steps=1,
    )
    trainer.train()
    [batch] = Looks.seen
    assert batch.replaced.equal(batch.completion_ids[:, :1] == says.z[0])
    assert batch.truncated.equal(~batch.replaced)
    assert batch.gather(batch.replaced).equal(batch.replaced)
    assert trainer.state.log_history[0]["looks/replaced"] == 0.5


def test_completion_ids_are_tensors_of_the_loss(make_trainer, dataset, says):
    """Rows that were replaced are in the loss as all others are."""
    trainer = make_trainer(odd_needs_z, completions="hinted_retry")
    batch = trainer._generate_and_score_completions(list(dataset.select(range(4))))
    assert torch.equal(batch["divergence_mask"], batch["completion_mask"].bool())


def test_what_makes_up_for_uneven_processes_is_not_counted():
    """A process that asks for less than others samples its first prompt besides, which is in no completion."""

    class Twice(CompletionSource):
        def __call__(self, prompts):
            assert prompts.sample([[1, 1]]) == [[1, 1]]
            assert prompts.sample_teacher([]) == []
            return prompts.rollouts()

    asked = []

    def sample(prompts):
        asked.append(prompts)
        return [list(ids) for ids in prompts], None

    used = {
        "sample": sample,
        "sample_teacher": lambda prompts: sample(prompts)[0],
        "process_index": 0,
        "num_generations": 1,
        "gather": lambda own: [*own, 3],
    }
    engines, generation = Engines(**dict.fromkeys(its.name for its in fields(Engines)) | used), Generation([ROW, ROW])
    completing = Completing(engines, generation, [[5, 6, 7], [8]], lambda: sample([[5, 6, 7], [8]]))
    assert completing(Twice(), seed=0, step=0).ids == [[5, 6, 7], [8]]
    assert asked[:2] == [[[1, 1], [5, 6, 7], [5, 6, 7]], [[5, 6, 7]] * 3]
    assert completing.num_sampled == 2 + 0 + 4
    assert generation.num_discarded_tokens == 2


def test_a_completion_without_tokens_is_refused(tokenizer):
    encode = partial(encoded, tokenizer, tokenizer.eos_token_id, 3)
    assert encode([{"role": "assistant", "content": "ab"}]) == [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]
    with pytest.raises(ValueError, match=r"The completion .. of the dataset has no tokens\. Correct the row"):
        encode([{"role": "assistant", "content": ""}])
    with pytest.raises(ValueError, match="never truncated"):
        encode("abc")
