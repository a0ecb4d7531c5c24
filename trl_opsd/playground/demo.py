"""
The main demo: a small model teaches itself in minutes on two CPU cores.

    python -m trl_opsd.playground.demo opsd
    python -m trl_opsd.playground.demo opsdc

So with every other method, on the base model of one of these two.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from ..files import recipes_folder
from ..methods import METHODS, summary
from .present import quiet, refuse_flags, stage, write_page


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Methods that shorten answers have the verbose world. All others have the one in which answers are hard.
SHORTENING = ("opsdc", "correct_only")
TOLD = {"opsd": "base, reading the solution", "opsdc": "base, told to be brief"}

# What the demo makes itself, and trains on whatever the recipe says
_OWN_FIELDS = {
    "model_name_or_path",
    "model_revision",
    "dataset_name",
    "dataset_config",
    "dataset_streaming",
    "dataset_train_split",
    "dataset_test_split",
    "datasets",
    "column_mapping",
    "prompt_template",
    "system_prompt",
    "plain_prompts",
    "resume_from_checkpoint",
}
_REWARD = "rewards/accuracy_reward/mean"


def world_of(method: str) -> str:
    """Key in [`~trl_opsd.playground.world.WORLDS`] of the world that a method is shown in."""
    return "opsdc" if method in SHORTENING else "opsd"


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the demo's own arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_opsd.playground.demo",
        description="Makes the embedded world, trains a small base model on it, runs self-distillation, and compares "
        "held-out answers before and after. Downloads nothing. Takes minutes on two CPU cores. Started again with the "
        "same output_dir, it goes on where it stopped.",
        epilog="Any other flag is a field of the recipe and takes precedence over it, for example "
        "--learning_rate 1e-3 or --max_steps 50.",
        allow_abbrev=False,
    )
    parser.add_argument("method", choices=list(METHODS), metavar="method", help=f"one of: {', '.join(METHODS)}")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=int, default=0, help="seed of the problems, the base and the training (default: 0)"
    )
    seeds.add_argument(
        "--seeds", type=int, nargs="+", help="several seeds, one after the other, with one table at the end"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="where everything goes (default: outputs/demo-METHOD, the base to that of the demo of OPSD or OPSDC)",
    )
    parser.add_argument("--recipe", type=Path, help="recipe of the self-distillation (default: recipes/playground)")
    parser.add_argument("--base_steps", type=int, help="optimizer steps of the base model's training")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo from the command line."""
    args, overrides = make_parser().parse_known_args(argv)
    console = Console()
    output_dir = args.output_dir or Path("outputs") / f"demo-{args.method}"
    bases = args.output_dir or Path("outputs") / f"demo-{world_of(args.method)}"
    recipe = args.recipe or recipes_folder() / "playground" / f"{args.method}.yaml"
    seeds = [args.seed] if args.seeds is None else args.seeds
    results = [
        run_demo(
            args.method,
            seed,
            output_dir / f"seed{seed}",
            recipe,
            overrides,
            args.base_steps,
            console,
            base=bases / f"seed{seed}" / "base",
        )
        for seed in seeds
    ]
    if len(results) > 1:
        console.print(seeds_table(results))
        (output_dir / "results.json").write_text(json.dumps(results, indent=2))


