"""One run, in a process of its own: `python -m trl_opsd.real_model.train RESULT_FILE`, the run pickled on stdin."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from ..experiment.train import main
from ..files import whole_folder, write_whole
from ..playground.recall import MAX_TOKENS, recall
from ..playground.smollm2 import MODEL_DIR, Exam, check_packages, prepare_model
from .arms import ADAPTER, PAGED, TUNING_SEED, RealRun
from .work import WORK, Rows, examine


# Data that SFT learns from, by the share of tokens that are drawn without the facts, see MixSDMaker
_SHARES = {"teacher": 0.0, "mixsd": 0.5}
_TRIES = 4
# Of a pass forward and backward: less than half of the memory of a whole batch, in the same time
_PASS_TOKENS = 400
# Questions of each kind that are asked along the way
_WATCHED = 14
# Answers that are kept, for reports
_SHOWN = 6


def run(spec: RealRun, folder: Path) -> dict[str, Any]:
    """
    Makes a run.

    Args:
        spec ([`RealRun`]):
            What to run.
        folder (`Path`):
            Folder of all runs.

    Returns:
        `dict[str, Any]`:
            `"steps"`, `"generated_tokens"`, `"seconds"` of training and of making its data (of processor time, where a
            GPU works by the clock), `"peak_memory_gb"`, the learning `"curve"`, the `"final"` figures and the
            first `"answers"`.
    """
    import torch

    from ..trainer.metrics import peak_memory

    if spec.model == str(MODEL_DIR) and not MODEL_DIR.is_dir():
        from rich.console import Console

        check_packages()
        prepare_model(MODEL_DIR, Console())
    started = time.process_time()
    result = _once(spec, folder) if spec.arm is None else _arm(spec, folder)
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers")}
    return {
        "steps": 0,
        "generated_tokens": 0,
        "seconds": 0.0,
        "curve": [],
        **result,
        "peak_memory_gb": peak_memory() / 1e9,
        "device_name": torch.cuda.get_device_name() if spec.device == "cuda" else "cpu",
        "cpu_seconds": time.process_time() - started,
        "versions": versions,
    }


def load(spec: RealRun) -> tuple[Any, Any]:
    """The model and its tokenizer, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).to(spec.device)
    return model, AutoTokenizer.from_pretrained(spec.model)


def _once(spec: RealRun, folder: Path) -> dict[str, Any]:
    """What the model says to unrelated prompts, against which retention is measured, and what else its part needs."""
    from . import retention

    model, tokenizer = load(spec)
    known, shown = WORK[spec.base.name].once(model, tokenizer, spec.base.settings)
    written = retention.responses(model, tokenizer)
    final = {
        "unrelated": retention.accuracy(tokenizer, written),
        "solved": retention.solved(model, tokenizer),
        "divergence": 0.0,
    }
    with whole_folder(_made(spec, folder)) as unfinished:
        (unfinished / "responses.json").write_text(
            json.dumps({"responses": written, **final, **known}), encoding="utf-8"
        )
    return {"final": final, **shown}


def _clock(spec: RealRun) -> float:
    """Processor time, which other programs do not lengthen; where a GPU works, the time of day."""
    return time.process_time() if spec.device == "cpu" else time.perf_counter()


def _made(spec: RealRun, folder: Path) -> Path:
    return folder / "bases" / spec.base.name


