from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from ..data import Template
from ..parts import import_object, make_part
from .base import Message, as_text
from .rollouts import Rollout, Rollouts
from .spans import Marks, by_characters, by_segments, read_marks, segments
from .template import TextContext


ERRORS = (
    "missed_case",
    "illegal_step",
    "wrong_constraint",
    "wrong_equivalence",
    "premature_conclusion",
    "format_error",
    "arithmetic_slip",
    "sign_error",
    "off_by_one",
)
STEPS = (
    "case_split",
    "boundary_check",
    "invariant",
    "substitution",
    "constraint_use",
    "symmetry",
    "construction_step",
    "final_verification",
    "key_formula",
    "insight",
)
_LABELS = {"error": ERRORS, "key": STEPS}

_SAID = {
    "error": "An attempt at this problem went wrong by: {labels}.",
    "key": "What decides whether an attempt at this problem succeeds: {labels}.",
}
_DIAGNOSIS = """{prompt}

For your eyes only, a diagnosis. {diagnosis}

Bear it in mind and solve the problem, without mentioning it. Give the final answer in the form the problem asks \
for."""

_TASK = {
    "error": "The attempt ends in a wrong answer. Find the segments in which it goes wrong.",
    "key": "The attempt ends in the right answer. Find the segments that decide that it does.",
}
_ASK = """A problem, and an attempt at it in numbered segments.

<<< problem >>>
{prompt}
<<< reference >>>
{reference}
<<< attempt >>>
{segments}
<<< end >>>

{task} Answer with a JSON list of at most {most} objects and nothing else. Each object has "first" and "last", the \
numbers of the first and the last of at most {longest} segments in a row, and "type", one of: {labels}. Leave the \
list empty if there are none. Example: [{{"first": 2, "last": 3, "type": "{example}"}}]"""


class Annotator(Protocol):
    """
    Says which parts of a rollout count, as a list of objects or text with such a list in JSON. An object has `"type"`
    and either the characters `"start"` and `"end"`, the one after the last, or the segments `"first"` and `"last"`.

    Two attributes are read where a class has them: `columns`, the dataset columns that it needs, and `check_run()`,
    which is called before the model is loaded and raises a `ValueError` if the annotator cannot be asked.
    """

    def __call__(
        self, asked: Sequence[tuple[Mapping[str, Any], Rollout, list[Message]]]
    ) -> list[str | list[Any] | None]:
        """
        An annotation of each rollout, `None` where there is none.

        Args:
            asked (`Sequence[tuple[Mapping[str, Any], Rollout, list[Message]]]`):
                Of each rollout its dataset row, the rollout, and messages that ask a model for its annotation.
        """


class ColumnAnnotator:
    """
    What a dataset column says of the dataset's completion. A rollout with another text has no annotation.

    Args:
        column (`str`, *optional*, defaults to `"spans"`):
            Column with the annotation, as JSON.
    """

    def __init__(self, column: str = "spans"):
        self.column = column
        self.columns = (column,)

    def __call__(
        self, asked: Sequence[tuple[Mapping[str, Any], Rollout, list[Message]]]
    ) -> list[str | list[Any] | None]:
        return [
            row[self.column] if rollout.text.strip() == _as_plain(row.get("completion", "")).strip() else None
            for row, rollout, _ in asked
        ]

    def check_dataset(self, columns: Sequence[str]) -> None:
        """Refuse annotations of completions that are not there."""
        if "completion" not in columns:
            raise ValueError(
                f"The column `{self.column}` annotates the column `completion`, which the training set lacks. Add it "
                "and set `completions='dataset'`, or choose another `annotator`: rollouts are not known beforehand."
            )


class _FunctionAnnotator:
    def __init__(self, function: Any):
        self._function = function

    def __call__(
        self, asked: Sequence[tuple[Mapping[str, Any], Rollout, list[Message]]]
    ) -> list[str | list[Any] | None]:
        return [self._function(row, rollout) for row, rollout, _ in asked]


ANNOTATORS: dict[str, type | str] = {
    "columns": ColumnAnnotator,
    "server": "trl_opsd.serving.annotator.ServerAnnotator",
}


