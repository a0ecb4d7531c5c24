"""Who is compared: every method by its playground recipe, TRL's GRPO and SFT, and controls."""

from dataclasses import dataclass
from typing import Any

import yaml

from ..experiment.arms import Arm
from ..experiment.runner import Plan
from ..files import recipes_folder
from ..methods import METHODS
from ..playground.demo import world_of


SEEDS = (1, 2, 3)
# Of the study's rates, without the highest: there, most arms were worse than at 3e-4, and GRPO knew nothing any more
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
TOKENS = 150_000
BATCH_SIZE = 64
POINTS = 10

# Worlds of the demos: the base whose answers a method is to make right, and the one whose answers it is to shorten
_BASES = {"opsd": "middling", "opsdc": "verbose"}

# What the comparison sets for all alike, whatever a recipe says. All else in a recipe is the method.
_ALIKE = {
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "max_completion_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "adam_beta2",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "use_cpu",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
}

# One of each kind
_QUICK = {"opsd", "sdpo", "rlsd", "star", "opsdc", "opsd_none", "opsd_other_solution", "grpo", "sft", "told"}


def _arm(name: str, trainer: str, bases: tuple[str, ...], settings: dict[str, Any], title: str | None = None) -> Arm:
    return Arm(
        name,
        title or name,
        trainer,
        bases,
        settings,
        # Enough for answers of a third of the usual length; with shorter ones, an arm ends with fewer tokens
        steps=3 * TOKENS // (BATCH_SIZE * 34),
        tokens=TOKENS,
        batch_size=BATCH_SIZE,
        evaluate_every=TOKENS // POINTS,
        seconds=65.0,
        quick=name in _QUICK,
    )


def method_settings(method: str) -> dict[str, Any]:
    """
    What a method's playground recipe says of the method itself.

    Args:
        method (`str`):
            Key of [`~trl_opsd.methods.METHODS`].

    Returns:
        `dict[str, Any]`:
            Fields of its configuration, and `"reward_funcs"`.

    Raises:
        ValueError: If it has no recipe.
    """
    recipe = recipes_folder() / "playground" / f"{method}.yaml"
    if not recipe.is_file():
        raise ValueError(
            f"The method `{method}` has no recipe to be compared by: write recipes/playground/{method}.yaml."
        )
    fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return {name: value for name, value in fields.items() if name not in _ALIKE}


def _control(method: str, context: str) -> Arm:
    """A method whose teacher reads something else."""
    settings = {**method_settings(method), "privileged_context": context}
    if context == "none":
        del settings["context_kwargs"]
    told = {
        "none": "what the student reads",
        "other_solution": "another problem's solution",
        "shuffled_solution": "the solution in another order",
    }[context]
    bases = (_BASES[world_of(method)],)
    return _arm(f"{method}_{context}", method, bases, settings, f"{method}, its teacher reads {told}")


def make_arms() -> dict[str, Arm]:
    """
    The arms by their names: controls, TRL's trainers, and whatever methods there are.

    Raises:
        ValueError: If a method has no playground recipe.
    """
    both = tuple(_BASES.values())
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    told = Arm("told", "no training, told to be brief", "none", ("verbose",), steps=0, seconds=0.0, quick=True)
    arms = [
        told,
        *(_control("opsd", context) for context in ("none", "other_solution", "shuffled_solution")),
        _control("opsdc", "none"),
        _arm("sft", "trl_sft", both, {}, "SFT (TRL)"),
        _arm("grpo", "trl_grpo", both, {**sampling, "num_generations": 8}, "GRPO (TRL)"),
        *(_arm(name, name, (_BASES[world_of(name)],), method_settings(name)) for name in METHODS),
    ]
    return {arm.name: arm for arm in arms}


ARMS = make_arms()

FULL = Plan(ARMS, SEEDS, LEARNING_RATES, tuple(ARMS), tuple(_BASES.values()))
# The middle of the grid and a third of the tokens: a look at the machinery, not a result.
QUICK = Plan(
    ARMS,
    seeds=(1, 2),
    learning_rates=(1e-4,),
    arms=tuple(arm.name for arm in ARMS.values() if arm.quick),
    bases=tuple(_BASES.values()),
    scale=0.3,
)


@dataclass(frozen=True)
class Family:
    """
    What an arm learns by, and from what.

    Args:
        loss (`str`):
            Terms of its loss.
        reads (`str`):
            What its teacher reads besides the prompt.
    """

    loss: str
    reads: str

    def __str__(self) -> str:
        return f"{self.loss}; {self.reads}"


_TERMS = {
    "divergence_coef": "divergence",
    "policy_loss_coef": "policy gradient",
    "likelihood_coef": "likelihood",
}


def family_of(arm: Arm) -> Family:
    """
    Finds out from its configuration what an arm learns by.

    Args:
        arm ([`~trl_opsd.experiment.arms.Arm`]):
            The arm.

    Returns:
        [`Family`]:
            Its family.
    """
    from ..context import NoContext, OtherSolutionContext, ShuffledSolutionContext, make_context
    from ..methods import config_class

    if arm.trainer in ("none", "trl_sft", "trl_grpo"):
        return {
            "none": Family("none", "–"),
            "trl_sft": Family("likelihood", "the reference"),
            "trl_grpo": Family("policy gradient", "nothing"),
        }[arm.trainer]
    fields = config_class(arm.trainer).__dataclass_fields__

    def value(name: str) -> Any:
        if name in arm.settings:
            return arm.settings[name]
        default = fields[name]
        return default.default_factory() if callable(default.default_factory) else default.default

    scheduled = value("schedules") or {}
    terms = [term for name, term in _TERMS.items() if value(name) or name in scheduled]
    context = make_context(value("privileged_context"), value("context_kwargs"))
    for kind, reads in (
        (NoContext, "nothing"),
        (OtherSolutionContext, "another's reference"),
        (ShuffledSolutionContext, "a shuffled reference"),
    ):
        if isinstance(context, kind):
            return Family(" + ".join(terms), reads)
    reads = "rollouts" if context.reads_rollouts else "the reference" if context.columns else "an instruction"
    return Family(" + ".join(terms), reads)
