"""Every kind of teacher trains, saves and resumes, with all weights and with LoRA, under ZeRO-3.

On one process, tests/trainer/test_checkpoints.py sees to it.
"""

from typing import Any

import pytest
import torch
from distributed.launch import job, launch
from peft import PeftModel
from tiny import make_model, make_tokenizer


TEACHERS: dict[str, dict[str, Any]] = {
    "initial": {},
    "live": {},
    "periodic": {"teacher_update_steps": 2},
    "ema": {"teacher_update_rate": 0.3},
    "external": {},
}
SAVING = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """
    Folders of the policy and of a wider model with the same vocabulary. From there, `from_pretrained` shards a model
    for ZeRO-3 while it loads.
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for name, overrides in {"policy": {}, "external": {"seed": 5, "hidden_size": 48}}.items():
        make_model(tokenizer, **overrides).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_every_teacher_trains_saves_and_resumes(weights, models, tmp_path):
    jobs = []
    for teacher, settings in TEACHERS.items():
        settings = {**SAVING, "teacher": teacher, **settings}
        if teacher == "external":
            settings["teacher_model_name_or_path"] = str(models / "external")
        for name, resume in ((teacher, None), (f"{teacher}-resumed", f"{teacher}/run/checkpoint-3")):
            jobs.append(job("opsd", weights, name, resume, str(models / "policy"), **settings))
    # Checkpoint 3 lies between two generations
    settings = {**SAVING, "teacher": "ema", "steps_per_generation": 2, "num_iterations": 2}
    for name, resume in (("between", None), ("between-resumed", "between/run/checkpoint-3")):
        jobs.append(job("opsd", weights, name, resume, str(models / "policy"), **settings))

    found = launch("zero3", jobs, tmp_path / "run")

    for teacher in [*TEACHERS, "between"]:
        whole, resumed = found[teacher], found[f"{teacher}-resumed"]
        assert whole["world"] == [2, "DEEPSPEED"]
        assert all(share == pytest.approx(0.5, abs=0.02) for shares in whole["shares"] for share in shares)
        assert resumed["loss"] == whole["loss"]
        for side in ("student", "teacher"):
            assert resumed[side].keys() == whole[side].keys()
            for name, value in whole[side].items():
                assert torch.equal(resumed[side][name], value), f"{teacher}, {side}: {name}"
        if weights == "lora":
            assert_loads_in_plain_peft(tmp_path / "run" / teacher, whole["student"])
    losses = [tuple(found[teacher]["loss"]) for teacher in TEACHERS]
    assert len(set(losses)) == len(losses)  # five different teachers


def assert_loads_in_plain_peft(folder, state):
    model = PeftModel.from_pretrained(make_model(make_tokenizer()), folder / "run" / "checkpoint-5")
    trained = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert trained
    assert any(value.count_nonzero() for name, value in trained.items() if "lora_B" in name)
    for name, value in trained.items():
        assert torch.equal(value, state[name]), name
