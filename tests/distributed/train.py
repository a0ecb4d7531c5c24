"""Trains a tiny model on rollouts that are fixed, and writes losses and final weights. Started by test_ddp.py."""

import json
import os
import sys
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import make_model, make_tokenizer

from trl_opsd import OPSDCConfig, OPSDConfig, OPSDCTrainer, OPSDTrainer


def fixed_rollouts(prompts, trainer):
    completions = [f"It is {prompt[-1]['content'][8:]}" for prompt in prompts]
    ids = trainer.processing_class(completions, add_special_tokens=False)["input_ids"]
    ids = [row[: 3 + sum(row) % 5] for row in ids]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}


def count_passes(trainer, num_passes: list[int]) -> None:
    """Append how often the student is run for each micro-batch."""
    passes = trainer._passes

    def counting(inputs):
        cut = passes(inputs)
        num_passes.append(len(cut))
        return cut

    trainer._passes = counting


def main(method: str, weights: str, output_dir: Path) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config_class, trainer_class, settings = {
        "opsd": (OPSDConfig, OPSDTrainer, {"loss_type": "dapo"}),
        "opsdc": (OPSDCConfig, OPSDCTrainer, {"teacher_update_steps": 2}),
        # In the first and third step, one process would need one pass for its two rows, and the other two passes
        "opsd-budget": (OPSDConfig, OPSDTrainer, {"num_generations": 2, "max_tokens_per_microbatch": 896}),
    }[method]
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {7 * a}?"}], "solution": f"{a}+{7 * a}={8 * a}"}
        for a in range(1, 17)
    ]
    tokenizer = make_tokenizer()
    trainer = trainer_class(
        model=make_model(tokenizer),
        args=config_class(
            output_dir=str(output_dir / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            shuffle_dataset=False,
            per_device_train_batch_size=4 // world_size,
            gradient_accumulation_steps=1,
            max_completion_length=8,
            optim="sgd",  # Adam would blow up the rounding of gradients that are almost zero
            learning_rate=0.1,
            max_steps=4,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=fixed_rollouts,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if weights == "lora" else None,
    )
    num_passes = []
    count_passes(trainer, num_passes)
    trainer.train()
    num_passes = gather_object([num_passes])
    if trainer.accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = ("loss", "distillation_loss", "entropy", "num_generated_tokens", "teacher_prompts/max_length")
        result = {name: [entry[name] for entry in history] for name in names}
        result["num_passes"] = num_passes
        result["world"] = [trainer.accelerator.num_processes, trainer.accelerator.distributed_type.value]
        (output_dir / "result.json").write_text(json.dumps(result))
        state = {name: value.clone().contiguous() for name, value in trainer.model.state_dict().items()}
        save_file(state, output_dir / "weights.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
