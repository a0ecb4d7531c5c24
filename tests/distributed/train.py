"""Trains a tiny model on rollouts that are fixed, once per job, and writes what came of it. Started by launch.py."""

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import state as accelerate_state
from accelerate.utils import gather_object
from datasets import Dataset
from flash_attention import FlashAttention, use_flash_attention
from leave import leave
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tiny import make_model, make_tokenizer
from tiny_vlm import make_image, make_vlm
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.distributed import DistributedBackend
from trl.trainer import grpo_trainer
from trl.trainer.utils import shuffle_sequence_dict

from trl_opsd import SelfDistillationTrainer
from trl_opsd.methods import config_class
from trl_opsd.scripts.train import find_checkpoint
from trl_opsd.serving.adapter import adapter_weights, obstacle
from trl_opsd.serving.merged_weights import merged_weights
from trl_opsd.teacher import EMA
from trl_opsd.teacher.sharding import part_of, whole_value


def fixed_rollouts(prompts, trainer):
    completions = [f"It is {text_of(prompt[-1])[8:]}" for prompt in prompts]
    ids = trainer._tokenizer(completions, add_special_tokens=False)["input_ids"]
    # With rewards, the rollouts of a prompt differ, or their advantages would cancel out
    context = trainer.args.privileged_context
    apart = 2 if trainer.args.policy_loss_coef or context == "peers" or "." in context else 0
    ids = [row[: 3 + (sum(row) + index % 2 * apart) % 5] for index, row in enumerate(ids)]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def every_other(completions, **kwargs):
    """Of the two rollouts of a prompt, the second is better."""
    return [float(index % 2) for index in range(len(completions))]


def of_odd_problems(prompts, completions, **kwargs):
    """As above, and none of the others, whose rollouts all lie on one process."""
    return [
        rewarded * (problem(prompt) % 2) for rewarded, prompt in zip(every_other(completions), prompts, strict=True)
    ]


def problem(prompt):
    """Number of a row, from 1."""
    return int(text_of(prompt[0]).split()[2])