def run_demo(
    method: str,
    seed: int,
    folder: Path,
    recipe: Path,
    overrides: Sequence[str] = (),
    base_steps: int | None = None,
    console: Console | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """
    Runs one demo, or what is left of it.

    Args:
        method (`str`):
            Key of [`~trl_opsd.methods.METHODS`].
        seed (`int`):
            Seed of the problems, the base model and the self-distillation.
        folder (`Path`):
            Where everything goes.
        recipe (`Path`):
            Recipe of the self-distillation.
        overrides (`Sequence[str]`, *optional*, defaults to `()`):
            Flags that take precedence over the recipe.
        base_steps (`int`, *optional*):
            Optimizer steps of the base model's training. `None` takes the demo's own number.
        console ([`~rich.console.Console`], *optional*):
            Console to write to.
        base (`Path`, *optional*):
            Folder of the base model, which is trained if it is not there. `None` puts it into `folder`.

    Returns:
        `dict[str, Any]`:
            The results, as they are in `results.json`.
    """
    # Imported late: `--help` should not wait for torch.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..data import load_rows
    from ..report import PromptPreviewCallback
    from ..scripts.train import find_checkpoint, make_parser
    from .base import BASE_RECIPES, has_base, train_base
    from .evaluate import evaluate
    from .world import WORLDS

    started = time.perf_counter()
    console = console or Console()
    quiet()
    console.rule(f"[bold]{method.upper()}[/bold], seed {seed}")
    console.print(summary(method))
    refuse_flags(overrides, _OWN_FIELDS, "The demo makes its own base model, problems and checkpoints")

    base, model_dir = base or folder / "base", folder / "model"
    settings = {
        "method": method,
        "seed": seed,
        "recipe": yaml.safe_load(recipe.read_text()),
        "overrides": list(overrides),
        "base_steps": base_steps,
    }
    results_file, settings_file = folder / "results.json", folder / "settings.json"
    if settings_file.is_file() and json.loads(settings_file.read_text()) == settings:
        if results_file.is_file():
            console.print(f"Finished already: these are the results in {folder}. Delete it to run again.")
            results = json.loads(results_file.read_text())
            console.print(results_table(results))
            return results
    else:
        # What another recipe left here must not be continued with this one. The base is checked by itself.
        shutil.rmtree(model_dir, ignore_errors=True)
        results_file.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(json.dumps(settings, indent=2))

    script_args, training_args, model_args, _ = make_parser(method).parse_args_and_config(
        ["--config", str(recipe), *overrides, "--output_dir", str(model_dir), "--seed", str(seed)]
    )
    context = _readable_context(method, training_args)
    world, base_recipe = WORLDS[world_of(method)], BASE_RECIPES[world_of(method)]
    if base_steps is not None:
        base_recipe = replace(base_recipe, steps=base_steps)
    splits = world.splits(seed)
    for name in ("train", "test"):
        splits[name].to_json(folder / f"{name}.jsonl")
    test = splits["test"]
    console.print(
        f"The world: {world.digits}-digit addition, {len(splits['base'])} problems for the base model, "
        f"{len(splits['train'])} for {method.upper()}, {len(test)} held out."
    )

    timings = {}
    if has_base(base, world, base_recipe, context, seed):
        console.print(f"The base model in {base} is finished and is used again.")
    else:
        with stage("Training the base", base_recipe.steps, console) as (progress, task):

            def on_step(step: int, loss: float) -> None:
                progress.update(task, completed=step, status=f"loss {loss:.3f}")

            train_base(base, world, base_recipe, context, splits["base"], seed, on_step)
    timings["base"] = time.perf_counter() - started

    tokenizer = AutoTokenizer.from_pretrained(base)
    told_prompts = [context.teacher_messages(row, None) for row in test]

    def answer(path: Path, prompts: Sequence[list[dict[str, Any]]]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path)
        return evaluate(model, tokenizer, prompts, test["answer"], training_args.max_completion_length)

    with console.status("Evaluating the base on held-out problems"):
        before, told = answer(base, test["prompt"]), answer(base, told_prompts)

    distillation_started = time.perf_counter()
    checkpoint = find_checkpoint("auto", str(model_dir))
    if checkpoint is not None:
        console.print(f"Going on from {checkpoint}.")
    model_args.model_name_or_path = str(base)
    rows = load_rows(str(folder / "train.jsonl"))
    trainer = _make_trainer(script_args, training_args, model_args, rows)
    with stage(f"Running {method.upper()}", training_args.max_steps, console) as (progress, task):
        trainer.add_callback(_progress_callback(progress, task))
        trainer.add_callback(PromptPreviewCallback(trainer, console))
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(model_dir))
    timings["self-distillation"] = time.perf_counter() - distillation_started

    with console.status("Evaluating again"):
        after = answer(model_dir, test["prompt"])
    timings["total"] = time.perf_counter() - started

    logs = [row for row in trainer.state.log_history if "num_generated_tokens" in row]
    keys = {"divergence": "distillation_loss", "accuracy": _REWARD, "tokens": "completions/mean_length"}
    results = {
        "method": method,
        "seed": seed,
        "problems": len(test),
        "before": _without_responses(before),
        "told": _without_responses(told),
        "after": _without_responses(after),
        "steps": trainer.state.global_step,
        "num_generated_tokens": int(logs[-1]["num_generated_tokens"]),
        "seconds": {name: round(seconds, 1) for name, seconds in timings.items()},
        "curve": {"step": [row["step"] for row in logs]}
        | {name: [row.get(key) for row in logs] for name, key in keys.items()},
        "examples": [
            {
                "problem": test[index]["prompt"][-1]["content"],
                "answer": test[index]["answer"],
                "before": before.responses[index],
                "after": after.responses[index],
            }
            for index in _examples(before.correct, after.correct)
        ],
    }
    write_results_page(results, folder)
    results_file.write_text(json.dumps(results, indent=2))
    console.print(results_table(results))
    console.print(f"Page:   {folder / 'index.html'}\nModel:  {model_dir}, for AutoModelForCausalLM.from_pretrained")
    return results


