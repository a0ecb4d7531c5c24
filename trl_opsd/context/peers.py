from collections.abc import Iterable, Mapping
from typing import Any

from ..data import Template
from .base import Message, without_thinking
from .rollouts import Rollout, Rollouts
from .template import TextContext


_PEERS = """{prompt}

For your eyes only, this is what is known about the problem.

{peers}

Use it to find out what is right, then solve the problem yourself in your own words, without mentioning any of it. \
Give the final answer in the form the problem asks for."""

_SHOWN = """<<< {title} >>>
{text}
<<< end >>>"""

_FEEDBACK = ("never", "always", "without_correct")


class PeersContext(TextContext):
    """
    The teacher reads other rollouts of the same prompt, as in [SDPO](https://huggingface.co/papers/2601.20802) and
    [MOPD](https://huggingface.co/papers/2605.12652). A rollout for which there is nothing to show has no context.

    Rollouts are taken in their order in the group, and told apart by their position, never by their text.

    Args:
        correct (`int`, *optional*, defaults to `1`):
            Most correct rollouts to show.
        wrong (`int`, *optional*, defaults to `0`):
            Most wrong rollouts to show.
        include_own (`bool`, *optional*, defaults to `False`):
            Whether the rollout being scored may be among them.
        feedback (`bool` or `str`, *optional*, defaults to `False`):
            Whether to show the feedback on the rollout being scored. `"without_correct"` shows it only where no
            correct rollout is shown.
        fallback (`str`, *optional*):
            Dataset column with a reference solution, shown where there is no correct rollout to show.
        wrong_alone (`bool`, *optional*, defaults to `True`):
            Whether wrong rollouts are shown where nothing else is.
        contrast (`int`, *optional*, defaults to `0`):
            Most wrong rollouts that the teacher reads in the place and in the words of correct ones, in a prompt each,
            if a part of the method contrasts the two, as [RLCSD](https://huggingface.co/papers/2606.11709) does. A
            rollout that has no wrong peer then has no context.
        strip_thinking (`bool`, *optional*, defaults to `False`):
            Whether to leave out the rollouts' reasoning up to `</think>`.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{peers}`, besides any dataset
            columns.
        shown (`str`, *optional*):
            Text of each thing that is shown, with the placeholders `{title}`, which says what it is, and `{text}`.
            Defaults to fences with the title.

    Raises:
        ValueError: If nothing would ever be shown, or a template is malformed.
    """

    reads_rollouts = True

    def __init__(
        self,
        correct: int = 1,
        wrong: int = 0,
        include_own: bool = False,
        feedback: bool | str = False,
        fallback: str | None = None,
        wrong_alone: bool = True,
        contrast: int = 0,
        strip_thinking: bool = False,
        template: str | None = None,
        shown: str = _SHOWN,
    ):
        super().__init__(_PEERS if template is None else template, "peers")
        if correct < 0 or wrong < 0 or correct + wrong == 0:
            raise ValueError(
                f"The peers context shows `correct={correct}` and `wrong={wrong}` rollouts. Both must be at least 0, "
                "and one of them at least 1."
            )
        if contrast < 0 or (contrast and not correct):
            raise ValueError(
                f"`contrast={contrast}` of the peers context shows wrong rollouts in the place of correct ones, of "
                f"which it shows `correct={correct}`. Set `contrast` to 0, or both to positive numbers."
            )
        feedback = _FEEDBACK[feedback] if isinstance(feedback, bool) else feedback
        if feedback not in _FEEDBACK:
            raise ValueError(
                f"`feedback` of the peers context must be true, false or 'without_correct', got {feedback!r}."
            )
        self._shown = Template(shown, "`shown` of the peers context")
        if "text" not in self._shown.names or set(self._shown.names) - {"title", "text"}:
            raise ValueError(
                f"`shown` of the peers context has the placeholder {{text}} and may have {{title}}, got {shown!r}."
            )
        self.correct, self.wrong, self.include_own = correct, wrong, include_own
        self.feedback, self.fallback = feedback, fallback
        self.wrong_alone, self.contrast, self.strip_thinking = wrong_alone, contrast, strip_thinking
        if fallback is not None:
            self.columns = tuple(dict.fromkeys([*self.columns, fallback]))

    def check_run(self, num_generations: int, has_rewards: bool, has_feedback: bool) -> None:
        """Refuse a run without peers, or in which none is known to be correct or wrong."""
        if num_generations < 2:
            raise ValueError(
                f"The peers context needs `num_generations` of at least 2, got {num_generations}: a rollout that is "
                "alone has no peers. Raise it, or choose another `privileged_context`."
            )
        if not has_rewards:
            raise ValueError(
                "The peers context needs rewards, which tell correct rollouts from wrong ones. Pass `reward_funcs`, "
                "or an environment that has `get_reward`."
            )

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        if rollouts is None or (self.contrast and not self._contrasts(rollouts)):
            return None
        candidates = rollouts.all if self.include_own else rollouts.others()
        shown = self._texts((rollout for rollout in candidates if rollout.correct is True), self.correct)
        return self._messages(row, rollouts, shown)

    def contrast_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[list[Message]]:
        """The prompts that show a wrong rollout each where `teacher_messages` shows correct ones."""
        if rollouts is None:
            return []
        prompts = (self._messages(row, rollouts, [text]) for text in self._contrasts(rollouts))
        return [messages for messages in prompts if messages is not None]

    def _contrasts(self, rollouts: Rollouts) -> list[str]:
        return self._texts(rollouts.others(correct=False), self.contrast)

    def _messages(self, row: Mapping[str, Any], rollouts: Rollouts, shown: list[str]) -> list[Message] | None:
        blocks = [("a correct attempt", text) for text in shown]
        if not shown and self.fallback is not None:
            blocks.append(("a reference solution", row[self.fallback]))
        candidates = rollouts.all if self.include_own else rollouts.others()
        wrong = self._texts((rollout for rollout in candidates if rollout.correct is False), self.wrong)
        feedback = rollouts.own.feedback
        if feedback is not None and (self.feedback == "always" or (self.feedback == "without_correct" and not shown)):
            blocks.append(("feedback on an earlier attempt", feedback))
        if blocks or self.wrong_alone:
            blocks += [("an attempt that is wrong", text) for text in wrong]
        if not blocks:
            return None
        return self.rewritten(
            row, peers="\n\n".join(self._shown.fill({"title": title, "text": text}) for title, text in blocks)
        )

    def _texts(self, rollouts: Iterable[Rollout], most: int) -> list[str]:
        texts = (without_thinking(one.text) if self.strip_thinking else one.text for one in rollouts)
        return [text for text in texts if text.strip()][:most]
