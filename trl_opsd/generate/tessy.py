from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..parts import import_object
from .base import Attempt, Made, Problems, Writer


Boundary = Callable[[list[str], list[str], str], Sequence[int | None]]
# Tokens of what is there that a span is decoded after: some tokenizers begin a text otherwise than they go on with one
_CONTEXT = 16
_LONGEST_REPEAT, _REPEATS = 50, 8


class TESSYMaker:
    """
    Texts of two writers, as [TESSY](https://huggingface.co/papers/2604.14164) makes them for supervised training: the
    teacher writes what takes capability, the student what is style.

    The student begins. Each writes a few tokens at a time, all of one text that both read after their own prompts,
    until `boundary` says that what has just been written is the other's part; the word is finished, as far as it has
    been written, and the other goes on. Once the thinking has ended, the student writes the whole answer. A text that
    repeats itself, or gets too long, is begun anew.

    With a second model (`teacher` of the command) this is the paper's method. Without one, the teacher is the same
    model reading the privileged context: a variant that nobody has published.

    The column `spans` says who wrote what, `source` which of the two it is: `"teacher_and_student"` or
    `"same_model_with_context"`.

    Args:
        boundary (`str` or `Callable`):
            Function, or its import path, that is given the texts so far, what has been written since, and by whom
            (`"student"` or `"teacher"`). For each it returns after how many characters of what has been written the
            first piece ends that is the other's part, capability in the student's and style in the teacher's, or
            `None` if none is. The paper trains a token classifier for each writer.
        student_tokens (`int`, *optional*, defaults to `5`):
            Most tokens that the student writes before `boundary` is asked.
        teacher_tokens (`int`, *optional*, defaults to `10`):
            Most tokens that the teacher writes before `boundary` is asked.
        answer_tokens (`int`, *optional*, defaults to `2048`):
            Most tokens of the answer, which is a part of `max_new_tokens`.
        end_of_thinking (`str`, *optional*, defaults to `"</think>"`):
            Text that ends the thinking.
        teacher_end_of_thinking (`str`, *optional*):
            Text that also does, and is replaced by `end_of_thinking`, for a teacher of another family.
        student_opening (`str`, *optional*, defaults to `""`):
            Text that the completion begins with, such as `"<think>\\n"` for a model whose prompt does not say it.
        teacher_opening (`str`, *optional*):
            What the teacher reads in its place. By default the same.
        max_tries (`int`, *optional*, defaults to `5`):
            Tries of each row.
        keep (`str`, *optional*, defaults to `"finished"`):
            `"correct"` also begins anew what is wrong by the reward functions.

    Raises:
        ValueError: If a value is none of these, or there is no such function.
    """

    needs_context = False
    takes_teacher = True

    def __init__(
        self,
        boundary: str | Boundary,
        student_tokens: int = 5,
        teacher_tokens: int = 10,
        answer_tokens: int = 2048,
        end_of_thinking: str = "</think>",
        teacher_end_of_thinking: str | None = None,
        student_opening: str = "",
        teacher_opening: str | None = None,
        max_tries: int = 5,
        keep: str = "finished",
    ):
        limits = {"student_tokens": student_tokens, "teacher_tokens": teacher_tokens, "answer_tokens": answer_tokens}
        for name, value in (limits | {"max_tries": max_tries}).items():
            if value < 1:
                raise ValueError(f"`{name}` of the tessy maker must be at least 1, got {value}.")
        if keep not in ("finished", "correct"):
            raise ValueError(f"`keep` of the tessy maker must be one of finished, correct, got {keep!r}.")
        if not end_of_thinking:
            raise ValueError("`end_of_thinking` of the tessy maker is empty, so that no thinking would ever end.")
        self.boundary = _function(boundary)
        self.tokens = {"student": student_tokens, "teacher": teacher_tokens}
        self.answer_tokens, self.max_tries = answer_tokens, max_tries
        self.end, self.other_end = end_of_thinking, teacher_end_of_thinking
        teacher_opening = student_opening if teacher_opening is None else teacher_opening
        self.openings = {"student": student_opening, "teacher": teacher_opening}
        self.needs_rewards = keep == "correct"

    def __call__(self, problems: Problems) -> Made:
        self._check(problems)
        made, source = Made(), "teacher_and_student" if problems.has_second_model else "same_model_with_context"
        drafts: list[_Draft] = []
        done: dict[int, tuple[_Draft, Attempt]] = {}
        for row, ids in enumerate(problems.writers["teacher"].prompt_ids):
            if ids is None:
                made.dropped["without a context"] += 1
            else:
                drafts.append(_Draft(row))
        with tqdm(total=len(drafts), desc="thoughts of two writers", unit="text", smoothing=0) as bar:
            while drafts:
                self._think(drafts, problems.writers, problems.sampling.max_new_tokens - self.answer_tokens, bar)
                self._answer([draft for draft in drafts if not draft.is_over], problems)
                done |= self._graded([draft for draft in drafts if draft.reason is None], problems)
                failed = [draft for draft in drafts if draft.reason is not None]
                for draft in failed:
                    if draft.number == self.max_tries:
                        made.dropped[f"{draft.reason} in the last of {self.max_tries} tries"] += 1
                again = [_Draft(draft.row, draft.number + 1) for draft in failed if draft.number < self.max_tries]
                drafts, bar.total = again, bar.total + len(again)
        for row in sorted(done):
            draft, attempt = done[row]
            made.add(problems.rows[row], attempt, source, tries=draft.number, spans=self._spans(draft))
        return made

    def _check(self, problems: Problems) -> None:
        longest = problems.sampling.max_new_tokens
        if self.answer_tokens >= longest:
            raise ValueError(
                f"`answer_tokens={self.answer_tokens}` of the tessy maker leave nothing for the thinking, of "
                f"`max_new_tokens={longest}` in all. Lower the one in `maker_kwargs`, or raise the "
                "other."
            )
        if problems.sampling.temperature == 0.0 and self.max_tries > 1:
            raise ValueError(
                "With `temperature=0` all tries of a row by the tessy maker are the same. Set `max_tries: 1` in "
                "`maker_kwargs`, or a temperature."
            )

    def _think(self, drafts: list["_Draft"], writers: Mapping[str, Writer], longest: int, bar: Any) -> None:
        while drafts:
            for by, writer in writers.items():
                self._write([draft for draft in drafts if draft.thinks and draft.by == by], by, writer, longest)
            still = [draft for draft in drafts if draft.thinks]
            bar.set_postfix(longest=max(len(draft.text) for draft in drafts), refresh=False)
            bar.update(len(drafts) - len(still))
            drafts = still

    def _write(self, drafts: list["_Draft"], by: str, writer: Writer, longest: int) -> None:
        """Have a writer go on with each draft, up to a boundary."""
        read = [self._ids(draft, by, writer) for draft in drafts]
        for draft, ids in zip(drafts, read, strict=True):
            if ids is not None and len(ids) + self.tokens[by] > longest:
                draft.stop("truncated")
        asked = [(draft, ids) for draft, ids in zip(drafts, read, strict=True) if ids is not None and draft.thinks]
        written = _sampled(asked, writer, self.tokens[by])
        some = [(draft, text, ended) for (draft, _), (text, ended) in zip(asked, written, strict=True) if text]
        cuts = self._boundaries([draft.text for draft, *_ in some], [text for _, text, _ in some], by)
        for (draft, text, ended), cut in zip(some, cuts, strict=True):
            end = len(text) if cut is None else _word_end(text, cut)
            draft.add(text[:end], by, self.end, self.other_end)
            ended = ended and end == len(text)
            if draft.thinks and (cut is not None or (ended and by == "teacher")):
                draft.by = "teacher" if by == "student" else "student"
            elif draft.thinks and ended:  # the student is done without having ended its thinking
                draft.thinks, draft.is_over = False, True
        for (draft, _), (text, ended) in zip(asked, written, strict=True):
            if not text:
                draft.add_nothing(ended)

    def _ids(self, draft: "_Draft", by: str, writer: Writer) -> list[int] | None:
        """Tokens of what there is of a draft, as a writer reads it."""
        text = self.openings[by] + draft.text
        ids: list[int] = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
        if _decoded(writer, ids, keeps_special=True) != text:
            draft.stop(f"read otherwise by the {by}")
            return None
        return ids

    def _boundaries(self, before: list[str], written: list[str], by: str) -> list[int | None]:
        cuts = list(self.boundary(before, written, by)) if written else []
        if len(cuts) != len(written):
            raise ValueError(f"`boundary` of the tessy maker gave {len(cuts)} results for {len(written)} spans.")
        for cut, text in zip(cuts, written, strict=True):
            if cut is not None and not 0 < cut <= len(text):
                raise ValueError(
                    f"`boundary` of the tessy maker gave {cut!r} for a span of {len(text)} characters, {text!r}. "
                    "Return how many of them there are up to the end of the piece, at least 1, or `None`."
                )
        return cuts

    def _answer(self, drafts: list["_Draft"], problems: Problems) -> None:
        writer = problems.writers["student"]
        read = [(draft, self._ids(draft, "student", writer)) for draft in drafts]
        asked = [(draft, ids) for draft, ids in read if ids is not None]
        answers = _sampled(asked, writer, self.answer_tokens, "answers")
        for (draft, _), (text, ended) in zip(asked, answers, strict=True):
            draft.append(text, "student")
            if not ended:
                draft.stop("truncated")

    def _graded(self, drafts: list["_Draft"], problems: Problems) -> dict[int, tuple["_Draft", Attempt]]:
        """Those that are worth keeping, by their row."""
        writer, attempts = problems.writers["student"], []
        for draft in drafts:
            ids = writer.tokenizer(self.openings["student"] + draft.text, add_special_tokens=False)["input_ids"]
            attempts.append(Attempt(draft.row, problems.decode(draft.row, ids), ids, draft.seed or 0, False))
        kept = {}
        for draft, attempt in zip(drafts, problems.grade(attempts), strict=True):
            if reason := attempt.shortcoming(self.needs_rewards):
                draft.stop(reason)
            else:
                kept[draft.row] = draft, attempt
        return kept

    def _spans(self, draft: "_Draft") -> list[dict[str, str]]:
        opening = [("opening", self.openings["student"])] if self.openings["student"] else []
        return [{"by": by, "text": text} for by, text in opening + draft.spans]


