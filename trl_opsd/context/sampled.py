from collections.abc import Mapping
from typing import Any

from .base import Message, without_thinking
from .rollouts import Rollouts
from .template import TextContext


class SampledTextContext(TextContext):
    """
    A template one of whose placeholders the current policy fills, by answering another template. Reasoning up to
    `</think>` is left out of what it wrote. Where nothing is left, there is no context.

    Args:
        name (`str`):
            Placeholder of `template` that stands for what was sampled.
        template (`str`):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{<name>}`.
        sample_template (`str`):
            Text of the last user turn that the policy answers, with the placeholder `{prompt}`.
        max_new_tokens (`int`):
            Most tokens to sample.
        temperature (`float`):
            Temperature to sample at, from the whole distribution.
        reads_attempt (`bool`, *optional*, defaults to `False`):
            Whether `sample_template` has a placeholder `{attempt}`, the rollout being scored.

    Raises:
        ValueError: If a template is malformed or lacks a placeholder, or `max_new_tokens` or `temperature` is out of
            range.
    """

    def __init__(
        self,
        name: str,
        template: str,
        sample_template: str,
        max_new_tokens: int,
        temperature: float,
        reads_attempt: bool = False,
    ):
        super().__init__(template, name)
        self._question = TextContext(sample_template, *(["attempt"] if reads_attempt else []))
        self.columns = tuple(dict.fromkeys([*self.columns, *self._question.columns]))
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` of the {name} context must be at least 1, got {max_new_tokens}.")
        if temperature < 0:
            raise ValueError(f"`temperature` of the {name} context must be at least 0, got {temperature}.")
        self.name = name
        self.reads_rollouts = reads_attempt
        self.sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "max_new_tokens": max_new_tokens}

    def question(self, row: Mapping[str, Any]) -> list[Message]:
        """What the policy answers for a row, where that does not depend on the rollout being scored."""
        return self._question.rewritten(row)

    def sample_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        if not self.reads_rollouts:
            return self.question(row)
        return None if rollouts is None else self._question.rewritten(row, attempt=rollouts.own.text)

    def teacher_messages(
        self, row: Mapping[str, Any], rollouts: Rollouts | None, sampled: str | None = None
    ) -> list[Message] | None:
        text = without_thinking(sampled or "")
        return self.rewritten(row, **{self.name: text}) if text else None
