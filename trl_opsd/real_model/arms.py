"""Which runs there are on a real pretrained model, and what is set for all of them alike."""

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..experiment.arms import TUNING_SEED, Arm
from ..experiment.runner import Job, Plan
from ..playground.facts import FACTS_PER_SIZE
from ..playground.smollm2 import MODEL_DIR, SIZE


# To be raised by every change that alters what a run does, so that no older result passes for one of the changed one
VERSION = 3
SEEDS = (1, 2, 3)

# All arms train an adapter of the same shape on the same base
ADAPTER = {
    "r": 32,
    "lora_alpha": 64,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# Whose tokens are shown before and after, by arm and seed
PAGED = ("opsd_forward_kl", SEEDS[0])
_CLIP = 0.05
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
_DIVERGENCES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}


@dataclass(frozen=True)
class Part:
    """
    What is to be learnt.

    Args:
        name (`str`):
            Name, a key of [`~trl_opsd.real_model.work.WORK`].
        title (`str`):
            What reports call it.
        settings (`dict[str, Any]`):
            What its runs depend on beside their arms: the `template` of what the teacher reads, `rollout_tokens` (of a
            completion that is trained on), `answer_tokens` (of one that is tested), and what its rows are made by.
        learning_rates (`tuple[float, ...]`):
            Rates that its arms are tuned over.
        steps, batch_size (`int`):
            Optimizer steps of every arm, and sequences per step.
        tests (`tuple[str, ...]`):
            Splits that are tested, the one that arms are tuned by and whose answers are shown first.
        watched (`tuple[str, ...]`):
            Splits of which a few rows are asked along the way.
        seconds (`float`):
            Core-seconds of what is done once, before the arms.
        step_seconds, sft_step_seconds (`float`):
            Of a step of training, and of one of SFT, its share in making the data included.
        testing_seconds, tuning_seconds (`float`):
            Of all tests of a run, and of those of tuning or of an arm without training, which forgets nothing.
    """

    name: str
    title: str
    settings: dict[str, Any] = field(hash=False)
    learning_rates: tuple[float, ...]
    steps: int
    batch_size: int
    tests: tuple[str, ...]
    watched: tuple[str, ...]
    seconds: float
    step_seconds: float
    sft_step_seconds: float
    testing_seconds: float
    tuning_seconds: float

    @property
    def reads(self) -> dict[str, Any]:
        """What the teacher reads, as fields of a configuration."""
        return {"privileged_context": "template", "context_kwargs": {"template": self.settings["template"]}}


PARTS = {
    part.name: part
    for part in (
        Part(
            "facts",
            f"{SIZE * FACTS_PER_SIZE} facts it cannot know",
            # The wording under which SmolLM2-135M answered most, see docs/demos.md. Rollouts are shorter than
            # answers: the word that matters comes early
            {"size": SIZE, "template": "Facts:\n{about}\n\nQuestion: {prompt}", "rollout_tokens": 12},
            learning_rates=(1e-3, 2e-3, 4e-3),
            steps=75,
            batch_size=8,
            tests=("new", "trained", "two"),
            watched=("trained", "new"),
            seconds=50.0,
            step_seconds=10.3,
            sft_step_seconds=5.8,
            testing_seconds=185.0,
            tuning_seconds=25.0,
        ),
        Part(
            "brevity",
            "to be brief",
            # Of the wordings that leave answers right the one that makes them shortest
            {"template": "{prompt} Reply with the answer alone.", "rollout_tokens": 40, "answer_tokens": 64},
            learning_rates=(2.5e-4, 5e-4, 1e-3),
            steps=30,
            batch_size=8,
            tests=("test",),
            watched=("test",),
            seconds=430.0,
            step_seconds=17.5,
            sft_step_seconds=15.5,
            testing_seconds=190.0,
            tuning_seconds=25.0,
        ),
        Part(
            "skill",
            "to add and subtract",
            {
                "family": "chain_sum",
                "template": "{prompt}\n\nThe right answer is {answer}.",
                "rollout_tokens": 20,
                "answer_tokens": 24,
                "train": 100,
                "test": 60,
            },
            learning_rates=(5e-4, 1e-3, 2e-3),
            steps=40,
            batch_size=8,
            tests=("test",),
            watched=("test",),
            seconds=320.0,
            step_seconds=13.3,
            sft_step_seconds=6.0,
            testing_seconds=135.0,
            tuning_seconds=20.0,
        ),
    )
}


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
        is_short = self.seed == TUNING_SEED or self.arm.trainer == "none"
        testing = self.base.tuning_seconds if is_short else self.base.testing_seconds
        return testing + self.scale * self.arm.seconds

    @property
    def origin(self) -> "RealRun":
        """What is done once."""
        return RealRun(self.base, model=self.model, device=self.device)

    def score(self, result: Any, origin: Any) -> float:
        """
        What an arm is tuned for: right answers of the left-out seed, facts in other words. Where answers are to become
        shorter, less their length as a share of the base's: a point of accuracy is worth a percent of length.
        """
        final = result["final"]
        if self.base.name == "brevity":
            return final["test"] - final["mean_tokens"] / origin["mean_tokens"]
        return final[self.base.tests[0]]

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
        shared = {"adapter": ADAPTER, **self.base.settings}
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

    def rates(self, base: str) -> tuple[float, ...]:
        """Rates that the arms of a part are tuned over: a single one of the plan is taken as it is."""
        return self.learning_rates or PARTS[base].learning_rates

    def tuning_runs(self, arm: str, base: str) -> list[Job]:
        """The runs that an arm is tuned by."""
        if self.learning_rates or not self.is_trained(arm):
            return []
        tuned = self.known[self.known[arm].tuned_as or arm]
        return [self.run(base, TUNING_SEED, tuned, rate) for rate in PARTS[base].learning_rates]

    def reported_runs(self, arm: str, base: str, learning_rate: float | None) -> list[Job]:
        """The runs that are reported: one per seed also of an arm without training, as each seed has its world."""
        return [self.run(base, seed, self.known[arm], learning_rate) for seed in self.seeds]

    def adapted(self, args: argparse.Namespace) -> "RealPlan":
        """The same plan for the model and the device that are asked for."""
        return RealPlan(**{**self.__dict__, "model": args.model, "device": args.device})


