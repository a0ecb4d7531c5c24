"""The fields of the benchmarks. Nothing heavy is imported here, so that `--help` answers at once."""

import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import product
from operator import ne
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..help import did_you_mean, help_from_docstring
from ..methods import METHODS


@help_from_docstring
@dataclass
class BenchArguments(ABC):
    """
    Fields of all benchmarks.

    Args:
        contenders (`list[str]`, *optional*):
            Names of the contenders to run, in this order. `None` runs the usual ones.
        repeats (`int`, *optional*, defaults to `5`):
            Timed iterations of each contender, one per round. Fewer than 5 give no median worth quoting.
        warmups (`int`, *optional*, defaults to `1`):
            Iterations of each contender before the first timed one.
        device (`str`, *optional*, defaults to `"auto"`):
            `"cpu"`, `"cuda"`, or `"auto"` for CUDA where there is a GPU.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"float32"`, `"bfloat16"`, or `"auto"` for bfloat16 on a GPU and float32 on a CPU.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that a contender may take in one case, from its start to its last iteration. One that takes longer
            is ended, and the others go on.
        threads (`int`, *optional*):
            CPU threads of each contender. `None` leaves the choice to PyTorch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of everything random, the same for all contenders.
        output_dir (`str`, *optional*):
            Folder for the results, the plot and what the contenders write on their consoles. Defaults to
            `bench/<name of the benchmark>`.
    """

    name: ClassVar[str]
    all_contenders: ClassVar[tuple[str, ...]]
    factory: ClassVar[str]

    contenders: list[str] | None = None
    repeats: int = 5
    warmups: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    timeout: float = 600.0
    threads: int | None = None
    seed: int = 0
    output_dir: str | None = None

    def __post_init__(self) -> None:
        self.contenders = self.default_contenders() if self.contenders is None else list(self.contenders)
        for name in self.contenders:
            if name not in self.all_contenders:
                raise ValueError(f"`contenders` knows no {name!r}. Choose from: {', '.join(self.all_contenders)}.")
        if len(set(self.contenders)) < len(self.contenders):
            raise ValueError(f"`contenders` names one twice: {' '.join(self.contenders)}. Name each once.")
        self._check_at_least(1, "repeats", "threads")
        self._check_at_least(0, "warmups")
        if not self.timeout > 0.0:
            raise ValueError(f"`timeout` must be positive, got {self.timeout}.")
        if self.output_dir is None:
            self.output_dir = f"bench/{self.name}"

    def _check_at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and number < minimum:
                    raise ValueError(f"`{name}` must be at least {minimum}, got {number}.")

    def prepare_output_dir(self) -> Path:
        """
        Makes the output folder.

        Returns:
            `Path`:
                The folder.

        Raises:
            ValueError: If nothing can be written there.
        """
        assert self.output_dir is not None
        folder = Path(self.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"`output_dir={self.output_dir}` cannot be written to ({error.strerror}). Name another folder."
            ) from None
        return folder

    def default_contenders(self) -> list[str]:
        """Names of the contenders that run where none are named."""
        return list(self.all_contenders)

    @abstractmethod
    def cases(self) -> list[dict[str, Any]]:
        """What is measured, one after the other: settings that a contender's process receives."""