def _arm(spec: RealRun, folder: Path) -> dict[str, Any]:
    from . import retention

    assert spec.arm is not None
    assert spec.seed is not None
    origin = json.loads((_made(spec, folder) / "responses.json").read_text(encoding="utf-8"))
    rows = WORK[spec.base.name].rows(spec.base.settings, spec.seed, origin)
    questions = rows.pop("train")
    if spec.arm.trainer == "none":
        from ..context import TemplateContext

        kwargs = spec.arm.settings.get("context_kwargs")
        model, tokenizer = load(spec)
        final, answers = _examined(model, tokenizer, spec, rows, None if kwargs is None else TemplateContext(**kwargs))
        # What is in one prompt changes nothing for others
        return {
            "final": final | {name: origin[name] for name in ("unrelated", "solved", "divergence")},
            "answers": answers,
        }
    with tempfile.TemporaryDirectory() as output_dir:
        started = _clock(spec)
        trainer, sampled = make_trainer(spec, questions, output_dir)
        watch = make_watch(trainer, spec, rows, _clock(spec) - started)
        trainer.add_callback(watch)
        with token_page(trainer, spec, questions, rows, folder / "tokens.html"):
            trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    base, tokenizer = load(spec)
    if spec.seed == TUNING_SEED:
        rows = {spec.base.tests[0]: rows[spec.base.tests[0]]}
    final, answers = _examined(model, tokenizer, spec, rows)
    kept = {} if spec.seed == TUNING_SEED else retention.figures(model, base, tokenizer, origin)
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    return {
        "steps": trainer.state.global_step,
        "generated_tokens": round(spec.arm.batch_size * sum(lengths)) if lengths else sampled,
        "seconds": watch.seconds,
        "curve": watch.curve,
        "final": final | kept,
        "answers": answers,
    }


