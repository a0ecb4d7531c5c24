import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..data import Template
from .base import Message, as_text, without_thinking
from .rollouts import Rollout, Rollouts
from .template import TextContext


_KNOWN = """{prompt}

For your eyes only, this is what is known about the problem, and about problems like it.

{known}

Use it to find out what is right, then solve the problem yourself in your own words, without mentioning any of it. \
Give the final answer in the form the problem asks for."""

_SHOWN = """<<< {title} >>>
{text}
<<< end >>>"""

_ASK = """{prompt}

This is an attempt at the problem above. It failed.

<<< attempt >>>
{attempt}
<<< feedback >>>
{feedback}
<<< lessons so far >>>
{playbook}
<<< end >>>

In a few sentences, say where the attempt first went wrong and what to do differently. Do not solve the problem \
again. Then end with three lines:
LESSON: one sentence that would help with other problems of this kind too
HELPFUL: the numbers of the lessons so far that show the way
HARMFUL: the numbers of those that lead astray
Write "none" where there is nothing to say."""

_LINE = re.compile(r"^[*\s]*(LESSON|HELPFUL|HARMFUL)[*\s]*:(.*)$", re.MULTILINE | re.IGNORECASE)


class PlaybookContext(TextContext):
    """
    The teacher reads what the policy has learnt so far, as in [RESD](https://huggingface.co/papers/2605.12741): a
    playbook of lessons that is common to all problems, and an earlier solution of this one by the policy. Of a correct
    rollout it also reads the rollout itself; of a failed one what the policy writes about it, the rollout and the
    feedback on it. Where nothing of all that is there, it reads the student's prompt.

    What the policy writes about a failure ends with a lesson, which is added to the playbook, and with the numbers of
    lessons that are of help or do harm, which are counted. In every fourth batch, and where there are too many, those
    are dropped that do as much harm as good, and those that nobody has found helpful for long. Playbook and solutions
    are those from before the batch, and are saved in checkpoints. Evaluation reads them, and does not change them.

    Args:
        most_lessons (`int`, *optional*, defaults to `120`):
            Budget of the playbook. Where pruning leaves more, the least helpful ones go first, older before newer.
        prune_every (`int`, *optional*, defaults to `4`):
            Batches from one pruning to the next.
        stale_after (`int`, *optional*, defaults to `50`):
            Batches after which a lesson that was not helpful in them is dropped.
        most_solutions (`int`, *optional*, defaults to `50000`):
            Most problems of which a solution is kept, the latest ones.
        most_characters (`int`, *optional*, defaults to `400`):
            Most characters of a lesson. A longer one is dropped, and counted.
        strip_thinking (`bool`, *optional*, defaults to `True`):
            Whether to leave out the reasoning of rollouts up to `</think>` where they are shown.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{known}`, besides any dataset
            columns.
        shown (`str`, *optional*):
            Text of each thing that is known, with the placeholders `{title}` and `{text}`.
        sample_template (`str`, *optional*):
            Text of the last user turn that the policy answers after a failure, with the placeholders `{prompt}`,
            `{attempt}`, `{feedback}` and `{playbook}`, besides any dataset columns.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of what it writes.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that is sampled at.

    Raises:
        ValueError: If a template is malformed or lacks a placeholder, or a number is out of range.
    """

    reads_rollouts = True

    def __init__(
        self,
        most_lessons: int = 120,
        prune_every: int = 4,
        stale_after: int = 50,
        most_solutions: int = 50_000,
        most_characters: int = 400,
        strip_thinking: bool = True,
        template: str = _KNOWN,
        shown: str = _SHOWN,
        sample_template: str = _ASK,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
    ):
        super().__init__(template, "known")
        counts = {
            "most_lessons": most_lessons,
            "prune_every": prune_every,
            "stale_after": stale_after,
            "most_solutions": most_solutions,
            "most_characters": most_characters,
            "max_new_tokens": max_new_tokens,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"`{name}` of the playbook context must be at least 1, got {count}.")
        if temperature < 0:
            raise ValueError(f"`temperature` of the playbook context must be at least 0, got {temperature}.")
        self._shown = Template(shown, "`shown` of the playbook context")
        if "text" not in self._shown.names or set(self._shown.names) - {"title", "text"}:
            raise ValueError(
                f"`shown` of the playbook context has the placeholder {{text}} and may have {{title}}, got {shown!r}."
            )
        self._question = TextContext(sample_template, "attempt", "feedback", "playbook")
        self.columns = tuple(dict.fromkeys([*self.columns, *self._question.columns]))
        self.sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "max_new_tokens": max_new_tokens}
        self.most_lessons, self.prune_every, self.stale_after = most_lessons, prune_every, stale_after
        self.most_solutions, self.most_characters = most_solutions, most_characters
        self.strip_thinking = strip_thinking
        self.lessons: list[dict[str, Any]] = []
        """`text`, the counts `helpful` and `harmful`, and the batch it was `used` in last, of each."""
        self._solutions: dict[str, str] = {}
        self._batches, self._dropped = 0, 0

    def check_run(self, num_generations: int, has_rewards: bool, has_feedback: bool) -> None:
        """Refuse a run in which no rollout is known to fail."""
        if not has_rewards:
            raise ValueError(
                "The playbook context needs rewards, which tell correct rollouts from failures. Pass `reward_funcs`, "
                "or an environment that has `get_reward`."
            )

    def sample_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        """What the policy is asked about a failure."""
        if rollouts is None or rollouts.own.correct is not False:
            return None
        return self._question.rewritten(
            row,
            attempt=rollouts.own.text,
            feedback=rollouts.own.feedback or "none",
            playbook=self.playbook or "none",
        )

    def teacher_messages(
        self, row: Mapping[str, Any], rollouts: Rollouts | None, sampled: str | None = None
    ) -> list[Message] | None:
        if rollouts is None:
            return None
        own, blocks = rollouts.own, []
        if self.lessons:
            blocks.append(("lessons from other problems", self.playbook))
        if solution := self._solutions.get(_key(row["prompt"])):
            blocks.append(("an earlier solution that is correct", solution))
        if own.correct and self._text(own):
            blocks.append(("a correct attempt", self._text(own)))
        reflection = _LINE.sub("", without_thinking(sampled or "")).strip()
        if own.correct is False and (reflection or own.feedback):
            said = [("an attempt that failed", self._text(own)), ("feedback on it", own.feedback)]
            blocks += [(title, text) for title, text in [*said, ("a reflection on it", reflection)] if text]
        if not blocks:
            return as_text(row["prompt"])
        return self.rewritten(
            row, known="\n\n".join(self._shown.fill({"title": title, "text": text}) for title, text in blocks)
        )

    @property
    def playbook(self) -> str:
        """The lessons, numbered from 1."""
        return "\n".join(f"{number}. {lesson['text']}" for number, lesson in enumerate(self.lessons, 1))

    def _text(self, rollout: Rollout) -> str:
        return (without_thinking(rollout.text) if self.strip_thinking else rollout.text).strip()

    def remember(self, groups: Sequence[tuple[Mapping[str, Any], list[Rollout]]]) -> None:
        """Learn from a batch that is trained on, see [`Memory`]."""
        self._batches += 1
        self._dropped = 0
        shown, known = list(self.lessons), {_plain(lesson["text"]) for lesson in self.lessons}
        for row, rollout in ((row, rollout) for row, rollouts in groups for rollout in rollouts):
            if rollout.correct and self._text(rollout):
                key = _key(row["prompt"])
                self._solutions.pop(key, None)
                self._solutions[key] = self._text(rollout)
            for name, value in _LINE.findall(without_thinking(rollout.said or "")):
                if name.upper() != "LESSON":
                    self._count(shown, name.lower(), value)
                    continue
                text = " ".join(value.split())
                if _plain(text) in known | {"", "none"}:
                    continue
                known.add(_plain(text))
                if len(text) > self.most_characters:
                    self._dropped += 1
                    continue
                self.lessons.append({"text": text, "helpful": 0, "harmful": 0, "used": self._batches})
        for key in list(self._solutions)[: -self.most_solutions]:
            del self._solutions[key]
        self._dropped += len(self.lessons)
        if self._batches % self.prune_every == 0 or len(self.lessons) > self.most_lessons:
            self._prune()
        self._dropped -= len(self.lessons)

    def _count(self, shown: list[dict[str, Any]], name: str, numbers: str) -> None:
        for number in {int(its) for its in re.findall(r"\d{1,6}", numbers)}:
            if 1 <= number <= len(shown):
                shown[number - 1][name] += 1
                if name == "helpful":
                    shown[number - 1]["used"] = self._batches

    def _prune(self) -> None:
        kept = [
            lesson
            for lesson in self.lessons
            if not 0 < lesson["harmful"] >= lesson["helpful"] and self._batches - lesson["used"] < self.stale_after
        ]
        ranks = sorted(range(len(kept)), key=lambda index: (kept[index]["helpful"] - kept[index]["harmful"], index))
        over = set(ranks[: max(len(kept) - self.most_lessons, 0)])
        self.lessons = [lesson for index, lesson in enumerate(kept) if index not in over]

    def rates(self, rows: Sequence[Mapping[str, Any]], rollouts: Sequence[Rollouts]) -> dict[str, tuple[int, int]]:
        """How many lessons there are, and how many the last batch dropped."""
        return {"playbook/lessons": (len(self.lessons), 1), "playbook/dropped_lessons": (self._dropped, 1)}

    def state_dict(self) -> dict[str, Any]:
        """The playbook, the solutions and the number of batches."""
        lessons = [dict(lesson) for lesson in self.lessons]
        return {"lessons": lessons, "solutions": dict(self._solutions), "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""
        self.lessons = [dict(lesson) for lesson in state["lessons"]]
        self._solutions, self._batches = dict(state["solutions"]), state["batches"]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _key(prompt: Any) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_text(prompt)
    told = json.dumps([[message["role"], message["content"]] for message in messages])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
