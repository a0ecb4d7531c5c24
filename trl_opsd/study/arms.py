"""What the study compares."""

from typing import Any

from ..experiment.arms import BASES, STEPS, Arm
from ..experiment.runner import Plan
from ..experiment.tasks import BRIEF_TEMPLATE, REFERENCE_TEMPLATE


# Every arm is tuned over these. At 3e-4, GRPO took a base from 52 % to 11 % within 20 steps in a trial, hence the low
# end.
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (1, 2, 3)

_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def _opsd(context: str = "solution", **settings: Any) -> dict[str, Any]:
    # As in recipes/playground/opsd.yaml: no clip unless the arm is about it, and the fixed initial teacher.
    return {
        **_SAMPLING,
        "divergence_clip": None,
        "privileged_context": "answer" if context == "answer" else "solution",
        "context_kwargs": {"column": context, "template": REFERENCE_TEMPLATE % context},
        **settings,
    }


def _opsdc(**settings: Any) -> dict[str, Any]:
    return {**_SAMPLING, "weight_decay": 0.01, "context_kwargs": {"template": BRIEF_TEMPLATE}, **settings}


_ADDING = ("weak", "middling")
_MIDDLING = ("middling",)
# As published, with a constant rate, so that a collapse is not mended by the rate's decay
_VERBOSE: dict[str, Any] = {"bases": ("verbose",), "steps": 100, "constant_rate": True, "seconds": 180.0}
# At the rate of OPSD, so that they differ in nothing else, and constant: what happens if the training just goes on?
_LONG: dict[str, Any] = {
    "bases": _MIDDLING,
    "steps": 5 * STEPS,
    "seconds": 400.0,
    "evaluate_every": 20,
    "constant_rate": True,
    "tuned_as": "opsd",
}

# In the order they are run in: what most claims ask for first, what takes longest last.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("opsd", "OPSD", "opsd", _ADDING, _opsd(), quick=True),
        Arm(
            "grpo",
            "GRPO, 8 rollouts, 4 times the tokens",
            "trl_grpo",
            _ADDING,
            {**_SAMPLING, "num_generations": 8},
            steps=2 * STEPS,
            batch_size=64,
            evaluate_every=10,
            seconds=240.0,
            quick=True,
        ),
        Arm(
            "opsd_short",
            "OPSD, half the steps",
            "opsd",
            _ADDING,
            _opsd(),
            steps=STEPS // 2,
            evaluate_every=5,
            seconds=40.0,
            tuned_as="opsd",
        ),
        Arm("sft", "SFT on the solutions", "trl_sft", _ADDING, seconds=36.0, quick=True),
        Arm("sft_terse", "SFT on terse solutions", "trl_sft", _ADDING, column="terse", seconds=32.0),
        Arm("opsd_terse", "OPSD, terse solutions", "opsd", _ADDING, _opsd("terse")),
        Arm(
            "off_policy",
            "off-policy, the teacher's own samples",
            "opsd",
            _ADDING,
            _opsd(completions="teacher"),
            seconds=104.0,
            quick=True,
        ),
        Arm(
            "off_policy_terse",
            "off-policy, terse solutions",
            "opsd",
            _ADDING,
            _opsd("terse", completions="teacher"),
            seconds=104.0,
        ),
        Arm("sdft", "TRL's SDFT", "trl_sdft", _ADDING, {**_SAMPLING, "num_generations": 1}, seconds=96.0),
        Arm("told", "no training, told to be brief", "none", ("verbose",), steps=0, seconds=0.0, quick=True),
        *(
            Arm(
                f"opsdc_{steps}",
                f"OPSDC, teacher refreshed every {steps} steps" if steps > 1 else "OPSDC, refreshed every step",
                "opsdc",
                settings=_opsdc(teacher_update_steps=steps),
                quick=steps == 50,
                **_VERBOSE,
            )
            for steps in (50, 10, 1)
        ),
        Arm(
            "opsdc_1_same",
            "OPSDC, refreshed every step, at the rate of every 50",
            "opsdc",
            ("verbose",),
            tuned_as="opsdc_50",
            trained_as="opsdc_1",
        ),
        Arm(
            "opsdc_frozen",
            "OPSDC, frozen teacher",
            "opsdc",
            settings=_opsdc(teacher="initial"),
            **_VERBOSE,
        ),
        Arm(
            "opsdc_forward_kl",
            "OPSDC, forward KL, refreshed every 50 steps",
            "opsdc",
            settings=_opsdc(teacher_update_steps=50, divergence="forward_kl"),
            quick=True,
            **_VERBOSE,
        ),
        Arm(
            "opsdc_forward_kl_same",
            "OPSDC, forward KL, at the rate of reverse KL",
            "opsdc",
            ("verbose",),
            tuned_as="opsdc_50",
            trained_as="opsdc_forward_kl",
        ),
        Arm("opsd_answer", "OPSD, answer only", "opsd", _MIDDLING, _opsd("answer"), quick=True),
        Arm("opsd_live", "OPSD, live teacher", "opsd", _MIDDLING, _opsd(teacher="live")),
        Arm("opsd_clip", "OPSD, with the clip", "opsd", _MIDDLING, _opsd(divergence_clip=0.05)),
        Arm("opsd_reverse_kl", "OPSD, reverse KL", "opsd", _MIDDLING, _opsd(divergence="reverse_kl"), quick=True),
        Arm("opsd_jsd", "OPSD, JSD", "opsd", _MIDDLING, _opsd(divergence="jsd")),
        Arm(
            "opsd_sampled",
            "OPSD, sampled-token loss",
            "opsd",
            _MIDDLING,
            _opsd(divergence="reverse_kl", divergence_support="sampled_token"),
        ),
        Arm("opsd_long", "OPSD, 5 times the steps", "opsd", settings=_opsd(), **_LONG),
        Arm(
            "opsd_live_long", "OPSD, live teacher, 5 times the steps", "opsd", settings=_opsd(teacher="live"), **_LONG
        ),
        Arm(
            "opsd_clip_long",
            "OPSD, with the clip, 5 times the steps",
            "opsd",
            settings=_opsd(divergence_clip=0.05),
            **_LONG,
        ),
    )
}

FULL = Plan(ARMS, SEEDS, LEARNING_RATES, tuple(ARMS), tuple(BASES))
# The middle of the grid and half the steps: a look at the machinery, not a result.
QUICK = Plan(
    ARMS,
    seeds=(1, 2),
    learning_rates=(1e-4,),
    arms=tuple(arm.name for arm in ARMS.values() if arm.quick),
    bases=("middling", "verbose"),
    scale=0.5,
)
