"""What is known before the model is loaded: the method's parts, the tokenizer, the teacher's prompts, the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin, logging
from trl.trainer.utils import get_config_model_id

from ..context import PrivilegedContext, SampledContext, TeacherPrompt, TextContext, make_context, thinking_prefix
from ..data import image_columns, validate_rows
from ..guard import Guards
from ..parts import make_part
from ..sampling.prompts import PromptSource
from ..sampling.sources import SOURCES, CompletionSource
from ..scoring import reads_more_than_text
from ..serving import check_vllm_installed, wait_for_sampler
from ..signal import Signals
from ..teacher import ServedTeacher
from .checks.images import check_chat_template, check_images, check_processing_class
from .checks.model import check_completion_length, check_model, check_special_tokens
from .checks.parts import (
    check_completions,
    check_context,
    check_curriculum,
    check_named_teachers,
    check_number_of_rows,
    check_parts_and_context,
    check_prompts,
    check_served_live_teacher,
    check_signals,
    warn_of_unknown_sampler,
)
from .config import SelfDistillationConfig
from .guards import make_guards
from .lengths import fit_completions, prompt_budget
from .several import has_served_teacher, teacher_names
from .signals import make_signals
from .teachers import connect_teachers


logger = logging.get_logger(__name__)


@dataclass
class Prepared:
    """
    What a run consists of beside its weights.

    Args:
        context ([`PrivilegedContext`]):
            What the teacher reads.
        completions ([`CompletionSource`]):
            Which completions are trained on.
        prompts ([`PromptSource`], *optional*):
            Exchanges prompts before.
        signals ([`Signals`]):
            Write the streams of the loss.
        guards ([`Guards`]):
            Watch the run.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the policy and the teacher.
        teacher_prompt ([`TeacherPrompt`]):
            Renders what the teacher reads.
        served_teachers (`list[ServedTeacher | None]`):
            Each teacher, if it is on a server.
        columns (`tuple[str, ...]`):
            Dataset columns that are read beside the prompt.
        train_dataset (`Any`):
            Rows to train on, checked.
        eval_dataset (`Any`):
            Rows to evaluate on, checked.
    """

    context: PrivilegedContext
    completions: CompletionSource
    prompts: PromptSource | None
    signals: Signals
    guards: Guards
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    teacher_prompt: TeacherPrompt
    served_teachers: list[ServedTeacher | None]
    columns: tuple[str, ...]
    train_dataset: Any
    eval_dataset: Any


def checked_arguments(
    args: SelfDistillationConfig | None, config_class: type[SelfDistillationConfig], trainer: type, model: Any
) -> SelfDistillationConfig:
    """
    The configuration of a run, with all defaults if there is none.

    Args:
        args ([`SelfDistillationConfig`], *optional*):
            The configuration.
        config_class (`type[SelfDistillationConfig]`):
            What it has to be.
        trainer (`type`):
            The trainer, for the message.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, after which a folder is named.

    Raises:
        ValueError: If it is of another class.
    """
    if args is None:
        name = "Self-Distillation" if config_class.method is None else config_class.method.name
        return config_class(f"{_model_id(model).split('/')[-1]}-{name}")
    if not isinstance(args, config_class):
        raise ValueError(
            f"{trainer.__name__} needs a `{config_class.__name__}` as `args`, got {type(args).__name__}. It takes the "
            "same fields: only the name changes."
        )
    return args


def _model_id(model: Any) -> str:
    return model if isinstance(model, str) else get_config_model_id(model.config)


def prepare(
    args: SelfDistillationConfig,
    model: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    train_dataset: Any,
    eval_dataset: Any,
    reward_funcs: Any,
    peft_config: Any,
    tools: list[Callable] | None,
    rollout_func: Callable | None,
    environment_factory: Any,
) -> Prepared:
    """
    Make all of a run that needs no weights, and refuse what cannot work. All processes call this at once.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration. A `max_completion_length` that is a default may change.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Its tokenizer, or the processor of a vision-language model. `None` loads it.
        train_dataset, eval_dataset, reward_funcs, peft_config, tools, rollout_func, environment_factory:
            See [`SelfDistillationTrainer`].

    Raises:
        ValueError: If the data, the tokenizer or the configuration cannot work, naming what and the way out.
    """
    _check_engines_and_model(args, model, peft_config)
    has_rewards = bool(reward_funcs or environment_factory)
    context = make_context(args.privileged_context, cast(dict[str, Any] | None, args.context_kwargs))
    has_feedback = has_rewards or rollout_func is not None
    check_context(context, cast(int, args.num_generations), train_dataset, has_rewards, has_feedback)
    itself = {"tools": tools, "environment_factory": environment_factory, "rollout_func": rollout_func}
    completions, prompts = _make_sources(args, context, bool(reward_funcs), itself)
    check_curriculum(args, train_dataset, has_rewards, environment_factory)
    signals, guards = _make_signals(args, context, has_rewards), make_guards(args)
    warn_of_unknown_sampler(signals, args)
    images = image_columns({"train": train_dataset, "eval": eval_dataset})
    processing_class, model_config = load_processing_class_and_config(args, model, processing_class, bool(images))
    check_images(args, images, processing_class, model_config, context, reward_funcs)
    check_completion_length(args, model_config, samples_itself=rollout_func is None)
    served = connect_teachers(args, tokenizer_of(processing_class), model_config, bool(images))
    context_length = _teacher_context(model_config, served)
    teacher_prompt = make_teacher_prompt(args, context, processing_class, model_config, context_length)
    names = teacher_names(args)
    columns = (*context.columns, *completions.columns, *names)
    if environment_factory is None:  # otherwise the prompt comes from the environment
        train_dataset, eval_dataset = (
            checked_rows(data, name, teacher_prompt, columns, tools, names)
            for data, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset"))
        )
        check_number_of_rows(args, train_dataset)
    check_named_teachers(names, train_dataset, environment_factory)
    fit_completions(args, context_length, teacher_prompt.longest or teacher_prompt.max_length or 0)
    check_served_live_teacher(args, rollout_func)
    if args.use_vllm and args.vllm_mode == "server":
        wait_for_sampler(args.sampler_url, args.vllm_server_timeout, is_main_process=args.process_index == 0)
    parts = context, completions, prompts, signals, guards, processing_class, teacher_prompt, served
    return Prepared(*parts, columns, train_dataset, eval_dataset)


def _check_engines_and_model(args: SelfDistillationConfig, model: Any, peft_config: Any) -> None:
    check_model(model, peft_config)
    if args.use_vllm or has_served_teacher(args):
        check_vllm_installed()


def _make_sources(
    args: SelfDistillationConfig, context: PrivilegedContext, has_reward_funcs: bool, itself: dict[str, Any]
) -> tuple[CompletionSource, PromptSource | None]:
    kwargs = cast(dict[str, Any] | None, args.completions_kwargs)
    completions: CompletionSource = make_part("completions", args.completions, kwargs, SOURCES)
    check_completions(args, completions, context, has_reward_funcs, itself)
    if args.prompts is None:
        return completions, None
    prompts = make_part("prompts", args.prompts, cast(dict[str, Any] | None, args.prompts_kwargs), {})
    check_prompts(args, prompts, has_reward_funcs, itself["environment_factory"])
    return completions, prompts


def _make_signals(args: SelfDistillationConfig, context: PrivilegedContext, has_rewards: bool) -> Signals:
    signals = make_signals(args)
    check_signals(signals, args, has_rewards)
    check_parts_and_context(signals, context, args)
    return signals


def load_processing_class_and_config(
    args: SelfDistillationConfig,
    model: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    has_images: bool,
) -> tuple[PreTrainedTokenizerBase | ProcessorMixin, Any]:
    """
    Tokenizer or processor and configuration of the policy, as [`prepare`] takes and checks them.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            What is given.
        has_images (`bool`):
            Whether rows have images.
    """
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    kwargs = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(model, **kwargs) if isinstance(model, str) else model.config
    if processing_class is None:
        sides = {"truncation_side": "left", "padding_side": "left"}
        processing_class = _loaded(
            _model_id(model), has_images or reads_more_than_text(config), has_images, **sides, **kwargs
        )
    check_processing_class(processing_class)
    check_special_tokens(tokenizer_of(processing_class), getattr(config.get_text_config(), "vocab_size", None))
    return processing_class, config


def _loaded(
    model_id: str, is_multimodal: bool, has_images: bool, **kwargs: Any
) -> PreTrainedTokenizerBase | ProcessorMixin:
    # Beside a model of text there may be a processor too
    if not is_multimodal:
        return AutoTokenizer.from_pretrained(model_id, **kwargs)
    try:
        return AutoProcessor.from_pretrained(model_id, **kwargs)
    except ImportError as error:  # a video processor needs torchvision, for one
        if has_images:
            raise ValueError(f"The processor of {model_id} cannot be loaded: {error}") from error
        logger.warning(f"The processor of {model_id} cannot be loaded, and is not saved with the model: {error}")
        return AutoTokenizer.from_pretrained(model_id, **kwargs)


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer, which a processor has."""
    if isinstance(processing_class, ProcessorMixin):
        return cast(Any, processing_class).tokenizer
    return processing_class


