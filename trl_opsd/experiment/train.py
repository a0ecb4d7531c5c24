"""One run, in a process of its own: `python -m trl_opsd.experiment.train RESULT_FILE`, the run pickled on stdin."""

import json
import math
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from ..files import write_whole
from .arms import BASE_SEED, TUNING_SEED, Arm, Base


# To be raised by every change that alters what a run does, so that no older result passes for one of the changed one
VERSION = 1


@dataclass(frozen=True)
class Run:
    """
    One training with one seed.

    Args:
        base ([`~trl_opsd.experiment.arms.Base`]):
            The base.
        seed (`int`, *optional*):
            Seed of the order of the rows and of sampling. `None` for the training of the base itself.
        arm ([`~trl_opsd.experiment.arms.Arm`], *optional*):
            The arm. `None` trains the base itself.
        learning_rate (`float`, *optional*):
            Peak learning rate.
        scale (`float`, *optional*, defaults to `1.0`):
            Share of the arm's steps and tokens that are taken.
    """

    # What makes it in a process of its own
    module: ClassVar[str] = "trl_opsd.experiment.train"

    base: Base
    seed: int | None = None
    arm: Arm | None = None
    learning_rate: float | None = None
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Name of its result file."""
        parts = [self.base.name] if self.arm is None else [self.arm.name, self.base.name]
        parts += [] if self.learning_rate is None else [f"lr{self.learning_rate:g}"]
        parts += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(parts if self.scale == 1.0 else [*parts, f"x{self.scale:g}"])

    @property
    def steps(self) -> int:
        """Optimizer steps, the most of them where tokens end the training."""
        return self.base.recipe.steps if self.arm is None else math.ceil(self.scale * self.arm.steps)

    @property
    def tokens(self) -> float | None:
        """Generated tokens that end the training."""
        return None if self.arm is None or self.arm.tokens is None else self.scale * self.arm.tokens

    @property
    def planned_seconds(self) -> float:
        """Core-seconds it takes where the arms were measured. Ten are for starting and testing."""
        return self.base.seconds if self.arm is None else 10.0 + self.scale * self.arm.seconds

    @property
    def origin(self) -> "Run":
        """The training of its base."""
        return Run(self.base)

    def score(self, result: Mapping[str, Any], origin: Mapping[str, Any]) -> float:
        """
        What an arm is tuned for.

        Args:
            result (`Mapping[str, Any]`):
                What it left.
            origin (`Mapping[str, Any]`):
                What the training of its base left.

        Returns:
            `float`:
                Accuracy on problems that are kept for this. Where answers are to become shorter, less their length as
                a share of the base's: a point of accuracy is worth a percent of length.
        """
        final = result["final"]["tune"]
        if self.base.family.name == "adding":
            return final["accuracy"]
        return final["accuracy"] - final["mean_tokens"] / origin["final"]["tune"]["mean_tokens"]

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on, of JSON types. A result with other settings is not this run's."""
        arm = {} if self.arm is None else asdict(self.arm)
        for name in ("title", "bases", "trained_as", "seconds", "quick"):
            arm.pop(name, None)
        run = {
            "base": self.base.name,
            "seed": self.seed,
            "arm": None if self.arm is None else self.arm.name,
            "learning_rate": self.learning_rate,
            "scale": self.scale,
        }
        settings = {"run": run, "recipe": asdict(self.base.recipe), "family": asdict(self.base.family), "arm": arm}
        return json.loads(json.dumps({"version": VERSION, **settings}))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """
    Writes a result file, whole or not at all.

    Args:
        path (`Path`):
            The file.
        result (`dict[str, Any]`):
            Its content.
    """
    write_whole(path, json.dumps(result, indent=1) + "\n")


