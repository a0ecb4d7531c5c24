"""The trainer all methods share, and the only place that overrides TRL's private methods.

What it relies on in `trl.GRPOTrainer` 1.16 (held by `tests/trainer/test_trl_contract.py`):

- `_generate_and_score_completions(inputs)` turns rows into a dict of tensors with the keys `prompt_ids`, `prompt_mask`
  (left-padded), `completion_ids`, `completion_mask` (right-padded), `advantages` and, with tools, `tool_mask`; with
  vLLM, `importance_sampling_ratio`. Extra tensors in that dict are shuffled and split with the rest.
- `_calculate_rewards(inputs, prompts, completions, completion_ids_list)` is called once per batch, after generation,
  and returns the rewards of all processes, of shape (B_global, number of reward functions). Reward functions get
  `_log_completion_extra(column, values)` as `log_extra`, which adds to `_pending_extra_logs[column]`; it is emptied
  after `_calculate_rewards` has returned. `environments` are those of the batch, or `None`.
- `_generate(prompts)` calls `rollout_func`, or `_generate_single_turn(prompt_ids, images, multimodal_fields,
  num_generations, has_tool_images)` for each turn, which samples from `model_wrapped`.
- `_compute_loss(model, inputs)` returns the loss of a micro-batch, already divided by the number of accumulated
  micro-batches, linear in `advantages` up to the terms of `beta` and `entropy_coef`. `training_step` hands that
  loss to `accelerator.backward` as it is (`loss_is_scaled_for_ga`).
- Of the student, that loss depends on what `_get_per_token_logps_and_entropies(model, input_ids, attention_mask,
  logits_to_keep, batch_size, ...)` returns, and on nothing else. `_generate_and_score_completions` gets the
  log-probabilities of the sampling and the reference policy from it too.
- `_prepare_inputs(generation_batch)` returns, in training, `_buffered_inputs[_step % steps_per_generation]`, and makes
  that list anew, shuffled, whenever it generates: when `_step`, which counts micro-batches, is a multiple of
  `steps_per_generation * num_iterations`.
- `vllm_generation._iter_named_params()` yields the weights that vLLM is sent; `vllm_generation._dist.gather_params(
  parameters)` makes them whole under ZeRO-3. `sync_weights()` asks for them once, in colocate mode when the engine is
  awake, and resets its prefix cache afterwards. That engine is `vllm_generation.llm`.
- `vllm_generation.generate(...)` and, on the main process in server mode, `vllm_generation.vllm_client`, whose
  `update_named_params`, `reset_prefix_cache` and `generate` are all that is used of it.
- `vllm_generation.generate` samples by its attributes `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`,
  `max_completion_length`, `structured_outputs_regex` and `generation_kwargs`.
- `_run_epoch(...)`, of transformers, takes the steps of an epoch, at least one.
- `_get_train_sampler(dataset)` returns a sampler that draws the order of each epoch from its `generator`.
- `_load_from_checkpoint(checkpoint, model)` and `_load_best_model()`, of transformers, load the policy's weights; with
  DeepSpeed only the second is called.
- `_pending_extra_logs` and `_pending_metrics` hold what reward functions log of a batch until it is logged.
- `_tokenize_prompts(prompts)`, `_metrics[mode]`, `_save_checkpoint(model, trial)`,
  `_load_optimizer_and_scheduler(checkpoint)`, `_set_signature_columns_if_needed()`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..context import (
    SampledContext,
    as_text,
    check_embedded,
    without_end,
)
from ..guard import SkipNonFiniteSteps
from ..objective import (
    FusedDivergence,
    generalized_jsd_loss,
)
from ..sampling import Sampling
from ..scoring import announce_head, causal_lm, evaluation_mode, keep_groups_together
from ..serving import (
    ServerError,
    check_engine_context,
    longest_prompt,
    prepare_sampler,
    report_failures,
)
from ..signal import TokenScores
from ..teacher import Teacher, fingerprint
from .batch import (
    Generation,
    TeacherInputs,
    all_feedback,
    check_feedback,
    joined_feedback,
    total_rewards,
)
from .checkpoints import load_weights
from .checks import (
    check_auxiliary_loss,
    check_context,
    check_grpo_pass,
    check_signals,
)
from .completing import Completing, Engines, decoded, encoded, with_stand_ins, without_empty
from .config import SelfDistillationConfig
from .loss import SelfDistillationLoss, make_networks, policy_term
from .method import Method
from .metrics import Metrics, add_contexts, add_divergence, add_policy, add_sampler_difference, warn_of_clip
from .preparation import prepare
from .random_numbers import Draws
from .run_state import Attributes, ProcessFiles, RunState, Stateful, dataset_summary
from .sampling_settings import changed_settings, transformers_settings, vllm_settings
from .signals import make_streams
from .steps import OrderOfEpochs, StepCallback
from .teachers import load_teacher
from .world import check_world


def _no_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    # GRPOTrainer insists on a reward function when it is constructed. This one stands in and is removed right after.
    return [0.0] * len(completions)


class SelfDistillationTrainer(GRPOTrainer):
    """
    Trainer for on-policy self-distillation.

    The student samples a rollout from the prompt alone. The teacher, the same network reading a prompt with privileged
    context, scores the same tokens, and the student is pulled towards it token by token. Everything
    [`~trl.GRPOTrainer`] does for rollouts, rewards, logging and checkpoints stays.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd import SelfDistillationTrainer

    >>> dataset = Dataset.from_list([{"prompt": "What is 2 + 3?", "solution": "Two and three make five, so 5."}])
    >>> trainer = SelfDistillationTrainer("Qwen/Qwen3-1.7B", train_dataset=dataset)
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Reward functions, as in [`~trl.GRPOTrainer`]. They are evaluated and logged, are shown to the privileged
            context, and take part in the loss if `args.policy_loss_coef` is positive.
        args ([`SelfDistillationConfig`], *optional*):
            Configuration. `None` uses the defaults.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with a `prompt` (string or messages) and the columns the privileged context reads. All rows are
            checked before the model is loaded; those of a streaming dataset as they arrive.
        kwargs:
            All other arguments of [`~trl.GRPOTrainer`] (`eval_dataset`, `processing_class`,
            `reward_processing_classes`, `callbacks`, `optimizers`, `quantization_config`, `peft_config`, `tools`,
            `rollout_func`, `environment_factory`).

    Raises:
        ValueError: If the data, the tokenizer or the configuration cannot work, naming what and the way out.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "trl-opsd", "self-distillation"]
    _name = "Self-Distillation"
    _paper: ClassVar[dict[str, str]] = {}
    config_class: ClassVar[type[SelfDistillationConfig]] = SelfDistillationConfig

    args: SelfDistillationConfig
    model_wrapped: Any
    reward_weights: torch.Tensor
    _buffered_inputs: Any
    _signature_columns: list[str]
    _step: int
    _pending_extra_logs: Any
    _pending_metrics: Any
    use_vllm: bool
    _warned_about_clip = False

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: SelfDistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            method = self.config_class.method
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name if method is None else method.name}")
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"{type(self).__name__} needs a `{self.config_class.__name__}` as `args`, got "
                f"{type(args).__name__}. It takes the same fields: only the name changes."
            )
        if args.method is not None:
            self._present_as(args.method)
        run = prepare(
            args,
            model,
            model_id,
            processing_class,
            train_dataset,
            eval_dataset,
            reward_funcs,
            peft_config,
            tools,
            rollout_func,
            environment_factory,
        )
        self.context, self.completion_source, self.signals = run.context, run.completions, run.signals
        self.teacher_prompt, self._data_columns = run.teacher_prompt, run.columns

        # Set by the generation methods for the batch in hand
        self._first_turn = False
        self._draws = Draws(args.seed)
        self._generation_step = -1
        self._first_micro_batch = 0
        self._rows: list[Mapping[str, Any]] = []
        self._empty_rollouts: set[int] = set()
        self._extra_tokens = 0
        self._generation: Generation
        self.statistics = {"train": Metrics(), "eval": Metrics()}
        self._num_generated_tokens = 0
        self._given_log_probs: tuple[torch.Tensor, torch.Tensor, None] | None = None

        super().__init__(
            model=model,
            reward_funcs=reward_funcs or [_no_reward],
            args=args,
            train_dataset=run.train_dataset,
            eval_dataset=run.eval_dataset,
            processing_class=run.tokenizer,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=None if rollout_func is None else without_empty(rollout_func, self._mark_empty_rollouts),
            environment_factory=environment_factory,
        )
        if self.reward_funcs[0] is _no_reward:
            for values in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
                values.pop(0)
            self.reward_weights = self.reward_weights[1:]
        if environment_factory is not None and not self.reward_funcs:  # it gives none, which is known only now
            check_signals(self.signals, args, has_reward=False)
            check_context(self.context, self.num_generations, run.train_dataset, has_rewards=False, has_feedback=True)
        self._teacher_inputs = TeacherInputs(
            self.teacher_prompt,
            self.reward_weights,
            args.success_threshold,
            (*self.eos_token_ids, self._tokenizer.pad_token_id),
            self._tokenizer.pad_token_id,
            self.pad_to_multiple_of,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            gather_object,
            self._sample_for_context,
        )
        if self.use_vllm and self.completion_source.samples_teacher:  # with transformers
            sampling = Sampling(self.temperature, self.top_p, self.top_k, cast(int, self.max_completion_length))
            tokens = {f"{name}_token_id": getattr(self._tokenizer, f"{name}_token_id") for name in ("pad", "bos")}
            tokens |= {"eos_token_id": self.eos_token_ids, "cache_implementation": args.cache_implementation}
            others = {"min_p": self.min_p, "repetition_penalty": self.repetition_penalty}
            for name, value in transformers_settings(sampling, tokens, **others).items():
                setattr(self, name, value)
        self._has_grpo_terms = (
            self.beta != 0.0
            or self.signals.has_term("policy_loss_coef")
            or self._entropy_bonus_enabled
            or self.aux_loss_enabled
        )
        # What follows from the log-probabilities at the divergence's temperature comes from its forward pass
        self._shares_student_pass = (
            self._has_grpo_terms
            and not self._entropy_bonus_enabled
            and not self.aux_loss_enabled
            and args.distillation_temperature == self.temperature
        )
        if self._has_grpo_terms and not self._shares_student_pass:
            check_grpo_pass(causal_lm(self.model), self.router_aux_loss_coef)
        check_auxiliary_loss(args, self.aux_loss_enabled, self.router_aux_loss_coef)
        self.teacher_prompt.chat_template = self.chat_template

        # With the correction on, GRPO logs it. vLLM's log-probabilities are those of what it samples from
        self._compares_with_sampler = (
            self.use_vllm
            and not self.vllm_importance_sampling_correction
            and not args.truncates_sampling
            and args.distillation_temperature == self.temperature
            and self.repetition_penalty == 1.0
        )
        check_world(args, self.accelerator, self.model)
        self.context_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.use_vllm:
            self.context_length = self._prepare_sampler()
        fingerprints: dict[str, str | None] = {"model": fingerprint(self.model)}
        starts_at_zero = getattr(peft_config, "init_lora_weights", False) in (True, "gaussian")
        self.teacher: Teacher = run.served_teacher or load_teacher(args, self.accelerator, self.model, starts_at_zero)
        fingerprints["teacher"] = self.teacher.fingerprint
        networks = make_networks(args, self.accelerator, self.model, self.teacher, self.pad_to_multiple_of)
        self.loss = SelfDistillationLoss(args, self.accelerator, networks, args.objective(), self.signals)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            networks.check_logits(self.model)
        announce_head(self.model)
        self._guard = SkipNonFiniteSteps()
        self.add_callback(self._guard)
        self.add_callback(StepCallback(self.teacher, self.signals, self.statistics["train"], self._begin_step))

        self.run_state = self._make_run_state(fingerprints)

    # Construction

    def _present_as(self, method: Method) -> None:
        """Model cards and tags of the Hub name and cite the method of the configuration."""
        self._name = method.name
        self._paper = {"title": method.title, "id": method.paper, "citation": method.citation}  # type: ignore[misc]
        self._tag_names = ["trl", "trl-opsd", method.name.lower().replace(" ", "-")]  # type: ignore[misc]

    @property
    def _samples_in_process(self) -> bool:
        return self.use_vllm and self.vllm_mode == "colocate"

    @property
    def _sampler_index(self) -> int:
        """Which of several streams of random numbers this process samples by: tensor-parallel ones share theirs."""
        return self.accelerator.process_index // (self.args.vllm_tensor_parallel_size if self.use_vllm else 1)

    def _make_run_state(self, fingerprints: dict[str, str | None]) -> RunState:
        data = dataset_summary(self.train_dataset, ("prompt", *self._data_columns))
        run_state = RunState(self.accelerator, self.args, data, fingerprints)
        run_state.add("teacher", self.teacher)
        run_state.add("guard", self._guard)
        run_state.add("schedules", self.signals)
        if isinstance(self.context, Stateful):
            run_state.add("context", self.context)
        run_state.add("counts", Attributes(self, num_generated_tokens="_num_generated_tokens"))
        rollouts = ProcessFiles("rollouts", self._leftover_rollouts, self._take_up_rollouts, self.accelerator)
        run_state.add("rollouts", rollouts)
        return run_state

    def _prepare_sampler(self) -> int:
        """The engine's context length. Refuses one that cannot sample this policy's rollouts in full."""
        generation, args = self.vllm_generation, self.args
        limit = prepare_sampler(generation, self.model, self._tokenizer, args.vllm_server_request_timeout)
        if self._samples_in_process:
            # The engine has seeded this process anew, by its number alone
            set_seed(args.seed + self._sampler_index)
        elif self.rollout_func is None:  # which may talk to the client itself
            report_failures(generation)
        longest = 0
        if not self.environment_factories:
            longest = longest_prompt(
                self.train_dataset, lambda prompts: self._tokenize_prompts(prompts)[0], self.accelerator
            )
        field = "vllm_max_model_length" if self._samples_in_process else "--max-model-len"
        check_engine_context(limit, longest, self.max_completion_length, field)
        return limit

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self._data_columns, "feedback"]))

    def preview_prompts(self) -> tuple[list[int], list[int] | None]:
        """
        The prompts of the first training row, as the model will read them.

        Returns:
            `tuple[list[int], list[int] | None]`: token ids of the student's and of the teacher's prompt; `None` for
            the teacher's if it needs the rollouts first, or if the row is left out.
        """
        row = next(iter(self.train_dataset))
        student_ids = self._tokenize_prompts([row["prompt"]])[0][0]
        return list(student_ids), self.teacher_prompt.token_ids(row, None, self.tools)

    # Rollouts

    def _tokenize_prompts(self, prompts: list):
        plain = isinstance(prompts[0], str)
        prompt_ids, *others = super()._tokenize_prompts(prompts if plain else [as_text(prompt) for prompt in prompts])
        if plain:
            prompt_ids = [without_end(self._tokenizer, ids) for ids in prompt_ids]
        for ids in prompt_ids:
            check_embedded(ids, self._tokenizer, self.teacher_prompt.num_embeddings)
        return prompt_ids, *others

    def _generate(self, prompts: list):
        self._first_turn = True
        self._empty_rollouts = set()
        self._extra_tokens = 0
        return super()._generate(prompts)

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        first_turn, self._first_turn = self._first_turn, False
        if not first_turn:
            return self._sample_rollouts(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        rollouts = partial(
            self._sample_rollouts, prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        )
        if not self.model.training or not self.completion_source.replaces_rollouts:
            return self._mark_empty_rollouts(*rollouts())[:2]
        completing = Completing(self._engines(rollouts, prompt_ids), self._rows, prompt_ids, gather_object)
        completions = completing(self.completion_source, self.args.seed, self.state.global_step)
        self._extra_tokens = completing.num_sampled - sum(map(len, completions.ids))
        for name, pair in completions.rates.items():
            self.statistics["train"].add_rate(name, *torch.tensor(pair, device=self.accelerator.device))
        return self._mark_empty_rollouts(completions.ids, completions.log_probs)[:2]

    def _sample_rollouts(self, *args: Any) -> tuple[list[list[int]], Any]:
        if not self._samples_in_process:
            return super()._generate_single_turn(*args)
        with self._random_numbers():
            return super()._generate_single_turn(*args)

    def _random_numbers(self, *stream: int) -> AbstractContextManager[None]:
        key = (self.state.global_step, int(self.model.training), self._sampler_index)
        return self._draws.random_numbers(key, stream, self.accelerator.device)

    def sample(self, prompt_ids: list[list[int]], sampling: Sampling, stream: int = 0) -> list[list[int]]:
        """
        Completions of the current policy, by the engine of the rollouts. All processes call this at once, with as many
        prompts each. Training goes on with the random numbers it would have had, and a resumed run draws the same.

        Args:
            prompt_ids (`list[list[int]]`):
                Prompts of this process, special tokens included.
            sampling ([`~trl_opsd.sampling.Sampling`]):
                How to draw tokens. Nothing else applies, whatever the rollouts are sampled by.
            stream (`int`, *optional*, defaults to `0`):
                Stream of random numbers to draw from: one of its own for each purpose. Those of evaluations are 1,
                those of contexts 2.

        Returns:
            `list[list[int]]`: token ids of each completion, the end-of-turn token included.

        Raises:
            ServerError: If the vLLM server failed. In training, the run then ends after a checkpoint.
        """
        with self._random_numbers(stream), evaluation_mode(self.model), self._sampling_as(sampling):
            return super()._generate_single_turn(prompt_ids, None, {}, 1)[0]

    @contextmanager
    def _sampling_as(self, sampling: Sampling) -> Iterator[None]:
        models = [self.model, causal_lm(self.model)]
        if self.use_vllm:
            changed = changed_settings(self.vllm_generation, vllm_settings(sampling, self.eos_token_ids), models)
        else:
            changed = changed_settings(self, transformers_settings(sampling, self.generation_kwargs), models)
        with changed:
            try:
                yield
            finally:
                # FSDP2 leaves it to a backward pass, which does not come, to shard the root module again
                for module in self.model_wrapped.modules() if self.is_fsdp_enabled else ():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def _sample_for_context(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        return self.sample(prompt_ids, Sampling(**cast(SampledContext, self.context).sampling), stream=2)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        # There is no generator without shuffling
        self.add_callback(OrderOfEpochs(getattr(sampler, "generator", None)))
        return sampler

    def _begin_step(self) -> None:
        self._first_micro_batch = self._step

    def _mark_empty_rollouts(self, completion_ids, logprobs):
        ids, logprobs, empty = with_stand_ins(completion_ids, logprobs, self.eos_token_ids[0])
        self._empty_rollouts |= empty
        return ids, logprobs, empty

    def _engines(self, rollouts: Callable[[], Any], prompt_ids: list[list[int]]) -> Engines:
        return Engines(
            rollouts=rollouts,
            # The groups are broken up, so every prompt is sampled by itself
            sample=lambda prompts: self._sample_rollouts(prompts, None, {}, 1),
            sample_teacher=self._sample_teacher,
            teacher_prompt=lambda index: self.teacher_prompt.token_ids(self._rows[index], None),
            encode=partial(encoded, self._tokenizer, self.eos_token_ids[0], self.max_completion_length),
            grade=lambda rows, completion_ids: self._grade(
                [self._rows[row] for row in rows], [prompt_ids[row] for row in rows], completion_ids
            ),
            process_index=self.accelerator.process_index,
        )

    def _sample_teacher(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        if self.use_vllm and self.args.teacher == "live":
            return self._sample_rollouts(prompt_ids, None, {}, 1)[0]
        policy, use_vllm = self.model_wrapped, self.use_vllm
        with self.teacher.weights(policy) as self.model_wrapped:
            self.use_vllm = False  # its engine holds the policy
            try:
                return super()._generate_single_turn(prompt_ids, None, {}, 1)[0]
            finally:
                self.model_wrapped, self.use_vllm = policy, use_vllm

    def _grade(
        self, rows: list[Mapping[str, Any]], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> list[bool | None]:
        """Whether completions are right by the reward functions, which log nothing of them."""
        prompts = [row["prompt"] for row in rows]
        completions = decoded(self._tokenizer, prompts[0], prompt_ids, completion_ids)
        kept = {name: vars(self)[name] for name in ("_rows", "_pending_extra_logs", "_pending_metrics")}
        self._rows, self._pending_extra_logs, self._pending_metrics = rows, defaultdict(list), defaultdict(list)
        try:
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids)
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
        own = rewards[self.accelerator.process_index * len(rows) :][: len(rows)]
        totals = total_rewards(own, self.reward_weights).tolist()
        return [None if math.isnan(total) else total >= self.args.success_threshold for total in totals]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.reward_funcs:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            num_rollouts = len(prompts) * self.accelerator.num_processes
            rewards = torch.zeros(num_rollouts, 0, device=self.accelerator.device)
        self._generation = Generation(
            rows=[{**row, "prompt": prompt} for row, prompt in zip(inputs, prompts, strict=True)],
            completions=completions,
            token_ids=completion_ids_list,
            rewards=rewards,
            feedback=all_feedback(self._pending_extra_logs.get("feedback"), self.environments, inputs),
            tools=[self._env_tools[name] for name in self._batch_environments]
            if self.environment_factories
            else [self.tools] * len(inputs),
            empty=self._empty_rollouts,
        )
        return rewards

    def _log_completion_extra(self, column, values):
        if column == "feedback":
            who = " or ".join(f"`{name}`" for name in self.reward_func_names)
            values = check_feedback(values, len(self._rows), f"The reward function {who}")
            earlier = self._pending_extra_logs.pop("feedback", None) or [None] * len(values)
            values = [joined_feedback(*pair) for pair in zip(earlier, values, strict=True)]
        super()._log_completion_extra(column, values)

    def _prepare_inputs(self, generation_batch):
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        fresh = self._buffered_inputs is not buffered
        if fresh and self.num_generations > 1 and self.loss.networks.can_share_prompts:
            # GRPO's shuffle scatters the rollouts of a prompt over micro-batches, where each would pay for the
            # teacher's prompt again. Rows change places among the micro-batches of one optimizer step only, so that
            # every step keeps the rows the shuffle gave it: the greatest common divisor never straddles two steps.
            steps = self.args.steps_per_generation
            window = math.gcd(steps, self.args.gradient_accumulation_steps)
            self._buffered_inputs = keep_groups_together(self._buffered_inputs, window, "teacher_prompt_groups")
            inputs = self._buffered_inputs[self._step % steps]
        return inputs

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._generation_step = self.state.global_step
        self._rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        if not self.reward_funcs:
            for name in ("reward", "reward_std", "frac_reward_zero_std"):
                self._metrics[mode].pop(name, None)
        batch = self._add_teacher_inputs(batch, mode)
        streams = make_streams(
            self.signals,
            batch,
            self._empty_rollouts,
            partial(self._score, mode=mode),
            partial(self.accelerator.reduce, reduction="sum"),
            self.statistics[mode],
        )
        if self.signals.policy_weightings:
            # Under the policy that sampled, where it is not the student in every loss to come
            names = ["sampling_per_token_logps"] if self._compares_with_sampler else []
            given = (batch.get(name) for name in [*names, "old_per_token_logps"])
            batch["old_log_probs"] = next((values for values in given if values is not None), None)
        return batch | streams

    def _score(self, batch: dict[str, Any], mode: str) -> TokenScores:
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        scores, output = self.loss.scores(self.model_wrapped, batch, size)
        if not self.signals.coefficients["divergence_coef"]:  # or the loss says it
            self._add_divergence(mode, output)
        return scores

    def _add_teacher_inputs(self, batch: dict[str, Any], mode: str) -> dict[str, Any]:
        device, size = self.accelerator.device, self.num_generations if mode == "train" else self.num_generations_eval
        student_ids = [
            ids[mask].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        ]
        teacher_ids, tensors = self._teacher_inputs(self._generation, student_ids, size, self.statistics[mode])
        batch.update(self.teacher.annotate(teacher_ids, batch))
        groups = tensors.pop("teacher_prompt_groups")  # no work for the device
        batch.update({name: values.to(device) for name, values in tensors.items()}, teacher_prompt_groups=groups)
        self._count_tokens(batch.get("tool_mask", 1) * batch["completion_mask"], mode)
        add_contexts(self.statistics[mode], batch, len(self._empty_rollouts))
        return batch

    def _count_tokens(self, model_tokens: torch.Tensor, mode: str) -> None:
        num_stand_ins = model_tokens[sorted(self._empty_rollouts)].sum()
        num_generated = model_tokens.sum() + self._extra_tokens - num_stand_ins
        num_generated = self.accelerator.reduce(num_generated, "sum")
        if mode == "train":
            self._num_generated_tokens += int(num_generated)
        self._metrics[mode]["num_generated_tokens"] = [self._num_generated_tokens]

    # Loss

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        num_micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
        num_generation_batches = self.args.steps_per_generation if mode == "train" else 1
        policy = partial(policy_term, self._given, self._reads_log_probs) if self._shares_student_pass else None
        loss, output, likelihood, passes = self.loss(model, inputs, num_micro_batches, num_generation_batches, policy)
        metrics = self.statistics[mode]
        if self.signals.coefficients["divergence_coef"]:
            self._add_divergence(mode, output)
            fresh = mode == "eval" or self.state.global_step == self._generation_step
            if self._compares_with_sampler and fresh and "sampling_per_token_logps" in inputs:
                sampled = [rows["sampling_per_token_logps"][rows["divergence_mask"].bool()] for rows in passes]
                add_sampler_difference(metrics, output.student_log_prob, torch.cat(sampled))
        if self.signals.coefficients["likelihood_coef"]:
            metrics.add_rate("likelihood_loss", likelihood.sum(), likelihood.new_tensor(len(likelihood)))
        if self._has_grpo_terms and not self._shares_student_pass:
            loss = loss + self._grpo_loss(model, inputs, mode)
        if mode == "eval" or self.accelerator.sync_gradients:
            metrics.reduce(self.accelerator.gather)
        return loss

    def _add_divergence(self, mode: str, output: FusedDivergence) -> None:
        clips = self.args.divergence_clip is not None
        add_divergence(self.statistics[mode], output, self.teacher.knows_entropy, clips)

    def _grpo_loss(self, model, inputs, mode):
        """GRPO's own loss. What it logs becomes sums and counts."""
        kept, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        advantages = inputs["advantages"] * self.signals.coefficients["policy_loss_coef"]
        try:
            loss = super()._compute_loss(model, {**inputs, "advantages": advantages})
        finally:
            logged, self._metrics[mode] = self._metrics[mode], kept
        tokens = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        by_sequence = self.importance_sampling_level == "sequence" and advantages.dim() == 1
        for name, values in add_policy(self.statistics[mode], logged, tokens, by_sequence).items():
            kept[name] += values
        return loss

    def _given(self, inputs: dict[str, Any], log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """GRPO's own loss, of these log-probabilities of the student."""
        self._given_log_probs = log_probs, entropies, None
        try:
            return self._grpo_loss(self.model, inputs, "train" if self.model.training else "eval")
        finally:
            self._given_log_probs = None

    def _reads_log_probs(self, inputs: dict[str, Any]) -> bool:
        """Whether GRPO's loss or its gradient depends on the values of the student's log-probabilities."""
        return (
            inputs.get("old_per_token_logps") is not None
            or self.beta != 0.0
            or self.loss_type in ("cispo", "vespo")
            or self.off_policy_mask_threshold is not None
            or self.top_entropy_quantile < 1.0
        )

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs
    ):
        if self._given_log_probs is not None:
            return self._given_log_probs
        if not self._shares_student_pass:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs
            )
        # Ratios are to what is computed in the same way, or rounding would take part in them
        batch_size = batch_size or len(input_ids)
        return *self.loss.networks.log_probs(model, input_ids, attention_mask, logits_to_keep, batch_size), None

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        values = self.statistics[mode].take()
        if values and mode == "train":
            values["skipped_steps/total"] = self._guard.skipped_steps
        self._metrics[mode].update({name: [value] for name, value in values.items()})
        is_negative = self.args.divergence_clip is not None and values.get("distillation_loss", 0.0) < 0.0
        if is_negative and not self._warned_about_clip:
            self._warned_about_clip = True
            warn_of_clip(self.args.divergence_clip, values["distillation_loss"])
        super().log(logs, start_time)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = self.run_state.checkpoint(resume_from_checkpoint)
        with self.run_state.alone():
            try:
                return super().train(checkpoint, *args, **kwargs)
            except ServerError as error:  # of a sampler or a teacher, wherever it was asked
                raise ServerError(f"{error} {self._save_after_failure()}") from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The checkpoint is of the last step, and within an epoch transformers would take one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(Path(resume_from_checkpoint), self.model)

    def _load_best_model(self):
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            load_weights(Path(cast(str, self.state.best_model_checkpoint)), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.run_state.load(Path(checkpoint))

    def _checkpoint_folder(self, trial: Any = None) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model, trial):
        with self.run_state.saving(self._checkpoint_folder(trial), self.state):
            super()._save_checkpoint(model, trial)

    def _save_after_failure(self) -> str:
        """Make a checkpoint where one can be made. Says what became of the run."""
        if self.state.global_step == 0:
            return "No step had been trained."
        # Sampling may come in the middle of a step, whose first micro-batches a resumed run begins with
        if self._step != self._first_micro_batch and self._first_micro_batch % self._generate_every:
            return "Resume from the last checkpoint: between two generations none could be made."
        directory = self._checkpoint_folder()
        if not self.run_state.is_saved(directory):
            only_model, self.args.save_only_model = self.args.save_only_model, False
            self._save_checkpoint(self.model, trial=None)
            self.args.save_only_model = only_model
        return f"The run is saved in {directory}: start the server and resume with `resume_from_checkpoint`."

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _leftover_rollouts(self) -> dict[str, Any]:
        # Between two generations, micro-batches are left over that a resumed run could not sample again
        return {"step": self._step, "pending": self._buffered_inputs if self._step % self._generate_every else None}

    def _take_up_rollouts(self, rollouts: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = rollouts["step"], rollouts["pending"]