def _teacher_context(model_config: Any, served: Sequence[ServedTeacher | None]) -> int | None:
    own = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    limits = (own, *(one.context_length for one in served if one is not None))
    return min((limit for limit in limits if limit is not None), default=None)


def make_teacher_prompt(
    args: SelfDistillationConfig,
    context: PrivilegedContext,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    model_config: Any,
    context_length: int | None,
) -> TeacherPrompt:
    """
    What renders the teacher's prompts.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        context ([`PrivilegedContext`]):
            What the teacher reads.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor of the model.
        model_config (`PreTrainedConfig`):
            Configuration of the policy.
        context_length (`int`, *optional*):
            Tokens that the teacher can read.
    """
    student_kwargs = cast(dict[str, Any], args.chat_template_kwargs or {})
    teacher_kwargs = cast(dict[str, Any] | None, args.teacher_chat_template_kwargs)
    teacher_kwargs = student_kwargs if teacher_kwargs is None else teacher_kwargs
    prefix, chat_prefix = args.teacher_generation_prefix, ""
    if prefix is None:
        prefix, chat_prefix = "", thinking_prefix(processing_class, student_kwargs, teacher_kwargs)
    asked = context.sampling["max_new_tokens"] if isinstance(context, SampledContext) else 0
    policy_context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return TeacherPrompt(
        context=context,
        tokenizer=tokenizer_of(processing_class),
        chat_template_kwargs=teacher_kwargs,
        generation_prefix=prefix,
        max_length=prompt_budget(args, context_length),
        skip_overlong=args.overlong_teacher_prompt == "skip",
        num_embeddings=getattr(model_config.get_text_config(), "vocab_size", None),
        chat_prefix=chat_prefix,
        student_template_kwargs=student_kwargs,
        max_sample_length=None if policy_context is None else policy_context - asked,
        processor=processing_class if isinstance(processing_class, ProcessorMixin) else None,
        image_token_id=getattr(model_config, "image_token_id", None),
    )