def _arm(
    part: Part,
    name: str,
    title: str,
    trainer: str,
    quick: bool = False,
    column: str = "solution",
    tuned_as: str | None = None,
    share: float = 1.0,
    **settings: Any,
) -> Arm:
    steps = 0 if trainer == "none" else round(share * part.steps)
    seconds = steps * (part.sft_step_seconds if trainer == "trl_sft" else part.step_seconds)
    return Arm(
        name,
        title,
        trainer,
        (part.name,),
        settings,
        steps=steps,
        batch_size=part.batch_size,
        column=column,
        tuned_as=tuned_as,
        evaluate_every=round(share * part.steps) // 4,
        seconds=seconds,
        quick=quick,
    )


def _tuned_as(divergence: str, clip: float | None) -> str | None:
    # JSD lies between the two, and three more runs would not fit into a night
    tuned = "forward_kl" if divergence == "jsd" else divergence
    return f"opsd_{tuned}" if clip or divergence != tuned else None


def _facts(part: Part) -> list[Arm]:
    opsd = [
        _arm(
            part,
            f"opsd_{divergence}{'_clipped' if clip else ''}",
            f"OPSD, {title}{', clipped' if clip else ''}",
            "opsd",
            divergence == "forward_kl" and clip is None,
            tuned_as=_tuned_as(divergence, clip),
            divergence=divergence,
            divergence_clip=clip,
            **part.reads,
            **_SAMPLING,
        )
        for divergence, title in _DIVERGENCES.items()
        for clip in (None, _CLIP)
    ]
    return [
        _arm(part, "floor", "the model itself (floor)", "none", True),
        _arm(part, "told", "the facts in its prompt (ceiling)", "none", True, **part.reads),
        _arm(part, "sft", "SFT on the answers", "trl_sft", True),
        # What it forgets when it stops as soon as it knows the facts
        _arm(part, "sft_short", "SFT on the answers, a quarter of the steps", "trl_sft", tuned_as="sft", share=0.25),
        _arm(part, "sft_teacher", "SFT on the teacher's samples", "trl_sft", column="teacher", tuned_as="sft"),
        _arm(part, "sft_mixsd", "SFT on MixSD's data", "trl_sft", column="mixsd", tuned_as="sft"),
        _arm(part, "sdft", "SDFT", "sdft", True, **part.reads, temperature=1.0),
        *opsd,
    ]


def _brevity(part: Part) -> list[Arm]:
    return [
        _arm(part, "brevity_floor", "the model itself", "none", True),
        _arm(part, "brevity_told", "told to be brief in its prompt", "none", True, **part.reads),
        _arm(part, "brevity_sft", "SFT on its brief answers that are right", "trl_sft", column="teacher"),
        _arm(
            part, "opsdc_frozen", "OPSDC, teacher frozen", "opsdc", True, teacher="initial", **part.reads, **_SAMPLING
        ),
    ]


def _skill(part: Part) -> list[Arm]:
    read = {"column": "answer", **part.reads["context_kwargs"]}
    other: dict[str, Any] = {"privileged_context": "other_solution", "context_kwargs": read}
    opsd: dict[str, Any] = {"divergence": "forward_kl", "divergence_clip": None, **_SAMPLING}
    return [
        _arm(part, "skill_floor", "the model itself (floor)", "none", True),
        _arm(part, "skill_told", "the answer in its prompt (ceiling)", "none", True, **part.reads),
        _arm(part, "skill_sft", "SFT on the answers", "trl_sft"),
        _arm(part, "skill_opsd", "OPSD, forward KL", "opsd", True, **opsd, **part.reads),
        _arm(part, "skill_star", "STaR", "star", tuned_as="skill_sft", **part.reads, **_SAMPLING),
        _arm(part, "skill_grpo", "GRPO (TRL)", "trl_grpo", num_generations=4, **_SAMPLING),
        _arm(
            part,
            "skill_opsd_other",
            "OPSD, its teacher reads another answer",
            "opsd",
            tuned_as="skill_opsd",
            **opsd,
            **other,
        ),
    ]


def make_arms() -> dict[str, Arm]:
    """The arms by their names."""
    arms = [*_facts(PARTS["facts"]), *_brevity(PARTS["brevity"]), *_skill(PARTS["skill"])]
    return {arm.name: arm for arm in arms}


ARMS = make_arms()
# Every part has rates of its own
FULL = RealPlan(ARMS, SEEDS, (), tuple(ARMS), tuple(PARTS))
# One seed and one rate: a look, not a result
QUICK = RealPlan(
    ARMS,
    seeds=SEEDS[:1],
    learning_rates=(1e-3,),
    arms=tuple(arm.name for arm in ARMS.values() if arm.quick),
    bases=tuple(PARTS),
    scale=0.3,
)

__all__ = ["ARMS", "FULL", "PARTS", "QUICK", "TUNING_SEED", "Part", "RealPlan", "RealRun"]
