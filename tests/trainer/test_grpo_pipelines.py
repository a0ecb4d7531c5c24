"""A GRPO pipeline in which two names are changed keeps its own shape: batches, steps, order of the data, optimizer."""

import re
from dataclasses import fields

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig
from tiny import make_model, make_tokenizer
from transformers import Qwen3ForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import (
    OPSDCConfig,
    OPSDConfig,
    OPSDCTrainer,
    OPSDTrainer,
    SelfDistillationConfig,
    SelfDistillationTrainer,
)
from trl_opsd.methods import TRAINABLE, config_class


NAMES = {
    "opsd": (OPSDConfig, OPSDTrainer),
    "opsdc": (OPSDCConfig, OPSDCTrainer),
    "distill": (SelfDistillationConfig, SelfDistillationTrainer),
}

# Arguments of the configuration, and of the trainer
PIPELINES = {
    "epochs": ({"num_train_epochs": 1, "num_generations": 4}, {}),
    "three rollouts": ({"per_device_train_batch_size": 3, "num_generations": 3, "num_train_epochs": 1}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "num_generations": 8, "max_steps": 2}, {}),
    "buffer": ({"steps_per_generation": 2, "num_generations": 4, "max_steps": 3}, {}),
    "iterations": ({"num_iterations": 2, "num_generations": 4, "max_steps": 3}, {}),
    "generation batch": ({"generation_batch_size": 16, "num_generations": 2, "max_steps": 2}, {}),
    "unshuffled": ({"shuffle_dataset": False, "num_generations": 2, "max_steps": 2}, {}),
    "decay": ({"weight_decay": 0.1, "num_generations": 2, "max_steps": 1, "lr_scheduler_type": "cosine"}, {}),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 1, "num_generations": 2, "max_steps": 2}, {}),
    "adapter": ({"num_generations": 2, "max_steps": 1}, {"peft_config": LoraConfig(target_modules="all-linear")}),
}


