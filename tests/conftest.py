"""Tiny, offline stand-ins for a model, its tokenizer and its data. The models are random; everything else is real."""

import os


os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when triton is imported

import pytest
from datasets import Dataset
from hypothesis import settings
from tiny import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM


# The same examples on every machine, however slow it is
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer) -> Qwen3ForCausalLM:
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    """Folder with a tiny model and its tokenizer, for code that loads by name."""
    path = tmp_path_factory.mktemp("tiny-qwen3")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def dataset() -> Dataset:
    """Conversational rows of different lengths, with a solution and an answer."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {b}?"}],
            "solution": f"{a} and {b} " + "make " * (1 + a % 3) + str(a + b),
            "answer": str(a + b),
        }
        for a, b in zip(range(3, 19), [4, 15, 6, 111, 8, 9, 10, 1, 2, 3, 41, 5, 66, 7, 8, 9], strict=True)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def training_args(tmp_path) -> dict:
    """Arguments of a short, quiet run on the CPU."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 2,
    }
