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
- `_get_train_sampler(dataset)` returns a `RepeatSampler`, which draws the order of each epoch from its `generator`.
- `_load_from_checkpoint(checkpoint, model)` and `_load_best_model()`, of transformers, load the policy's weights; with
  DeepSpeed only the second is called. vLLM is sent them where `_last_loaded_step` is not the step.
- `_pending_extra_logs` and `_pending_metrics` hold what reward functions log of a batch until it is logged.
- `_tokenize_prompts(prompts)`, `_metrics[mode]`, `_save_checkpoint(model, trial)`,
  `_load_optimizer_and_scheduler(checkpoint)`, `_set_signature_columns_if_needed()`, `_is_vlm`, a batch's `num_images`.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..changed import changed
from ..context import Memory, SampledContext, as_text, check_embedded, without_end
from ..data import TEACHER_IMAGES, prompt_of
from ..objective import generalized_jsd_loss
from ..sampling import Sampling
from ..scoring import announce_head, causal_lm, images_apart, images_together
from ..serving import engine_for_adapters
from ..signal import TokenScores
from ..teacher import Teacher, fingerprint
from .batch import Generation, TeacherInputs, regrouped
from .checkpoints import load_weights
from .checks.model import check_grpo_loss
from .checks.parts import check_context, check_signals
from .checks.world import check_world
from .completing import Completing, Engines, encoded, with_stand_ins, without_empty
from .config import SelfDistillationConfig
from .curriculum import DrawnRows
from .guards import roll_back
from .images import log_images
from .loss import make_loss
from .method import presented
from .metrics import Metrics
from .policy import GRPOLoss
from .preparation import Prepared, checked_arguments, checked_rows, prepare
from .prompts import PromptExchange, settled
from .random_numbers import random_numbers
from .record import RunRecord
from .rewards import added_feedback, all_feedback, check_finite, forget_rewards, graded, hand_policy, no_reward
from .run_state import Attributes, LeftoverRollouts, RunState, Stateful, dataset_summary
from .sampler import PolicySampler
from .sampling_settings import teacher_settings
from .several import teacher_names
from .signals import make_streams, may_shape_in_loss
from .steps import OrderOfEpochs, StepCallback
from .teachers import load_teacher


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
            As in [`~trl.GRPOTrainer`]: `eval_dataset`, `processing_class`, `reward_processing_classes`, `callbacks`,
            `optimizers`, `quantization_config`, `peft_config`, `tools`, `rollout_func`, `environment_factory`.

    Raises:
        ValueError: If the data, the tokenizer or the configuration cannot work, naming what and the way out.
    """

    config_class: ClassVar[type[SelfDistillationConfig]] = SelfDistillationConfig

    args: SelfDistillationConfig
    _name: str
    _paper: dict[str, str]
    _tag_names: list[str]
    reward_weights: torch.Tensor
    _buffered_inputs: Any
    _signature_columns: list[str]

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: SelfDistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ):
        args = checked_arguments(args, self.config_class, type(self), model)
        self._name, self._paper, self._tag_names = presented(args.method)
        given = processing_class, train_dataset, eval_dataset, reward_funcs, peft_config, tools, rollout_func
        run = prepare(args, model, *given, environment_factory)
        self.context, self.completion_source, self.signals = run.context, run.completions, run.signals
        self.guards, self.teacher_prompt, self._data_columns = run.guards, run.teacher_prompt, run.columns
        self._generation, self._generation_step, self._first_micro_batch = Generation([]), -1, 0
        self._num_generated_tokens, self.statistics = 0, {"train": Metrics(), "eval": Metrics()}
        self.observers: list[Callable[[dict[str, Any], Generation], None]] = []
        self.record = RunRecord(self)
        with engine_for_adapters(args.vllm_lora_sync):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs or [no_reward],
                args=args,
                train_dataset=run.train_dataset,
                eval_dataset=run.eval_dataset,
                processing_class=run.processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=[*(callbacks or []), self.record],
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=None if rollout_func is None else without_empty(rollout_func, self._mark_empty_rollouts),
                environment_factory=environment_factory,
            )
        self._settle_rewards(run, environment_factory)
        self._prepare_policy_term()
        check_world(args, self.accelerator, self.model, run.train_dataset, run.eval_dataset)
        self._prepare_sampling(run)
        self._prepare_loss(run, getattr(peft_config, "init_lora_weights", False) in (True, "gaussian"))
        hand_policy(self.reward_funcs, self.model, self._tokenizer, self.tokenize_prompts, args)

    def _settle_rewards(self, run: Prepared, environment_factory: Any) -> None:
        names = ("reward_funcs", "reward_func_names", "reward_processing_classes", "reward_weights")
        self.__dict__.update(zip(names, settled(run.prompts, *(getattr(self, name) for name in names)), strict=True))
        if environment_factory is not None and not self.reward_funcs:  # it gives none, which is known only now
            check_signals(self.signals, self.args, has_reward=False)
            check_context(self.context, self.num_generations, run.train_dataset, has_rewards=False, has_feedback=True)

    def _prepare_policy_term(self) -> None:
        self.grpo_loss = GRPOLoss(
            self.args,
            super()._compute_loss,
            self._metrics,
            self.statistics,
            self.signals.coefficients,
            self.signals.has_term("policy_loss_coef"),
            needs_own_pass=self._entropy_bonus_enabled or self.aux_loss_enabled,
        )
        takes_pass = self.grpo_loss.takes_part and not self.grpo_loss.shares_pass
        check_grpo_loss(self.args, causal_lm(self.model), takes_pass, self.aux_loss_enabled, self.router_aux_loss_coef)

    def _prepare_sampling(self, run: Prepared) -> None:
        args, tokenizer = self.args, self._tokenizer
        self.teacher_prompt.chat_template = self.chat_template
        self.sampler = PolicySampler(
            args,
            self.accelerator,
            self.model,
            wrapped=lambda: self.model_wrapped,
            generate=lambda *asked: GRPOTrainer._generate_single_turn(self, *asked),
            changing=partial(changed, self),
            engine=self.vllm_generation if self.use_vllm else None,
            generation_kwargs=None if self.use_vllm else self.generation_kwargs,
            end_token_ids=self.eos_token_ids,
            where=lambda: (self.state.global_step, self.model.training),
            teacher_settings=teacher_settings(args, self.completion_source, tokenizer, self.eos_token_ids),
        )
        size = args.per_device_train_batch_size
        known = self._unlogged_rewards, tokenizer, self.reward_weights, args.success_threshold
        self._engines = Engines(
            sample=lambda prompts: self.sampler.turn(prompts, None, {}, 1),  # groups are broken up
            sample_teacher=lambda prompts: self.sampler.sample_teacher(prompts, self.teacher),
            teacher_prompt=self.teacher_prompt.before_rollouts,
            share_in_top_k=lambda *asked: self.loss.networks.share_in_top_k(self.model_wrapped, size, *asked),
            encode=partial(encoded, tokenizer, self.eos_token_ids[0], self.max_completion_length),
            grade=partial(graded, *known, self.accelerator.process_index),
            process_index=self.accelerator.process_index,
            num_generations=self.num_generations,
            gather=gather_object,
        )
        asked = tokenizer, None if self.environment_factories else self.train_dataset, self.tokenize_prompts
        self.context_length = self.sampler.prepare(*asked, reports_failures=self.rollout_func is None)
        longest = None if self.context_length is None else self.context_length - (self.max_completion_length or 0)
        given = args.success_threshold, args.seed, self.accelerator.process_index, gather_object, self.tokenize_prompts
        self._exchange = PromptExchange(run.prompts, self.num_generations, *given, longest)

    def _prepare_loss(self, run: Prepared, adapter_starts_at_zero: bool) -> None:
        args, accelerator, padding = self.args, self.accelerator, self.pad_to_multiple_of
        self.teacher_inputs = TeacherInputs(
            self.teacher_prompt,
            self.signals,
            self.reward_weights,
            args.success_threshold,
            (*self.eos_token_ids, self._tokenizer.pad_token_id),
            self._tokenizer.pad_token_id,
            padding,
            accelerator.process_index,
            accelerator.num_processes,
            gather_object,
            lambda prompts: self.sample(prompts, Sampling(**cast(SampledContext, self.context).sampling), stream=2),
            [cast(Memory, part) for part in (self.context, run.prompts) if isinstance(part, Memory)],
        )
        initial, given = fingerprint(self.model), (args, accelerator, self.model)
        self.teacher: Teacher = load_teacher(*given, adapter_starts_at_zero, run.served_teachers)
        self.loss = make_loss(*given, self.teacher, self.signals, padding)
        announce_head(self.model)
        self.guards.watch(lambda: self.statistics["train"].latest)
        seen = self.teacher, self.signals, self.statistics["train"], args.divergence_clip
        for callback in (self.guards, StepCallback(*seen, self._begin_step, self.sampler.take_seconds)):
            self.add_callback(callback)
        data = dataset_summary(self.train_dataset, ("prompt", *self._data_columns))
        self.run_state = RunState(accelerator, args, data, {"model": initial, "teacher": self.teacher.fingerprint})
        self.run_state.add("teacher", self.teacher)
        parts = {"guards": self.guards, "schedules": self.signals, "context": self.context, "prompts": run.prompts}
        for name, part in parts.items():
            if isinstance(part, Stateful):
                self.run_state.add(name, part)
        self.run_state.add("counts", Attributes(self, num_generated_tokens="_num_generated_tokens"))
        position = Attributes(self, step="_step", pending="_buffered_inputs")
        self.run_state.add("rollouts", LeftoverRollouts(position, self._generate_every, accelerator))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = [*self._signature_columns, *self._data_columns, TEACHER_IMAGES, "feedback"]
        self._signature_columns = list(dict.fromkeys(columns))

    def preview_prompts(self) -> tuple[list[int], list[int] | None]:
        """Token ids of the first training row's prompts: no teacher's if it needs rollouts or the row is left out."""
        row = next(iter(self.train_dataset))
        return list(self.tokenize_prompts([prompt_of(row)])[0]), self.teacher_prompt.token_ids(row, None, self.tools)

    def _tokenize_prompts(self, prompts: list):
        plain = isinstance(prompts[0], str)
        given = prompts if plain or self._is_vlm else [as_text(prompt) for prompt in prompts]
        prompt_ids, *others = super()._tokenize_prompts(given)
        if plain:
            prompt_ids = [without_end(self._tokenizer, ids) for ids in prompt_ids]
        for ids in prompt_ids:
            check_embedded(ids, self._tokenizer, self.teacher_prompt.num_embeddings)
        return prompt_ids, *others

    def tokenize_prompts(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of the student's prompts, text or messages."""
        return self._tokenize_prompts(prompts)[0]

    def _generate(self, prompts):
        self.log_multimodal = False  # GRPOTrainer's
        logs = self._logs["images"] if self._is_vlm and self.args.log_multimodal else None
        return log_images(prompts, *super()._generate(prompts), logs=logs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        asked = prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        generation = self._generation
        if generation.has_turns:
            return self.sampler.turn(*asked)
        generation.has_turns = True
        if not self.model.training or not self.completion_source.replaces_rollouts:
            return self._mark_empty_rollouts(*self.sampler.turn(*asked))[:2]
        completing = Completing(self._engines, generation, prompt_ids, partial(self.sampler.turn, *asked))
        completions = completing(self.completion_source, self.args.seed, self.state.global_step)
        self.statistics["train"].add_rates(completions.rates, self.accelerator.device)
        return self._mark_empty_rollouts(completions.ids, completions.log_probs)[:2]

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
                Stream of random numbers to draw from, one for each purpose: evaluations have 1, contexts 2.

        Returns:
            `list[list[int]]`: token ids of each completion, the end-of-turn token included.

        Raises:
            ServerError: If the vLLM server failed. In training, the run then ends after a checkpoint.
        """
        return self.sampler.sample(prompt_ids, sampling, stream)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if self.signals.curriculum is not None:
            sampler = DrawnRows(sampler, self.signals, self.tokenize_prompts)
        self.add_callback(OrderOfEpochs(getattr(sampler, "generator", None)))  # there is none without shuffling
        return sampler

    def _begin_step(self) -> None:
        self._first_micro_batch = self._step

    def _mark_empty_rollouts(self, completion_ids, logprobs):
        ids, logprobs, empty = with_stand_ins(completion_ids, logprobs, self.eos_token_ids[0])
        self._generation.empty |= empty
        return ids, logprobs, empty

    def _unlogged_rewards(self, rows, prompts, completions, completion_ids) -> torch.Tensor:
        empty: Any = {name: defaultdict(list) for name in ("_pending_extra_logs", "_pending_metrics")}
        with changed(self, _generation=Generation(rows), **empty):
            return super()._calculate_rewards(rows, prompts, completions, completion_ids)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        given = inputs, prompts, completions, completion_ids_list
        rewards = torch.zeros(len(prompts) * self.accelerator.num_processes, 0, device=self.accelerator.device)
        if self.reward_funcs:
            rewards = check_finite(super()._calculate_rewards(*given), self.reward_func_names)
        rewards = self._exchange.rewards(rewards, self.reward_weights) if self.model.training else rewards
        feedback = all_feedback(self._pending_extra_logs.get("feedback"), self.environments, inputs)
        names = self._batch_environments if self.environment_factories else []
        tools = [self._env_tools[name] for name in names] or [self.tools] * len(inputs)
        self._generation.finish(*given, rewards, feedback, tools)
        return rewards

    def _log_completion_extra(self, column, values):
        if column == "feedback":
            earlier = self._pending_extra_logs.pop("feedback", None)
            values = added_feedback(earlier, values, len(self._generation.rows), self.reward_func_names)
        super()._log_completion_extra(column, values)

    def _prepare_inputs(self, generation_batch):
        buffered, inputs = self._buffered_inputs, super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not buffered and self.num_generations > 1 and self.loss.networks.can_share_prompts:
            steps = self.args.steps_per_generation
            self._buffered_inputs = regrouped(self._buffered_inputs, steps, self.args.gradient_accumulation_steps)
            inputs = self._buffered_inputs[self._step % steps]
        return inputs

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        metrics, size = self.statistics[mode], self.num_generations if mode == "train" else self.num_generations_eval
        if mode == "train":
            self._generation_step = self.state.global_step
            inputs = self._exchange.rows(inputs, self.state.global_step)
        self._generation = Generation(inputs)
        batch = images_apart(super()._generate_and_score_completions(inputs))
        if not self.reward_funcs:
            forget_rewards(self._metrics[mode])
        self.teacher_inputs.into(batch, self._generation, size, self.teacher.annotate, metrics, mode == "train")
        num_sampled = self._generation.num_sampled_tokens(batch.get("tool_mask", 1) * batch["completion_mask"])
        self._num_generated_tokens += int(self.accelerator.reduce(num_sampled, "sum")) * (mode == "train")
        self._metrics[mode]["num_generated_tokens"] = [self._num_generated_tokens]
        given = self.signals, self.args, batch, self._generation.empty, partial(self._score, mode=mode)
        in_loss = may_shape_in_loss(self.args, self.grpo_loss.shares_pass, self.model)
        batch |= make_streams(*given, self.accelerator, size, mode == "train", metrics, in_loss)
        for observe in self.observers:
            observe(batch, self._generation)
        return batch

    def _score(self, batch: dict[str, Any], mode: str) -> TokenScores:
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        return self.loss.scores(self.model_wrapped, batch, size, self.statistics[mode], self._generation.contrasts)

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        num_micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
        num_generation_batches = self.args.steps_per_generation if mode == "train" else 1
        result = self.loss(model, inputs, num_micro_batches, num_generation_batches, self.grpo_loss.term(model, mode))
        # Weights that have moved since the rollouts were sampled are not the sampler's
        is_fresh = mode == "eval" or self.state.global_step == self._generation_step
        self.loss.add_metrics(self.statistics[mode], result, self.args.sampler_is_comparable and is_fresh)
        loss = result.loss
        if self.grpo_loss.takes_part and not self.grpo_loss.shares_pass:
            loss = loss + self.grpo_loss(model, images_together(self.model, inputs), mode)
        if mode == "eval" or self.accelerator.sync_gradients:
            self.statistics[mode].reduce(self.accelerator.gather)
        return loss

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs
    ):
        given = model, input_ids, attention_mask, logits_to_keep
        if self.grpo_loss.given is not None:
            return self.grpo_loss.given
        if not self.grpo_loss.shares_pass:
            return super()._get_per_token_logps_and_entropies(*given, batch_size, *args, **kwargs)
        # Ratios are to what is computed in the same way, or rounding would take part in them
        return *self.loss.networks.log_probs(*given, batch_size, images_apart(kwargs).get("images")), None

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        values = self.statistics[mode].take()
        values |= self.guards.current() if values and mode == "train" else {}
        self._metrics[mode].update({name: [value] for name, value in values.items()})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if isinstance(eval_dataset, Dataset | IterableDataset) and not self.environment_factories:
            given = self.teacher_prompt, self._data_columns, self.tools, teacher_names(self.args)
            eval_dataset = checked_rows(eval_dataset, "eval_dataset", *given)
        with random_numbers(self.args.seed, self.state.global_step, device=self.accelerator.device):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = self.run_state.checkpoint(resume_from_checkpoint)
        save = partial(self._save_checkpoint, self.model, trial=None)
        with self.run_state.alone(), self.run_state.rescuing(self._place, save):
            output = super().train(checkpoint, *args, **kwargs)
            roll_back(self.guards, self.run_state, self.args, self.state, self._load_best_model)
            return output

    def _place(self) -> tuple[Path, int, bool]:
        # Sampling may come in the middle of a step, whose first micro-batches a resumed run begins with
        is_between = self._step != self._first_micro_batch and self._first_micro_batch % self._generate_every != 0
        return self._folder(), self.state.global_step, is_between

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # in a checkpoint of the last step, or one more would be taken
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_weights(Path(resume_from_checkpoint), self.model)

    def _load_best_model(self):
        self._last_loaded_step = -1  # vLLM's weights are others
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            return super()._load_best_model()
        return load_weights(Path(cast(str, self.state.best_model_checkpoint)), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.run_state.load(Path(checkpoint))

    def _folder(self, trial: Any = None) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model, trial):
        kept = self.guards.kept(self._folder(trial), self.state.best_model_checkpoint)
        with self.run_state.saving(self._folder(trial), *kept):
            super()._save_checkpoint(model, trial)

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations
