"""What student and teacher say of the rows: sampled, graded, scored, and written down row by row."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm.auto import tqdm

from ..changed import changed
from ..context import PrivilegedContext, TeacherPrompt
from ..context.spans import Marks
from ..eval.chat import ChatFormat
from ..eval.scorer import AnswerType, score
from ..files import LineFile
from ..sampling import Sampling
from ..trainer.score import Scored, reward
from ..trainer.score import score as score_tokens
from ..trainer.several import each_teacher, teacher_names
from .readings import OTHER, Reading


if TYPE_CHECKING:
    from ..context import OtherSolutionContext
    from ..trainer.trainer import SelfDistillationTrainer

STUDENT = "student"
RECORDS = "records.jsonl"
SCORES = ("divergence", "student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy")

Record = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """
    A row to probe.

    Args:
        row (`Mapping[str, Any]`):
            Dataset row.
        reference (`str`):
            Right answer, as the scorer takes it.
    """

    row: Mapping[str, Any]
    reference: str


class Measuring:
    """
    Measures rows in chunks, so that any number of finished chunks is a measurement of fewer rows.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Its policy, teacher, context, divergence and sampler are used. Nothing of it changes.
        questions (`Sequence[Question]`):
            Rows.
        readings (`Sequence[Reading]`):
            What the teacher reads.
        answer_type (`str`):
            How answers are graded.
        reference_of (`Callable[[Mapping[str, Any]], str | None]`):
            The right answer of any row, `None` if it has none that can be compared.
        num_samples (`int`):
            Completions of a row by each side. A student whose rollouts the context reads has as many as in training.
        chunk_size (`int`):
            Completions that are sampled at once.
    """

    def __init__(
        self,
        trainer: "SelfDistillationTrainer",
        questions: Sequence[Question],
        readings: Sequence[Reading],
        answer_type: AnswerType,
        reference_of: Callable[[Mapping[str, Any]], str | None],
        num_samples: int,
        chunk_size: int,
    ):
        args = trainer.args
        self._trainer, self._questions, self._readings = trainer, questions, readings
        self._answer_type, self._reference_of, self._num_samples = answer_type, reference_of, num_samples
        self._reads_rollouts = getattr(trainer.context, "reads_rollouts", True)
        self.group_size = max(num_samples, cast(int, args.num_generations)) if self._reads_rollouts else num_samples
        self._chunk = max(1, chunk_size // self.group_size)
        self._sampling = Sampling(args.temperature, args.top_p, args.top_k, cast(int, args.max_completion_length))
        tokenizer: Any = trainer.processing_class
        is_chat = not isinstance(questions[0].row["prompt"], str)
        self._chat = ChatFormat(tokenizer, trainer.chat_template, apply_chat_template=is_chat)

    def run(self, file: Path, shows_progress: bool = True) -> None:
        """
        Measure what a file does not hold yet, and add it to the file.

        Args:
            file (`Path`):
                A JSON object per line, for a row and an arm each.
            shows_progress (`bool`, *optional*, defaults to `True`):
                Whether to show a bar.
        """
        arms = [STUDENT, *(reading.name for reading in self._readings)]
        with closing(LineFile(file)) as lines:
            known = {(record["row"], record["arm"]): record for record in read_records(file)}
            total = len(arms) * len(self._questions)
            bar = tqdm(total=total, initial=len(known), unit="row", smoothing=0, disable=not shows_progress)
            with bar:
                for start in range(0, len(self._questions), self._chunk):
                    indices = range(start, min(start + self._chunk, len(self._questions)))
                    for number, arm in enumerate(arms):
                        missing = [index for index in indices if (index, arm) not in known]
                        if not missing:
                            continue
                        bar.set_description(arm)
                        # All of the chunk, so that it is what it would have been without an interruption
                        students = [known.get((index, STUDENT)) for index in indices]
                        stream = 1000 + start * len(arms) + number
                        for record in self._measured(number, indices, cast(list[Record], students), stream):
                            if record["row"] in missing:
                                lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
                                known[record["row"], arm] = record
                                bar.update()

    def _measured(self, number: int, indices: range, students: list[Record], stream: int) -> list[Record]:
        if number == 0:
            return self._student(indices, stream)
        return self._reading(self._readings[number - 1], indices, students, stream)

    def _student(self, indices: range, stream: int) -> list[Record]:
        """The student's rollouts, reading the question alone."""
        trainer, size = self._trainer, self.group_size
        rows = [self._questions[index].row for index in indices for _ in range(size)]
        prompts = trainer.tokenize_prompts([row["prompt"] for row in rows])
        ids = self._filled(trainer.sample(prompts, self._sampling, stream))
        rewards = self._rewards(rows, ids)
        records = []
        for place, index in enumerate(indices):
            own = range(place * size, (place + 1) * size)
            written = [self._written(index, prompts[its], ids[its]) for its in own]
            for its, one in zip(own, written, strict=True):
                one["rewards"] = rewards[its]
            records.append({"row": index, "arm": STUDENT, "completions": written})
        return records

    def _reading(self, reading: Reading, indices: range, students: list[Record], stream: int) -> list[Record]:
        """What the teacher makes of the student's rollouts by a reading, and what it writes itself."""
        size = self.group_size
        if reading.context is None:
            scored: Scored | None = self._scored(indices, students)
            given = cast(Scored, scored).teacher_prompts
            groups = [given[place * size : (place + 1) * size] for place in range(len(indices))]
            prompts = [next((ids for ids in group if ids is not None), None) for group in groups]
        else:
            control = replace(self._trainer.teacher_prompt, context=_Control(reading.context), skip_overlong=True)
            prompts = [control.token_ids(self._questions[index].row, None) for index in indices]
            scored = self._scored_by(control, indices, students)
        tokenizer: Any = self._trainer.processing_class
        plain = self._trainer.tokenize_prompts([self._questions[index].row["prompt"] for index in indices])
        asked = [place for place, ids in enumerate(prompts) if ids is not None for _ in range(self._num_samples)]
        of_rows = [cast("list[int]", prompts[place]) for place in asked], [indices[place] for place in asked]
        completions = iter(self._filled(self._sampled(*of_rows, stream)) if asked else [])
        records = []
        for place, (index, ids) in enumerate(zip(indices, prompts, strict=True)):
            number = 0 if ids is None else self._num_samples
            written = [self._written(index, cast("list[int]", ids), next(completions), reading) for _ in range(number)]
            record = {"row": index, "arm": reading.name, "completions": written, "reads_same": ids == plain[place]}
            record["read"] = None if ids is None else tokenizer.decode(ids, skip_special_tokens=True)
            own = range(place * size, (place + 1) * size)
            record["scores"] = [None if scored is None else _of_rollout(scored, its, students[place]) for its in own]
            records.append(record)
        return records

    def _scored_by(self, control: TeacherPrompt, indices: range, students: list[Record]) -> Scored | None:
        if not scores_controls(self._trainer):
            return None
        inputs = replace(self._trainer.teacher_inputs, teacher_prompt=control)
        with changed(self._trainer, teacher_inputs=inputs):
            return self._scored(indices, students)

    def _scored(self, indices: range, students: list[Record]) -> Scored:
        trainer, size = self._trainer, self.group_size
        rows = [self._questions[index].row for index in indices for _ in range(size)]
        written = [one for record in students for one in record["completions"]]
        ids, rewards = [one["token_ids"] for one in written], [one["rewards"] for one in written]
        tensor = None
        if rewards[0] is not None:
            given = [[math.nan if its is None else its for its in values] for values in rewards]
            tensor = torch.tensor(given, device=trainer.accelerator.device)
        return score_tokens(trainer, rows, ids, tensor, size)

    def _sampled(self, prompts: list[list[int]], indices: list[int], stream: int) -> list[list[int]]:
        """A completion of each prompt, by the teacher of its row."""
        trainer = self._trainer
        completions: list[list[int]] = [[] for _ in prompts]
        writers = [self._writer(self._questions[index].row) for index in indices]
        for writer in dict.fromkeys(writers):
            places = [place for place, its in enumerate(writers) if its is writer]
            own = [prompts[place] for place in places]
            if writer is None:
                self._check_lengths(own)
                written = trainer.sample(own, self._sampling, stream)
            else:
                written = trainer.sampler.sample(own, self._sampling, stream, writer)
            for place, ids in zip(places, written, strict=True):
                completions[place] = ids
        return completions

    def _writer(self, row: Mapping[str, Any]) -> Any:
        """The teacher of a row, `None` where its weights are the student's: before training, those of a copy are."""
        trainer = self._trainer
        names = [row[column] for column in teacher_names(trainer.args)]
        name = names[0] if names else None
        if each_teacher(trainer.args)[name].teacher != "external":
            return None
        return trainer.teacher if name is None else trainer.teacher.members[name]

    def _check_lengths(self, prompts: list[list[int]]) -> None:
        """In training, an engine does not answer the teacher's prompts."""
        args, limit = self._trainer.args, self._trainer.context_length
        needed = max(map(len, prompts)) + self._sampling.max_new_tokens
        if args.use_vllm and limit is not None and needed > limit:
            field = "vllm_max_model_length" if args.vllm_mode == "colocate" else "--max-model-len"
            raise ValueError(
                f"A prompt of the teacher and its answer may have {needed} tokens, and vLLM takes {limit}: raise "
                f"`{field}` to that, lower `max_completion_length`, or have the teacher read less."
            )

    def _filled(self, completions: list[list[int]]) -> list[list[int]]:
        return [ids or [self._trainer.eos_token_ids[0]] for ids in completions]

    def _rewards(self, rows: list[Any], ids: list[list[int]]) -> list[Any]:
        trainer = self._trainer
        if not self._reads_rollouts or not trainer.reward_funcs:
            return [None] * len(rows)
        return [[None if math.isnan(its) else its for its in values] for values in reward(trainer, rows, ids).tolist()]

    def _written(self, index: int, prompt: list[int], ids: list[int], reading: Reading | None = None) -> Record:
        text = self._chat.decode(prompt, ids)
        verdict = score(text, self._questions[index].reference, self._answer_type)
        written: Record = {
            "text": text,
            "token_ids": ids,
            "truncated": ids[-1] not in self._trainer.eos_token_ids,
            "correct": bool(verdict.correct),
            "answer": verdict.answer,
        }
        if reading is not None and reading.name == OTHER:
            other = self._reference_of(cast("OtherSolutionContext", reading.context).other(self._questions[index].row))
            its = None if other is None else score(text, other, self._answer_type).correct
            # Where both have the same answer, nobody can tell which is followed
            same = (
                other is not None
                and score(f"\\boxed{{{other}}}", self._questions[index].reference, self._answer_type).correct
            )
            written["follows_other"] = None if same else its
        return written