@help_from_docstring
@dataclass
class LossArguments(BenchArguments):
    """
    Fields of `trl-opsd bench loss`: one forward and backward pass of the divergence, from hidden states.

    Args:
        num_tokens (`list[int]`, *optional*, defaults to `[512]`):
            Number of tokens N; several values make a sweep.
        hidden_size (`list[int]`, *optional*, defaults to `[1024]`):
            Width H of the hidden states; several values make a sweep.
        vocab_size (`list[int]`, *optional*, defaults to `[151936]`):
            Size V of the vocabulary; several values make a sweep.
        one_at_a_time (`bool`, *optional*, defaults to `False`):
            Whether each size is varied while the others keep the first of their values, instead of running all
            combinations.
        divergence (`str`, *optional*, defaults to `"jsd"`):
            `"forward_kl"`, `"reverse_kl"` or `"jsd"` (with β = 0.5).
        support (`str`, *optional*, defaults to `"full"`):
            Tokens whose entries are summed, as `divergence_support` of the trainers. The peers know `"full"` only.
        frozen_head (`bool`, *optional*, defaults to `False`):
            Whether the head is frozen, as with LoRA: the gradient then goes to the hidden states alone.
        clip (`float`, *optional*):
            Upper bound on every vocabulary entry of the divergence.
        token_weights (`bool`, *optional*, defaults to `False`):
            Whether every token has a weight of its own, as the aggregations over sequences need, instead of 1/N.
        metrics (`bool`, *optional*, defaults to `False`):
            Whether the pass also yields what a training log shows: both entropies, both log-probabilities of the
            sampled token and, with a clip, the share of clipped tokens.
        check (`bool`, *optional*, defaults to `False`):
            Whether to compare every contender's gradients with those of the plain formula in float64, on a small slice
            of the same inputs.
    """

    name: ClassVar[str] = "loss"
    all_contenders: ClassVar[tuple[str, ...]] = (
        "ours",
        "ours-triton",
        "ours-compiled",
        "ours-eager",
        "trl-chunked",
        "liger",
        "dense",
        "floor",
    )
    factory: ClassVar[str] = "trl_opsd.bench.loss:serve"

    num_tokens: list[int] = field(default_factory=lambda: [512])
    hidden_size: list[int] = field(default_factory=lambda: [1024])
    vocab_size: list[int] = field(default_factory=lambda: [151936])
    one_at_a_time: bool = False
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    support: Literal[
        "full", "teacher_top_k", "student_top_k", "union_top_k", "intersection_top_k", "sampled_token"
    ] = "full"
    frozen_head: bool = False
    clip: float | None = None
    token_weights: bool = False
    metrics: bool = False
    check: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(1, "num_tokens", "hidden_size", "vocab_size")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"`clip` must be positive, got {self.clip}. Leave it out for no clipping.")

    def default_contenders(self) -> list[str]:
        # What `ours` runs is one of these two
        return [name for name in self.all_contenders if name not in ("ours-triton", "ours-compiled")]

    def cases(self) -> list[dict[str, Any]]:
        shared = {
            name: getattr(self, name)
            for name in ("dtype", "divergence", "support", "frozen_head", "clip", "token_weights", "metrics", "seed")
        }
        values = (self.num_tokens, self.hidden_size, self.vocab_size)
        sizes = list(dict.fromkeys(product(*values)))
        if self.one_at_a_time:
            first = sizes[0]
            sizes = [size for size in sizes if sum(map(ne, size, first)) <= 1]
        return [{"num_tokens": n, "hidden_size": h, "vocab_size": v, **shared} for n, h, v in sizes]


