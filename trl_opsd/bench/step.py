"""
The contenders of `trl-opsd bench step`: one optimizer step on the same model, prompts, rollouts and batch.

All of them but GRPO compute the same divergence over the whole vocabulary and use the same optimizer. Each runs as it
does in training, from the rows of its dataset to the optimizer's step; only its sampling is replaced, by rollouts that
are given, unless it is to be measured too. Methods run beside them, each with its own loss.
"""

import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce, wraps
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..methods import METHODS, config_class
from .channel import CannotRun, Channel
from .measure import (
    PeakMemory,
    allocation_retries,
    mark,
    memory_in_use,
    release_memory,
    seconds_between,
    synchronize,
)
from .models import WORDS, random_model


_TRAINERS = (
    "trl.experimental.sdft.sdft_trainer",
    "trl.trainer.distillation_trainer",
    "trl.trainer.grpo_trainer",  # which ours loads with
)
# Least rollouts of a prompt: for right and wrong ones among the others of each, or for gold among four
_LEAST_GENERATIONS = {"rlcsd": 4, "stable_opd": 4}
PARTS = ("preparation", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepCase:
    """
    What is trained.

    Args:
        model (`str`): Id or folder of the model.
        random_weights (`bool`): Whether the folder has no weights, and they are made on the device.
        device (`str`): `"cpu"` or `"cuda"`.
        output_dir (`str`): Folder that the trainers are given.
        num_steps (`int`): Number of steps that will be asked for.
        lora (`bool`): Whether a LoRA adapter is trained.
        num_rollouts (`int`): Rollouts of a step.
        num_generations (`int`): Rollouts of a prompt.
        prompt_tokens (`int`): Length of the student's prompts.
        teacher_prompt_tokens (`int`): Length of the teacher's prompts.
        equal_teacher_tokens (`bool`): Whether all teachers read them.
        max_new_tokens (`int`): Length of the rollouts.
        sample (`bool`): Whether the rollouts are sampled.
        use_vllm (`bool`): Whether vLLM samples them.
        vllm_gpu_memory_utilization (`float`): Share of the GPU's memory that it takes.
        divergence (`str`): `"forward_kl"`, `"reverse_kl"` or `"jsd"`, β = 0.5.
        gradient_checkpointing (`bool`): Whether activations are recomputed.
        dtype (`str`): Dtype of the weights. With `"bfloat16"`, autocast is on.
        seed (`int`): Seed of weights, prompts and rollouts.
    """

    model: str
    random_weights: bool
    device: str
    output_dir: str
    num_steps: int
    lora: bool
    num_rollouts: int
    num_generations: int
    prompt_tokens: int
    teacher_prompt_tokens: int
    equal_teacher_tokens: bool
    max_new_tokens: int
    sample: bool
    use_vllm: bool
    vllm_gpu_memory_utilization: float
    divergence: str
    gradient_checkpointing: bool
    dtype: str
    seed: int

    @property
    def beta(self) -> float:
        """The divergence in TRL's terms: 0 is the forward KL, 1 the reverse KL."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[self.divergence]


# What all contenders share


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
            One row per prompt of a step, with the student's `prompt` and, in `privileged_context`, what the teacher
            reads after it.
    """
    generator = random.Random(case.seed)
    rows = []
    for _ in range(case.num_rollouts // case.num_generations):
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
    text += " ".join(generator.choices(WORDS.split(), k=num_tokens))
    while count(text) > num_tokens and len(text) > start:
        text = text[:-1]
    if count(text) != num_tokens:
        raise ValueError(f"The tokenizer makes {count(text)} tokens of a text that should have {num_tokens}.")
    return text


class GivenRollouts:
    """
    Random tokens in the place of a policy's rollouts. Those of a prompt in a step are the same for all contenders.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer whose ordinary tokens are taken.
        case ([`StepCase`]):
            Case.
    """

    def __init__(self, tokenizer: Any, case: StepCase):
        special = set(tokenizer.all_special_ids)
        self._ids = [token for token in range(len(tokenizer)) if token not in special]
        self._case = case

    def __call__(self, step: int, prompt_ids: list[list[int]]) -> list[list[int]]:
        rollouts, seen = [], Counter[tuple[int, ...]]()
        for ids in map(tuple, prompt_ids):
            generator = random.Random(repr((self._case.seed, step, ids, seen[ids])))
            seen[ids] += 1
            rollouts.append(generator.choices(self._ids, k=self._case.max_new_tokens))
        return rollouts


@dataclass
class Contender:
    """
    A trainer, and how it samples.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, ready to train.
        function (`str`):
            Name of its function, or of one of its attributes', that samples rollouts, whose first argument is the
            token ids of the prompts. What it is called for later in a step is not counted.
        completions (`Callable[[Any], list[list[int]]]`):
            Takes the rollouts' token ids out of what that function returns.
        result (`Callable[[list[list[int]], list[list[int]]], Any]`):
            Makes what it returns of prompts and rollouts.
        samples_besides (`tuple[str, ...]`, *optional*):
            Names of others, which return what they have sampled for their first argument.
        replaces_rollouts (`bool`, *optional*, defaults to `False`):
            Whether something else may be trained on than rollouts, of which fewer are then asked for.
        exchanges_prompts (`bool`, *optional*, defaults to `False`):
            Whether prompts may be others than those of the rows, and longer.
    """

    trainer: Any
    function: str
    completions: Callable[[Any], list[list[int]]]
    result: Callable[[list[list[int]], list[list[int]]], Any]
    samples_besides: tuple[str, ...] = ()
    replaces_rollouts: bool = False
    exchanges_prompts: bool = False


def _arguments(case: StepCase) -> dict[str, Any]:
    arguments = {
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
    if case.use_vllm:
        arguments |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": case.vllm_gpu_memory_utilization,
            "vllm_max_model_length": case.prompt_tokens + case.max_new_tokens,
            "generation_kwargs": {"ignore_eos": True, "min_tokens": case.max_new_tokens},
        }
    return arguments


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


@contextmanager
def random_weights(case: StepCase) -> Iterator[None]:
    """TRL's trainers make the random models of a case where they would load one."""

    def make(path: str, *args: Any, **kwargs: Any) -> Any:
        return random_model(path, case.device, case.dtype, case.seed)

    modules: list[Any] = list(map(import_module, _TRAINERS))
    loaders = [module.create_model_from_path for module in modules]
    try:
        for module in modules if case.random_weights else ():
            module.create_model_from_path = make
        yield
    finally:
        for module, loader in zip(modules, loaders, strict=True):
            module.create_model_from_path = loader


# The contenders


def self_distillation(case: StepCase, **kwargs: Any) -> Contender:
    """[`SelfDistillationTrainer`], the teacher being the initial policy."""
    from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer

    reward_funcs = kwargs.pop("reward_funcs", None)
    args = SelfDistillationConfig(
        **_arguments(case),
        num_generations=case.num_generations,
        divergence=case.divergence,
        privileged_context="template",
        context_kwargs={"template": "{prompt} {privileged_context}"},
        **kwargs,
    )
    trainer = SelfDistillationTrainer(case.model, reward_funcs, args=args, **_shared(case))
    return Contender(
        trainer, "_generate_single_turn", lambda result: result[0], lambda prompts, rollouts: (rollouts, None)
    )


def self_distillation_with_grpo(case: StepCase) -> Contender:
    """The same with GRPO's policy loss in its loss, every other rollout being rewarded."""
    _check_groups(case)
    return self_distillation(case, policy_loss_coef=1.0, reward_funcs=[_every_other])


def _every_other(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(index % 2) for index in range(len(completions))]


def _check_groups(case: StepCase) -> None:
    if case.num_generations < 2:
        raise CannotRun("GRPO's policy loss needs `--num_generations` of 2 or more")


def grpo(case: StepCase) -> Contender:
    """TRL's GRPO trainer, every other rollout being rewarded."""
    from trl import GRPOConfig, GRPOTrainer

    _check_groups(case)
    args = GRPOConfig(**_arguments(case), num_generations=case.num_generations)
    trainer = GRPOTrainer(case.model, _every_other, args=args, **_shared(case))
    return Contender(
        trainer, "_generate_single_turn", lambda result: result[0], lambda prompts, rollouts: (rollouts, None)
    )


def _in_groups(case: StepCase, size: int) -> StepCase:
    """The case with as many rollouts of a prompt as a method needs, if it has fewer."""
    if case.num_generations % size == 0:
        return case
    if case.num_rollouts % size:
        raise CannotRun(f"it needs groups of {size} rollouts: set `--num_rollouts` to a multiple of {size}")
    return replace(case, num_generations=size)


def first_characters(row: dict[str, Any], rollout: Any) -> list[dict[str, Any]]:
    """Marks the first half of a rollout, of which what is more than a context allows is cut off."""
    kind = "key_formula" if rollout.correct else "sign_error"
    return [{"start": 0, "end": len(rollout.text) // 2, "type": kind}]


def method(case: StepCase, name: str) -> Contender:
    """[`SelfDistillationTrainer`] with the defaults of a method, every other rollout being rewarded."""
    from trl_opsd import SelfDistillationTrainer

    config = config_class(name)
    case = _in_groups(case, _LEAST_GENERATIONS.get(name, min(config.num_generations or 1, 2)))
    arguments = _arguments(case)
    if config.teacher == "external":
        if case.random_weights:
            raise CannotRun("its teacher is loaded a second time, which random weights are not")
        arguments["teacher_model_name_or_path"] = case.model
    if name == "u_opsd":  # random tokens hold no answers, so that each text is one
        arguments["context_kwargs"] = {"answer_of": "builtins.str", "same_answer": "operator.eq", "threshold": 0.0}
    if config.privileged_context == "diagnosis":  # random weights mark nothing
        arguments["context_kwargs"] = {"annotator": f"{__name__}.first_characters"}
    args = config(**arguments, num_generations=case.num_generations)
    shared = _shared(case)
    rows = shared["train_dataset"]
    for column in ("solution", "answer", "english"):
        rows = rows.add_column(column, rows["privileged_context"])
    # With the token that ends it
    gold = _extended("", case.max_new_tokens - 1, shared["processing_class"], random.Random(case.seed))
    rows = rows.add_column("completion", [gold] * len(rows))
    shared["train_dataset"] = rows
    trainer = SelfDistillationTrainer(case.model, [_every_other], args=args, **shared)
    return Contender(
        trainer,
        "sampler.turn",
        lambda result: result[0],
        lambda prompts, rollouts: (rollouts, None),
        samples_besides=("sample", "sampler.sample_teacher"),
        replaces_rollouts=trainer.completion_source.replaces_rollouts,
        exchanges_prompts=trainer.args.prompts is not None,
    )


def sdft(case: StepCase) -> Contender:
    """TRL's SDFT trainer over the whole vocabulary, the teacher being the initial policy."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(
        **_arguments(case),
        num_generations=case.num_generations,
        max_prompt_length=None,
        distillation_mode="full_logits",
        distillation_alpha=case.beta,
        teacher_prompt_template="{prompt} {privileged_context}",
    )
    trainer = SDFTTrainer(case.model, args=args, **_shared(case))
    return Contender(trainer, "_generate", lambda result: result[1], lambda prompts, rollouts: (prompts, rollouts))


def distillation(case: StepCase) -> Contender:
    """TRL's distillation trainer, the teacher being a second copy of the model."""
    from datasets import concatenate_datasets
    from trl import DistillationConfig, DistillationTrainer

    class ContextDistillationTrainer(DistillationTrainer):
        """Its teacher reads the privileged context too."""

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            texts = [f"{row['prompt']} {row['privileged_context']}" for row in inputs]
            prompts = self._tokenizer(texts, return_tensors="pt").to(self.accelerator.device)
            return batch | {"teacher_prompt_ids": prompts["input_ids"], "teacher_mask": prompts["attention_mask"]}

        def _compute_loss(self, student: Any, inputs: dict[str, Any], *args: Any) -> Any:
            self._teacher_inputs = (
                torch.cat([inputs["teacher_prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["teacher_mask"], inputs["completion_mask"]], dim=1),
            )
            return super()._compute_loss(student, inputs, *args)

        def _get_last_hidden_state(self, model: Any, input_ids: Any, attention_mask: Any, *args: Any) -> Any:
            if model is self.accelerator.unwrap_model(self.teacher_model):
                input_ids, attention_mask = self._teacher_inputs
            return super()._get_last_hidden_state(model, input_ids, attention_mask, *args)

    args = DistillationConfig(**_arguments(case), beta=case.beta, teacher_model_init_kwargs={"dtype": case.dtype})
    shared = _shared(case)
    # It samples each row once
    shared["train_dataset"] = concatenate_datasets([shared["train_dataset"]] * case.num_generations)
    trainer_class = ContextDistillationTrainer if case.equal_teacher_tokens else DistillationTrainer
    trainer = trainer_class(case.model, teacher_model=case.model, args=args, **shared)
    return Contender(trainer, "_generate_single_turn", lambda result: result, lambda prompts, rollouts: rollouts)


CONTENDERS: dict[str, Callable[[StepCase], Contender]] = {
    "self-distillation": self_distillation,
    "self-distillation+grpo": self_distillation_with_grpo,
    "grpo": grpo,
    "sdft": sdft,
    "distillation": distillation,
    **{f"method-{name}": partial(method, name=name) for name in METHODS},
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
    # One run at a time works in a folder
    case = StepCase(**{**settings, "output_dir": str(Path(settings["output_dir"], name))})
    device = torch.device(case.device)
    # All of them in every process, so that what is loaded later is the contender's own
    for module in (*_TRAINERS, "trl_opsd.trainer.trainer"):
        import_module(module)
    release_memory(device)
    before = memory_in_use(device)
    with random_weights(case):
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
    channel.receive()  # the end of the case


def model_tensors() -> list[torch.Tensor]:
    """Parameters and buffers of all modules in this process, one for each storage."""
    tensors = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                tensors[tensor.untyped_storage().data_ptr()] = tensor
    return list(tensors.values())


def _set(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute, or one of an attribute's."""
    *path, attribute = name.split(".")
    setattr(reduce(getattr, path, owner), attribute, value)


class _StepByStep(TrainerCallback):
    """Lets the trainer take a step per command, and measures it."""

    def __init__(self, contender: Contender, case: StepCase, channel: Channel, facts: dict[str, Any]):
        self._channel, self._facts, self._case = channel, facts, case
        self._device = torch.device(case.device)
        trainer, self._contender = contender.trainer, contender
        self._sample = attrgetter(contender.function)(trainer)
        self._given = None if case.sample else GivenRollouts(trainer.processing_class, case)
        self._started = self._generation_seconds = 0.0
        self._step = 0
        self._marks: list[Any] = []
        self._peak: PeakMemory | None = None
        _set(trainer, contender.function, self._rollouts)
        for name in contender.samples_besides:
            _set(trainer, name, partial(self._samples, attrgetter(name)(trainer)))
        # The parts of a step end where these return, the last one with the step
        trainer._prepare_inputs = self._marked(trainer._prepare_inputs)
        trainer.compute_loss = self._marked(trainer.compute_loss)
        trainer.accelerator.backward = self._marked(trainer.accelerator.backward)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._channel.send(self._facts)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        command = self._channel.receive()
        if command is None:
            raise SystemExit
        self._peak = PeakMemory(self._device) if command == "memory" else None
        self._step = state.global_step
        self._generation_seconds = 0.0
        self._has_rollouts = False
        self._started = self._now()
        self._marks = [mark(self._device)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks.append(mark(self._device))
        seconds = self._now() - self._started
        if self._peak is not None:
            highest = self._peak.highest()
            extra = max(0, highest - self._peak.start)
            self._channel.send({"peak_learning_bytes": extra, "peak_bytes": highest})
            return
        parts = dict(zip(PARTS, map(seconds_between, self._marks[:-1], self._marks[1:]), strict=True))
        parts["preparation"] -= self._generation_seconds
        self._channel.send(
            {
                "seconds": seconds,
                "generation_seconds": self._generation_seconds,
                "learning_seconds": seconds - self._generation_seconds,
                **{f"{name}_seconds": value for name, value in parts.items()},
                "allocation_retries": allocation_retries(self._device),
            }
        )

    def _marked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._marks.append(mark(self._device))
            return result

        return call

    def _rollouts(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        started = self._now()
        if self._given is None:
            result = self._sample(prompt_ids, *args, **kwargs)
        else:
            result = self._contender.result(prompt_ids, self._given(self._step, prompt_ids))
        self._generation_seconds += self._now() - started
        if self._has_rollouts:
            return result
        self._has_rollouts = True
        case = self._case
        for what, ids, length in (
            ("prompts", prompt_ids, case.prompt_tokens),
            ("rollouts", self._contender.completions(result), case.max_new_tokens),
        ):
            lengths = [len(tokens) for tokens in ids]
            is_number = len(ids) == case.num_rollouts or self._contender.replaces_rollouts
            is_length = set(lengths) == {length} or (what == "prompts" and self._contender.exchanges_prompts)
            if not is_number or not is_length:
                raise ValueError(f"{case.num_rollouts} {what} of {length} tokens were asked for, got {lengths}.")
        if self._peak is not None:
            self._peak.restart()
        return result

    def _samples(
        self, sample: Callable[..., list[list[int]]], prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        started = self._now()
        given = self._given
        result = sample(prompt_ids, *args, **kwargs) if given is None else given(self._step, prompt_ids)
        self._generation_seconds += self._now() - started
        return result

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()