def run(config_class, trainer_class, settings, extra, rows, output_dir):
    """Trains, and tells the prompts of every batch in order, and the finished trainer."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append([prompt[-1]["content"] for prompt in prompts])
        return [float(len(str(completion))) for completion in completions]

    tokenizer = make_tokenizer()
    args = config_class(
        output_dir=output_dir,
        max_completion_length=4,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=make_model(tokenizer).device.type == "cpu",
        disable_tqdm=True,
        **settings,
    )
    if args.eval_strategy != "no":
        extra = {**extra, "eval_dataset": rows.select(range(8))}
    trainer = trainer_class(
        model=make_model(tokenizer),
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        **extra,
    )
    trainer.train()
    return seen, trainer


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("method", NAMES)
def test_two_names_are_changed(pipeline, method, dataset, tmp_path):
    settings, extra = PIPELINES[pipeline]
    rows = Dataset.from_list([*dataset, {**dataset[0], "prompt": [{"role": "user", "content": "A last one."}]}])
    theirs, grpo = run(GRPOConfig, GRPOTrainer, settings, extra, rows, str(tmp_path / "grpo"))
    ours, trainer = run(*NAMES[method], settings, extra, rows, str(tmp_path / "ours"))

    assert ours == theirs
    assert trainer.state.global_step == grpo.state.global_step
    assert trainer.state.epoch == grpo.state.epoch
    assert trainer.state.num_input_tokens_seen > 0
    for group, other in zip(trainer.optimizer.param_groups, grpo.optimizer.param_groups, strict=True):
        assert group["weight_decay"] == other["weight_decay"]
    shape = [
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "generation_batch_size",
        "steps_per_generation",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
    ]
    assert [getattr(trainer.args, name) for name in shape] == [getattr(grpo.args, name) for name in shape]


@pytest.mark.parametrize("method", TRAINABLE)
def test_defaults_that_are_a_pipelines_own(method):
    """No method decides over batches, the length of training, the optimizer, logging or checkpoints."""
    own = "batch_size|accumulation|steps|epochs|decay|optim|adam|seed|fp16|bf16|checkpointing|save|log|eval_"
    ours = {field.name: field.default for field in fields(config_class(method))}
    for field in fields(GRPOConfig):
        if field.name != "warmup_steps" and re.search(own, field.name):
            assert ours[field.name] == field.default, field.name


@pytest.mark.parametrize("method", NAMES)
def test_defaults_train_seventeen_rows_for_their_epochs(method, dataset, tmp_path):
    rows = Dataset.from_list([*dataset, dataset[0]])
    assert len(rows) == 17
    seen, trainer = run(*NAMES[method], {}, {}, rows, str(tmp_path))
    assert trainer.state.epoch == 3
    assert trainer.state.global_step == 3 * (17 // 8)
    assert [len(batch) for batch in seen] == [8] * 6


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


async def letters(completions, **kwargs):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def seldom(prompts, **kwargs):
    """Applies to every other prompt."""
    return [None if len(prompt[0]["content"]) % 2 else 1.0 for prompt in prompts]


def never(completions, **kwargs):
    return [None] * len(completions)


# Arguments of the configuration, and reward functions
ASKED = {
    "one reward": ({}, [length]),
    "weighted": ({"reward_weights": [0.7, 0.3]}, [length, letters]),
    "some apply": ({}, [length, seldom, never]),
    "none applies": ({}, [never]),
    "a reward model": ({}, [length, "model"]),
    "normalised each": ({"multi_objective_aggregation": "normalize_then_sum"}, [length, letters]),
    "scaled by the batch": ({"scale_rewards": "batch"}, [length]),
    "not scaled": ({"scale_rewards": "none"}, [length]),
    "moving reference": ({"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}, [length]),
    "unbiased penalty": ({"beta": 0.1, "use_bias_correction_kl": True, "num_iterations": 2}, [length]),
    "adaptive entropy": ({"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 9.0}, [length]),
    "sequence ratios": ({"num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"}, [length]),
    "truncated": ({"mask_truncated_completions": True}, [length]),
    "sampling": ({"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1}, [length]),
    "beams": ({"generation_kwargs": {"num_beams": 2, "length_penalty": -0.1}}, [length]),
    "fp32 head": ({"cast_lm_head_to_fp32": True}, [length]),
}


def optimise(config_class, trainer_class, settings, rewards, model_path, rows, output_dir):
    """Trains for three steps, and tells the steps' logs and the trained weights."""
    tokenizer = make_tokenizer()
    judge = Qwen3ForSequenceClassification(make_model(tokenizer, seed=1).config).to(make_model(tokenizer).device)
    given = [judge if reward == "model" else reward for reward in rewards]
    args = config_class(
        output_dir=output_dir,
        max_completion_length=6,
        num_generations=4,
        max_steps=3,
        learning_rate=1e-2,
        adam_epsilon=1e-4,  # by 1e-8, a gradient that is nearly 0 moves a weight as it is rounded
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=judge.device.type == "cpu",
        disable_tqdm=True,
        **settings,
    )
    processors = [tokenizer if reward == "model" else None for reward in rewards]
    trainer = trainer_class(
        model=model_path,  # the reference model of GRPO is loaded by its name
        reward_funcs=given,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_processing_classes=processors,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_left_without_the_divergence_is_grpo(asked, dataset, model_path, tmp_path):
    settings, rewards = ASKED[asked]
    alone = {"privileged_context": "none", "divergence_coef": 0.0, "policy_loss_coef": 1.0}
    torch.manual_seed(1)
    theirs = optimise(GRPOConfig, GRPOTrainer, settings, rewards, model_path, dataset, str(tmp_path / "grpo"))
    torch.manual_seed(1)
    ours = optimise(
        SelfDistillationConfig,
        SelfDistillationTrainer,
        {"loss_type": "dapo", **alone, **settings},
        rewards,
        model_path,
        dataset,
        str(tmp_path / "ours"),
    )

    logs = zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True)
    for ours_logged, logged in logs:
        names = [name for name in logged if name.startswith(("reward", "completions/", "loss", "kl", "entropy_coef"))]
        assert len(names) > (5 if "num_tokens" in logged else 0)  # fewer where rollouts are taken up again
        for name in names:
            if logged[name] is None:  # no number
                assert ours_logged[name] is None, name
            else:
                assert ours_logged[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    start = dict(make_model(make_tokenizer()).named_parameters())
    trained = dict(ours.model.named_parameters())
    for name, weight in theirs.model.named_parameters():
        torch.testing.assert_close(
            trained[name], weight, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = any(not torch.equal(start[name], weight) for name, weight in trained.items())
    assert moved == (rewards != [never])


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1 + 1?"}], "eval_dataset has no column `solution`"),
        ([{"prompt": "1 + 1?", "solution": "2."}, {"prompt": "2 + 2?", "solution": " "}], "eval_dataset.*1.*solution"),
    ],
)
def test_rows_handed_to_an_evaluation_are_checked(rows, message, is_stream, dataset, model, tokenizer, training_args):
    args = OPSDConfig(**training_args)
    trainer = OPSDTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    data = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(data.to_iterable_dataset() if is_stream else data)


@pytest.mark.parametrize("given_to", ["trainer", "evaluate"])
@pytest.mark.parametrize("shape", ["rows", "stream", "DatasetDict", "IterableDatasetDict", "dict", "dict of streams"])
def test_evaluates_on_every_shape_of_data(shape, given_to, dataset, model, tokenizer, training_args):
    data = dataset.select(range(4))
    if shape in ("stream", "IterableDatasetDict", "dict of streams"):
        data = data.to_iterable_dataset()
    kind = {"DatasetDict": DatasetDict, "IterableDatasetDict": IterableDatasetDict, "rows": None, "stream": None}
    kind = kind.get(shape, dict)
    data = data if kind is None else kind({"first": data, "second": data})
    trainer = OPSDTrainer(
        model=model,
        args=OPSDConfig(**{**training_args, "max_steps": 1, "eval_strategy": "steps", "eval_on_start": True}),
        train_dataset=dataset,
        eval_dataset=data if given_to == "trainer" else dataset.select(range(1)),
        processing_class=tokenizer,
    )
    if given_to == "trainer":
        trainer.train()
        metrics = {name for entry in trainer.state.log_history for name in entry}
    else:
        metrics = trainer.evaluate(eval_dataset=data)
    names = ["eval_loss"] if kind is None else ["eval_first_loss", "eval_second_loss"]
    assert set(names) <= set(metrics)
