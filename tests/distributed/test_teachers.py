"""Every kind of teacher trains, saves and resumes, with all weights and with LoRA, under ZeRO-3.

On one process, tests/trainer/test_checkpoints.py sees to it.
"""

from typing import Any

import pytest
import torch
from distributed.launch import job, launch
from distributed.resume import BETWEEN, assert_resumed, pair
from peft import PeftModel
from tiny import make_model, make_tokenizer


TEACHERS: dict[str, dict[str, Any]] = {
    "initial": {},
    "live": {},
    "periodic": {"teacher_update_steps": 2},
    "ema": {"teacher_update_rate": 0.3},
    "external": {},
    "several": {},
}


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


def several(models):
    wider = {"teacher": "external", "teacher_model_name_or_path": str(models / "external")}
    return {"teacher": "several", "teachers": {"maths": wider, "code": {"teacher": "ema", **TEACHERS["ema"]}}}


@pytest.mark.slow
@pytest.mark.distributed
def test_every_teacher_trains_saves_and_resumes(models, tmp_path):
    jobs = []
    for weights in ("lora", "full"):
        for teacher, settings in TEACHERS.items():
            settings = {"teacher": teacher, **settings}
            if teacher == "external":
                settings["teacher_model_name_or_path"] = str(models / "external")
            if teacher == "several":
                settings = several(models)
            jobs += pair(weights, f"{weights}-{teacher}", str(models / "policy"), **settings)
        jobs += pair(weights, f"{weights}-between", str(models / "policy"), **BETWEEN)

    found = launch("zero3", jobs, tmp_path / "run")

    for name, result in found.items():
        assert result["world"] == [2, "DEEPSPEED"]
        assert result["deepspeed"][0] == 3
        assert all(share == pytest.approx(0.5, abs=0.02) for shares in result["shares"] for share in shares)
        if not name.endswith("-resumed"):
            assert_resumed(found, name)
    for teacher in [*TEACHERS, "between"]:
        assert_loads_in_plain_peft(tmp_path / "run" / f"lora-{teacher}", found[f"lora-{teacher}"]["student"])
    for weights in ("lora", "full"):
        losses = {tuple(found[f"{weights}-{teacher}"]["loss"]) for teacher in TEACHERS}
        assert len(losses) == len(TEACHERS)


@pytest.mark.slow
@pytest.mark.distributed
def test_an_external_teacher_among_several_under_fsdp2(models, tmp_path):
    policy, settings = str(models / "policy"), several(models)
    jobs = [job("opsd", weights, weights, model=policy, **settings) for weights in ("lora", "full")]
    one = launch("single", jobs, tmp_path / "one")
    two = launch("fsdp2", [*jobs, *pair("full", "saved", policy, **settings)], tmp_path / "two")

    assert_resumed(two, "saved")
    for weights in ("lora", "full"):
        found, expected = two[weights], one[weights]
        assert found["world"] == [2, "FSDP"]
        assert found["num_units"] > 1
        for name in ("loss", *(f"teachers/{its}/distillation_loss" for its in settings["teachers"])):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
        for name, value in expected["student"].items():
            torch.testing.assert_close(found["student"][name], value, rtol=1e-5, atol=1e-5, msg=name)


def assert_loads_in_plain_peft(folder, state):
    model = PeftModel.from_pretrained(make_model(make_tokenizer()), folder / "run" / "checkpoint-5")
    trained = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert trained
    assert any(value.count_nonzero() for name, value in trained.items() if "lora_B" in name)
    for name, value in trained.items():
        assert torch.equal(value, state[name]), name