def checked_rows(
    dataset: Any,
    name: str,
    teacher_prompt: TeacherPrompt,
    columns: tuple[str, ...],
    tools: list[Callable] | None,
    choices: Mapping[str, Sequence[str]],
) -> Any:
    """
    A data set whose rows have what they are asked for, those of a stream as they arrive.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Data.
        name (`str`):
            What it is called.
        teacher_prompt ([`TeacherPrompt`]):
            Renders the context.
        columns (`tuple[str, ...]`):
            What is read beside the prompt.
        tools (`list[Callable]`, *optional*):
            Tools that prompts show.
        choices (`Mapping[str, Sequence[str]]`):
            What may be in some of the columns.

    Raises:
        ValueError: Naming the column or the row, and the way out.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return type(dataset)(
            {
                key: checked_rows(data, f"{name}[{key!r}]", teacher_prompt, columns, tools, choices)
                for key, data in dataset.items()
            }
        )
    # Completions may be messages, and a context of the user's may read anything
    texts = teacher_prompt.context.columns if isinstance(teacher_prompt.context, TextContext) else ()
    structured = [column for column in columns if column not in texts]
    reads_images = teacher_prompt.processor is not None
    dataset = validate_rows(
        dataset, columns, name=name, structured=structured, reads_images=reads_images, choices=choices
    )
    first = next(iter(dataset))
    if not isinstance(first["prompt"], str):
        check_chat_template(name, teacher_prompt.processor or teacher_prompt.tokenizer)
    teacher_prompt.check_rows(dataset, name, tools)
    return dataset