def relabel_cpu_world() -> None:
    """Have FSDP2 shard over CPU processes, which accelerate would run under DDP without a word."""
    initialise = accelerate_state.PartialState.__init__

    def relabelled(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.__dict__.get("distributed_type") == accelerate_state.DistributedType.MULTI_CPU:
            self.distributed_type = accelerate_state.DistributedType.MULTI_GPU

    accelerate_state.PartialState.__init__ = relabelled


def skip_unused_op() -> None:
    """Keep DeepSpeed from compiling, for a minute, an op for CPUs that inference alone would use."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def shard_small_weights(args: TrainingArguments) -> None:
    """Have ZeRO-3 shard weights that it would keep whole, as small as they are."""
    if args.deepspeed_plugin is not None:
        zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0


def reward_of(method: str, args: TrainingArguments):
    if args.completions == "hinted_retry" or method == "brts":
        return right_at_last()
    if (args.privileged_context == "peers" and method != "opsd") or "." in args.privileged_context:
        return of_odd_problems
    if "correct_only" in (args.token_weights or {}) or args.privileged_context == "playbook":
        return of_odd_problems
    return every_other if args.policy_loss_coef else None


def right_at_last():
    seen = set()

    def reward(prompts, **kwargs):
        """The rows of the first of two processes are right, those of the second when they are asked for again."""
        numbers = [problem(prompt) for prompt in prompts]
        rewards = [float(number % 4 in (1, 2) or number in seen) for number in numbers]
        seen.update(numbers)
        return rewards

    return reward


def images(number: int, least: int) -> dict[str, list[Any]]:
    """Of the rows of a step, one of either process, both of the second, none of the first: any but the same."""
    students, teachers = [(0, 2, 1, 0), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 1, 2)][number // 4], (0, 1, 0, 0)
    made = {"images": max(students[number % 4], least), "teacher_images": teachers[number % 4]}
    return {
        name: [make_image(10 * number + seed, (20, 28 - 7 * seed)) for seed in range(count)]
        for name, count in made.items()
    }


def make_trainer(job: dict[str, Any], output_dir: Path):
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_micro_batches = job["settings"].get("gradient_accumulation_steps", 1)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {7 * a}?"}],
            "solution": f"{a}+{7 * a}={8 * a}",
            "answer": str(8 * a),
            "teacher": "maths" if (a - 1) // 2 % 2 else "code",  # one for each of two processes
        }
        for a in range(1, 17)
    ]
    tokenizer, vlm = make_tokenizer(), None
    if job["images"]:
        unset_hf_deepspeed_config()  # of the job before, under which its parts would be made without weights
        vlm, tokenizer = make_vlm("qwen2_5_vl")
        least = int(job["images"] == "all")
        rows = [{**row, **images(number, least)} for number, row in enumerate(rows)]
    settings = {
        "output_dir": str(output_dir / "run"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "shuffle_dataset": False,
        "per_device_train_batch_size": job["rows"] // world_size // num_micro_batches,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "optim": "sgd",  # Adam would blow up the rounding of gradients that are almost zero
        "learning_rate": 0.1,
        "max_steps": 4,
        **job["settings"],
    }
    evaluation = settings.pop("evaluation", None)
    args = config_class(job["method"])(**settings)
    shard_small_weights(args)
    grpo_trainer.shuffle_sequence_dict = (
        shuffle_sequence_dict if job["shuffle"] else partial(deal, num_micro_batches=args.steps_per_generation)
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = job["model"] or vlm or make_model(tokenizer)
    trainer = SelfDistillationTrainer(
        model=use_flash_attention(model) if job["packed"] else model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=fixed_rollouts if args.completions == "on_policy" else None,
        reward_funcs=reward_of(job["method"], args),
        peft_config=lora if job["weights"] == "lora" else None,
    )
    if evaluation is not None:
        from trl_opsd.eval.in_training import BenchmarkCallback

        trainer.add_callback(BenchmarkCallback(trainer, **evaluation))
    return trainer


def deal(batch: dict[str, Any], num_micro_batches: int) -> dict[str, Any]:
    """Order the rows of a generation such that micro-batches hold the same rows on one process and on two."""
    num_processes = 2 // int(os.environ.get("WORLD_SIZE", "1"))
    order = torch.arange(len(batch["prompt_ids"])).view(num_processes, num_micro_batches, -1).transpose(0, 1).flatten()
    return {name: value[order] if getattr(value, "ndim", 0) else value for name, value in batch.items()}


def count_passes(trainer, num_passes: list[int], output_dir: Path) -> None:
    """Append how often the student is run for each micro-batch, and write down after which step the first came."""
    passes = trainer.loss.networks.passes

    def counting(inputs):
        if not num_passes:
            (output_dir / "first_step").write_text(str(trainer.state.global_step))
        cut = passes(inputs)
        num_passes.append(len(cut))
        return cut

    trainer.loss.networks.passes = counting


def follow_average(trainer) -> dict[str, torch.Tensor]:
    """What an EMA teacher has to hold: the same average in fp64, of whole weights."""
    teacher, average = trainer.teacher, {}
    if not isinstance(getattr(teacher, "rule", None), EMA):
        return average
    move = teacher.on_step_end

    def following(step):
        if not average:
            average.update({name: whole_value(own, part_of(own)).double() for name, _, own in teacher.copy.pairs()})
        move(step)
        for name, student, _ in teacher.copy.pairs():
            average[name].lerp_(whole_value(student, part_of(student)).double(), teacher.rule.rate)

    teacher.on_step_end = following
    return average


def share_held(model: torch.nn.Module) -> float:
    """Share of a model's entries this process holds."""
    whole = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()]
    held = [part_of(parameter).numel() for parameter in model.parameters()]
    # A value that ZeRO-3 has gathered lies beside the part, and is empty once it is released
    gathered = [parameter.numel() for parameter in model.parameters() if hasattr(parameter, "ds_tensor")]
    return sum(held + gathered) / sum(whole)


def share_updated(trainer) -> float:
    """Share of the trained entries this process's optimizer updates."""
    optimizer = trainer.optimizer.optimizer
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hands these over one at a time
    if parts is None:
        parts = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    whole = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained]
    return sum(part_of(part).numel() for part in parts) / sum(whole)


