"""Trains a tiny vision-language model on vLLM's rollouts, in this process or of a server. Run by test_images.py."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from environment import SETTINGS, save_result
from peft import LoraConfig
from tiny_vlm import FAMILIES, make_image, make_vlm
from train import record_batches, record_calls, record_loads
from train_on_server import FileClient
from trl.generation import vllm_generation

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
TARGETS = {"lora": "all-linear", "alone": r".*language_model.*_proj"}


def save_model(folder: Path, family: str) -> None:
    """
    Save a model that samples no token of an image, which whoever reads its rollouts would take for one. vLLM's
    attention on the CPU needs heads of at least 32.
    """
    model, processor = make_vlm(family, hidden_size=64, head_dim=32)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embeddings
    of_images = processor.tokenizer.convert_tokens_to_ids(FAMILIES[family].special_tokens)
    with torch.no_grad():
        # Large in every state, and asked by the head for these tokens alone
        embeddings[:, 0], head[:, 0] = 10.0, 0.0
        head[of_images] = 0.0
        head[of_images, 0] = -10.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def rows() -> Dataset:
    """With no image, one and two, of several sizes. In each step, the second of two processes has none."""
    numbers = (0, 1, 2, 1, 0, 0, 0, 0) if SEVERAL else (0, 1, 2, 0, 1, 2, 0, 1)
    images = [[make_image(row + seed, (20 + row, 28)) for seed in range(its)] for row, its in enumerate(numbers)]
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


def main(base: str, output_dir: str, job: dict) -> dict:
    is_here = "url" not in job
    if is_here:
        vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
        engine = {"vllm_mode": "colocate", "vllm_max_model_length": 1024, "vllm_gpu_memory_utilization": 0.1}
    else:
        vllm_generation.VLLMClient = FileClient
        engine = {"vllm_mode": "server", "vllm_server_base_url": job["url"]}
    trainer = SelfDistillationTrainer(
        base,
        args=SelfDistillationConfig(
            output_dir=output_dir,
            **SETTINGS,
            shuffle_dataset=not SEVERAL,
            use_vllm=True,
            vllm_lora_sync="adapter" if job["weights"] == "alone" else "auto",
            **engine,
        ),
        train_dataset=rows(),
        peft_config=LoraConfig(r=8, target_modules=TARGETS[job["weights"]]) if job["weights"] in TARGETS else None,
    )
    batches = record_batches(trainer)
    llm = trainer.vllm_generation.llm if is_here else None
    calls, loads = (record_calls(llm), record_loads(llm)) if is_here else ([], [])
    trainer.train()
    name = "sampling/sampling_logp_difference/max"
    return {
        "differences": [entry[name] for entry in trainer.state.log_history if name in entry],
        "sampled": gather_object([call["completions"] for call in calls] if is_here else FileClient.completions),
        "trained": gather_object([batch["completions"] for batch in batches]),
        "loads": gather_object(loads),
        "sent": trainer.sampler.sent,
        "world": trainer.accelerator.num_processes,
    }


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save_model(Path(sys.argv[2]), sys.argv[3])
        save_result(None)
    else:
        save_result(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
