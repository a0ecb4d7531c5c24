"""Which defaults of a method hold where another part is chosen than its own."""

from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    from .config import SelfDistillationConfig

# Fields whose default, in a method, belongs to the method's choice of another: the arguments of a part, say
_BELONGS_TO = {
    "context_kwargs": "privileged_context",
    "completions_kwargs": "completions",
    "replaced_divergence": "completions",
    "curriculum_kwargs": "curriculum",
    "target_kwargs": "target",
    "prompts_kwargs": "prompts",
    "advantage_kwargs": "advantage",
    "schedules": "advantage",
    "teacher_update_steps": "teacher",
    "teacher_update_rate": "teacher",
    "teachers": "teacher",
    "teacher_column": "teacher",
    "divergence_tail": "divergence_support",
}


def default_of(config: type, name: str) -> Any:
    """The default of a field."""
    its = cast(Any, config).__dataclass_fields__[name]
    return its.default if its.default is not MISSING else its.default_factory()


def leave_out_defaults_of_other_choices(args: "SelfDistillationConfig") -> None:
    """Where another part is chosen than the method's, the method's arguments of its own do not come with it."""
    for name, choice in _BELONGS_TO.items():
        chosen, default = (default_of(type(args), field) for field in (choice, name))
        if getattr(args, choice) == chosen or default is None or getattr(args, name) != default:
            continue
        if name == "schedules":
            others = {key: value for key, value in default.items() if not key.startswith("advantage.")}
            args.schedules = others or None
        elif name != "divergence_tail" or not args.divergence_support.endswith("top_k"):
            setattr(args, name, None)
