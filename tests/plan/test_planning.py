"""Hardware, sharding, suggestions and the command."""

import json
from pathlib import Path

import pytest
import yaml

from trl_opsd.cli import main
from trl_opsd.plan.hardware import GPUS, parse_gpus
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
