"""What a configuration by itself cannot ask for: one function per refusal, in the order of `CHECKS`."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...help import did_you_mean
from ...objective.top_log_probs import SERVED_SUPPORTS
from ..several import FIELDS, each_teacher, naming


if TYPE_CHECKING:
    from ..config import SelfDistillationConfig

# Fields that are gone, and what took their place
RETIRED: dict[str, str] = {
    "compile_divergence": "set `divergence_kernel` to 'compiled' or 'eager'",
    "lmbda": "it is an argument of what completions come from. Set `completions` to 'dataset' or 'teacher' and "
    "`completions_kwargs={'lmbda': ...}`",
    "seq_kd": "set `completions='teacher'`, with the share of on-policy sequences in `completions_kwargs={'lmbda': "
    "...}`",
    **dict.fromkeys(
        [f"eval_benchmarks{name}" for name in ("", "_steps", "_num_samples", "_limit", "_sampling", "_system_prompt")],
        "it is one of the training commands. In Python, add a `trl_opsd.eval.in_training.BenchmarkCallback` to the "
        "trainer",
    ),
}
# Fields that an objective knows by another name
_OBJECTIVE_FIELDS = {
    "support": "divergence_support",
    "top_k": "divergence_top_k",
    "tail": "divergence_tail",
    "clip": "divergence_clip",
    "ratio_low": "divergence_ratio_low",
    "ratio_high": "divergence_ratio_high",
    "bounded": "divergence_bounded",
    "temperature": "distillation_temperature",
}
_AT_LEAST_ONE = {
    "teacher_update_steps": "",
    "divergence_memory": " It is in MiB.",
    "max_teacher_prompt_length": " Use `None` for what the model's context allows.",
    "max_tokens_per_microbatch": " Use `None` for one pass.",
}
_OF_ONE_TEACHER = {
    "teacher_update_steps": "periodic",
    "teacher_update_rate": "ema",
    "teacher_model_name_or_path": "external",
    "teacher_model_init_kwargs": "external",
    "teachers": "several",
    "teacher_column": "several",
}


def known_choices(args: "SelfDistillationConfig") -> None:
    for name in ("loss_type", "overlong_teacher_prompt", "teacher", "vllm_lora_sync", "divergence_kernel"):
        field = type(args).__dataclass_fields__[name]
        choices, value = field.metadata["choices"], getattr(args, name)
        if value not in choices and (value is not None or field.default is not None):
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def counts_of_at_least_one(args: "SelfDistillationConfig") -> None:
    for name, hint in _AT_LEAST_ONE.items():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.{hint}")


def normaliser_of_dr_grpo(args: "SelfDistillationConfig") -> None:
    if args.loss_type == "dr_grpo" and args.max_completion_length is None:
        raise ValueError(
            "`loss_type='dr_grpo'` divides by `max_completion_length`, which is `None`. Set it, or choose another "
            "`loss_type`."
        )


def settings_of_another_teacher(args: "SelfDistillationConfig") -> None:
    for name, kind in _OF_ONE_TEACHER.items():
        if args.teacher != kind and getattr(args, name) is not None:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect with `teacher='{args.teacher}'`. Set "
                f"`teacher='{kind}'`, or leave `{name}` unset."
            )


def several_teachers(args: "SelfDistillationConfig") -> None:
    if args.teacher != "several":
        return
    if not isinstance(args.teachers, dict) or not args.teachers:
        raise ValueError(
            f"`teacher='several'` needs `teachers`, a mapping from names to the fields of each, got {args.teachers!r}."
        )
    if args.teacher_offload:
        raise ValueError(
            "`teacher_offload=True` is of one teacher. Set it among the fields of that one in `teachers`."
        )
    for name, given in args.teachers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"`teachers` has the name {name!r}, and metrics and files are named after it. Use letters, digits, "
                "`_` and `-` alone, and write the column anew with `dataset.map`."
            )
        with naming(name):
            _fields_of_one_teacher(given)


def _fields_of_one_teacher(given: Any) -> None:
    if not isinstance(given, dict) or given.get("teacher") in (None, "several"):
        raise ValueError(
            f"a mapping with a `teacher` is needed, which is a single one, such as {{'teacher': 'initial'}}, got "
            f"{given!r}."
        )
    for field, value in given.items():
        if field not in FIELDS:
            raise ValueError(f"`{field}` is no field of one teacher. {did_you_mean(str(field), FIELDS)}")
        if not isinstance(value, FIELDS[field]):
            raise ValueError(f"`{field}` cannot be a {type(value).__name__}, got {value!r}.")


def rate_of_ema(args: "SelfDistillationConfig") -> None:
    if args.teacher_update_rate is not None and not 0.0 < args.teacher_update_rate <= 1.0:
        raise ValueError(
            f"`teacher_update_rate` must be in (0, 1], got {args.teacher_update_rate}. It is the share of the "
            "policy: for a decay of 0.999, set 0.001. For a teacher that never moves, set `teacher='initial'`."
        )


def external_teacher_without_a_model(args: "SelfDistillationConfig") -> None:
    if args.teacher == "external" and not (args.teacher_model_name_or_path or args.teacher_server_base_url):
        raise ValueError(
            "`teacher='external'` needs `teacher_model_name_or_path`, the model to read it with, or "
            "`teacher_server_base_url`, a server of it."
        )


def offload_of_nothing(args: "SelfDistillationConfig") -> None:
    if args.teacher_offload and (args.teacher == "live" or args.teacher_server_base_url):
        raise ValueError(
            "`teacher_offload=True` has no effect: a teacher that is live or on a server has no weights of its "
            "own here. Set it to `False`."
        )


def timeout_of_a_server(args: "SelfDistillationConfig") -> None:
    if args.vllm_server_request_timeout <= 0:
        raise ValueError(f"`vllm_server_request_timeout` must be positive, got {args.vllm_server_request_timeout}.")


def adapter_of_no_engine(args: "SelfDistillationConfig") -> None:
    if args.vllm_lora_sync != "auto" and not args.use_vllm:
        raise ValueError(
            f"`vllm_lora_sync='{args.vllm_lora_sync}'` has no effect with `use_vllm=False`. Leave it at its default, "
            "or set `use_vllm=True`."
        )


def objective(args: "SelfDistillationConfig") -> None:
    """What the objective refuses, by the names of the fields."""
    try:
        args.objective()
    except ValueError as error:
        message = re.sub(r"(?<=`)\w+(?=[`=])", lambda name: _OBJECTIVE_FIELDS.get(name[0], name[0]), str(error))
        raise ValueError(message) from error


def divergence_of_replaced_completions(args: "SelfDistillationConfig") -> None:
    if args.replaced_divergence is not None and args.completions == "on_policy":
        raise ValueError(
            f"`replaced_divergence={args.replaced_divergence}` has no effect with `completions='on_policy'`, which "
            "replaces no rollout. Choose other completions, or leave it unset."
        )


def divergences_of_some_tokens(args: "SelfDistillationConfig") -> None:
    names = [name for name in ("replaced_divergence", "spans_divergence") if getattr(args, name) is not None]
    if not names:
        return
    given = " and ".join(f"`{name}={getattr(args, name)}`" for name in names)
    if len(names) == 2:
        raise ValueError(f"A span of a completion that took a rollout's place would have {given}. Leave one unset.")
    if args.teacher_server_base_url is not None:
        raise ValueError(f"{given} cannot be combined with {_server(args)}. Leave one unset.")
    try:
        objectives = args.other_objectives().values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{given} is no divergence: {error}") from error
    if any(its.support == "sampled_token" or its.temperature != args.distillation_temperature for its in objectives):
        raise ValueError(
            f"{given} cannot have the support 'sampled_token', for tokens that the student sampled, nor a temperature "
            "of its own. Leave them out."
        )


def tail_of_no_top_k(args: "SelfDistillationConfig") -> None:
    if args.divergence_tail is not None and not args.divergence_support.endswith("top_k"):
        raise ValueError(
            f"`divergence_tail='{args.divergence_tail}'` has no effect with "
            f"`divergence_support='{args.divergence_support}'`, which has no tail. Choose a top-k support, or "
            "leave `divergence_tail` unset."
        )


def correction_of_truncated_sampling(args: "SelfDistillationConfig") -> None:
    if args.use_vllm and args.vllm_importance_sampling_correction and args.truncates_sampling:
        raise ValueError(
            f"`vllm_importance_sampling_correction=True` contradicts truncated sampling (`top_p={args.top_p}`, "
            f"`top_k={args.top_k}`, `min_p={args.min_p}`): vLLM's log-probabilities are those of the truncated "
            "distribution, so the ratio would fall towards 0 with every token. Set the correction to `False`, or "
            "sample from the whole distribution (`top_p=1.0`, `top_k=0`, `min_p=None`)."
        )


def memory_of_a_sleeping_engine(args: "SelfDistillationConfig") -> None:
    if args.use_vllm and args.vllm_enable_sleep_mode and not args.skip_memory_metrics:
        raise ValueError(
            "`skip_memory_metrics=False` reports PyTorch's count of allocated memory, in which the weights and "
            "cache of an engine that sleeps (`vllm_enable_sleep_mode=True`) are still there. Leave it `True`, and "
            "ask `torch.cuda.mem_get_info()`."
        )


def threshold_of_success(args: "SelfDistillationConfig") -> None:
    if not math.isfinite(args.success_threshold):
        raise ValueError(f"`success_threshold` must be a finite number, got {args.success_threshold}.")


def curriculum_of_rows_in_order(args: "SelfDistillationConfig") -> None:
    if args.curriculum is not None and not args.shuffle_dataset:
        raise ValueError(
            f"`curriculum={args.curriculum!r}` draws the rows, and `shuffle_dataset=False` keeps their order. Leave "
            "one of them at its default."
        )


def weights_of_the_terms(args: "SelfDistillationConfig") -> None:
    for name in ("divergence_coef", "policy_loss_coef", "likelihood_coef"):
        if not 0.0 <= getattr(args, name) < math.inf:
            raise ValueError(f"`{name}` must not be negative or infinite, got {getattr(args, name)}.")


def check_mean_over_sequences(args: "SelfDistillationConfig") -> None:
    """
    For a method whose weights of tokens are made for the mean over rollouts of their means.

    Raises:
        ValueError: If `loss_type` takes another mean.
    """
    if args.loss_type != "grpo":
        raise ValueError(
            f"The weights of tokens of {type(args).__name__} are made for `loss_type='grpo'`, the mean over rollouts "
            f"of their means, and `loss_type={args.loss_type!r}` takes another. Leave it at its default."
        )


def passes_of_a_loss_that_is_one(args: "SelfDistillationConfig") -> None:
    if args.max_tokens_per_microbatch is None:
        return
    needs_all = [name for name in ("entropy_coef", "use_adaptive_entropy") if getattr(args, name)]
    if args.beta or args.policy_loss_coef:
        needs_all += ["top_entropy_quantile"] if args.top_entropy_quantile < 1.0 else []
        needs_all += ["distillation_temperature"] if args.distillation_temperature != args.temperature else []
    for name in needs_all:
        raise ValueError(
            f"`max_tokens_per_microbatch={args.max_tokens_per_microbatch}` cannot be combined with "
            f"`{name}={getattr(args, name)}`: it makes GRPO's own loss one of the whole micro-batch at once. Leave "
            "`max_tokens_per_microbatch` unset and lower `per_device_train_batch_size`, or leave "
            f"`{name}` at its default."
        )


def _server(args: "SelfDistillationConfig") -> str:
    return f"`teacher_server_base_url='{args.teacher_server_base_url}'`"


def served_teacher_of_another_kind(args: "SelfDistillationConfig") -> None:
    if args.teacher not in ("live", "external"):
        raise ValueError(
            f"{_server(args)} cannot be combined with `teacher='{args.teacher}'`: the server has the weights it was "
            "started with or, if it samples the rollouts, the current ones. Set `teacher='live'` or 'external', "
            "or leave `teacher_server_base_url` unset."
        )


def served_teacher_that_is_loaded(args: "SelfDistillationConfig") -> None:
    for name in ("teacher_model_name_or_path", "teacher_model_init_kwargs"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect beside {_server(args)}. Leave one unset."
            )


def support_of_a_server(args: "SelfDistillationConfig") -> None:
    if args.divergence_support not in SERVED_SUPPORTS:
        raise ValueError(
            f"{_server(args)} cannot be combined with `divergence_support='{args.divergence_support}'`: a server "
            "reports the teacher's most probable tokens and the sampled one, and no others. Choose one of "
            f"{list(SERVED_SUPPORTS)}."
        )


def temperature_of_a_server(args: "SelfDistillationConfig") -> None:
    if args.distillation_temperature != 1.0:
        raise ValueError(
            f"{_server(args)} cannot be combined with `distillation_temperature={args.distillation_temperature}` (the "
            "default is the sampling temperature): log-probabilities of a few tokens cannot be brought to another "
            "temperature than 1. Set `distillation_temperature=1.0`."
        )


def live_teacher_on_another_server(args: "SelfDistillationConfig") -> None:
    if not (args.use_vllm and args.vllm_mode == "server") or args.sampler_url != args.teacher_server_base_url:
        raise ValueError(
            f"{_server(args)} with `teacher='live'` has to be the server that samples the rollouts and is sent the "
            "current weights for them. Set `use_vllm=True`, `vllm_mode='server'` and `vllm_server_base_url` to "
            "the same address, or leave `teacher_server_base_url` unset."
        )


def live_teacher_that_moves_before_its_scores_are_used(args: "SelfDistillationConfig") -> None:
    if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations):
        raise ValueError(
            f"{_server(args)} with `teacher='live'` scores when rollouts are sampled, and the weights move before all "
            f"of them are used: `steps_per_generation={args.steps_per_generation}`, "
            f"`num_iterations={args.num_iterations}`, "
            f"`gradient_accumulation_steps={args.gradient_accumulation_steps}`. Leave the first two at their "
            "defaults, or leave `teacher_server_base_url` unset."
        )


Check = Callable[["SelfDistillationConfig"], None]

CHECKS: tuple[Check, ...] = (
    known_choices,
    counts_of_at_least_one,
    normaliser_of_dr_grpo,
    settings_of_another_teacher,
    several_teachers,
    rate_of_ema,
    external_teacher_without_a_model,
    offload_of_nothing,
    timeout_of_a_server,
    adapter_of_no_engine,
    objective,
    divergence_of_replaced_completions,
    divergences_of_some_tokens,
    tail_of_no_top_k,
    correction_of_truncated_sampling,
    memory_of_a_sleeping_engine,
    threshold_of_success,
    curriculum_of_rows_in_order,
    weights_of_the_terms,
    passes_of_a_loss_that_is_one,
)
# For a teacher that is scored by a server
SERVED_TEACHER_CHECKS: tuple[Check, ...] = (
    served_teacher_of_another_kind,
    served_teacher_that_is_loaded,
    support_of_a_server,
    temperature_of_a_server,
)
# For one whose weights are the policy's
SERVED_LIVE_TEACHER_CHECKS: tuple[Check, ...] = (
    live_teacher_on_another_server,
    live_teacher_that_moves_before_its_scores_are_used,
)


def check_config(args: "SelfDistillationConfig") -> None:
    """
    Refuse settings that contradict each other or have no effect, whatever the data and the model.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration whose values are complete.

    Raises:
        ValueError: Naming the field and the way out.
    """
    _check(args)
    if args.teacher == "several":
        for name, its in each_teacher(args).items():
            with naming(name):
                _check(its)


def _check(args: "SelfDistillationConfig") -> None:
    is_served = args.teacher_server_base_url is not None
    checks = CHECKS + SERVED_TEACHER_CHECKS * is_served
    for check in checks + SERVED_LIVE_TEACHER_CHECKS * (is_served and args.teacher == "live"):
        check(args)
