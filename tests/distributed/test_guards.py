"""A guard ends a run on all processes at once, and rolls a sharded model back."""

import pytest
import torch
from distributed.launch import job, launch


RUN = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "teacher": "ema",
    "teacher_update_rate": 0.3,
}


def guarded(action):
    # Whatever moves is trouble, from the third step on
    tight = {"action": action, "baseline": 2, "window": 2, "low": 0.999, "high": 1.001}
    return {"divergence": tight}


def jobs(weights):
    return [
        job("opsd", weights, name="whole", **RUN),
        job("opsd", weights, name="at", **{**RUN, "max_steps": 2}),
        job("opsd", weights, name="stopped", guards=guarded("stop"), **RUN),
        job("opsd", weights, name="rolled-back", guards=guarded("rollback"), **RUN),
        job("opsd", weights, name="on", resume="rolled-back/run/checkpoint-2", **RUN),
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("backend", "weights"), [("ddp", "lora"), ("ddp", "full"), ("zero3", "full")])
def test_stop_and_rollback(backend, weights, tmp_path):
    found = launch(backend, jobs(weights), tmp_path)
    for name in ("stopped", "rolled-back"):
        assert [len(steps) for steps in found[name]["num_passes"]] == [4, 4]  # of both processes
        assert found[name]["loss"] == found["whole"]["loss"][:4]
    stopped, run = (tmp_path / name / "run" for name in ("stopped", "rolled-back"))
    assert (stopped / "checkpoint-4").is_dir()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in run.glob("_rolled_back-1/*")) == ["checkpoint-3", "checkpoint-4"]
    assert found["on"]["loss"] == found["whole"]["loss"]
    for one, other in (("rolled-back", "at"), ("on", "whole")):
        for side in ("student", "teacher"):
            assert found[one][side].keys() == found[other][side].keys()
            for name, value in found[other][side].items():
                assert torch.equal(found[one][side][name], value), f"{one}, {side}: {name}"
