"""What the teacher reads: one small class per kind of privileged context."""

from typing import Any, cast

from ..parts import make_part
from .base import AnsweredContext, MarkingContext, Memory, Message, PrivilegedContext, SampledContext, as_text
from .concise import ConciseContext
from .controls import NoContext, OtherSolutionContext, PartialSolutionContext, ShuffledSolutionContext
from .diagnosis import DiagnosisContext, diagnosis
from .feedback import FeedbackContext
from .hint import HintContext
from .peers import PeersContext
from .plan import PlanContext
from .playbook import PlaybookContext
from .reflection import ReflectionContext
from .rendering import Reading, TeacherPrompt, check_embedded, thinking_prefix, without_end
from .rollouts import Rollout, Rollouts
from .sibling import SiblingContext
from .solution import AnswerContext, SolutionContext
from .template import TemplateContext, TextContext


__all__ = [
    "AnswerContext",
    "AnsweredContext",
    "ConciseContext",
    "DiagnosisContext",
    "FeedbackContext",
    "HintContext",
    "MarkingContext",
    "Memory",
    "Message",
    "NoContext",
    "OtherSolutionContext",
    "PartialSolutionContext",
    "PeersContext",
    "PlanContext",
    "PlaybookContext",
    "PrivilegedContext",
    "Reading",
    "ReflectionContext",
    "Rollout",
    "Rollouts",
    "SampledContext",
    "ShuffledSolutionContext",
    "SiblingContext",
    "SolutionContext",
    "TeacherPrompt",
    "TemplateContext",
    "TextContext",
    "as_text",
    "check_embedded",
    "make_context",
    "thinking_prefix",
    "without_end",
]

CONTEXTS: dict[str, Any] = {
    "solution": SolutionContext,
    "answer": AnswerContext,
    "hint": HintContext,
    "concise": ConciseContext,
    "peers": PeersContext,
    "feedback": FeedbackContext,
    "reflection": ReflectionContext,
    "plan": PlanContext,
    "diagnosis": diagnosis,
    "playbook": PlaybookContext,
    "template": TemplateContext,
    "none": NoContext,
    "other_solution": OtherSolutionContext,
    "partial_solution": PartialSolutionContext,
    "shuffled_solution": ShuffledSolutionContext,
}


def make_context(name: str, kwargs: dict[str, Any] | None = None) -> PrivilegedContext:
    """
    Construct a privileged context.

    Args:
        name (`str`):
            One of the shipped kinds, or the import path of a class that implements [`PrivilegedContext`]. Modules in
            the working directory can be imported.
        kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of the class.

    Raises:
        ValueError: If there is no such kind, if the path cannot be imported, if what it names is no context, or if the
            class does not take `kwargs`.
    """
    context = make_part("privileged_context", name, kwargs, CONTEXTS)
    columns = getattr(context, "columns", None)
    if not callable(getattr(context, "teacher_messages", None)) or not isinstance(columns, tuple | list):
        raise ValueError(
            f"`privileged_context={name!r}` is no privileged context: it needs an attribute `columns`, a tuple of "
            "column names, and a method `teacher_messages(row, rollouts)`."
        )
    if hasattr(context, "sample_messages") and not isinstance(context, SampledContext):
        raise ValueError(
            f"`privileged_context={name!r}` has `sample_messages` and no `sampling`, a dictionary with `temperature`, "
            "`top_p`, `top_k` and `max_new_tokens`."
        )
    return cast(PrivilegedContext, context)