def _readable_context(method: str, training_args: Any) -> Any:
    """What the base learns to read: the recipe's template of columns, or the world's own where a method has none."""
    from ..context import TemplateContext, make_context

    context = make_context(training_args.privileged_context, training_args.context_kwargs)
    if isinstance(context, TemplateContext):
        return context
    own = yaml.safe_load((recipes_folder() / "playground" / f"{world_of(method)}.yaml").read_text())
    return make_context(own["privileged_context"], own["context_kwargs"])


def _make_trainer(script_args: Any, training_args: Any, model_args: Any, rows: Any) -> Any:
    from transformers import PrinterCallback, ProgressCallback

    from ..scripts.inputs import load_reward_funcs
    from ..scripts.train import make_trainer

    rewards = load_reward_funcs(script_args)
    trainer = make_trainer(script_args, training_args, model_args, rows, reward_funcs=rewards)
    # One line of progress takes their place.
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _progress_callback(progress: Progress, task: TaskID) -> Any:
    from transformers import TrainerCallback

    class StageCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress.update(task, total=state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress.update(task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "num_generated_tokens" in logs:
                status = f"{logs['completions/mean_length']:.0f} tokens"
                if "distillation_loss" in logs:
                    status = f"KL {logs['distillation_loss']:.3f}, {status}"
                if _REWARD in logs:
                    status += f", {logs[_REWARD]:.0%} right"
                progress.update(task, status=status)

    return StageCallback()


def _without_responses(evaluation: Any) -> dict[str, float]:
    values = asdict(evaluation)
    return {name: values[name] for name in ("accuracy", "mean_tokens", "truncated")}


def _examples(before: Sequence[bool], after: Sequence[bool], number: int = 2) -> list[int]:
    """Problems to show: those that came to be solved first, then those solved both times."""
    order = sorted(range(len(before)), key=lambda index: (not after[index], before[index]))
    return order[:number]


def results_table(results: Mapping[str, Any]) -> Table:
    """Makes the summary table of one run."""
    method = results["method"]
    seconds = results["seconds"]
    table = Table(
        title=f"{method.upper()} on held-out problems, seed {results['seed']}",
        caption=f"{results['steps']} steps, {results['num_generated_tokens']:,} generated tokens. "
        f"{seconds['total']:.0f} s: base {seconds['base']:.0f} s, "
        f"{method.upper()} {seconds['self-distillation']:.0f} s.",
    )
    table.add_column("")
    for name in ("base", TOLD[world_of(method)], f"after {method.upper()}"):
        table.add_column(name, justify="right")
    columns = [results[name] for name in ("before", "told", "after")]
    table.add_row("accuracy", *(f"{column['accuracy']:.1%}" for column in columns))
    table.add_row("response tokens", *(f"{column['mean_tokens']:.1f}" for column in columns))
    table.add_row("cut short", *(f"{column['truncated']:.1%}" for column in columns))
    return table


def seeds_table(all_results: Sequence[Mapping[str, Any]]) -> Table:
    """Makes the table of several seeds."""
    table = Table(title=f"{all_results[0]['method'].upper()}, {len(all_results)} seeds")
    for name in ("seed", "accuracy", "change", "response tokens", "change", "generated tokens", "seconds"):
        table.add_column(name, justify="right")
    for results in all_results:
        before, after = results["before"], results["after"]
        table.add_row(
            str(results["seed"]),
            f"{before['accuracy']:.1%} → {after['accuracy']:.1%}",
            f"{100 * (after['accuracy'] - before['accuracy']):+.1f} points",
            f"{before['mean_tokens']:.1f} → {after['mean_tokens']:.1f}",
            f"{after['mean_tokens'] / before['mean_tokens'] - 1:+.0%}",
            f"{results['num_generated_tokens']:,}",
            f"{results['seconds']['total']:.0f}",
        )
    return table


def plot(results: Mapping[str, Any]) -> "Figure":
    """Draws accuracy and length before and after, and the course of the training."""
    from matplotlib.figure import Figure

    grey, blue, light = "#9aa5b1", "#2f6fde", "#cdd5de"
    method, curve = results["method"].upper(), results["curve"]
    columns = [results[name] for name in ("before", "told", "after")]
    labels = ["base", TOLD[world_of(results["method"])].replace(", ", ",\n"), f"after\n{method}"]
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    (accuracy, length), (divergence, rollouts) = figure.subplots(2, 2)
    shares, tokens = [100 * column["accuracy"] for column in columns], [column["mean_tokens"] for column in columns]
    for axes, title, values, top in (
        (accuracy, "Held-out accuracy (%)", shares, 112),
        (length, "Mean response length (tokens)", tokens, 1.15 * max(tokens)),
    ):
        bars = axes.bar(labels, values, color=[grey, light, blue], width=0.6)
        axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], padding=2)
        axes.set_title(title)
        axes.set_ylim(0, top)
    divergence.plot(curve["step"], [_or_nan(value) for value in curve["divergence"]], color=blue)
    divergence.set_title("Divergence from the teacher in training (nats per token)")
    divergence.set_ylim(bottom=0)
    if world_of(results["method"]) == "opsd":
        shown, scale, title = "accuracy", 100, "Right rollouts in training (%, sampled)"
    else:
        shown, scale, title = "tokens", 1, "Rollout length in training (tokens)"
    rollouts.plot(curve["step"], [scale * _or_nan(value) for value in curve[shown]], color=blue)
    rollouts.set_title(title)
    rollouts.set_ylim(bottom=0)
    for axes in (divergence, rollouts):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    for axes in (accuracy, length, divergence, rollouts):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def write_results_page(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the self-contained `index.html` of a run."""
    from ..report.page import table
    from ..report.run_report import paragraph

    method, seconds = results["method"], results["seconds"]
    columns = [results[name] for name in ("before", "told", "after")]
    rows = [
        ["accuracy", *(f"{100 * column['accuracy']:.1f} %" for column in columns)],
        ["response tokens", *(f"{column['mean_tokens']:.1f}" for column in columns)],
        ["cut short", *(f"{100 * column['truncated']:.1f} %" for column in columns)],
    ]
    header = [f"{results['problems']} held-out problems", "base", TOLD[world_of(method)], f"after {method.upper()}"]
    cost = (
        f"{results['steps']} optimizer steps, {results['num_generated_tokens']:,} generated tokens, seed "
        f"{results['seed']}. {seconds['total']:.0f} s in all, of which the base model took {seconds['base']:.0f} s "
        f"and {method.upper()} {seconds['self-distillation']:.0f} s."
    )
    write_page(
        folder / "index.html",
        folder / "model",
        f"{method.upper()} on the embedded world, seed {results['seed']}",
        [paragraph(summary(method)), table(header, rows), paragraph(cost)],
        plot(results),
        "Accuracy and length before and after, and the training curves",
        results["examples"],
    )


if __name__ == "__main__":
    main()
