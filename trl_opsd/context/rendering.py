"""From messages to the token ids the teacher reads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin, logging
from trl.data_utils import prepare_multimodal_messages

from ..data import image_parts, prompt_of, teacher_images_of
from .base import AnsweredContext, MarkingContext, Message, PrivilegedContext, SampledContext, as_text
from .images import with_images, without_images
from .rollouts import Rollouts
from .spans import Marks, token_masks


logger = logging.get_logger(__name__)

_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Reading(NamedTuple):
    """
    What a model reads.

    Args:
        ids (`list[int]`):
            Token ids.
        images (`dict[str, torch.Tensor]`):
            What the processor makes of the images, empty without any.
    """

    ids: list[int]
    images: dict[str, torch.Tensor]


@dataclass
class TeacherPrompt:
    """
    Renders and tokenizes the teacher's prompt of a row. Contexts read and write text: images of the prompt keep their
    places, and those of the column `teacher_images` follow them.

    The prompt is tokenized the way the student's is: conversational prompts by the chat template, which brings its own
    special tokens, plain ones by the tokenizer. It is never truncated.

    Args:
        context ([`PrivilegedContext`]):
            What the teacher reads.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        chat_template_kwargs (`dict[str, Any]`):
            Keyword arguments of the teacher's chat template.
        generation_prefix (`str`):
            Text appended right before the completion.
        num_embeddings (`int`, *optional*):
            Number of tokens the model has an embedding for.
        chat_prefix (`str`, *optional*, defaults to `""`):
            The same, of prompts that a chat template has rendered.
        max_length (`int`, *optional*):
            Budget in tokens.
        skip_overlong (`bool`):
            Whether a prompt over budget gives `None` instead of an error.
        chat_template (`str`, *optional*):
            Chat template to use instead of the tokenizer's own.
        student_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the student's chat template, for what a context has the policy answer.
        max_sample_length (`int`, *optional*):
            Budget in tokens of such a prompt.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            Of a vision-language model, whose chat template takes the place of the tokenizer's.
        image_token_id (`int`, *optional*):
            The token that stands for a part of an image.
    """

    context: PrivilegedContext
    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any]
    generation_prefix: str
    max_length: int | None
    skip_overlong: bool
    chat_template: str | None = None
    num_embeddings: int | None = None
    chat_prefix: str = ""
    student_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_sample_length: int | None = None
    processor: ProcessorMixin | None = None
    image_token_id: int | None = None
    longest: int = field(default=0, init=False)
    _plain_prefix_ids: list[int] = field(init=False)
    _chat_prefix_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._plain_prefix_ids, self._chat_prefix_ids = (
            self.tokenizer(prefix, add_special_tokens=False)["input_ids"]
            for prefix in (self.generation_prefix, self.chat_prefix + self.generation_prefix)
        )

    def before_rollouts(self, row: Mapping[str, Any], context: PrivilegedContext | None = None) -> list[int] | None:
        """
        Token ids of the prompt of a row that has no rollouts yet.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row.
            context ([`PrivilegedContext`], *optional*):
                What the teacher reads for once. Its prompt is skipped if it is over budget.
        """
        reading = self if context is None else replace(self, context=context, skip_overlong=True)
        return reading.token_ids(row, None)

    def token_ids(
        self,
        row: Mapping[str, Any],
        rollouts: Rollouts | None,
        tools: list[Callable[..., Any]] | None = None,
        sampled: Any = None,
    ) -> list[int] | None:
        """
        Token ids of the teacher's prompt, or `None` if the row has no context or is over budget and skipped.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row, `prompt` being a string or a list of messages.
            rollouts ([`Rollouts`], *optional*):
                The rollouts of the row, if there are any yet.
            tools (`list[Callable[..., Any]]`, *optional*):
                Tools shown by the chat template, as for the student.
            sampled (`Any`, *optional*):
                What the policy wrote, or somebody else said, for a context that asks.

        Raises:
            ValueError: If the prompt is longer than `max_length` tokens and `skip_overlong` is `False`, or has a token
                without an embedding, or if the context returned no messages.
        """
        reading = self.reading(row, rollouts, tools, sampled)
        return None if reading is None else reading.ids

    def reading(
        self,
        row: Mapping[str, Any],
        rollouts: Rollouts | None,
        tools: list[Callable[..., Any]] | None = None,
        sampled: Any = None,
    ) -> Reading | None:
        """The same, with its images."""
        reading = self._teacher_reading(row, rollouts, tools, sampled)
        return None if reading is None or self._is_skipped(reading.ids) else reading

    def student_images(
        self, prompt: str | list[Message], tools: list[Callable[..., Any]] | None = None
    ) -> dict[str, torch.Tensor]:
        """What the processor makes of the images of a student's prompt."""
        if self.processor is None or isinstance(prompt, str) or not image_parts(prompt):
            return {}
        return self._applied(prompt, tools, self.student_template_kwargs).images

    def completion_images(self, completion: Any) -> dict[str, torch.Tensor]:
        """What the processor makes of the images that tools returned within a completion."""
        images = [] if isinstance(completion, str) else [part["image"] for part in image_parts(completion)]
        if self.processor is None or not images:
            return {}
        given: Any = self.processor
        return dict(given.image_processor(images=images, return_tensors="pt"))

    def contrast_ids(
        self, row: Mapping[str, Any], rollouts: Rollouts | None, tools: list[Callable[..., Any]] | None = None
    ) -> list[list[int]]:
        """
        Token ids of the prompts that the context gives for contrast, without those that are over budget and skipped.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row, `prompt` being a string or a list of messages.
            rollouts ([`Rollouts`], *optional*):
                The rollouts of the row, if there are any yet.
            tools (`list[Callable[..., Any]]`, *optional*):
                Tools shown by the chat template, as for the student.

        Raises:
            ValueError: As for [`~TeacherPrompt.token_ids`].
        """
        given: Any = self.context
        prompts = given.contrast_messages(_conversational(row), rollouts)
        ids = [self._teacher_prompt(row, messages, "contrast_messages", tools).ids for messages in prompts]
        return [its for its in ids if not self._is_skipped(its)]

    def sample_ids(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[int] | None:
        """
        Token ids of what a context that samples has the policy answer, rendered as the student's prompt is, without
        tools. `None` if there is nothing to answer, or if it is over budget and skipped.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row, `prompt` being a string or a list of messages.
            rollouts ([`Rollouts`], *optional*):
                The rollouts of the row, if there are any yet.

        Raises:
            ValueError: As for [`~TeacherPrompt.token_ids`], with `max_sample_length`.
        """
        if not isinstance(self.context, SampledContext):
            return None
        messages = self.context.sample_messages(_conversational(row), rollouts)
        if messages is None:
            return None
        ids = self._rendered(row, messages, "sample_messages", None, self.student_template_kwargs).ids
        check_embedded(ids, self.tokenizer, self.num_embeddings)
        if self.max_sample_length is None or len(ids) <= self.max_sample_length:
            return ids
        if self.skip_overlong:
            return None
        raise ValueError(
            f"The prompt that {type(self.context).__name__} has the policy answer has {len(ids)} tokens, and the "
            f"model's context leaves {self.max_sample_length} beside what is sampled. Lower `max_new_tokens` of the "
            "context, shorten the privileged column, drop the row, or set `overlong_teacher_prompt='skip'` to leave "
            "such rows out of the loss."
        )

    def answers(self, rows: Sequence[tuple[Mapping[str, Any], Rollouts] | None]) -> list[Any]:
        """What is said of each rollout for a context that somebody answers for, see [`AnsweredContext`]."""
        assert isinstance(self.context, AnsweredContext)
        return self.context.answers([None if its is None else (_conversational(its[0]), its[1]) for its in rows])

    def marks(self, row: Mapping[str, Any], rollouts: Rollouts, said: Any) -> tuple[Marks, dict[str, list[bool]]]:
        """
        What a context marks of a rollout, and its tokens of each kind.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row.
            rollouts ([`Rollouts`]):
                The rollouts of the prompt.
            said (`Any`):
                What was sampled or answered for it, `None` without.
        """
        assert isinstance(self.context, MarkingContext)
        marks = self.context.marks(_conversational(row), rollouts, said)
        return marks, token_masks(self.tokenizer, rollouts.own, marks.spans, self.context.most_of_it)

    def _is_skipped(self, ids: list[int]) -> bool:
        """Whether a prompt is over budget, where that is no error."""
        if self.max_length is None or len(ids) <= self.max_length:
            return False
        if self.skip_overlong:
            return True
        of_images = ids.count(self.image_token_id) if self.image_token_id is not None else 0
        which = f", {of_images} of them for images," if of_images else ","
        shorten = "make images smaller (in the processor's settings), " if of_images else ""
        raise ValueError(
            f"The teacher's prompt has {len(ids)} tokens{which} {len(ids) - self.max_length} more than the budget of "
            f"{self.max_length}. It is never truncated: raise `max_teacher_prompt_length` (and the model's context, "
            f"or lower `max_completion_length`), {shorten}show less by `context_kwargs` or in the privileged column, "
            "drop the row, or set `overlong_teacher_prompt='skip'` to leave such rows out of the loss."
        )

    def _teacher_reading(
        self,
        row: Mapping[str, Any],
        rollouts: Rollouts | None,
        tools: list[Callable[..., Any]] | None,
        sampled: Any = None,
    ) -> Reading | None:
        if isinstance(self.context, SampledContext | AnsweredContext):
            messages = self.context.teacher_messages(_conversational(row), rollouts, sampled)
        else:
            messages = self.context.teacher_messages(_conversational(row), rollouts)
        return None if messages is None else self._teacher_prompt(row, messages, "teacher_messages", tools)

    def _teacher_prompt(
        self, row: Mapping[str, Any], messages: list[Message], hook: str, tools: list[Callable[..., Any]] | None
    ) -> Reading:
        ids, images = self._rendered(row, messages, hook, tools, self.chat_template_kwargs)
        ids = ids + (self._plain_prefix_ids if isinstance(row["prompt"], str) else self._chat_prefix_ids)
        check_embedded(ids, self.tokenizer, self.num_embeddings)
        return Reading(ids, images)

    def _rendered(
        self,
        row: Mapping[str, Any],
        messages: list[Message],
        hook: str,
        tools: list[Callable[..., Any]] | None,
        chat_template_kwargs: dict[str, Any],
    ) -> Reading:
        """Messages of the context, tokenized as the row's prompt is."""
        if problem := _problem(messages):
            raise ValueError(
                f"The privileged context {type(self.context).__name__} returned {problem}. `{hook}` returns "
                "a list of messages, dictionaries with `role` and `content`, that ends before the assistant's turn, "
                "or `None` for a rollout to leave out."
            )
        messages = as_text(messages)
        if isinstance(row["prompt"], str):
            return Reading(self._plain_ids(messages), {})
        if self.processor is not None:
            name = type(self.context).__name__
            messages = with_images(messages, prompt_of(row), teacher_images_of(row), name)
        return self._applied(messages, tools, chat_template_kwargs)

    def _applied(
        self,
        messages: list[Message],
        tools: list[Callable[..., Any]] | None,
        chat_template_kwargs: dict[str, Any],
    ) -> Reading:
        """Messages by the chat template, as GRPOTrainer has it applied to those of the student."""
        settings: dict[str, Any] = {
            "tools": tools or None,
            "chat_template": self.chat_template,
            "add_generation_prompt": True,
            "tokenize": True,
            "return_dict": True,
            **chat_template_kwargs,
        }
        if self.processor is None:
            ids: list[int] = self.tokenizer.apply_chat_template(messages, **settings)["input_ids"]
            return Reading(ids, {})
        given: Any = self.processor
        template = str(self.chat_template or given.chat_template)
        for_processor = {name: settings.pop(name) for name in chat_template_kwargs if name not in template}
        made = given.apply_chat_template(
            [prepare_multimodal_messages(messages)],
            processor_kwargs={**for_processor, "return_tensors": "pt"},
            **settings,
        )
        has_images = bool(image_parts(messages))
        return Reading(
            made["input_ids"][0].tolist(),
            {name: made[name] for name in made if has_images and name not in _OF_TOKENS},
        )

    def check_rows(self, dataset: Any, name: str, tools: list[Callable[..., Any]] | None = None) -> None:
        """
        Find rows over budget before training starts. Every process checks its share of the rows, and all hear of the
        outcome. The rows of a streaming dataset are checked as they arrive. What a prompt can at most take is kept in
        `longest`: the tokens of the longest one, or the budget where a stream or the rollouts will tell.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Dataset whose rows have been validated.
            name (`str`):
                Name of the dataset, for messages.
            tools (`list[Callable[..., Any]]`, *optional*):
                Tools shown by the chat template.

        Raises:
            ValueError: If a row is over budget and `skip_overlong` is `False`, with the index of the first one found.
        """
        if self.max_length is None:
            return
        if not hasattr(dataset, "__len__"):
            self.longest = self.max_length
            return
        state = PartialState()
        indices = range(state.process_index, len(dataset), state.num_processes)
        progress = tqdm(
            dataset.select(indices),
            f"Checking teacher prompts of {name}",
            leave=False,
            disable=None if state.is_local_main_process else True,  # None: no bar where there is no terminal
        )
        num_skipped, longest, failure, error = 0, 0, None, None
        for index, row in zip(indices, progress, strict=True):
            try:
                reading = self._teacher_reading(row, None, tools)
                self.sample_ids(row, None)
                # Rows whose context waits for the rollouts are not over budget
                is_skipped = reading is not None and self._is_skipped(reading.ids)
                num_skipped += is_skipped
                if not is_skipped:
                    longest = max(longest, self.max_length if reading is None else len(reading.ids))
            except Exception as caught:  # the others wait to hear of it
                failure, error = (index, str(caught) if isinstance(caught, ValueError) else repr(caught)), caught
                break
        outcomes = gather_object([(num_skipped, longest, failure)])
        if error is not None and not isinstance(error, ValueError):
            raise error
        if failures := [failure for *_, failure in outcomes if failure is not None]:
            index, message = min(failures)
            raise ValueError(f"Row {index} of `{name}`: {message}")
        self.longest = max(self.longest, *(longest for _, longest, _ in outcomes))
        total = sum(num_skipped for num_skipped, *_ in outcomes)
        if total and state.is_main_process:
            logger.warning(f"{total} of {len(dataset)} rows of `{name}` will be left out of the loss.")

    def _plain_ids(self, messages: list[Message]) -> list[int]:
        text = "\n\n".join(message["content"] for message in messages)
        ids = without_end(self.tokenizer, self.tokenizer(text)["input_ids"])
        bos = self.tokenizer.bos_token_id
        # A prompt that spells out the BOS token gets a second one from the tokenizer
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _conversational(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as contexts read it, with messages of text as its prompt."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": [{"role": "user", "content": prompt}]}
    return {**row, "prompt": without_images(prompt_of(row))}


def _problem(messages: Any) -> str | None:
    """What the user's context returned instead of messages of text."""
    if not isinstance(messages, list):
        return f"{type(messages).__name__}"
    if not messages:
        return "an empty list"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            return f"the message {message!r:.80}"
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        is_text = all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)
        if not is_text and not (content is None and message.get("tool_calls")):
            return f"a message whose content is {content!r:.80}"
    return "an assistant turn at the end" if messages[-1]["role"] == "assistant" else None


