"""Trains a tiny vision-language model on vLLM's rollouts, in this process. Run by test_colocate.py."""

import sys
from functools import partial
from pathlib import Path

from datasets import Dataset
from environment import SETTINGS, save_result
from peft import LoraConfig
from tiny_vlm import make_image, make_vlm
from train import record_batches, record_calls, record_loads
from trl.generation import vllm_generation

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


def save_model(folder: Path) -> None:
    """As of text: vLLM's attention on the CPU needs heads of at least 32."""
    model, processor = make_vlm("qwen2_5_vl", hidden_size=64, head_dim=32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def rows() -> Dataset:
    """With no image, one and two, of several sizes."""
    images = [[make_image(row + seed, (20 + row, 28)) for seed in range(row % 3)] for row in range(8)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {row}?"}],
                "images": its,
                "teacher_images": [make_image(90 + row)] * (row % 2),
                "solution": f"It is {row}.",
            }
            for row, its in enumerate(images)
        ]
    )


def main(folder: Path, weights: str) -> dict:
    save_model(folder / "base")
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 1024}
    trainer = SelfDistillationTrainer(
        str(folder / "base"),
        args=SelfDistillationConfig(
            output_dir=str(folder / "run"), **SETTINGS, **engine, vllm_gpu_memory_utilization=0.1
        ),
        train_dataset=rows(),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if weights == "lora" else None,
    )
    llm = trainer.vllm_generation.llm
    calls, loads, batches = record_calls(llm), record_loads(llm), record_batches(trainer)
    trainer.train()
    name = "sampling/sampling_logp_difference/max"
    result = {name: [entry[name] for entry in trainer.state.log_history if name in entry], "changed": []}
    return result | {"calls": calls, "loads": loads, "batches": batches}


if __name__ == "__main__":
    save_result(main(Path(sys.argv[1]), sys.argv[2]))
