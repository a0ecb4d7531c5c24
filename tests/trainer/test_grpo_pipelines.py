"""A GRPO pipeline in which two names are changed keeps its own shape: batches, steps, order of the data, optimizer."""

import re
from dataclasses import fields

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model, make_tokenizer
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
