"""Who samples: the engine of the rollouts, made ready for a run and asked for more than rollouts."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration

from ..changed import changed
from ..sampling import Sampling
from ..scoring import causal_lm, evaluation_mode
from ..serving import check_engine_context, longest_prompt, prepare_sampler, report_failures
from ..teacher import Teacher
from .config import SelfDistillationConfig
from .random_numbers import Draws
from .sampling_settings import sharded_after, transformers_settings, vllm_settings, without_own_settings
from .several import each_teacher


def sampler_index(args: SelfDistillationConfig, process_index: int) -> int:
    """Which of several streams of random numbers a process samples by: tensor-parallel ones share theirs."""
    return process_index // (args.vllm_tensor_parallel_size if args.use_vllm else 1)


def _why_asked_for_the_base(args: SelfDistillationConfig, reports_failures: bool) -> str | None:
    """Why a server that has the adapter beside its base may be asked for the base alone, if so."""
    if not reports_failures:
        return "a `rollout_func` may ask it for the base"
    if any(its.teacher_server_base_url == args.sampler_url for its in each_teacher(args).values()):
        return "it scores the live teacher, for which it is asked for the base"
    return None


class PolicySampler:
    """
    Samples by GRPOTrainer's engine, with random numbers that follow from the step.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not wrapped.
        wrapped (`Callable[[], nn.Module]`):
            The policy as it is trained.
        generate (`Callable`):
            GRPOTrainer's turn: from prompts, images, further fields, rollouts of each prompt in a row and whether
            there are images of tools to token ids and log-probabilities.
        changing (`Callable[..., AbstractContextManager]`):
            Gives attributes of GRPOTrainer other values meanwhile.
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`], *optional*):
            vLLM.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Special tokens and cache of transformers' generation.
        end_token_ids (`list[int]`):
            Tokens that end a completion.
        where (`Callable[[], tuple[int, bool]]`):
            Optimizer steps done, and whether this is training.
        teacher_settings (`dict[str, Any]`):
            Attributes of what samples the teacher meanwhile: of the engine, if it holds the teacher, or GRPOTrainer's.
    """

    def __init__(
        self,
        args: SelfDistillationConfig,
        accelerator: Accelerator,
        policy: Any,
        wrapped: Callable[[], Any],
        generate: Callable[..., tuple[list[list[int]], Any]],
        changing: Callable[..., AbstractContextManager[None]],
        engine: VLLMGeneration | None,
        generation_kwargs: dict[str, Any] | None,
        end_token_ids: list[int],
        where: Callable[[], tuple[int, bool]],
        teacher_settings: dict[str, Any],
    ):
        self._args = args
        self._accelerator = accelerator
        self._policy = policy
        self._wrapped = wrapped
        self._generate = generate
        self._changing = changing
        self._engine = engine
        self._generation_kwargs = generation_kwargs
        self._end_token_ids = end_token_ids
        self._where = where
        self._teacher_settings = teacher_settings
        self.sent: str | None = None
        self._seconds = 0.0
        self._draws = Draws(args.seed, sampler_index(args, accelerator.process_index), accelerator.device)

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Any,
        tokenize: Callable[[list[Any]], list[list[int]]],
        reports_failures: bool,
    ) -> int | None:
        """
        Have vLLM take the policy's weights, and refuse it if it cannot sample rollouts in full.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the policy.
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
                Rows with the prompts. `None` if they come from elsewhere.
            tokenize (`Callable`):
                From prompts to token ids.
            reports_failures (`bool`):
                Whether failures of a server end the run: not where a `rollout_func` may talk to it itself.

        Returns:
            `int`, *optional*: tokens that prompt and completion may have together, if there is a limit.

        Raises:
            ValueError: On every process, naming what does not fit.
        """
        args, accelerator = self._args, self._accelerator
        if self._engine is None:
            return getattr(self._policy.config.get_text_config(), "max_position_embeddings", None)
        is_here = args.vllm_mode == "colocate"
        given = args.vllm_server_request_timeout, args.vllm_lora_sync, Path(args.output_dir)
        otherwise = _why_asked_for_the_base(args, reports_failures)
        limit, self.sent = prepare_sampler(self._engine, self._policy, tokenizer, *given, otherwise)
        if is_here:
            # The engine has seeded this process anew, by its number alone
            set_seed(args.seed + sampler_index(args, accelerator.process_index))
        elif reports_failures:
            report_failures(self._engine)
        longest = 0 if dataset is None else longest_prompt(dataset, tokenize, accelerator)
        field = "vllm_max_model_length" if is_here else "--max-model-len"
        check_engine_context(limit, longest, args.max_completion_length, field)
        return limit

    def turn(self, *asked: Any) -> tuple[list[list[int]], Any]:
        """What GRPOTrainer samples for a turn, see `generate`."""
        step, is_training = self._where()
        draws = self._engine is not None and self._args.vllm_mode != "server"
        started = time.perf_counter()
        with self._draws(step, is_training) if draws else nullcontext():
            sampled = self._generate(*asked)
        if is_training:
            self._seconds += time.perf_counter() - started
        return sampled

    def take_seconds(self) -> float:
        """Seconds that rollouts of the training took, since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def sample(
        self, prompt_ids: list[list[int]], sampling: Sampling, stream: int, teacher: Teacher | None = None
    ) -> list[list[int]]:
        """
        Completions of the policy by other settings, see [`SelfDistillationTrainer.sample`].

        Args:
            prompt_ids (`list[list[int]]`):
                Prompts of this process.
            sampling ([`Sampling`]):
                How to draw tokens.
            stream (`int`):
                Stream of random numbers.
            teacher ([`Teacher`], *optional*):
                Whose weights write, by transformers, in place of the policy's.
        """
        changing: Callable[..., AbstractContextManager[None]]
        if teacher is not None:
            kwargs = self._generation_kwargs or {"eos_token_id": self._end_token_ids}
            changing, settings = partial(self._changing, use_vllm=False), transformers_settings(sampling, kwargs)
        elif self._engine is None:
            changing, settings = self._changing, transformers_settings(sampling, self._generation_kwargs or {})
        else:
            changing, settings = partial(changed, self._engine), vllm_settings(sampling, self._end_token_ids)
        weights = nullcontext(self._wrapped()) if teacher is None else teacher.weights(self._wrapped())
        with (
            self._draws(*self._where(), stream),
            evaluation_mode(self._policy),
            weights as model,
            changing(**settings) if teacher is None else changing(**settings, model_wrapped=model),
            without_own_settings([self._policy, causal_lm(self._policy)] if teacher is None else [model]),
            sharded_after(self._wrapped()),
        ):
            return self._generate(prompt_ids, None, {}, 1)[0]

    def sample_teacher(self, prompt_ids: list[list[int]], teacher: Teacher) -> list[list[int]]:
        """Completions of the teacher, sampled as rollouts are unless it has settings of its own."""
        if self._engine is not None and self._args.teacher == "live":
            with changed(self._engine, **self._teacher_settings):
                return self.turn(prompt_ids, None, {}, 1)[0]
        # An engine holds the policy
        changing = partial(self._changing, use_vllm=False, **self._teacher_settings)
        with teacher.weights(self._wrapped()) as weights, changing(model_wrapped=weights):
            return self._generate(prompt_ids, None, {}, 1)[0]
