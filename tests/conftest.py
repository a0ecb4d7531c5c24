"""The device of the tests, and tiny, offline stand-ins for a model, its tokenizer and its data."""

import gc
import importlib.metadata
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec


# Read when Triton is imported, which transformers does. The processes of a parallel run inherit it
os.environ.setdefault("TRITON_INTERPRET", "0" if {"cuda", "--device=cuda"} & set(sys.argv) else "1")

import numpy as np
import pytest
import torch
from browser import Browser, browsers
from datasets import Dataset
from hypothesis import HealthCheck, settings
from placement import Placement
from tiny import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM


# The same examples on every machine, however slow it is
settings.register_profile(
    "reproducible", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("reproducible")

# accelerate reads and parses that of the same packages in every pass through a model
importlib.metadata.metadata = cache(importlib.metadata.metadata)


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the tests of a single process run: cpu or cuda"
    )


def pytest_configure(config):
    if config.getoption("device") != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda needs a GPU that PyTorch can use, and there is none.")
        placements = ExitStack()
        placements.enter_context(Placement(torch.device("cuda")))
        config.add_cleanup(placements.close)


def pytest_collection_modifyitems(config, items):
    for item in items:
        packages = [package for marker in item.iter_markers("needs") for package in marker.args]
        if absent := [package for package in packages if find_spec(package) is None]:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(absent)}"))
        if config.getoption("device") == "cpu":
            continue
        if (marker := item.get_closest_marker("cpu")) is not None:
            item.add_marker(pytest.mark.skip(reason=f"for CPUs: {marker.args[0]}"))
        elif item.get_closest_marker("distributed") is not None:
            item.add_marker(pytest.mark.skip(reason="for CPUs: several processes"))


def pytest_collection_finish():
    """Every training collects garbage: have it pass over the libraries and the tests, which stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    """Where the tests run."""
    return torch.empty(0, device=pytestconfig.getoption("device")).device


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """A test draws the same numbers, whichever tests its process has run before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _patience():
    """A busy machine changes no verdict on an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_opsd.eval.equivalence.TIME_LIMIT", 300.0)
        yield


@pytest.fixture
def deterministic(device):
    """The same operations give the same bits, which CUDA promises only when asked."""
    torch.use_deterministic_algorithms(device.type == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """A browser without a window."""
    yield from browsers(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """The figures of matplotlib that are written from here on, by their path."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, save = {}, Figure.savefig

    def savefig(figure, file, **kwargs):
        save(figure, file, **kwargs)
        figures[file] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.fixture
def training_args(tmp_path, device) -> dict:
    """Arguments of a short, quiet run."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": device.type == "cpu",
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
