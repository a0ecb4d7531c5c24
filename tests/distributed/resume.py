"""Runs in pairs: one that is not interrupted, and one that resumes from its third step."""

from typing import Any

import torch
from distributed.launch import job


SAVING = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
# Step 3 lies between two generations
BETWEEN = {"teacher": "ema", "teacher_update_rate": 0.3, "steps_per_generation": 2, "num_iterations": 2}


def pair(weights: str, name: str, model: str | None = None, **settings: Any) -> list[dict[str, Any]]:
    settings = {**SAVING, **settings}
    whole = job("opsd", weights, name, None, model, **settings)
    return [whole, {**whole, "name": f"{name}-resumed", "resume": f"{name}/run/checkpoint-3"}]


def assert_resumed(found: dict[str, dict[str, Any]], name: str) -> None:
    whole, resumed = found[name], found[f"{name}-resumed"]
    assert (whole["first_step"], resumed["first_step"]) == (0, 3)
    assert resumed["loss"] == whole["loss"]
    for side in ("student", "teacher"):
        assert resumed[side].keys() == whole[side].keys()
        for key, value in whole[side].items():
            assert torch.equal(resumed[side][key], value), f"{name}, {side}: {key}"