def check_embedded(token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> None:
    """
    Refuse tokens that the model has no embedding for: they would be read past its end.

    Raises:
        ValueError: Naming the first one.
    """
    for token_id in token_ids:
        if num_embeddings is not None and token_id >= num_embeddings:
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise ValueError(
                f"{token!r} is token {token_id} of the tokenizer, and the model has embeddings for {num_embeddings} "
                f"tokens. Call `model.resize_token_embeddings({len(tokenizer)})` and save it, or use a token the "
                "model has (to pad with, for one: `tokenizer.pad_token = tokenizer.eos_token`)."
            )


def without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """
    Token ids of a text without the special tokens that some tokenizers end every text with, after which a model would
    have nothing to go on from.
    """
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    # The text itself may be an unknown token, which is a special one too
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), len(whole) - len(bare))
    return ids[: len(ids) - (len(whole) - start - len(bare))]


def thinking_prefix(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    student_kwargs: dict[str, Any],
    teacher_kwargs: dict[str, Any],
    chat_template: str | None = None,
) -> str:
    """
    Text that lets the teacher read the completion as its reasoning when only the student's template closes a think
    block.

    Templates such as Qwen3's end the student's prompt with an empty think block when thinking is off. With thinking
    on, they leave it to the model to open one, so the teacher would expect `<think>` where the student's answer
    begins, and the first token's divergence would measure that mismatch alone.

    Returns:
        `str`: `"<think>\\n"` in that case, else `""`.
    """
    if chat_template is None and tokenizer.chat_template is None:
        return ""
    given: Any = tokenizer
    content = [{"type": "text", "text": "?"}] if isinstance(tokenizer, ProcessorMixin) else "?"

    def tail(kwargs: dict[str, Any]) -> str:
        text: str = given.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **kwargs,
        )
        return text.rpartition("?")[2]

    closed_by_student = tail(student_kwargs).rstrip().endswith("</think>")
    return "<think>\n" if closed_by_student and "<think>" not in tail(teacher_kwargs) else ""
