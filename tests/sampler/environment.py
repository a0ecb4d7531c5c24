"""What processes with vLLM's CPU build need, and what all of these tests train."""

import os
from pathlib import Path

import torch
from datasets import Dataset
from tiny import make_model, make_tokenizer


TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
}
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 16,
    "learning_rate": 0.05,
    "max_steps": 4,
}


def save_model(folder: Path, dtype: str = "float32", **overrides) -> None:
    """Save a tiny random model. vLLM's attention on the CPU needs heads of at least 32."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, **{"hidden_size": 64, "head_dim": 32, "intermediate_size": 64, **overrides})
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dataset() -> Dataset:
    rows = [{"prompt": f"What is {a} + {7 * a}?", "solution": f"{a}+{7 * a}={8 * a}"} for a in range(1, 17)]
    return Dataset.from_list(rows)
