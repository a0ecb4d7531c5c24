"""Which runs there are on a real pretrained model, and what is set for all of them alike."""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..experiment.arms import TUNING_SEED, Arm
from ..experiment.runner import Job, Plan
from ..playground.facts import FACTS_PER_SIZE
from ..playground.smollm2 import MODEL_DIR, SIZE


# To be raised by every change that alters what a run does, so that no older result passes for one of the changed one
VERSION = 3
SEEDS = (1, 2, 3)
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
STEPS, BATCH_SIZE = 75, 8
# Core-seconds of a step of the library's trainer, as measured, and by estimate of SFT, of all tests of a run (31 were
# measured for all questions with the facts, 17 for retention of the base) and of those of tuning
STEP_SECONDS, SFT_STEP_SECONDS, TESTING_SECONDS, TUNING_SECONDS = 10.0, 5.0, 120.0, 40.0

# What the teacher reads: the wording under which SmolLM2-135M answered most, see docs/real_model.md
TEMPLATE = "Facts:\n{about}\n\nQuestion: {prompt}"
READS: dict[str, Any] = {"privileged_context": "template", "context_kwargs": {"template": TEMPLATE}}
# All arms train an adapter of the same shape on the same base
ADAPTER = {
    "r": 32,
    "lora_alpha": 64,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# Whose tokens are shown before and after, by arm and seed
PAGED = ("opsd_forward_kl", SEEDS[0])
# Of a rollout that is trained on, not of an answer of the test: the word that matters comes early
ROLLOUT_TOKENS = 12
_CLIP = 0.05
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
_DIVERGENCES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}


@dataclass(frozen=True)
class Part:
    """
    What is to be learnt.

    Args:
        name (`str`):
            Name.
        title (`str`):
            What reports call it.
        size (`int`):
            Size of each seed's world, see [`~trl_opsd.playground.facts.make_world`].
        seconds (`float`):
            Core-seconds of what is done once, before the arms.
    """

    name: str
    title: str
    size: int
    seconds: float


PARTS = {"facts": Part("facts", f"{SIZE * FACTS_PER_SIZE} facts it cannot know", SIZE, seconds=20.0)}


@dataclass(frozen=True)
class RealRun:
    """
    One training with one seed, which is also that of its world.

    Args:
        base ([`Part`]):
            What is learnt.
        seed (`int`, *optional*):
            Seed. `None` for what is done once: the model's answers to unrelated prompts.
        arm ([`~trl_opsd.experiment.arms.Arm`], *optional*):
            The arm. One with the trainer `"none"` is the model itself, with the context in its prompt if it has
            settings.
        learning_rate (`float`, *optional*):
            Peak learning rate.
        scale (`float`, *optional*, defaults to `1.0`):
            Share of the arm's steps that is taken.
        model (`str`, *optional*):
            Folder or Hub id of the model.
        device (`str`, *optional*, defaults to `"cpu"`):
            `"cpu"` or `"cuda"`.
    """

    module: ClassVar[str] = "trl_opsd.real_model.train"

    base: Part
    seed: int | None = None
    arm: Arm | None = None
    learning_rate: float | None = None
    scale: float = 1.0
    model: str = str(MODEL_DIR)
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Name of its result file."""
        parts = [self.base.name] if self.arm is None else [self.arm.name, self.base.name]
        parts += [] if self.learning_rate is None else [f"lr{self.learning_rate:g}"]
        parts += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(parts if self.scale == 1.0 else [*parts, f"x{self.scale:g}"])

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return 0 if self.arm is None else max(1, round(self.scale * self.arm.steps))

    @property
    def planned_seconds(self) -> float:
        """Core-seconds on a CPU, by those that were measured."""
        if self.arm is None:
            return self.base.seconds
        testing = TUNING_SECONDS if self.seed == TUNING_SEED else TESTING_SECONDS
        return testing + self.scale * self.arm.seconds

    @property
    def origin(self) -> "RealRun":
        """What is done once."""
        return RealRun(self.base, model=self.model, device=self.device)

    def score(self, result: Any, origin: Any) -> float:
        """What an arm is tuned for: recall in other words, of the left-out seed's world."""
        return result["final"]["new"]

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on, of JSON types. A result with other settings is not this run's."""
        arm = {} if self.arm is None else asdict(self.arm)
        for name in ("title", "bases", "trained_as", "seconds", "quick"):
            arm.pop(name, None)
        run = {
            "base": self.base.name,
            "seed": self.seed,
            "arm": None if self.arm is None else self.arm.name,
            "learning_rate": self.learning_rate,
            "scale": self.scale,
            "model": self.model,
            "device": self.device,
        }
        shared = {"size": self.base.size, "adapter": ADAPTER, "template": TEMPLATE, "rollout_tokens": ROLLOUT_TOKENS}
        return json.loads(json.dumps({"version": VERSION, "run": run, "arm": arm, **shared}))