@dataclass
class _Draft:
    row: int
    number: int = 1
    by: str = "student"
    spans: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    seed: int | None = None
    thinks: bool = True
    is_over: bool = False
    reason: str | None = None
    num_empty: int = 0

    def stop(self, reason: str) -> None:
        self.reason, self.thinks, self.is_over = reason, False, True

    def add(self, text: str, by: str, end: str, other_end: str | None) -> None:
        start = len(self.text)
        self.append(text, by)
        self.num_empty = 0
        for marker in filter(None, (end, other_end)):
            place = self.text.find(marker, max(0, start - len(marker)))
            if place >= 0:
                self._keep(place)
                self.append(end, by)
                self.thinks = False
                return
        if _repeats(self.text):
            self.stop("repeating itself")

    def append(self, text: str, by: str) -> None:
        self.text += text
        if self.spans and self.spans[-1][0] == by:
            self.spans[-1] = by, self.spans[-1][1] + text
        elif text:
            self.spans.append((by, text))

    def add_nothing(self, ended: bool) -> None:
        self.num_empty += 1
        if self.num_empty == 3:
            self.stop("without a word")
        elif ended and self.by == "student" and self.text:
            self.thinks, self.is_over = False, True
        elif ended:
            self.by = "student"

    def _keep(self, length: int) -> None:
        """Leave out what stands after some characters, whoever wrote it."""
        over, self.text = len(self.text) - length, self.text[:length]
        while over > 0:
            by, text = self.spans.pop()
            if len(text) > over:
                self.spans.append((by, text[:-over]))
            over -= len(text)


