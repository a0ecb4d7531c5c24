"""Base models, and arms that start from them."""

from dataclasses import dataclass, field
from typing import Any

from ..playground.base import BaseRecipe
from .tasks import ADDING, BREVITY, Family


STEPS = 80

# Of the problems, and of the training of the bases
BASE_SEED = 0
# Arms are tuned with a seed and on problems that reports leave out.
TUNING_SEED = 0


@dataclass(frozen=True)
class Base:
    """
    A base model. All runs of all seeds start from the same one.

    Args:
        name (`str`):
            Name.
        title (`str`):
            What reports call it.
        family ([`~trl_opsd.experiment.tasks.Family`]):
            Tasks it knows.
        recipe ([`~trl_opsd.playground.base.BaseRecipe`]):
            Its training.
        seconds (`float`):
            Core-seconds that training and testing it took where that was measured.
    """

    name: str
    title: str
    family: Family
    recipe: BaseRecipe
    seconds: float


@dataclass(frozen=True)
class Arm:
    """
    One way to train a base model, which ends after so many steps, or with the step that comes closest to so many
    generated tokens.

    Args:
        name (`str`):
            Name.
        title (`str`):
            What reports call it.
        trainer (`str`):
            A key of [`~trl_opsd.methods.METHODS`]; `"trl_sft"`, `"trl_grpo"` or `"trl_sdft"` for a trainer of TRL; or
            `"none"` for the base itself, told to be brief.
        bases (`tuple[str, ...]`):
            Names of the bases it starts from.
        settings (`dict[str, Any]`):
            Fields of the trainer's configuration beside those that all arms share. `"reward_funcs"` are names, as in a
            recipe.
        steps (`int`, *optional*, defaults to `80`):
            Optimizer steps, the most of them where `tokens` are given.
        tokens (`int`, *optional*):
            Generated tokens that the training ends with, SFT with as many tokens of its completions. The learning rate
            then falls with the tokens instead of the steps.
        batch_size (`int`, *optional*, defaults to `32`):
            Sequences per step.
        constant_rate (`bool`, *optional*, defaults to `False`):
            Whether the learning rate stays what it is after the warm-up, instead of falling to zero.
        column (`str`, *optional*, defaults to `"solution"`):
            Column that SFT learns and that TRL's SDFT shows its teacher.
        tuned_as (`str`, *optional*):
            Arm whose learning rate it takes over instead of being tuned itself.
        trained_as (`str`, *optional*):
            Arm that it is at another rate. Where the rates are equal, so are the runs, which are then made once.
        evaluate_every (`int`, *optional*, defaults to `10`):
            Steps, or generated tokens where these end the training, between two points of the learning curve.
        seconds (`float`, *optional*, defaults to `80.0`):
            Core-seconds of the training where that was measured, for the plan.
        quick (`bool`, *optional*, defaults to `False`):
            Whether it is in the quick runs.
    """

    name: str
    title: str
    trainer: str
    bases: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    steps: int = STEPS
    tokens: int | None = None
    batch_size: int = 32
    constant_rate: bool = False
    column: str = "solution"
    tuned_as: str | None = None
    trained_as: str | None = None
    evaluate_every: int = 10
    seconds: float = 80.0
    quick: bool = False


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base("weak", "weak base", ADDING, BaseRecipe(steps=600, context_share=0.9875), seconds=400.0),
        Base("middling", "middling base", ADDING, BaseRecipe(steps=600, context_share=0.98), seconds=400.0),
        Base("verbose", "verbose base", BREVITY, BaseRecipe(steps=420, context_share=0.5), seconds=280.0),
    )
}
