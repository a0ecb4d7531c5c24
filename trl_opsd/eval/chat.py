"""From a question to the token ids a model reads, and from those it writes to text."""

import re
from dataclasses import asdict
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .benchmark import Problem


# How models mark where a thought begins and ends, in the order in which it is looked for. Of GPT-OSS' channels, the
# final one is the answer.
_MARKS = [
    (re.compile(r"<\|channel\|>final\b[^<]*<\|message\|>"), "</think>"),
    (re.compile(r"<\|channel\|>[^<]*(?:<\|message\|>|$)"), "<think>"),
    (re.compile(r"<\|channel>\w*|\[THINK\]|<\|START_THINKING\|>|<seed:think>|◁think▷"), "<think>"),
    (re.compile(r"<channel\|>|\[/THINK\]|<\|END_THINKING\|>|</seed:think>|◁/think▷"), "</think>"),
]
_TOKENS = {
    "<|channel|>",
    "<|message|>",
    "<|channel>",
    "<channel|>",
    "[THINK]",
    "[/THINK]",
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<seed:think>",
    "</seed:think>",
    "◁think▷",
    "◁/think▷",
}


class ChatFormat:
    """
    Renders prompts once for all backends, and decodes what they generate.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        chat_template (`str`, *optional*):
            Chat template to use instead of the tokenizer's own.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the chat template, e.g. `{"enable_thinking": True}`.
        system_prompt (`str`, *optional*):
            System message before the question.
        apply_chat_template (`bool`, *optional*, defaults to `True`):
            `False` gives the model the bare prompt, tokenized as any text.

    Raises:
        ValueError: If there is no chat template, or a system prompt without one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        apply_chat_template: bool = True,
    ):
        if apply_chat_template and chat_template is None and tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template. Give one with `chat_template_path`, take another `tokenizer`, or "
                "set `apply_chat_template` to false to ask the bare question, as for a base model."
            )
        if system_prompt is not None and not apply_chat_template:
            raise ValueError("`system_prompt` needs a chat template, but `apply_chat_template` is false. Drop one.")
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._chat_template_kwargs = chat_template_kwargs or {}
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._apply_chat_template = apply_chat_template
        # The scorer needs to see where the thinking ends, also where the tags count as special tokens
        added = tokenizer.added_tokens_decoder
        shown = {"<think>", "</think>"} | _TOKENS
        self._hidden = {index for index, token in added.items() if token.special and token.content not in shown}
        self._marks = _MARKS if any(token.content in _TOKENS for token in added.values()) else []

    def encode(self, prompt: str) -> list[int]:
        """
        Token ids of a whole prompt.

        Args:
            prompt (`str`):
                Content of the user turn.

        Returns:
            `list[int]`:
                Token ids up to where the model's answer begins.
        """
        ids: list[int]
        if not self._apply_chat_template:
            ids = self._tokenizer(prompt)["input_ids"]
            # Some tokenizers end every text
            return ids[:-1] if ids[-1] == self._tokenizer.eos_token_id else ids
        try:
            ids = self._tokenizer.apply_chat_template(
                [*self._system, {"role": "user", "content": prompt}],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self._chat_template_kwargs,
            )["input_ids"]
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses the prompt: {error}. Drop `system_prompt` if it has no place for one, or "
                "give another `chat_template_path`."
            ) from error
        return ids

    def rendered(self, problem: Problem) -> dict[str, Any]:
        """
        What is written down of a problem: the prompt as the model reads it, since another chat template makes another
        problem.

        Args:
            problem ([`~trl_opsd.eval.benchmark.Problem`]):
                Problem.

        Returns:
            `dict[str, Any]`:
                Its fields.
        """
        return {**asdict(problem), "prompt": self._text(self.encode(problem.prompt))}

    def _text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids))

    def _marked(self, token_ids: list[int]) -> str:
        text = self._text(token_ids)
        for mark, tag in self._marks:
            text = mark.sub(tag, text)
        return text.replace("<|message|>", "")

    def decode(self, prompt_ids: list[int], completion_ids: list[int]) -> str:
        """
        Text of a completion, without special tokens other than think tags, which are `<think>` and `</think>` whatever
        the model marks its thoughts with.

        Args:
            prompt_ids (`list[int]`):
                Prompt it continues.
            completion_ids (`list[int]`):
                Generated tokens.

        Returns:
            `str`:
                Text. It begins with `<think>` also if the chat template had opened the thinking part.
        """
        text = self._marked([token for token in completion_ids if token not in self._hidden])
        # Sixteen tokens hold the tag, however it is cut
        opened = self._marked(prompt_ids[-16:]).rstrip().endswith("<think>")
        return f"<think>\n{text}" if opened else text
