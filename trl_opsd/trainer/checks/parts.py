"""What a method's parts, its rows and its rewards cannot do together, known before the model is loaded."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset

from ...context import MarkingContext, NoContext, PrivilegedContext, SampledContext
from ...sampling.prompts import PromptSource, RewardingPromptSource
from ...sampling.sources import CompletionSource
from ...signal import Advantage, Signals, TokenWeighting
from ..config import SelfDistillationConfig
from ..several import each_teacher, has_served_teacher


def check_number_of_rows(args: SelfDistillationConfig, train_dataset: Any) -> None:
    """
    Refuse a training set that is smaller than a batch.

    Raises:
        ValueError: If no batch could be drawn.
    """
    prompts_per_batch = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < prompts_per_batch:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} rows, fewer than the {prompts_per_batch} prompts of one "
            "generation batch, so no batch could be drawn. Add rows, or lower `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `steps_per_generation`."
        )


def check_curriculum(
    args: SelfDistillationConfig, train_dataset: Any, has_rewards: bool, environment_factory: Any
) -> None:
    """
    Refuse a curriculum that could not draw, or would learn nothing.

    Raises:
        ValueError: If there are no rewards, or the rows or their prompts are not known beforehand.
    """
    if args.curriculum is None:
        return
    setting = f"`curriculum={args.curriculum!r}`"
    if not has_rewards:
        raise ValueError(f"{setting} goes by which rollouts are correct. Pass `reward_funcs`, or leave it unset.")
    if not isinstance(train_dataset, Dataset) or environment_factory is not None:
        raise ValueError(
            f"{setting} draws rows by their prompts, which a streaming dataset or an environment does not give "
            "beforehand. Leave it unset."
        )


def check_named_teachers(names: Mapping[str, Sequence[str]], train_dataset: Any, environment_factory: Any) -> None:
    """
    Refuse environments where rows choose their teacher, and say which teachers no row chooses.

    Args:
        names (`Mapping[str, Sequence[str]]`):
            The column in which rows name one of several teachers, and the names. Empty for one teacher.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training set.
        environment_factory (`Any`):
            Makes environments, if there are any.

    Raises:
        ValueError: If environments make the rows.
    """
    for column, known in names.items():
        if environment_factory is not None:
            raise ValueError(
                f"`teacher='several'` reads the column {column!r} of each row, and environments make their own rows. "
                "Leave `environment_factory` out, or choose one teacher."
            )
        if isinstance(train_dataset, Dataset) and train_dataset.format["type"] != "custom":
            for name in sorted({*known} - {*train_dataset.unique(column)}):
                warnings.warn(
                    f"No row of `train_dataset` has the teacher {name!r} in its column {column!r}: it is loaded, and "
                    "reads nothing.",
                    stacklevel=2,
                )


def check_served_live_teacher(args: SelfDistillationConfig, rollout_func: Any) -> None:
    """
    Refuse a live teacher on a server that is not sent the current weights.

    Raises:
        ValueError: If something else samples the rollouts.
    """
    teachers = each_teacher(args).values()
    is_live = any(its.teacher == "live" and its.teacher_server_base_url is not None for its in teachers)
    if is_live and rollout_func is not None:
        raise ValueError(
            "`teacher_server_base_url` with `teacher='live'` cannot be combined with `rollout_func`: the server is "
            "sent the current weights when it samples the rollouts. Drop one of them."
        )


def check_context(
    context: PrivilegedContext, num_generations: int, train_dataset: Any, has_rewards: bool, has_feedback: bool
) -> None:
    """
    Refuse a context that could never be given, and let it see the training set if it wants to.

    Args:
        context ([`PrivilegedContext`]):
            The context.
        num_generations (`int`):
            Rollouts of a prompt.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Training set, whose column `feedback` gives feedback.
        has_rewards (`bool`):
            Whether there may be rewards.
        has_feedback (`bool`):
            Whether anything else may give feedback.

    Raises:
        ValueError: If the context says so.
    """
    if hasattr(context, "check_run"):
        columns: Iterable[str] = ()
        if train_dataset is not None:
            columns = train_dataset.column_names or next(iter(train_dataset), {})
        context.check_run(num_generations, has_rewards, has_feedback or "feedback" in columns)
    if hasattr(context, "read_dataset"):
        context.read_dataset(train_dataset)


def check_completions(
    args: SelfDistillationConfig,
    source: CompletionSource,
    context: PrivilegedContext,
    has_reward_funcs: bool,
    given: Mapping[str, Any],
) -> None:
    """
    Refuse a source of completions that could not give any.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        source ([`~trl_opsd.sampling.sources.CompletionSource`]):
            What it names.
        context ([`PrivilegedContext`]):
            What the teacher reads.
        has_reward_funcs (`bool`):
            Whether there are reward functions.
        given (`Mapping[str, Any]`):
            What the trainer is given that says itself what completions are: `tools`, `environment_factory`,
            `rollout_func`.

    Raises:
        ValueError: Naming `completions` and the way out.
    """
    setting = f"`completions={args.completions!r}`"
    if not isinstance(source, CompletionSource):
        raise ValueError(f"{setting} is no subclass of `trl_opsd.sampling.sources.CompletionSource`. Make it one.")
    if not source.replaces_rollouts:
        return
    if names := [f"`{name}`" for name, value in given.items() if value]:
        raise ValueError(
            f"{setting} replaces rollouts by completions that have no tool calls and no environment. Set "
            f"`completions='on_policy'`, or drop {' and '.join(names)}."
        )
    if args.divergence_support == "sampled_token":
        raise ValueError(
            "`divergence_support='sampled_token'` estimates the divergence from tokens the student sampled, and "
            f"{setting} replaces some of them. Set `completions='on_policy'`, or choose another support."
        )
    if cast(int, args.num_generations) % source.group_size:
        raise ValueError(
            f"{setting} needs `num_generations` to be a multiple of {source.group_size}, got {args.num_generations}."
        )
    if source.needs_rewards and not has_reward_funcs:
        raise ValueError(f"{setting} has to tell right from wrong. Pass `reward_funcs`.")
    if source.needs_context:
        _check_context_of(source, setting, args, context)
    _check_teachers_of(source, setting, args)


def _check_teachers_of(source: CompletionSource, setting: str, args: SelfDistillationConfig) -> None:
    if source.samples_teacher and args.teacher == "several":
        raise ValueError(
            f"{setting} samples from the teacher, and `teacher='several'` has one for some rows and another for "
            "others. Choose other completions, or one teacher."
        )
    for its in each_teacher(args).values():
        if its.teacher_server_base_url is None:
            continue
        if source.samples_teacher:
            raise ValueError(
                f"{setting} samples from weights that `teacher_server_base_url` keeps elsewhere. Choose other "
                "completions."
            )
        if its.teacher == "live":
            raise ValueError(
                f"`teacher_server_base_url` with `teacher='live'` needs `completions='on_policy'`, not {setting}: the "
                "server is sent the current weights when it samples rollouts, which other completions may not need."
            )


def check_prompts(args: SelfDistillationConfig, source: Any, has_reward_funcs: bool, environment_factory: Any) -> None:
    """
    Refuse a source of prompts that could not work.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        source ([`~trl_opsd.sampling.prompts.PromptSource`]):
            What `prompts` names.
        has_reward_funcs (`bool`):
            Whether there are reward functions.
        environment_factory (`Any`):
            Makes environments, if there are any.

    Raises:
        ValueError: If it is none, lacks rewards to add to, or environments make the prompts.
    """
    setting = f"`prompts={args.prompts!r}`"
    if not isinstance(source, PromptSource):
        raise ValueError(f"{setting} is no subclass of `trl_opsd.sampling.prompts.PromptSource`. Make it one.")
    if isinstance(source, RewardingPromptSource) and not has_reward_funcs:
        raise ValueError(f"{setting} adds to rewards. Pass `reward_funcs`, or leave it unset.")
    if environment_factory is not None:
        raise ValueError(f"{setting} exchanges prompts, which environments make. Leave one of them unset.")
    scale = cast(Any, args.scale_rewards)
    source.check_run({True: "group", False: "none"}.get(scale, scale))


def _check_context_of(
    source: CompletionSource, setting: str, args: SelfDistillationConfig, context: PrivilegedContext
) -> None:
    kind = f"`privileged_context={args.privileged_context!r}`"
    if isinstance(context, NoContext):
        raise ValueError(f"{setting} reads the privileged context, and {kind} is none. Choose another one.")
    if isinstance(context, SampledContext) or getattr(context, "reads_rollouts", True):
        raise ValueError(
            f"{setting} reads the privileged context while completions are made, and {kind} is known only after "
            "them. Choose a context that neither reads rollouts nor samples."
        )
    if source.samples_teacher and args.use_vllm and args.teacher != "live":
        for name in ("generation_kwargs", "vllm_structured_outputs_regex"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{setting} samples from the teacher with transformers, which takes no "
                    f"`{name}={getattr(args, name)!r}` of vLLM's. Leave it unset."
                )


def _check_likelihood_alone(name: str, signals: Signals, args: SelfDistillationConfig) -> None:
    who = f"`token_weights` has {name}, in whose batches the policy reads the teacher's prompt"
    if args.teacher != "live":
        raise ValueError(f"{who}, and `teacher='{args.teacher}'` is another. Set `teacher='live'`, or leave it out.")
    if args.privileged_context == "none":
        raise ValueError(f"{who}, and `privileged_context='none'` is the student's. Choose another one.")
    others = [f"`{field}={getattr(args, field)}`" for field in ("policy_loss_coef", "beta") if getattr(args, field)]
    others += [type(part).__name__ for part in signals.policy_weightings]
    if others:
        raise ValueError(f"{who}, and {others[0]} is of the student's. Leave one out.")


def check_parts_and_context(signals: Signals, context: PrivilegedContext, args: SelfDistillationConfig) -> None:
    """
    Refuse parts and divergences that need more of a context than it gives: prompts to contrast with, or spans.

    Args:
        signals ([`Signals`]):
            The parts.
        context ([`PrivilegedContext`]):
            The context.
        args ([`SelfDistillationConfig`]):
            Configuration.

    Raises:
        ValueError: Naming what is missing and the way out.
    """
    parts: list[Advantage | TokenWeighting] = [signals.advantage, *signals.weightings]
    if any(part.needs_spans for part in parts) and not isinstance(context, MarkingContext):
        raise ValueError(
            "The method treats some spans of a rollout in another way than the rest, and "
            f"`privileged_context={args.privileged_context!r}` marks none. Set it to 'diagnosis', or to a class with "
            "`marks`."
        )
    marked = context.kinds if any(part.needs_spans for part in parts) and isinstance(context, MarkingContext) else ()
    if unmarked := {*cast(dict[str, Any], args.spans_divergence or {})} - {*marked}:
        raise ValueError(
            f"`spans_divergence` has one for spans of the kinds {sorted(unmarked)}, and the method reads spans of "
            f"{list(marked) or 'no kind'}. Leave it unset, or name those."
        )
    if not any(part.needs_contrast for part in parts) and signals.target is None:
        return
    if not hasattr(context, "contrast_messages"):
        raise ValueError(
            "The method contrasts what the teacher says after several prompts, and "
            f"`privileged_context={args.privileged_context!r}` gives one. Set it to 'peers' with "
            "`context_kwargs={'contrast': 4}`, to 'trl_opsd.methods.purified_opsd.ReferenceAlone', or to a class of "
            "yours with `contrast_messages`."
        )
    if has_served_teacher(args):
        raise ValueError(
            "The method contrasts what the teacher says after several prompts, and a server is asked for one. Leave "
            "`teacher_server_base_url` unset."
        )


def check_signals(signals: Signals, args: SelfDistillationConfig, has_reward: bool) -> None:
    """
    Refuse a loss without a term, and parts of a method that need a reward or a temperature where there is none.

    Args:
        signals ([`Signals`]):
            The parts.
        args ([`SelfDistillationConfig`]):
            Configuration.
        has_reward (`bool`):
            Whether there are reward functions.

    Raises:
        ValueError: Naming the part and the way out.
    """
    if not any(signals.has_term(name) for name in signals.coefficients):
        raise ValueError(
            "Nothing is trained: `divergence_coef`, `policy_loss_coef` and `likelihood_coef` are all 0. Set one."
        )
    if signals.has_term("policy_loss_coef") and signals.advantage.needs_reward:
        if signals.advantage.needs_group and args.num_generations == 1:
            raise ValueError(
                f"`policy_loss_coef={args.policy_loss_coef}` needs `num_generations` of at least 2: in a group of one "
                "every advantage is zero. Raise `num_generations`, or set `policy_loss_coef=0.0`."
            )
        if not has_reward:
            raise ValueError(
                f"`policy_loss_coef={args.policy_loss_coef}` needs `reward_funcs`. Pass some, or set it to 0."
            )
    if has_served_teacher(args):
        _check_signals_of_a_server(signals)
    for part in signals.teacher_weightings if signals.target is not None else ():
        raise ValueError(
            f"`token_weights` has {type(part).__name__}, which weighs by what the teacher would write, and "
            f"`target={args.target!r}` puts another distribution in its place. Leave one out."
        )
    for weighting in signals.weightings:
        if weighting.needs_reward and not has_reward:
            raise ValueError(
                f"`token_weights` has {type(weighting).__name__}, which needs `reward_funcs`. Pass some, or leave it "
                "out."
            )
        if weighting.changes_prompt:
            _check_likelihood_alone(type(weighting).__name__, signals, args)
        if weighting.needs_replaced and args.completions == "on_policy":
            raise ValueError(
                f"`token_weights` has {type(weighting).__name__}, which compares rollouts with completions that took "
                "the place of others, and `completions='on_policy'` has none. Choose other completions, or leave it "
                "out."
            )
    for ratio in signals.policy_weightings:
        if args.distillation_temperature != args.temperature:
            raise ValueError(
                f"`token_weights` has {type(ratio).__name__}, which compares log-probabilities of the student at "
                f"`distillation_temperature={args.distillation_temperature}` with those it was sampled with, at "
                f"`temperature={args.temperature}`. Set both to the same, or leave it out."
            )


def _check_signals_of_a_server(signals: Signals) -> None:
    if signals.has_term("policy_loss_coef") and signals.advantage.needs_teacher_entropy:
        raise ValueError(
            f"`advantage` names {type(signals.advantage).__name__}, which reads the teacher's entropy, which a "
            "teacher on a server does not tell. Leave `teacher_server_base_url` unset."
        )
    for part in signals.teacher_weightings:
        raise ValueError(
            f"`token_weights` has {type(part).__name__}, which reads the distribution of the teacher, which one "
            "on a server does not tell. Leave `teacher_server_base_url` unset."
        )
    for name, schedule in signals.schedules.items():
        if schedule.metric in ("teacher_entropy", "entropy_gap"):
            raise ValueError(
                f"`schedules[{name!r}]` follows `{schedule.metric}`, which a teacher on a server does not tell. "
                "Set its `metric` to another, or leave `teacher_server_base_url` unset."
            )


def warn_of_unknown_sampler(signals: Signals, args: SelfDistillationConfig) -> None:
    """
    Say once that a weight of tokens does not see how vLLM's probabilities differ from the policy's.

    Args:
        signals ([`Signals`]):
            The parts.
        args ([`SelfDistillationConfig`]):
            Configuration.
    """
    corrects = args.vllm_importance_sampling_correction
    if not args.use_vllm or args.sampler_is_comparable or corrects or not signals.policy_weightings:
        return
    names = ", ".join(type(weighting).__name__ for weighting in signals.policy_weightings)
    warnings.warn(
        f"`token_weights` has {names}, and vLLM's log-probabilities are those of what it samples from, which is not "
        f"the policy (`top_p={args.top_p}`, `top_k={args.top_k}`, `min_p={args.min_p}`, "
        f"`repetition_penalty={args.repetition_penalty}`): how the engine differs from it is not corrected, and as "
        "long as the policy has not moved since it sampled, each of these weights is 1. Sample from the whole "
        "distribution for it (`top_p=1.0`, `top_k=0`, `min_p=None`, `repetition_penalty=1.0`).",
        stacklevel=2,
    )
