"""What cannot work with images, and where a processor takes the place of a tokenizer."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...context import AnsweredContext, PrivilegedContext, SampledContext
from ...scoring import reads_more_than_text
from ..config import SelfDistillationConfig
from ..several import has_served_teacher


def check_processing_class(processing_class: Any) -> None:
    """
    Refuse what is neither a tokenizer nor a processor with one.

    Raises:
        ValueError: If it is neither.
    """
    has_tokenizer = isinstance(processing_class, ProcessorMixin) and hasattr(processing_class, "tokenizer")
    if not isinstance(processing_class, PreTrainedTokenizerBase) and not has_tokenizer:
        raise ValueError(
            f"`processing_class` has to be a tokenizer or a processor with one, got {type(processing_class).__name__}."
            " Pass `AutoTokenizer.from_pretrained(...)`, or `AutoProcessor.from_pretrained(...)` for images."
        )


def check_images(
    args: SelfDistillationConfig,
    columns: Sequence[str],
    processing_class: Any,
    model_config: Any,
    context: PrivilegedContext,
    reward_funcs: Any,
) -> None:
    """
    Refuse images for a model of text, and beside what reads text alone.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        columns (`Sequence[str]`):
            Columns of images in the data, none if it has none.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the policy.
        model_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the policy.
        context ([`PrivilegedContext`]):
            The context.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Reward functions.

    Raises:
        ValueError: Naming the column and the way out.
    """
    if not columns:
        return
    has = f"The data has the column {columns[0]!r}, and"
    if not reads_more_than_text(model_config):
        raise ValueError(
            f"{has} the model reads text alone (`model_type` {model_config.model_type!r}). Train a vision-language "
            "model, or remove the column."
        )
    if not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"{has} `processing_class` is a tokenizer, which reads no images. Pass the model's processor, "
            "`AutoProcessor.from_pretrained(...)`, or leave it out."
        )
    check_chat_template("The data", processing_class, "images")
    text_alone = {
        f"`privileged_context={args.privileged_context!r}` has a model write, which would be shown the text alone": (
            isinstance(context, SampledContext | AnsweredContext)
        ),
        f"`completions={args.completions!r}` samples from prompts of text": args.completions != "on_policy",
        f"`prompts={args.prompts!r}` makes prompts of text": args.prompts is not None,
        f"`curriculum={args.curriculum!r}` knows prompts by their text": args.curriculum is not None,
        "a teacher on a server (`teacher_server_base_url`) is sent token ids": has_served_teacher(args),
    }
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    text_alone["a reward reads the policy's attention to text"] = any(hasattr(its, "read_policy") for its in functions)
    for what, applies in text_alone.items():
        if applies:
            raise ValueError(f"{has} {what}. Choose another setting, or remove the column.")


def check_chat_template(name: str, processing_class: Any, what: str = "conversational prompts") -> None:
    """
    Refuse messages, and images in them, where there is no chat template.

    Args:
        name (`str`):
            What the data is called.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        what (`str`, *optional*, defaults to `"conversational prompts"`):
            What needs it.

    Raises:
        ValueError: If there is none.
    """
    if processing_class.chat_template is None:
        kind = "processor" if isinstance(processing_class, ProcessorMixin) else "tokenizer"
        strings = "" if what == "images" else ", or pass prompts as strings"
        raise ValueError(
            f"{name} has {what}, but the {kind} has no chat template. Use a model with one"
            f"{'' if strings else ' or'}{',' if strings else ''} set `{kind}.chat_template`{strings}."
        )
