"""Hardware, sharding, suggestions and the command."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, Qwen3MoeConfig

from trl_opsd.cli import main
from trl_opsd.plan.hardware import GPUS, parse_gpus
from trl_opsd.plan.models import Model, quantised_bytes
from trl_opsd.plan.sharding import named, read_accelerate_config


ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "models"
OPSD = ["--config", str(ROOT / "recipes/opsd/qwen3-8b.yaml"), "--model_config", str(MODELS / "Qwen3-8B.json")]


def plan(capsys, *arguments):
    status = main(["plan", *map(str, arguments), "--json"])
    written = capsys.readouterr()
    assert status < 2, written.err
    return status, json.loads(written.out)


def error(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_gpus():
    assert parse_gpus("8xH100-80GB") == parse_gpus("8 x h100") == (8, GPUS["H100-80GB"])
    number, own = parse_gpus("4x:48GB,200TFLOPS,900GB/s,50GB/s")
    assert (number, own.memory, own.flops, own.bandwidth, own.link) == (4, 48 * 10**9, 2e14, 9e11, 5e10)
    assert parse_gpus("1xCPU")[1].is_cpu


@pytest.mark.parametrize("text", ["8xTPU", "8xA100", "H100", "0xH100-80GB", "8x:80GB"])
def test_unknown_hardware_is_refused_with_the_list(text, capsys):
    message = error(capsys, *OPSD, "--gpus", text)

    assert all(name in message for name in GPUS)
    assert text in message


def test_sharding_of_the_shipped_configurations():
    folder = ROOT / "recipes/accelerate"
    found = {path.stem: read_accelerate_config(path).kind for path in folder.glob("*.yaml")}
    assert all(kind == name for name, kind in found.items())


def test_other_sharding_is_refused(tmp_path, capsys):
    for values in ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, {"distributed_type": "XLA"}):
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(ValueError, match="distributed_type"):
            read_accelerate_config(path)
    with pytest.raises(ValueError, match="zero3"):
        named("zero4", 8)
    with pytest.raises(ValueError, match="ddp"):
        named("single", 8)
    assert "say the same" in error(
        capsys, *OPSD, "--gpus", "8xH100", "--sharding", "ddp", "--accelerate_config", "ddp"
    )


def test_a_model_that_is_not_here(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = error(capsys, *OPSD[:2], "--gpus", "8xH100", "--model_name_or_path", "./nowhere")
    assert "--model_config" in message
    assert "./nowhere" in message


def test_recipe_of_no_method(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "recipes/opsd/qwen3-8b.yaml").read_text())
    given = ["--config", path, "--model_config", MODELS / "Qwen3-8B.json", "--gpus", "8xH100"]
    assert "--method" in error(capsys, *given)
    assert plan(capsys, *given, "--method", "opsd")[0] == 0


def test_misspelt_field(capsys):
    assert "learning_rate" in error(capsys, *OPSD, "--gpus", "8xH100", "--learning_rat", "1")


def test_a_recipe_that_is_not_there(capsys):
    assert "`--config nowhere.yaml` is no file" in error(capsys, "--config", "nowhere.yaml", "--gpus", "8xH100")


@pytest.mark.parametrize(
    "name",
    [
        "prompt_tokens",
        "teacher_prompt_tokens",
        "completion_tokens",
        "mean_completion_tokens",
        "vllm_server_gpus",
    ],
)
def test_numbers_that_are_none(name, capsys):
    assert f"`--{name}` must be at least 1, got 0." in error(capsys, *OPSD, "--gpus", "8xH100", f"--{name}", 0)


def test_interrupted(monkeypatch, capsys):
    def interrupt(setting):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_opsd.plan.planning.make_plan", interrupt)
    assert main(["plan", *OPSD, "--gpus", "8xH100"]) == 130
    assert capsys.readouterr().err == "trl-opsd plan: interrupted.\n"


def test_a_cpu_recipe_needs_a_cpu(capsys):
    recipe = ROOT / "recipes/playground/opsd.yaml"
    given = ["--config", recipe, "--model_config", MODELS / "playground.json"]
    assert "1xCPU" in error(capsys, *given, "--gpus", "8xH100")
    status, found = plan(capsys, *given, "--gpus", "1xCPU")
    assert status == 0
    assert not found["seconds"]
    assert "overhead" not in found["memory"]["loss"]


DOES_NOT_FIT = {
    "all weights on one GPU": [*OPSD, "--gpus", "1xH100", "--use_peft", "false"],
    "on eight": [*OPSD, "--gpus", "8xA100-80GB", "--use_peft", "false"],
    "long rows": [*OPSD, "--gpus", "8xA100-40GB", "--gradient_checkpointing", "false"],
    "a small engine": [*OPSD, "--gpus", "8xH100", "--vllm_gpu_memory_utilization", "0.15"],
}


@pytest.mark.parametrize("name", DOES_NOT_FIT)
def test_what_is_suggested_fits_when_planned_again(name, capsys):
    status, found = plan(capsys, *DOES_NOT_FIT[name])
    assert status == 1
    assert found["suggestions"]

    for suggestion in found["suggestions"]:
        flags = [part for flag, value in suggestion["flags"].items() for part in (f"--{flag}", value)]
        again, there = plan(capsys, *DOES_NOT_FIT[name], *flags)
        assert again == 0, flags
        assert there["peak_bytes"] == pytest.approx(suggestion["peak_bytes"], rel=0.02)


def test_each_setting_tells(capsys):
    base = plan(capsys, *OPSD, "--gpus", "8xH100")[1]

    def peak(*arguments, phase="backward", part=None):
        parts = plan(capsys, *OPSD, "--gpus", "8xH100", *arguments)[1]["memory"][phase]
        return sum(parts.values()) if part is None else parts.get(part, 0)

    before = sum(base["memory"]["backward"].values())
    assert peak("--gradient_checkpointing", "false") > before
    assert peak("--max_tokens_per_microbatch", "18000") < before
    assert peak("--vllm_enable_sleep_mode", "true") < before
    assert peak("--load_in_4bit", "true", part="weights") < 0.4 * base["memory"]["backward"]["weights"]
    assert peak("--divergence_memory", "128", phase="loss", part="logits blocks") <= 128 * 2**20
    assert peak("--teacher", "ema", part="teacher") > 0
    assert peak("--use_vllm", "false", part="sampler") == 0
    assert peak("--use_vllm", "false", phase="sampling", part="sampler") > 0


@pytest.fixture
def experts(tmp_path):
    """config.json of a mixture of 128 experts, 8 of a token: a twelfth of the layers of Qwen3-30B-A3B."""
    shapes = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, **shapes, **heads).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_experts(experts, capsys):
    given = [*OPSD[:2], "--model_config", experts, "--gpus", "8xH200-141GB", "--use_peft", "false"]
    assert "`router_aux_loss_coef` to 0.0" in error(capsys, *given)

    _, found = plan(capsys, *given, "--router_aux_loss_coef", "0.0", "--sharding", "zero3")

    assert found["memory"]["loss"]["weights"] == pytest.approx((29.9e9 / 12 + 0.62e9) * 2 / 8, rel=0.01)
    # Without embedding and head, a token is multiplied with a tenth of them
    matrices = 2048 * (2 * 4096 + 2 * 512 + 128 + 8 * 3 * 768)
    assert Model(AutoConfig.from_pretrained(experts), torch.bfloat16).num_matrix == 4 * matrices


# What bitsandbytes 0.50.2 keeps of a layer's weight on a CPU, in 4 bits, with quantised scales, and in 8 bits
BITSANDBYTES = {
    (256, 256): (32768 + 4096 + 64, 32768 + 1024 + 64 + 16 + 1028, 65536 + 1024),
    (1024, 256): (131072 + 16384 + 64, 131072 + 4096 + 64 + 64 + 1028, 262144 + 4096),
    (96, 160): (7680 + 960 + 64, 7680 + 240 + 64 + 4 + 1028, 15360 + 384),
    (100, 36): (1800 + 228 + 64, 1800 + 57 + 64 + 4 + 1028, 3600 + 400),
    (4096, 1024): (2097152 + 262144 + 64, 2097152 + 65536 + 64 + 1024 + 1028, 4194304 + 16384),
}


@pytest.mark.parametrize("shape", BITSANDBYTES, ids=str)
def test_quantised_weights(shape):
    for size, bits, nested in zip(BITSANDBYTES[shape], (4, 4, 8), (False, True, False), strict=True):
        assert quantised_bytes(*shape, bits, nested) == size


def test_time_is_planned_by_the_mean_length(capsys):
    longest = plan(capsys, *OPSD, "--gpus", "8xH100")[1]
    mean = plan(capsys, *OPSD, "--gpus", "8xH100", "--mean_completion_tokens", "256")[1]

    assert mean["memory"] == longest["memory"]
    assert mean["seconds"]["sampling"]["seconds"] < 0.3 * longest["seconds"]["sampling"]["seconds"]


def test_tables(capsys):
    assert main(["plan", *OPSD, "--gpus", "8xH100", "--accelerate_config", "ddp"]) == 0
    written = capsys.readouterr().out

    assert "Memory fits" in written
    assert "limited by" in written
    assert "docs/plan.md" in written.rstrip().splitlines()[-1]
