"""Synthetic results of a study, in which the published claims are true, false, or drowned in noise."""

from trl_opsd.experiment.arms import BASES
from trl_opsd.experiment.train import Run
from trl_opsd.study.arms import ARMS


SEEDS = (1, 2, 3)


def result(
    accuracy=0.6,
    ood=0.5,
    markers=20.0,
    tokens=40.0,
    lengths=(40.0, 40.0, 40.0),
    curve=(0.1, 0.6),
    spread=(0.4, 0.4),
    rate=1e-4,
):
    splits = {"test": accuracy, "longer": ood, "words": ood, "tune": accuracy}
    figures = {
        split: {
            "accuracy": value,
            "mean_tokens": tokens,
            "truncated": 0.0,
            "markers_per_1k": markers,
            "by_digits": {
                digits: {"accuracy": value, "mean_tokens": length}
                for digits, length in zip("234", lengths, strict=True)
            },
            "example": "",
        }
        for split, value in splits.items()
    }
    points = [
        {
            "step": 10 * index,
            "generated_tokens": 1000 * index,
            "seconds": 10.0 * index,
            "accuracy": value,
            "mean_tokens": tokens,
        }
        for index, value in enumerate(curve)
    ]
    return {
        "settings": {"run": {"learning_rate": rate}},
        "steps": 10 * max(len(curve) - 1, 0),
        "generated_tokens": 1000 * max(len(curve) - 1, 0),
        "learner_tokens": 5000,
        "seconds": 50.0,
        "cpu_seconds": 60.0,
        "curve": points,
        "series": {"frac_reward_zero_std": [value for value in spread for _ in range(5)], "reward": [0.1] * 10},
        "final": figures,
        "told": {"solution": figures},
    }


def run_of(base, seed=None, arm=None, learning_rate=None, scale=1.0):
    """A run of the study by the names of its base and arm."""
    return Run(BASES[base], seed, ARMS.get(arm), learning_rate, scale)


_PEAK = (0.1, 0.8, 0.8, 0.8)

TRUE = {
    "base": {"accuracy": 0.9, "ood": 0.7, "markers": 30.0, "tokens": 80.0, "lengths": (80.0,) * 3, "curve": ()},
    "grpo": {"curve": (0.1, 0.1, 0.1, 0.1, 0.1, 0.4), "spread": (0.8, 1.0)},
    "opsd": {"accuracy": 0.8, "ood": 0.6, "markers": 5.0, "curve": (0.1, 0.5, 0.5)},
    "opsd_short": {"curve": (0.1, 0.8)},
    "opsd_terse": {"accuracy": 0.8, "ood": 0.6},
    "opsd_answer": {"markers": 20.0, "ood": 0.7},
    "sft": {},
    "sft_terse": {},
    "off_policy": {},
    "off_policy_terse": {},
    "opsd_reverse_kl": {},
    "opsd_jsd": {},
    "opsd_long": {"accuracy": 0.8, "curve": _PEAK + 3 * (0.5,)},
    "opsd_live_long": {"curve": _PEAK + 3 * (0.2,)},
    "opsd_clip_long": {"accuracy": 0.95, "curve": _PEAK + 3 * (0.8,)},
    "opsdc_1": {"accuracy": 0.4},
    "opsdc_1_same": {"accuracy": 0.3},
    "opsdc_50": {"accuracy": 0.9, "tokens": 40.0, "lengths": (30.0, 40.0, 50.0)},
    "opsdc_forward_kl": {"accuracy": 0.3},
    "opsdc_forward_kl_same": {"accuracy": 0.2},
    "opsdc_frozen": {"accuracy": 0.9, "tokens": 70.0},
}

FALSE = {
    **TRUE,
    "grpo": {"curve": (0.1, 0.4), "spread": (0.2, 0.1)},
    "opsd": {"accuracy": 0.5, "ood": 0.4, "markers": 30.0, "curve": (0.1, 0.2, 0.3)},
    "opsd_short": {"curve": (0.1, 0.3)},
    "opsd_terse": {"accuracy": 0.5, "ood": 0.4},
    "opsd_answer": {"markers": 20.0, "ood": 0.3},
    "opsd_long": {"accuracy": 0.4, "curve": _PEAK + 3 * (0.5,)},
    "opsd_live_long": {"curve": _PEAK + 3 * (0.5,)},
    "opsd_clip_long": {"curve": _PEAK + 3 * (0.5,)},
    "opsdc_1": {"accuracy": 0.9},
    "opsdc_1_same": {"accuracy": 0.9},
    "opsdc_50": {"accuracy": 0.9, "tokens": 40.0, "lengths": (42.0, 40.0, 38.0)},
    "opsdc_forward_kl": {"accuracy": 0.9},
    "opsdc_forward_kl_same": {"accuracy": 0.9},
    "opsdc_frozen": {"accuracy": 0.9, "tokens": 40.0},
}


# Arms with the same number are not compared with each other
_ROTATION = {"base": 0, "opsd_clip_long": 0, "opsd": 1, "opsd_terse": 1, "opsd_long": 1, "opsdc_50": 1}


def true(arm, base):
    return {seed: result(**TRUE[arm]) for seed in SEEDS} if arm in TRUE else {}


def false(arm, base):
    return {seed: result(**FALSE[arm]) for seed in SEEDS} if arm in FALSE else {}


def noisy(arm, base):
    """The seeds take the values −1, 0 and 1 of a noise larger than any effect, each arm in another order."""
    if arm not in TRUE:
        return {}
    results = {}
    for seed in SEEDS:
        noise = (seed + _ROTATION.get(arm, 2)) % 3 - 1
        results[seed] = result(
            accuracy=0.5 + 0.3 * noise,
            ood=0.5 + 0.3 * noise,
            markers=20.0 + 15.0 * noise,
            tokens=50.0 + 20.0 * noise,
            lengths=(50.0 + 20.0 * noise, 50.0, 50.0 - 20.0 * noise),
            curve=(
                (*[0.1] * 4 ** (1 + noise), 0.4)
                if arm == "grpo"
                else (0.1, *3 * (0.5 + 0.3 * noise,), *3 * (0.2,))
                if arm.endswith("_long")
                else (0.1, 0.4 + 0.3 * noise, 0.25)
            ),
            spread=(0.5, 0.5 + 0.3 * noise),
        )
    return results
