"""Every recipe is planned for the hardware that its first line names."""

import json
import re
from pathlib import Path

import pytest
import yaml

from trl_opsd.cli import main


ROOT = Path(__file__).parents[2] / "recipes"
MODELS = Path(__file__).parent / "models"
IMAGES = ROOT / "rlsd/qwen3-vl-8b.yaml"
SEVERAL_TEACHERS = ROOT / "distill/deepseek-1.5b-two-domains.yaml"
RECIPES = sorted(
    path
    for path in ROOT.rglob("*.yaml")
    if path.parent.name != "accelerate" and not path.stem.startswith("generate-") and path != IMAGES
)
GPUS = {80: "H100-80GB", 96: "RTXPRO6000-96GB", 140: "H200-141GB"}


def flags(recipe: Path) -> list[str]:
    """What the command is given for a recipe: the hardware and the sharding of its first two lines, and shapes."""
    lines, values = recipe.read_text().splitlines(), yaml.safe_load(recipe.read_text())
    hardware = re.search(r"(\d+) GPUs of (\d+) GB", lines[0])
    gpus = f"{hardware[1]}x{GPUS[int(hardware[2])]}" if hardware else "1xCPU"
    sharding = re.search(r"--accelerate_config (\w+)", "".join(lines[:3]))
    found = ["--config", str(recipe), "--gpus", gpus, *(["--accelerate_config", sharding[1]] if sharding else [])]
    for field, flag in (("model", "--model_config"), ("teacher_model", "--teacher_model_config")):
        name = values.get(f"{field}_name_or_path")
        if name is not None:
            name = {"playground": "playground", "smollm2": "smollm2-135m"}.get(recipe.parent.name, name)
            found += [flag, str(MODELS / f"{name.rpartition('/')[2]}.json")]
    for name in values.get("teachers", {}) if recipe == SEVERAL_TEACHERS else ():  # of the policy's architecture
        found += ["--teacher_model_config", f"{name}={found[found.index('--model_config') + 1]}"]
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_is_planned(recipe, capsys):
    status = main(["plan", *flags(recipe), "--json"])
    written = capsys.readouterr()

    assert status in (0, 1), written.err
    plan = json.loads(written.out)
    assert plan["fits"] == (status == 0)
    assert plan["peak_bytes"] == max(sum(parts.values()) for parts in plan["memory"].values())
    assert plan["fits"] or plan["suggestions"]


def test_a_model_that_reads_images(capsys, tmp_path):
    config = {"model_type": "qwen3_vl", "vision_config": {}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ["plan", "--config", str(IMAGES), "--gpus", "8xH100-80GB", "--model_config"]
    assert main([*given, str(tmp_path)]) == 2
    assert "reads images, whose tokens and passes are not planned" in capsys.readouterr().err
    # The way out that it names
    assert main([*given, str(MODELS / "Qwen3-8B.json")]) in (0, 1)


def test_several_teachers_take_what_each_takes(capsys, tmp_path):
    """All are held at once, and read one after another, as many rows each."""
    values = yaml.safe_load(SEVERAL_TEACHERS.read_text())
    model, size = MODELS / "playground.json", MODELS / "smollm2-135m.json"
    values |= {"max_completion_length": 256, "use_vllm": False, "vllm_max_model_length": None}

    def planned(*flags, **changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
        given = ["--config", str(tmp_path / "recipe.yaml"), "--method", "distill", "--gpus", "2xH100-80GB"]
        status = main(["plan", *given, "--sharding", "zero3", "--model_config", str(model), *flags, "--json"])
        written = capsys.readouterr()
        return json.loads(written.out) if status < 2 else written.err

    large = {"teacher": "external", "teacher_model_name_or_path": "large"}
    teachers = {"large": large, "live": {"teacher": "live"}, "ema": {"teacher": "ema"}}
    both = planned("--teacher_model_config", f"large={size}", teachers=teachers)
    alone = {
        name: planned(
            *(["--teacher_model_config", str(size)] if name == "large" else []),
            teachers=None,
            teacher_column=None,
            **its,
        )
        for name, its in teachers.items()
    }
    held = {name: plan["memory"]["forward"].get("teacher", 0) for name, plan in alone.items()}
    assert both["memory"]["forward"]["teacher"] == held["large"] + held["ema"] > held["large"] > 0
    most = max(plan["memory"]["teacher"]["activations"] for plan in alone.values())
    assert both["memory"]["teacher"]["activations"] == most
    passes = [plan["seconds"]["teacher's pass"] for plan in (both, *alone.values())]
    assert {its["limit"] for its in passes} == {"launches"}  # of so small models, each of which runs
    assert passes[0]["seconds"] == pytest.approx(sum(its["seconds"] for its in passes[1:]))

    wrong = planned("--teacher_model_config", f"larg={size}", teachers=teachers)
    assert "is of no external teacher. Give `large=FILE`" in wrong
    assert "is of no external teacher. Give no file" in planned(
        "--teacher_model_config", str(size), teacher="live", teachers=None, teacher_column=None
    )