def _examined(
    model: Any, tokenizer: Any, spec: RealRun, rows: Rows, context: Any = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    answers = examine(model, tokenizer, spec.base.name, spec.base.settings, rows, context)
    first = answers[spec.base.tests[0]]
    shown = [{name: its[name] for name in ("question", "answer", "said", "right", "cut")} for its in first[:_SHOWN]]
    final = {name: recall(its) for name, its in answers.items()}
    return final | {"mean_tokens": fmean(len(its["token_ids"]) for its in first)}, shown


def make_trainer(spec: RealRun, rows: list[dict[str, Any]], output_dir: str) -> tuple[Any, int]:
    """
    Makes the trainer of an arm: an ordinary public one, with the settings that all arms share and the arm's own.

    Args:
        spec ([`RealRun`]):
            What is run.
        rows (`list[dict]`):
            Questions that are trained on.
        output_dir (`str`):
            Folder that the trainer is given.

    Returns:
        `tuple[Trainer, int]`: the trainer, ready to train, and how many tokens its data took to sample.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, ProgressCallback

    arm = spec.arm
    assert arm is not None
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": arm.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": spec.steps,
        "seed": spec.seed,
        "use_cpu": spec.device == "cpu",
        "bf16": spec.device == "cuda",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
        **arm.settings,
    }
    adapter, sampled = LoraConfig(**ADAPTER, task_type="CAUSAL_LM"), 0
    no_thought = {"enable_thinking": False}
    if arm.trainer == "trl_sft":
        from trl import SFTConfig, SFTTrainer

        completions, sampled = _completions(spec, rows, Path(output_dir))
        args = SFTConfig(**settings)
        trainer: Any = SFTTrainer(spec.model, args=args, train_dataset=completions, peft_config=adapter)
    else:
        if spec.device == "cuda" and find_spec("vllm") is not None:
            settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}
        settings |= {"max_completion_length": spec.base.settings["rollout_tokens"], "chat_template_kwargs": no_thought}
        if arm.trainer == "trl_grpo":
            from trl import GRPOConfig, GRPOTrainer

            make, args = GRPOTrainer, GRPOConfig(**settings)
        else:
            from trl_opsd import SelfDistillationTrainer

            from ..methods import config_class

            settings |= {"teacher_chat_template_kwargs": no_thought, "max_tokens_per_microbatch": _PASS_TOKENS}
            make, args = SelfDistillationTrainer, config_class(arm.trainer)(**settings)
        trainer = make(
            spec.model,
            reward_funcs=WORK[spec.base.name].reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            peft_config=adapter,
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer, sampled


def _completions(spec: RealRun, rows: list[dict[str, Any]], folder: Path) -> tuple[Any, int]:
    """What SFT learns: prompts with the answers, or with what the model wrote while it could read the facts."""
    from datasets import Dataset

    from ..data import load_rows

    assert spec.arm is not None
    column = spec.arm.column
    if column not in _SHARES:
        made = [
            {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row[column]}]} for row in rows
        ]
        return Dataset.from_list(made), 0
    from ..scripts.generate import GenerateArguments
    from ..scripts.generate import run as generate

    asked, made_in = folder / "questions.jsonl", folder / "generated"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = WORK[spec.base.name].reward
    has_vllm = spec.device == "cuda" and find_spec("vllm") is not None
    generate(
        "mixsd",
        GenerateArguments(
            model_name_or_path=spec.model,
            dtype="float32",
            backend="vllm" if has_vllm and column == "teacher" else "transformers",
            dataset_name=str(asked),
            maker_kwargs={"share": _SHARES[column], "max_tries": _TRIES},
            reward_funcs=[f"{reward.__module__}.{reward.__name__}"],
            max_new_tokens=spec.base.settings.get("answer_tokens", MAX_TOKENS),
            seed=spec.seed or 0,
            chat_template_kwargs={"enable_thinking": False},
            output_dir=str(made_in),
            **spec.base.reads,
        ),
    )
    lines = (made_in / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    sampled = sum(len(json.loads(line)["token_ids"]) for line in lines)
    return load_rows(str(made_in / "data")).select_columns(["prompt", "completion"]), sampled


@contextmanager
def token_page(trainer: Any, spec: RealRun, questions: list[dict[str, Any]], rows: Rows, page: Path) -> Iterator[None]:
    """
    Within which to train: writes what student and teacher say of one answer before and after, of the one run that
    reports show.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer of the run.
        spec ([`RealRun`]):
            What is run.
        questions (`list[dict]`):
            Questions that are trained on.
        rows (`dict[str, list]`):
            Questions by their kind.
        page (`Path`):
            Where the page goes.
    """
    if spec.arm is None or (spec.arm.name, spec.seed) != PAGED:
        yield
        return
    exam = Exam(trainer, questions, rows["new"] + rows["two"])
    before = exam.take(number=1)
    rollouts = [exam.tokens(0, before, "before the training")]
    yield
    after = exam.take(number=1)
    rollouts += [exam.tokens(0, said, "after the training") for said in (before, after)]
    write_whole(page, exam.token_page(rollouts))


def watched_steps(steps: int, every: int) -> set[int]:
    """Steps after which questions are asked: the last of all, and none so close before it that it says no more."""
    return {*range(every, steps - every // 2, every), steps}


def make_watch(trainer: Any, spec: RealRun, rows: Rows, spent: float) -> Any:
    """
    Makes the callback that asks a few of the questions along the way.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that is watched.
        spec ([`RealRun`]):
            What is run.
        rows (`dict[str, list]`):
            Questions by their kind.
        spent (`float`):
            Seconds that the data took.

    Returns:
        [`~transformers.TrainerCallback`]:
            The callback, with the `curve`, and the `seconds` of training without the questions.
    """
    from transformers import AutoTokenizer, TrainerCallback

    from ..trainer.metrics import peak_memory

    assert spec.arm is not None
    points = watched_steps(spec.steps, max(1, round(spec.scale * spec.arm.evaluate_every)))
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    some = {name: rows[name][:: max(1, len(rows[name]) // _WATCHED)] for name in spec.base.watched}

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.curve: list[dict[str, float]] = []
            self.seconds = spent
            self._since = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._ask(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in points:
                self.seconds += _clock(spec) - self._since
                self._ask(state.global_step)

        def _ask(self, step: int) -> None:
            if spec.seed == TUNING_SEED:
                self._since = _clock(spec)
                return
            model = trainer.accelerator.unwrap_model(trainer.model)
            figures, _ = _examined(model, tokenizer, spec, some)
            self.curve.append({"step": step, "seconds": self.seconds, "memory_gb": peak_memory() / 1e9, **figures})
            self._since = _clock(spec)

    return Watch()


if __name__ == "__main__":
    main(make=run)