def run(spec: Run, folder: Path) -> dict[str, Any]:
    """
    Trains a base, or an arm from its finished base, and tests the outcome.

    Args:
        spec ([`Run`]):
            What to run.
        folder (`Path`):
            Folder of all runs.

    Returns:
        `dict[str, Any]`:
            Budgets (`"steps"`, `"generated_tokens"`, `"learner_tokens"`, `"seconds"` of training without evaluation,
            as processor time, which other programs do not lengthen), the learning `"curve"`, unless it is tuning, and
            the `"final"` figures by split.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..context import TemplateContext
    from ..playground.base import train_base
    from .tasks import BRIEF_TEMPLATE, REFERENCE_TEMPLATE

    family = spec.base.family
    rows = family.make(BASE_SEED)
    model_folder = folder / "bases" / spec.base.name
    cpu_started = time.process_time()
    if spec.arm is None:
        train_base(model_folder, family, spec.base.recipe, family.base_context, rows["base"], BASE_SEED)
        model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
        result = {
            "generated_tokens": 0,
            "learner_tokens": 0,
            "seconds": time.process_time() - cpu_started,
            "curve": [],
            "final": examine(model, tokenizer, rows, family, splits=[*family.held_out, "tune"]),
            "told": {
                column: examine(model, tokenizer, rows, family, ["test"], TemplateContext(REFERENCE_TEMPLATE % column))
                for column in (("solution", "terse", "answer") if family.name == "adding" else ())
            },
        }
    elif spec.arm.trainer == "none":
        model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
        context = TemplateContext(BRIEF_TEMPLATE)
        result = {
            "generated_tokens": 0,
            "learner_tokens": 0,
            "seconds": 0.0,
            "curve": [],
            "final": examine(model, tokenizer, rows, family, family.held_out, context),
        }
    else:
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = make_trainer(spec, str(model_folder), rows["train"], output_dir)
            watch = make_watch(trainer, spec, rows)
            trainer.add_callback(watch)
            if spec.tokens is not None:
                follow_tokens(trainer, spec.arm, watch)
            with watch.counting():
                trainer.train()
        splits = ["tune"] if spec.seed == TUNING_SEED else family.held_out
        result = {
            **watch.budgets(),
            "curve": watch.curve,
            "series": watch.series,
            "final": examine(trainer.model, trainer.processing_class, rows, family, splits),
        }
    cpu_seconds = time.process_time() - cpu_started
    return {**result, "cpu_seconds": cpu_seconds, "versions": {"torch": torch.__version__}}


def make_trainer(spec: Run, model: str, rows: Any, output_dir: str) -> Any:
    """
    Makes the trainer of an arm: an ordinary public one, with the settings that all arms share and the arm's own.

    Args:
        spec ([`Run`]):
            What is run.
        model (`str`):
            Folder of the base.
        rows ([`~datasets.Dataset`]):
            The training rows of its tasks.
        output_dir (`str`):
            Folder that the trainer is given.

    Returns:
        [`~transformers.Trainer`]:
            The trainer, ready to train.
    """
    from transformers import PrinterCallback, ProgressCallback

    assert spec.arm is not None
    arm = spec.arm
    shared: dict[str, Any] = {
        "output_dir": output_dir,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if arm.constant_rate else "cosine",
        "warmup_steps": 10,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": arm.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": spec.steps,
        "seed": spec.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if arm.trainer != "trl_sft":
        shared["max_completion_length"] = spec.base.family.max_completion_length
    trainer = _PEERS.get(arm.trainer, _self_distillation)(arm, model, rows, {**shared, **arm.settings})
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _sft(arm: Arm, model: str, rows: Any, settings: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    def completion(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": [{"role": "assistant", "content": row[arm.column]}]}

    rows = rows.map(completion).select_columns(["prompt", "completion"])
    return SFTTrainer(model, args=SFTConfig(**settings), train_dataset=rows)


def _grpo(arm: Arm, model: str, rows: Any, settings: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    from ..playground.world import accuracy_reward

    return GRPOTrainer(model, reward_funcs=accuracy_reward, args=GRPOConfig(**settings), train_dataset=rows)


def _sdft(arm: Arm, model: str, rows: Any, settings: dict[str, Any]) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from .tasks import REFERENCE_TEMPLATE

    template = REFERENCE_TEMPLATE % "privileged_context"
    args = SDFTConfig(**settings, max_prompt_length=None, teacher_prompt_template=template)
    rows = rows.rename_column(arm.column, "privileged_context").select_columns(["prompt", "privileged_context"])
    return SDFTTrainer(model, args=args, train_dataset=rows)


def _self_distillation(arm: Arm, model: str, rows: Any, settings: dict[str, Any]) -> Any:
    from trl_opsd import SelfDistillationTrainer

    from ..methods import config_class
    from ..scripts.inputs import find_reward_funcs

    rewards = find_reward_funcs(settings.pop("reward_funcs", None))
    args = config_class(arm.trainer)(**settings)
    return SelfDistillationTrainer(model, reward_funcs=rewards, args=args, train_dataset=rows)


# TRL's own trainers; all others are methods of this library
_PEERS = {"trl_sft": _sft, "trl_grpo": _grpo, "trl_sdft": _sdft}


def follow_tokens(trainer: Any, arm: Arm, watch: Any) -> None:
    """
    Has the learning rate of a trainer follow the share of its tokens that is spent: a tenth of them warms up, then it
    falls to zero by a cosine.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        arm ([`~trl_opsd.experiment.arms.Arm`]):
            The arm.
        watch ([`~transformers.TrainerCallback`]):
            Knows the share.
    """
    from torch.optim.lr_scheduler import LambdaLR

    def factor(_: int) -> float:
        share = min(watch.share_spent, 1.0)
        if share < _WARM_UP:
            return share / _WARM_UP
        return 1.0 if arm.constant_rate else (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP))) / 2

    trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, factor)


_WARM_UP = 0.1


def examine(
    model: Any, tokenizer: Any, rows: dict[str, Any], family: Any, splits: Sequence[str], context: Any = None
) -> dict[str, Any]:
    """
    Tests a model on held-out problems, by one sample each.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`dict[str, Dataset]`):
            Rows by split.
        family ([`~trl_opsd.experiment.tasks.Family`]):
            Their family.
        splits (`Sequence[str]`):
            Splits to test on.
        context ([`PrivilegedContext`], *optional*):
            What the model reads instead of the bare question.

    Returns:
        `dict[str, Any]`:
            By split: accuracy, mean tokens, share of truncated responses, markers per 1,000 tokens, and accuracy and
            mean tokens by number of digits.
    """
    from ..playground.evaluate import evaluate
    from .tasks import count_markers

    figures = {}
    for split in splits:
        problems = rows[split]
        prompts = problems["prompt"] if context is None else [context.teacher_messages(row, None) for row in problems]
        length = family.max_completion_length
        done = evaluate(model, tokenizer, prompts, problems["answer"], length, sampling_seed=0)
        by_digits: dict[str, dict[str, float]] = {}
        for digits in sorted(set(problems["digits"])):
            chosen = [index for index, number in enumerate(problems["digits"]) if number == digits]
            by_digits[str(digits)] = {
                "accuracy": fmean(done.correct[index] for index in chosen),
                "mean_tokens": fmean(done.lengths[index] for index in chosen),
            }
        figures[split] = {
            "accuracy": done.accuracy,
            "mean_tokens": done.mean_tokens,
            "truncated": done.truncated,
            "markers_per_1k": 1000 * sum(map(count_markers, done.responses)) / sum(done.lengths),
            "by_digits": by_digits,
            "example": done.responses[0],
        }
    return figures


def make_watch(trainer: Any, spec: Run, rows: dict[str, Any]) -> Any:
    """
    Makes the callback that counts a run's budgets and tests it along the way.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that is watched.
        spec ([`Run`]):
            What is run.
        rows (`dict[str, Dataset]`):
            Rows by split.

    Returns:
        [`~transformers.TrainerCallback`]:
            The callback, with `curve`, `series`, `share_spent`, `counting()`, within which to train, and `budgets()`.
    """
    from transformers import TrainerCallback

    assert spec.arm is not None
    arm, family = spec.arm, spec.base.family
    tokenizer = trainer.processing_class
    prompt_tokens = fmean(
        len(ids)
        for ids in tokenizer.apply_chat_template(
            list(rows["train"]["prompt"]), add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.curve: list[dict[str, float]] = []
            self.series: dict[str, list[float]] = {}
            self._steps = 0
            self._generated = self._learnt = self._spent = self._before = 0.0
            self._started = self._seconds = self._evaluation_seconds = 0.0

        @contextmanager
        def counting(self) -> Iterator[None]:
            """Counts what any model samples, for whatever it is sampled."""
            kind = type(trainer.model)
            generate = kind.generate

            def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
                output = generate(model, *args, **kwargs)
                sampled = output[:, kwargs["input_ids"].shape[1] :]
                ended = (sampled == tokenizer.eos_token_id).cumsum(1) - (sampled == tokenizer.eos_token_id).long()
                self._generated += int((ended == 0).sum())
                return output

            kind.generate = counted
            try:
                yield
            finally:
                del kind.generate

        @property
        def share_spent(self) -> float:
            """Share of the tokens that end the training."""
            assert spec.tokens is not None
            return self._spent / spec.tokens

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._started = time.process_time()
            self._evaluate(0)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Known before the next learning rate is set, but for SFT, which is told with the log
            if arm.trainer != "trl_sft":
                self._spent = self._generated

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in logs:  # an evaluation, or the end
                return
            spent, self._steps = self._before, state.global_step
            if arm.trainer == "trl_sft":
                self._learnt = logs["num_tokens"]
                self._spent = self._learnt - arm.batch_size * state.global_step * prompt_tokens
            else:
                self._learnt += arm.batch_size * (logs["completions/mean_length"] + prompt_tokens)
            for name in ("frac_reward_zero_std", "reward"):
                if name in logs:
                    self.series.setdefault(name, []).append(logs[name])
            every, ended = arm.evaluate_every, state.global_step == spec.steps
            if spec.tokens is None:
                due = state.global_step % every == 0
            else:
                # With the step that comes closest
                ended = ended or 2 * self._spent + (self._spent - spent) >= 2 * spec.tokens
                due = self._spent // every > spent // every
                control.should_training_stop = control.should_training_stop or ended
            self._before = self._spent
            if due or ended:
                self._evaluate(state.global_step)

        def _evaluate(self, step: int) -> None:
            started, generated = time.process_time(), self._generated
            self._seconds = started - self._started - self._evaluation_seconds
            if spec.seed == TUNING_SEED:
                return
            figures = examine(trainer.model, tokenizer, rows, family, ["curve"])["curve"]
            self._generated = generated
            self._evaluation_seconds += time.process_time() - started
            self.curve.append(
                {
                    "step": step,
                    "generated_tokens": round(self._generated),
                    "seconds": self._seconds,
                    "accuracy": figures["accuracy"],
                    "mean_tokens": figures["mean_tokens"],
                }
            )

        def budgets(self) -> dict[str, float]:
            return {
                "steps": self._steps,
                "generated_tokens": round(self._generated),
                "learner_tokens": round(self._learnt),
                "seconds": self._seconds,
            }

    return Watch()


def main(argv: Sequence[str] | None = None, make: Callable[[Any, Path], dict[str, Any]] = run) -> None:
    """
    Makes what is described on stdin, and leaves its result or the error.

    Args:
        argv (`Sequence[str]`, *optional*):
            The result file, in a folder of that of the experiment.
        make (`Callable[[Any, Path], dict[str, Any]]`, *optional*):
            From a description and the folder of the experiment to the result.
    """
    from ..playground.present import quiet

    (path,) = map(Path, sys.argv[1:] if argv is None else argv)
    spec = pickle.load(sys.stdin.buffer)
    quiet()
    try:
        result = make(spec, path.parent.parent)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    write_result(path, {"settings": spec.settings(), **result})


if __name__ == "__main__":
    main()