def diagnosis(annotator: str = "policy", annotator_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """
    The context `"diagnosis"`: the teacher reads of which types the decisive parts of a rollout are, and a method
    trains on these parts in another way than on others, as [TRACE](https://huggingface.co/papers/2605.10194) does.

    Args:
        annotator (`str`, *optional*, defaults to `"policy"`):
            Who marks them. Possible values are:

            - `"policy"`: the current policy, asked as for any context that samples (`max_new_tokens`, `temperature`).
            - `"server"`: a model on a server that speaks OpenAI's protocol, see
              [`~trl_opsd.serving.annotator.ServerAnnotator`].
            - `"columns"`: a dataset column, for completions that come from the dataset, see [`ColumnAnnotator`].
            - the import path of a function of a row and a [`Rollout`], or of a class that implements [`Annotator`].
        annotator_kwargs (`Mapping[str, Any]`, *optional*):
            Its keyword arguments.
        kwargs:
            Those of [`DiagnosisContext`].
    """
    given = dict(annotator_kwargs or {})
    if annotator == "policy":
        return _SelfDiagnosisContext(given, **kwargs)
    if annotator in ANNOTATORS or "." not in annotator:
        return _AnnotatedContext(make_part("annotator", annotator, given, ANNOTATORS), **kwargs)
    try:
        found = import_object(annotator)
    except ImportError as error:
        raise ValueError(f"`annotator={annotator!r}` cannot be imported: {error}.") from error
    is_class = isinstance(found, type)
    one = make_part("annotator", annotator, given, {}) if is_class else found
    if not callable(one):
        raise ValueError(f"`annotator={annotator!r}` cannot be called. Name a function, or a class with `__call__`.")
    return _AnnotatedContext(one if is_class else _FunctionAnnotator(partial(one, **given)), **kwargs)


class DiagnosisContext(TextContext):
    """
    The teacher reads the types of the spans that an annotator marks, never where they are or what they say. Spans of
    correct rollouts are of the kind `"key"`, those of wrong ones of the kind `"error"`. Without a span there is no
    context. What an annotator says that is of no use is counted, and left out.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference that the annotator is shown. `None` shows none.
        most_spans (`int`, *optional*, defaults to `3`):
            Most spans of a rollout.
        most_segments (`int`, *optional*, defaults to `3`):
            Most segments, which are lines and the sentences in them, of a span.
        most_of_it (`float`, *optional*, defaults to `0.25`):
            Largest share of a rollout's tokens in its spans. Those beyond it are not marked.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and, if it is to say anything of
            the spans, `{diagnosis}`, besides any dataset columns.
        ask_template (`str`, *optional*):
            Text of the last user turn that a model answers as an annotator, with the placeholders `{prompt}`,
            `{segments}`, `{task}`, `{labels}` and, with a `column`, `{reference}`.

    Raises:
        ValueError: If a template is malformed, or a number is out of range.
    """

    reads_rollouts = True
    kinds: tuple[str, ...] = tuple(_LABELS)

    def __init__(
        self,
        column: str | None = "solution",
        most_spans: int = 3,
        most_segments: int = 3,
        most_of_it: float = 0.25,
        template: str = _DIAGNOSIS,
        ask_template: str | None = None,
    ):
        super().__init__(template, *(["diagnosis"] if "diagnosis" in Template(template).names else []))
        if min(most_spans, most_segments) < 1 or not 0.0 < most_of_it <= 1.0:
            raise ValueError(
                "`most_spans` and `most_segments` of the diagnosis context must be at least 1, and `most_of_it` must "
                f"be in (0, 1], got {most_spans}, {most_segments} and {most_of_it}."
            )
        self.column, self.most_spans, self.most_segments, self.most_of_it = (
            column,
            most_spans,
            most_segments,
            most_of_it,
        )
        given = ["segments", "task", "labels", *(["reference"] if column else [])]
        asked = _default_ask(column, most_spans, most_segments) if ask_template is None else ask_template
        self._question = TextContext(asked, *given)
        columns = [*self.columns, *self._question.columns, *([column] if column else [])]
        self.columns = tuple(dict.fromkeys(columns))

    def check_run(self, num_generations: int, has_rewards: bool, has_feedback: bool) -> None:
        """Refuse a run in which no rollout is known to be correct or wrong."""
        if not has_rewards:
            raise ValueError(
                "The diagnosis context needs rewards, which tell correct rollouts from wrong ones. Pass "
                "`reward_funcs`, or an environment that has `get_reward`."
            )

    def question(self, row: Mapping[str, Any], rollout: Rollout) -> list[Message] | None:
        """Messages that ask a model to annotate a rollout, `None` if there is nothing to ask."""
        if rollout.correct is None or not rollout.text.strip():
            return None
        kind = _kind(rollout)
        pieces = [rollout.text[start:end] for start, end in segments(rollout.text)]
        return self._question.rewritten(
            row,
            segments="\n".join(f"[{number}] {piece}" for number, piece in enumerate(pieces, 1)),
            task=_TASK[kind],
            labels=", ".join(_LABELS[kind]),
            **({"reference": row[self.column]} if self.column else {}),
        )

    def marks(self, row: Mapping[str, Any], rollouts: Rollouts, said: str | list[Any] | None) -> Marks:
        """
        What an annotation marks of a rollout.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row.
            rollouts ([`Rollouts`]):
                The rollouts of the prompt.
            said (`str` or `list[Any]`, *optional*):
                The annotation, `None` if there is none.
        """
        text, kind = rollouts.own.text, _kind(rollouts.own)
        characters, pieces = by_characters(text), by_segments(segments(text), self.most_segments)
        return read_marks(
            said,
            lambda item: pieces(item) if "first" in item else characters(item),
            kind,
            _LABELS[kind],
            self.most_spans,
        )

    def teacher_messages(
        self, row: Mapping[str, Any], rollouts: Rollouts | None, sampled: Any = None
    ) -> list[Message] | None:
        if rollouts is None:
            return None
        labels = dict.fromkeys(span.label.replace("_", " ") for span in self.marks(row, rollouts, sampled).spans)
        if not labels:
            return None
        said = _SAID[_kind(rollouts.own)].replace("{labels}", ", ".join(labels))
        return self.rewritten(row, diagnosis=said)


class _SelfDiagnosisContext(DiagnosisContext):
    def __init__(self, given: Mapping[str, Any], **kwargs: Any):
        super().__init__(**kwargs)
        known = {"max_new_tokens": 512, "temperature": 1.0}
        if unknown := given.keys() - known.keys():
            raise ValueError(f"`annotator='policy'` takes {list(known)} as `annotator_kwargs`, got {sorted(unknown)}.")
        self.sampling = {"top_p": 1.0, "top_k": 0, **known, **given}

    def sample_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        return None if rollouts is None else self.question(row, rollouts.own)


class _AnnotatedContext(DiagnosisContext):
    def __init__(self, annotator: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self._annotator = annotator
        self.columns = tuple(dict.fromkeys([*self.columns, *getattr(annotator, "columns", ())]))

    def check_run(self, num_generations: int, has_rewards: bool, has_feedback: bool) -> None:
        super().check_run(num_generations, has_rewards, has_feedback)
        getattr(self._annotator, "check_run", lambda: None)()

    def read_dataset(self, dataset: Any) -> None:
        """Show the annotator which columns there are."""
        if dataset is not None and dataset.column_names is not None and hasattr(self._annotator, "check_dataset"):
            self._annotator.check_dataset(dataset.column_names)

    def answers(self, rows: Sequence[tuple[Mapping[str, Any], Rollouts] | None]) -> list[str | list[Any] | None]:
        """What the annotator says of each rollout, `None` where it is not asked."""
        asked = {}
        for position, given in enumerate(rows):
            question = None if given is None else self.question(given[0], given[1].own)
            if given is not None and question is not None:
                asked[position] = (given[0], given[1].own, question)
        said = list(self._annotator(list(asked.values()))) if asked else []
        if len(said) != len(asked) or not all(isinstance(its, str | list | None) for its in said):
            kinds = sorted({type(its).__name__ for its in said})
            raise ValueError(
                f"The `annotator` gave {len(said)} annotations of {len(asked)} rollouts"
                f"{', of type ' if kinds else ''}{', '.join(kinds)}. It gives one for each: a list of objects, text "
                "with such a list in JSON, or `None`."
            )
        by_position = dict(zip(asked, said, strict=True))
        return [by_position.get(position) for position in range(len(rows))]


def _as_plain(completion: Any) -> str:
    if isinstance(completion, list):
        return "".join(message["content"] for message in as_text(completion))
    return str(completion)


def _kind(rollout: Rollout) -> str:
    return "key" if rollout.correct else "error"


def _default_ask(column: str | None, most_spans: int, most_segments: int) -> str:
    asked = _ASK if column else _ASK.replace("<<< reference >>>\n{reference}\n", "")
    example = STEPS[0]
    for name, value in (("most", most_spans), ("longest", most_segments), ("example", example)):
        asked = asked.replace(f"{{{name}}}", str(value))
    return asked