def deepspeed_in_use(trainer) -> list[Any] | None:
    """ZeRO's stage, the optimizer it runs, and whether parameters are offloaded."""
    if not trainer.is_deepspeed_enabled:
        return None
    engine = trainer.model_wrapped
    offloads = getattr(engine.optimizer, "offload_param", False)
    return [engine.zero_optimization_stage(), type(engine.optimizer.optimizer).__name__, offloads]


def merged_for_vllm(trainer, student: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What vLLM would be sent of an adapter, merged and alone, which must leave the weights as they are."""
    if not isinstance(student, PeftModel):
        return {}
    before = [part_of(parameter).clone() for parameter in student.parameters()]
    gather = DistributedBackend(trainer.accelerator).gather_params
    merged = {name: value.cpu().clone() for name, value in merged_weights(student, gather)}
    assert obstacle(student) is None
    merged |= adapter_weights(student, gather)
    for part, parameter in zip(before, student.parameters(), strict=True):
        assert torch.equal(part, part_of(parameter))
    return merged


def report(trainer, num_passes: list[int], average: dict[str, torch.Tensor], output_dir: Path) -> None:
    accelerator = trainer.accelerator
    student = accelerator.unwrap_model(trainer.model)
    updated = share_updated(trainer)  # here, because the teacher may switch the trained adapter off
    one = next(iter(trainer.teacher.members.values()), trainer.teacher)
    with one.weights(trainer.model_wrapped) as module:
        teacher = accelerator.unwrap_model(module)
        shares = gather_object([[share_held(student), share_held(teacher), updated]])
        num_units = sum(isinstance(module, FSDPModule) for module in teacher.modules())
    num_passes = gather_object([num_passes])
    merged = merged_for_vllm(trainer, student)
    state = accelerator.get_state_dict(trainer.model_wrapped)
    trainer.teacher.save(output_dir, accelerator.is_main_process)
    if not accelerator.is_main_process:
        return
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "distillation_loss", "likelihood_loss", "entropy", "num_generated_tokens", "context_rate")
    names += ("teacher_prompts/max_length", "completions/retry_rate", "completions/off_policy_rate", "preference/loss")
    names += ("teachers/maths/distillation_loss", "teachers/code/distillation_loss", "teachers/code/token_rate")
    names += ("replaced_distillation_loss", "completions/tier_2_rate", "e_step/loss")
    result = {name: [entry[name] for entry in history if name in entry] for name in names}
    result["benchmarks"] = [
        {name: value for name, value in entry.items() if name.startswith(("eval_playground", "step"))}
        for entry in trainer.state.log_history
        if "eval_playground_opsdc/mean_tokens" in entry
    ]
    result["num_passes"] = num_passes
    result["world"] = [accelerator.num_processes, accelerator.distributed_type.value]
    result["deepspeed"] = deepspeed_in_use(trainer)
    result["shares"] = shares
    result["num_units"] = num_units
    (output_dir / "result.json").write_text(json.dumps(result))
    for name, values in {"student": state, "merged": merged, "average": average}.items():
        save_file(
            {key: value.clone().contiguous() for key, value in values.items()}, output_dir / f"{name}.safetensors"
        )


def checkpoint_of(resume: str | None, output_dir: Path) -> str | None:
    if resume in ("auto", None):
        return find_checkpoint(resume, str(output_dir / "run"))
    return str(output_dir.parent / resume)


def run(job: dict[str, Any], output_dir: Path) -> None:
    output_dir.mkdir(exist_ok=True)
    num_passes: list[int] = []
    with (
        patch.dict(os.environ, job["environment"]),
        pytest.MonkeyPatch.context() as monkeypatch,
    ):  # not for the next job
        if job["packed"]:
            FlashAttention().install(monkeypatch)
        trainer = make_trainer(job, output_dir)
        count_passes(trainer, num_passes, output_dir)
        average = follow_average(trainer)
        trainer.train(resume_from_checkpoint=checkpoint_of(job["resume"], output_dir))
        report(trainer, num_passes, average, output_dir)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        relabel_cpu_world()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        skip_unused_op()
    gc.freeze()  # the libraries, which the collection of every job would pass over
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        run(job, folder / (job["name"] or str(number)))
    leave()
