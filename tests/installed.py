"""
What `make dist` runs by the Python of a fresh environment, in an empty folder: the wheel alone, without the checkout,
is a command that finds its recipes and trains.
"""

import json
import subprocess
import sys
from pathlib import Path

import trl_opsd
from trl_opsd.context import make_context
from trl_opsd.files import recipes_folder
from trl_opsd.methods import METHODS
from trl_opsd.playground.base import BaseRecipe, train_base
from trl_opsd.playground.world import WORLDS
from trl_opsd.scripts.train import make_parser


COMMAND = Path(sys.executable).parent / "trl-opsd"


def run(*arguments: str) -> str:
    result = subprocess.run([COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"trl-opsd {' '.join(arguments)} failed:\n{result.stdout}")
    return result.stdout


def main() -> None:
    for folder in (Path(trl_opsd.__file__).parent, recipes_folder()):
        assert folder.is_relative_to(sys.prefix), f"{folder} is not in the environment"
    assert run("--version").strip() == trl_opsd.__version__
    commands = run("--help").split()
    assert {*METHODS} <= {*commands}
    assert f"trl-opsd version: {trl_opsd.__version__}" in run("env")
    assert all((recipes_folder() / "playground" / f"{name}.yaml").is_file() for name in ("opsd", "opsdc"))

    # What the shipped recipe reads: rows, and a base that has hardly been trained
    recipe = recipes_folder() / "playground" / "opsd.yaml"
    script, args, model, _ = make_parser("opsd").parse_args_and_config(["--config", str(recipe)])
    world = WORLDS["opsd"]
    rows = world.splits()
    Path(script.dataset_name).parent.mkdir(parents=True)
    rows["train"].to_json(script.dataset_name)
    context = make_context(args.privileged_context, args.context_kwargs)
    train_base(Path(model.model_name_or_path), world, BaseRecipe(2, 0.5), context, rows["base"])
    run("opsd", "--config", str(recipe), "--max_steps", "1")
    state = json.loads((Path(args.output_dir) / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    print("The installed package works.")


if __name__ == "__main__":
    main()