def scores_controls(trainer: "SelfDistillationTrainer") -> bool:
    """Whether the divergence can be taken from the teacher reading a control: not from a target made of readings."""
    return trainer.signals.target is None


def _of_rollout(scored: Scored, position: int, student: Record) -> Record | None:
    length = len(student["completions"][position % len(student["completions"])]["token_ids"])
    known = scored.scores.known[position, :length].tolist()
    if not any(known):
        return None
    values = {name: getattr(scored.scores, name)[position, :length].tolist() for name in SCORES}
    return {"known": known} | {name: [float(f"{its:.6g}") for its in its_all] for name, its_all in values.items()}


class _Control:
    """A control, which contrasts and marks nothing, whatever parts of the method would read."""

    columns: tuple[str, ...] = ()
    reads_rollouts = True
    kinds: tuple[str, ...] = ()
    most_of_it = 0.0

    def __init__(self, context: PrivilegedContext):
        self.teacher_messages = context.teacher_messages

    def contrast_messages(self, row: Mapping[str, Any], rollouts: Any) -> list[Any]:
        return []

    def marks(self, row: Mapping[str, Any], rollouts: Any, said: Any) -> Marks:
        return Marks(was_asked=False)


def read_records(file: Path) -> list[Record]:
    """
    What has been measured.

    Args:
        file (`Path`):
            File that [`Measuring.run`] writes.

    Raises:
        ValueError: If a line of it is no record.
    """
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            record["row"], record["arm"], record["completions"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is no record ({error!r}). Remove that line.") from error
        records.append(record)
    return records