@help_from_docstring
@dataclass
class StepArguments(BenchArguments):
    """
    Fields of `trl-opsd bench step`: whole optimizer steps of trainers, from rollouts that are given or sampled.

    Args:
        method (`list[str]`, *optional*):
            Methods to run beside the contenders, by the names of their commands: each with the defaults of its
            configuration, on the same prompts and rollouts, every other rollout being rewarded.
        preset (`str`, *optional*, defaults to `"tiny"`):
            Shape of a model with random weights, made on the device: `"qwen3-0.6b"`, `"qwen3-1.7b"`, `"qwen3-8b"`, or
            `"tiny"` for one of 14 million parameters.
        model (`str`, *optional*):
            Id or folder of a model to load instead.
        lora (`bool`, *optional*, defaults to `False`):
            Whether to train a LoRA adapter of rank 16 on all linear layers instead of all weights.
        num_rollouts (`int`, *optional*, defaults to `4`):
            Rollouts of a step, all in one batch.
        num_generations (`int`, *optional*, defaults to `1`):
            Rollouts of each prompt. `grpo` and `self-distillation+grpo` need 2 or more. A method that needs more than
            this takes as many as it needs.
        prompt_tokens (`int`, *optional*, defaults to `64`):
            Length of every student prompt, in tokens.
        teacher_prompt_tokens (`int`, *optional*, defaults to `192`):
            Length of every teacher prompt, in tokens.
        equal_teacher_tokens (`bool`, *optional*, defaults to `True`):
            Whether the teacher of TRL's `DistillationTrainer`, which has no privileged context, is made to read what
            the other teachers read. Otherwise it reads the student's prompt, as that trainer has it.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Length of every rollout, in tokens.
        sample (`bool`, *optional*, defaults to `False`):
            Whether the rollouts are sampled from the policy. Otherwise they are random tokens, which cost nothing.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether they are sampled by a vLLM engine in the trainer's process instead of by transformers.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that the engine takes.
        sequential (`bool`, *optional*, defaults to `False`):
            Whether the contenders run one after the other, each with the device to itself, instead of taking turns.
            With `use_vllm` they always do.
        divergence (`str`, *optional*, defaults to `"jsd"`):
            `"forward_kl"`, `"reverse_kl"` or `"jsd"` (with β = 0.5), over the whole vocabulary.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether activations are recomputed in the backward pass.
    """

    name: ClassVar[str] = "step"
    all_contenders: ClassVar[tuple[str, ...]] = (
        "self-distillation",
        "self-distillation+grpo",
        "grpo",
        "sdft",
        "distillation",
    )
    factory: ClassVar[str] = "trl_opsd.bench.step:serve"

    method: list[str] | None = None
    preset: Literal["tiny", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b"] = "tiny"
    model: str | None = None
    lora: bool = False
    num_rollouts: int = 4
    num_generations: int = 1
    prompt_tokens: int = 64
    teacher_prompt_tokens: int = 192
    equal_teacher_tokens: bool = True
    max_new_tokens: int = 128
    sample: bool = False
    use_vllm: bool = False
    vllm_gpu_memory_utilization: float = 0.3
    sequential: bool = False
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.method or ():
            if name not in METHODS:
                raise ValueError(f"`method` knows no {name!r}. {did_you_mean(name, METHODS)}")
        assert self.contenders is not None
        self.contenders += [f"method-{name}" for name in dict.fromkeys(self.method or ())]
        self._check_at_least(1, "num_rollouts", "num_generations", "prompt_tokens", "max_new_tokens")
        if self.num_rollouts % self.num_generations != 0:
            raise ValueError(
                f"`num_rollouts={self.num_rollouts}` must be a multiple of `num_generations={self.num_generations}`."
            )
        if self.teacher_prompt_tokens <= self.prompt_tokens:
            raise ValueError(
                f"`teacher_prompt_tokens={self.teacher_prompt_tokens}` must be more than `prompt_tokens="
                f"{self.prompt_tokens}`: the teacher reads the prompt and the privileged context."
            )
        if self.use_vllm and not self.sample:
            raise ValueError(
                "`use_vllm=True` samples the rollouts, which `sample=False` does without. Add `--sample`."
            )

    def default_contenders(self) -> list[str]:
        usual = [name for name in self.all_contenders if name != "grpo"]
        return [name for name in usual if self.num_generations > 1 or not name.endswith("+grpo")]

    def cases(self) -> list[dict[str, Any]]:
        names = (
            "preset",
            "model",
            "lora",
            "num_rollouts",
            "num_generations",
            "prompt_tokens",
            "teacher_prompt_tokens",
            "equal_teacher_tokens",
            "max_new_tokens",
            "sample",
            "use_vllm",
            "vllm_gpu_memory_utilization",
            "divergence",
            "gradient_checkpointing",
            "dtype",
            "seed",
        )
        case = {name: getattr(self, name) for name in names}
        # Warm-ups, timed steps, and the one whose memory is measured
        return [{**case, "num_steps": self.warmups + self.repeats + 1}]


@help_from_docstring
@dataclass
class TeacherArguments(BenchArguments):
    """
    Fields of `trl-opsd bench teacher`: the teacher's pass over rollouts that share one privileged prompt.

    Args:
        preset (`str`, *optional*, defaults to `"tiny"`):
            Shape of a model with random weights, made on the device: `"qwen3-0.6b"`, `"qwen3-1.7b"`, `"qwen3-8b"`, or
            `"tiny"` for one of 14 million parameters.
        model (`str`, *optional*):
            Id or folder of a model to load instead.
        num_rollouts (`int`, *optional*, defaults to `8`):
            Rollouts of the prompt.
        teacher_prompt_tokens (`int`, *optional*, defaults to `2048`):
            Length of the teacher's prompt, in tokens.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Length of every rollout, in tokens.
    """

    name: ClassVar[str] = "teacher"
    all_contenders: ClassVar[tuple[str, ...]] = ("shared-prompt", "whole-sequences")
    factory: ClassVar[str] = "trl_opsd.bench.teacher:serve"

    preset: Literal["tiny", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b"] = "tiny"
    model: str | None = None
    num_rollouts: int = 8
    teacher_prompt_tokens: int = 2048
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(1, "num_rollouts", "teacher_prompt_tokens", "max_new_tokens")

    def cases(self) -> list[dict[str, Any]]:
        names = ("preset", "model", "num_rollouts", "teacher_prompt_tokens", "max_new_tokens", "dtype", "seed")
        return [{name: getattr(self, name) for name in names}]