@dataclass(frozen=True)
class RealPlan(Plan):
    """
    Which runs there are, of which model and where.

    Args:
        model (`str`, *optional*):
            Folder or Hub id of the model.
        device (`str`, *optional*, defaults to `"cpu"`):
            `"cpu"` or `"cuda"`.
    """

    model: str = str(MODEL_DIR)
    device: str = "cpu"

    def run(
        self, base: str, seed: int | None = None, arm: Arm | None = None, learning_rate: float | None = None
    ) -> Job:
        """A run of a part, or what is done once for it."""
        scale = self.scale if arm is not None and arm.trainer != "none" else 1.0
        return RealRun(PARTS[base], seed, arm, learning_rate, scale, self.model, self.device)

    def reported_runs(self, arm: str, base: str, learning_rate: float | None) -> list[Job]:
        """The runs that are reported: one per seed also of an arm without training, as each seed has its world."""
        return [self.run(base, seed, self.known[arm], learning_rate) for seed in self.seeds]

    def adapted(self, args: argparse.Namespace) -> "RealPlan":
        """The same plan for the model and the device that are asked for."""
        return RealPlan(**{**self.__dict__, "model": args.model, "device": args.device})


def _arm(name: str, title: str, trainer: str, quick: bool = False, column: str = "solution", **settings: Any) -> Arm:
    steps = 0 if trainer == "none" else STEPS
    seconds = steps * (SFT_STEP_SECONDS if trainer == "trl_sft" else STEP_SECONDS)
    return Arm(
        name,
        title,
        trainer,
        ("facts",),
        settings,
        steps=steps,
        batch_size=BATCH_SIZE,
        column=column,
        evaluate_every=STEPS // 4,
        seconds=seconds,
        quick=quick,
    )


def make_arms() -> dict[str, Arm]:
    """The arms by their names."""
    opsd = [
        _arm(
            f"opsd_{divergence}{'_clipped' if clip else ''}",
            f"OPSD, {title}{', clipped' if clip else ''}",
            "opsd",
            divergence == "forward_kl" and clip is None,
            divergence=divergence,
            divergence_clip=clip,
            **READS,
            **_SAMPLING,
        )
        for divergence, title in _DIVERGENCES.items()
        for clip in (None, _CLIP)
    ]
    arms = [
        _arm("floor", "the model itself (floor)", "none", True),
        _arm("told", "the facts in its prompt (ceiling)", "none", True, **READS),
        _arm("sft", "SFT on the answers", "trl_sft", True),
        _arm("sft_teacher", "SFT on the teacher's samples", "trl_sft", column="teacher"),
        _arm("sft_mixsd", "SFT on MixSD's data", "trl_sft", column="mixsd"),
        _arm("sdft", "SDFT", "sdft", True, **READS, temperature=1.0),
        *opsd,
    ]
    return {arm.name: arm for arm in arms}


ARMS = make_arms()
FULL = RealPlan(ARMS, SEEDS, LEARNING_RATES, tuple(ARMS), tuple(PARTS))
# One seed and the middle of the grid: a look, not a result
QUICK = RealPlan(
    ARMS,
    seeds=SEEDS[:1],
    learning_rates=(2e-3,),
    arms=tuple(arm.name for arm in ARMS.values() if arm.quick),
    bases=tuple(PARTS),
    scale=0.5,
)

__all__ = ["ARMS", "FULL", "PARTS", "QUICK", "TUNING_SEED", "Part", "RealPlan", "RealRun"]