def _function(boundary: str | Boundary) -> Boundary:
    if isinstance(boundary, str):
        try:
            boundary = import_object(boundary)
        except ImportError as error:
            raise ValueError(
                f"Cannot load `boundary={boundary!r}` of the tessy maker: {error}. Give the import path of a function "
                "of (texts so far, spans since, by whom)."
            ) from error
    if not callable(boundary):
        raise ValueError(f"`boundary` of the tessy maker is {boundary!r}, which cannot be called.")
    return boundary


def _sampled(
    asked: Sequence[tuple[_Draft, list[int]]], writer: Writer, max_new_tokens: int, what: str | None = None
) -> list[tuple[str, bool]]:
    """What a writer adds to each draft, whose tokens it reads, and whether it has ended there."""
    prompts: list[list[int]] = [[*(writer.prompt_ids[draft.row] or []), *ids] for draft, ids in asked]
    attempts = writer.sample([draft.row for draft, _ in asked], prompts, what, max_new_tokens)
    added = []
    for (draft, _), prompt, attempt in zip(asked, prompts, attempts, strict=True):
        draft.seed = attempt.seed if draft.seed is None else draft.seed
        ids = attempt.token_ids if attempt.truncated else attempt.token_ids[:-1]
        start = prompt[-_CONTEXT:]
        text = _decoded(writer, start + ids)[len(_decoded(writer, start)) :]
        added.append((text.rstrip("\N{REPLACEMENT CHARACTER}"), not attempt.truncated))
    return added


def _decoded(writer: Writer, ids: list[int], keeps_special: bool = False) -> str:
    text: Any = writer.tokenizer.decode(ids, skip_special_tokens=not keeps_special, clean_up_tokenization_spaces=False)
    return str(text)


def _word_end(text: str, place: int) -> int:
    if text[place - 1].isspace():
        return place
    return next((end for end in range(place, len(text)) if text[end].isspace()), len(text))


def _repeats(text: str) -> bool:
    """Whether the text ends in the same words, three or more, eight times over."""
    words = text.split()[-_LONGEST_REPEAT * _REPEATS :]
    for length in range(3, len(words) // _REPEATS + 1):
        fragment = words[-length:]
        if words[-length * _REPEATS :] == fragment * _REPEATS and any(map(str.isalnum, "".join(fragment))):
            return True
    return False
