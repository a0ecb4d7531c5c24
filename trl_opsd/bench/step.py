"""
The contenders of `trl-opsd bench step`: one optimizer step on the same model, prompts and batch.

All of them sample with transformers, compute the same divergence over the whole vocabulary, and use the same
optimizer. What still differs: the teacher of TRL's `DistillationTrainer` is a second model that reads the student's
prompt, since that trainer has no privileged context.
"""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .channel import Channel
from .measure import PeakMemory, memory_in_use, release_memory, synchronize


_WORDS = "the of and to in is for that on with as by from at this one two red blue green"
_TINY_VOCABULARY = 32768

_TRAINERS = (
    "trl.experimental.sdft.sdft_trainer",
    "trl.trainer.distillation_trainer",
    "trl_opsd.trainer.self_distillation_trainer",
)


@dataclass(frozen=True)
class StepCase:
    """
    What is trained.

    Args:
        model (`str`): Id or folder of the model.
        device (`str`): `"cpu"` or `"cuda"`.
        output_dir (`str`): Folder that the trainers are given.
        num_steps (`int`): Number of steps that will be asked for.
        lora (`bool`): Whether a LoRA adapter is trained.
        num_rollouts (`int`): Rollouts of a step.
        prompt_tokens (`int`): Length of the student's prompts.
        teacher_prompt_tokens (`int`): Length of the teacher's prompts.
        max_new_tokens (`int`): Length of the rollouts.
        divergence (`str`): `"forward_kl"`, `"reverse_kl"` or `"jsd"`, β = 0.5.
        gradient_checkpointing (`bool`): Whether activations are recomputed.
        dtype (`str`): Dtype of the weights. With `"bfloat16"`, autocast is on.
        seed (`int`): Seed of prompts and rollouts.
    """

    model: str
    device: str
    output_dir: str
    num_steps: int
    lora: bool
    num_rollouts: int
    prompt_tokens: int
    teacher_prompt_tokens: int
    max_new_tokens: int
    divergence: str
    gradient_checkpointing: bool
    dtype: str
    seed: int

    @property
    def beta(self) -> float:
        """The divergence in TRL's terms: 0 is the forward KL, 1 the reverse KL."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[self.divergence]


# What all contenders share


def save_tiny_model(folder: Path, seed: int = 0) -> None:
    """
    Saves a Qwen3 with random weights, 14 million parameters and a vocabulary of 32,768 words.

    Args:
        folder (`Path`):
            Where the model and its tokenizer go.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = ["<pad>", "<eos>", "<unk>", *_WORDS.split()]
    words += [f"w{index}" for index in range(len(words), _TINY_VOCABULARY)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=_TINY_VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(tokenizer: Any, case: StepCase) -> list[dict[str, str]]:
    """
    Makes prompts of exactly the lengths asked for.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        case ([`StepCase`]):
            Case.

    Returns:
        `list[dict[str, str]]`:
            One row per rollout of a step, with the student's `prompt` and, in `privileged_context`, what the teacher
            reads after it.
    """
    generator = random.Random(case.seed)
    rows = []
    for _ in range(case.num_rollouts):
        prompt = _extended("", case.prompt_tokens, tokenizer, generator)
        whole = _extended(f"{prompt} ", case.teacher_prompt_tokens, tokenizer, generator)
        rows.append({"prompt": prompt, "privileged_context": whole[len(prompt) + 1 :]})
    return rows


def _extended(text: str, num_tokens: int, tokenizer: Any, generator: random.Random) -> str:
    """Text that goes on with random words until it has a number of tokens."""

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    start = len(text)
    # Each word has a token or more, so this is long enough
    text += " ".join(generator.choices(_WORDS.split(), k=num_tokens))
    while count(text) > num_tokens and len(text) > start:
        text = text[:-1]
    if count(text) != num_tokens:
        raise ValueError(f"The tokenizer makes {count(text)} tokens of a text that should have {num_tokens}.")
    return text


@dataclass
class Contender:
    """
    A trainer, and how it samples.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, ready to train.
        method (`str`):
            Name of its method that samples rollouts, whose first argument is the token ids of the prompts.
        completions (`Callable[[Any], list[list[int]]]`):
            Takes the rollouts' token ids out of what that method returns.
    """

    trainer: Any
    method: str
    completions: Callable[[Any], list[list[int]]]


def _arguments(case: StepCase) -> dict[str, Any]:
    return {
        "output_dir": case.output_dir,
        "use_cpu": case.device == "cpu",
        "bf16": case.dtype == "bfloat16",
        "model_init_kwargs": {"dtype": case.dtype},
        "gradient_checkpointing": case.gradient_checkpointing,
        "per_device_train_batch_size": case.num_rollouts,
        "gradient_accumulation_steps": 1,
        "max_steps": case.num_steps,
        "max_completion_length": case.max_new_tokens,
        "temperature": 1.0,
        "generation_kwargs": {"min_new_tokens": case.max_new_tokens},
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "seed": case.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _shared(case: StepCase) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.model, padding_side="left")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "train_dataset": Dataset.from_list(make_rows(tokenizer, case)),
        "processing_class": tokenizer,
        "peft_config": lora if case.lora else None,
    }


