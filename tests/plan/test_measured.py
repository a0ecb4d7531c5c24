"""Planned memory beside what training steps take: see measuring.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from distributed.launch import ENVIRONMENT, TIMEOUT
from peft import LoraConfig
from plan.measuring import CASES, COMPLETION, compare
from transformers import AutoConfig, Qwen3Config

from trl_opsd import SelfDistillationConfig
from trl_opsd.bench.models import PRESETS, save_config
from trl_opsd.plan.hardware import parse_gpus
from trl_opsd.plan.memory import (
    GIB,
    MIB,
    communication_bytes,
    gathered_bytes,
    gradient_bytes,
    loss_memory,
    optimizer_bytes,
    phases,
    teacher_bytes,
    weight_bytes,
)
from trl_opsd.plan.models import Model
from trl_opsd.plan.setting import Lengths, Setting
from trl_opsd.plan.sharding import Sharding, named


ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
EXACT = ("weights", "teacher", "optimizer", "gradients")
pytestmark = pytest.mark.cpu("what a GPU allocates is in docs/plan.md")


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number} {CASES[number].name}")
def test_planned_is_what_is_allocated(number, tmp_path):
    case = CASES[number]

    found = compare(case, tmp_path)

    for name in EXACT:
        assert found[name][0] == found[name][1], name
    for name, (plan, measured) in found.items():
        assert plan == pytest.approx(measured, rel=0.15), name


@pytest.mark.distributed
@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_what_zero_keeps(stage, tmp_path):
    case = next(case for case in CASES if case.name == "all weights, fp32, autocast to bf16")
    config = yaml.safe_load((ACCELERATE / f"zero{stage}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "main_process_port": 0}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "case.json").write_text(json.dumps(case.name))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    script = Path(__file__).with_name("zero.py")

    command = [sys.executable, *launcher, script, tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)

    assert done.returncode == 0, done.stderr[-5000:]
    held = json.loads((tmp_path / "held.json").read_text())
    setting = sharded(tmp_path / "rank0", stage, bf16=True)
    assert weight_bytes(setting, setting.policy) == held["weights"]
    assert teacher_bytes(setting) == held["teacher"]
    assert optimizer_bytes(setting)[0] == held["optimizer"]
    assert gradient_bytes(setting) == held["gradients"]
    if stage == 3:
        assert communication_bytes(setting) == held["buffers"]
        assert gathered_bytes(setting, setting.policy) >= held["whole"]


@pytest.mark.distributed
def test_what_fsdp2_keeps(tmp_path):
    case = next(case for case in CASES if case.name == "all weights, fp32, autocast to bf16")
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "main_process_port": 0}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "case.json").write_text(json.dumps(case.name))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    script, tests = Path(__file__).with_name("fsdp2.py"), Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}

    command = [sys.executable, *launcher, script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)

    assert done.returncode == 0, done.stderr[-5000:]
    setting = sharded(tmp_path / "rank0", "fsdp2", bf16=True)
    assert json.loads((tmp_path / "held.json").read_text()) == {
        "weights": weight_bytes(setting, setting.policy),
        "teacher": teacher_bytes(setting),
        "optimizer": optimizer_bytes(setting)[0],
        "gradients": gradient_bytes(setting),
    }


def sharded(folder: Path, stage: int | str, num_gpus: int = 2, preset: str | None = None, **args) -> Setting:
    """A run under ZeRO of that stage, or under FSDP2."""
    if preset is not None:
        save_config(folder, preset)
    model = Model(AutoConfig.from_pretrained(folder), torch.float32)
    config = SelfDistillationConfig(str(folder / "run"), use_cpu=True, max_completion_length=COMPLETION, **args)
    _, gpu = parse_gpus("1xH100")
    kind = stage if isinstance(stage, str) else f"zero{stage}"
    return Setting(config, gpu, num_gpus, Sharding(kind), model, Lengths(64, 64, COMPLETION))


@pytest.mark.parametrize("num_gpus", [1, 8])
@pytest.mark.parametrize("preset", ["tiny", "qwen3-1.7b"])
def test_zero2_is_what_deepspeed_estimates(preset, num_gpus, tmp_path):
    setting = sharded(tmp_path, 2, num_gpus, preset, bf16=True)

    # In the optimizer's step: gradients are there in half and in single precision
    state, step = optimizer_bytes(setting)
    ours = weight_bytes(setting, setting.policy) + gradient_bytes(setting) + state + step

    _, theirs = estimate_zero2_model_states_mem_needs(setting.policy.num_parameters, num_gpus, cpu_offload=False)
    assert ours == pytest.approx(theirs, abs=num_gpus * 8)


@pytest.mark.parametrize("num_gpus", [1, 8])
@pytest.mark.parametrize("preset", ["tiny", "qwen3-1.7b"])
def test_zero3_is_what_deepspeed_estimates_and_explained(preset, num_gpus, tmp_path):
    setting = sharded(tmp_path, 3, num_gpus, preset, bf16=True)
    policy = setting.policy

    state, step = optimizer_bytes(setting)
    ours = weight_bytes(setting, policy) + gradient_bytes(setting) + state + step

    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        policy.num_parameters, policy.largest_module, num_gpus, cpu_offload=False, cpu_offload_params=False
    )
    # It has 18 bytes for each weight of a process: 2 of the weight, 12 of the optimizer and 4 of a gradient in fp32.
    # The half-precision gradient that this is made from is there too, and fp32 ones are made for 10⁹ weights at a time
    part = -(-policy.num_parameters // num_gpus)
    difference = 2 * part - 4 * max(0, part - 10**9)
    assert ours == pytest.approx(theirs - largest + difference, abs=num_gpus * 8)
    # It has the largest module once with its gradient; DeepSpeed gathers up to 10⁹ weights ahead
    assert largest == 4 * policy.largest_module
    assert gathered_bytes(setting, policy) == 2 * min(policy.num_parameters, 10**9 + policy.largest_module)


def test_offloaded_states_are_not_on_the_gpu(tmp_path):
    setting = sharded(tmp_path, 3, 8, "tiny", bf16=True)
    there = Setting(setting.args, setting.gpu, 8, Sharding("zero3", True, True), setting.policy, setting.lengths)

    assert weight_bytes(there, there.policy) == gradient_bytes(there) == optimizer_bytes(there)[0] == 0


def on_one_gpu(config, peft_config=None, **args) -> Setting:
    """A run of eight rollouts on an H100."""
    length = args.pop("completion")
    settings = {"num_generations": 8, "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
    config_of_run = SelfDistillationConfig(
        "run",
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=8,
        max_completion_length=length,
        **settings,
        **args,
    )
    model = Model(config, torch.bfloat16, peft_config)
    return Setting(config_of_run, parse_gpus("1xH100")[1], 1, named("single", 1), model, Lengths(128, 512, length))


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
# docs/benchmarks.md: tokens, hidden size, vocabulary, whether the head is trained; MiB beyond states, head and its
# gradient on an H100
LOSS_ON_H100 = {
    (4096, 2048, 151936, True): 1825,
    (4096, 2048, 151936, False): 931,
    (512, 1024, 49152, True): 302,
    (512, 2048, 151936, True): 1198,
    (512, 2048, 151936, False): 603,
    (1024, 1024, 151936, True): 897,
    (4096, 1024, 49152, True): 890,
    (4096, 1024, 151936, False): 911,
    (16384, 1024, 151936, True): 1257,
    (16384, 2048, 49152, True): 1109,
    (65536, 2048, 151936, False): 1414,
}


@pytest.mark.parametrize("case", LOSS_ON_H100, ids=str)
def test_what_the_loss_took_on_an_h100(case):
    tokens, hidden, vocabulary, is_trained = case
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=True
    )

    loss = loss_memory(on_one_gpu(config, None if is_trained else LORA, completion=tokens // 8), taken=0)

    # Half of the head's gradient in fp32 is handed over in bf16
    assert (loss.blocks + loss.hidden + loss.head / 2) / MIB == pytest.approx(LOSS_ON_H100[case], rel=0.05)


# Tokens of a completion, MiB for the loss as it was then: GiB beyond weights and optimizer of Qwen3-0.6B with LoRA
STEP_ON_H100 = {(512, None): 10.6, (128, 256): 4.2}


@pytest.mark.parametrize("case", STEP_ON_H100, ids=str)
def test_what_a_step_took_on_an_h100(case):
    completion, memory = case
    setting = on_one_gpu(Qwen3Config(**PRESETS["qwen3-0.6b"]), LORA, completion=completion, divergence_memory=memory)

    beyond = max(
        phase.total - sum(phase.parts.get(name, 0) for name in ("weights", "optimizer", "overhead"))
        for phase in phases(setting)
    )

    assert beyond / GIB == pytest.approx(STEP_ON_H100[case], rel=0.15)