# The contenders


def self_distillation(case: StepCase) -> Contender:
    """[`SelfDistillationTrainer`], the teacher being the initial policy."""
    from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer

    args = SelfDistillationConfig(
        **_arguments(case),
        divergence=case.divergence,
        privileged_context="template",
        context_kwargs={"template": "{prompt} {privileged_context}"},
    )
    trainer = SelfDistillationTrainer(case.model, args=args, **_shared(case))
    return Contender(trainer, "_generate_single_turn", lambda result: result[0])


def sdft(case: StepCase) -> Contender:
    """TRL's SDFT trainer over the whole vocabulary, the teacher being the initial policy."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(
        **_arguments(case),
        num_generations=1,
        max_prompt_length=None,
        distillation_mode="full_logits",
        distillation_alpha=case.beta,
        teacher_prompt_template="{prompt} {privileged_context}",
    )
    trainer = SDFTTrainer(case.model, args=args, **_shared(case))
    return Contender(trainer, "_generate", lambda result: result[1])


def distillation(case: StepCase) -> Contender:
    """TRL's distillation trainer, the teacher being a second copy of the model that reads the student's prompt."""
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(**_arguments(case), beta=case.beta, teacher_model_init_kwargs={"dtype": case.dtype})
    trainer = DistillationTrainer(case.model, teacher_model=case.model, args=args, **_shared(case))
    return Contender(trainer, "_generate_single_turn", lambda result: result)


CONTENDERS: dict[str, Callable[[StepCase], Contender]] = {
    "self-distillation": self_distillation,
    "sdft": sdft,
    "distillation": distillation,
}


def serve(name: str, settings: dict[str, Any], channel: Channel) -> None:
    """
    Runs a contender until it has taken all its steps.

    Args:
        name (`str`):
            Name of the contender.
        settings (`dict[str, Any]`):
            Fields of [`StepCase`].
        channel ([`Channel`]):
            Where commands come from and answers go.
    """
    case = StepCase(**settings)
    device = torch.device(case.device)
    # All of them in every process, so that what is loaded later is the contender's own
    for module in _TRAINERS:
        import_module(module)
    release_memory(device)
    before = memory_in_use(device)
    contender = CONTENDERS[name](case)
    tensors = model_tensors()
    for tensor in tensors:
        tensor.sum()  # weights mapped from a file only count once they have been read
    release_memory(device)
    facts = {
        "threads": torch.get_num_threads(),
        "model_bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        "loading_bytes": max(0, memory_in_use(device) - before),
    }
    contender.trainer.add_callback(_StepByStep(contender, case, channel, facts))
    contender.trainer.train()


def model_tensors() -> list[torch.Tensor]:
    """Parameters and buffers of all modules in this process, one for each storage."""
    tensors = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                tensors[tensor.untyped_storage().data_ptr()] = tensor
    return list(tensors.values())


class _StepByStep(TrainerCallback):
    """Lets the trainer take a step per command, and measures it."""

    def __init__(self, contender: Contender, case: StepCase, channel: Channel, facts: dict[str, Any]):
        self._channel, self._facts, self._case = channel, facts, case
        self._device = torch.device(case.device)
        self._generate = getattr(contender.trainer, contender.method)
        self._completions = contender.completions
        self._command = ""
        self._started = self._generation_seconds = 0.0
        self._peak: PeakMemory | None = None
        setattr(contender.trainer, contender.method, self._timed_generation)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._channel.send(self._facts)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        command = self._channel.receive()
        if command is None:
            raise SystemExit
        self._command = command
        self._peak = PeakMemory(self._device) if command == "memory" else None
        self._generation_seconds = 0.0
        self._started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._peak is not None:
            synchronize(self._device)
            self._channel.send({"peak_learning_bytes": self._peak.stop()})
            return
        seconds = self._now() - self._started
        self._channel.send(
            {
                "seconds": seconds,
                "generation_seconds": self._generation_seconds,
                "learning_seconds": seconds - self._generation_seconds,
            }
        )

    def _timed_generation(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        started = self._now()
        result = self._generate(prompt_ids, *args, **kwargs)
        self._generation_seconds += self._now() - started
        case = self._case
        for what, ids, length in (
            ("prompts", prompt_ids, case.prompt_tokens),
            ("rollouts", self._completions(result), case.max_new_tokens),
        ):
            lengths = [len(tokens) for tokens in ids]
            if lengths != [length] * case.num_rollouts:
                raise ValueError(f"{case.num_rollouts} {what} of {length} tokens were asked for, got {lengths}.")
        if self._peak is not None:
            self._peak.restart()
        return result

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()
