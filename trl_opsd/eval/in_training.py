"""The evaluation of `trl-opsd eval` while a model trains, on the engine its rollouts come from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..sampling import Completion, Request, Sampling
from ..scoring import evaluation_mode
from .benchmark import Problem, load_benchmark
from .chat import ChatFormat
from .evaluate import evaluate, make_requests
from .metrics import Summary, summarize
from .run_folder import SampleFile, keep_problems, open_run, write_json
from .samples import Sample
from .scorer import SCORER_VERSION


if TYPE_CHECKING:
    from ..trainer.config import SelfDistillationConfig
    from ..trainer.trainer import SelfDistillationTrainer

# Of the trainer's streams of random numbers, the one of evaluations
_STREAM = 1


def load_problems(benchmarks: Sequence[str], limit: int | None) -> dict[str, list[Problem]]:
    """
    The problems of benchmarks, by the benchmark's name.

    Args:
        benchmarks (`Sequence[str]`):
            Names or files, as in [`~trl_opsd.eval.benchmark.load_benchmark`].
        limit (`int`, *optional*):
            Number of problems of each. `None` loads all.

    Raises:
        ValueError: If a benchmark is unknown or there twice, or its data are not as described.
    """
    problems = {}
    for benchmark in map(load_benchmark, benchmarks):
        if benchmark.name in problems:
            raise ValueError(f"The benchmark {benchmark.name} is named twice. Name each once.")
        problems[benchmark.name] = benchmark.problems(limit)
    return problems


def make_sampling(given: Mapping[str, Any] | None, num_samples: int, args: "SelfDistillationConfig") -> Sampling:
    """
    How an evaluation samples in a training run.

    Args:
        given (`Mapping[str, Any]`, *optional*):
            Fields of [`~trl_opsd.sampling.Sampling`]. What is left out is as in the rollouts.
        num_samples (`int`):
            Completions of each problem.
        args ([`SelfDistillationConfig`]):
            Arguments of the run.

    Raises:
        ValueError: If a field is unknown or out of its range, if nothing limits completions, if all completions of a
            problem would be the same, or if math-verify is not installed.
    """
    if find_spec("math_verify") is None:
        raise ValueError("Benchmarks need math-verify: run `pip install trl-opsd[eval]`.")
    values = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "max_new_tokens": args.max_completion_length,
    }
    if unknown := sorted(set(given or {}) - set(values)):
        raise ValueError(
            f"The sampling of benchmarks has the unknown key {unknown[0]!r}. Its keys are {tuple(values)}."
        )
    values |= given or {}
    if values["max_new_tokens"] is None:
        raise ValueError(
            "Benchmarks need a limit: set `max_completion_length`, or `max_new_tokens` in their sampling."
        )
    try:
        sampling = Sampling(**values)
    except ValueError as error:
        raise ValueError(f"The sampling of benchmarks: {error}") from error
    if sampling.temperature == 0 and num_samples > 1:
        raise ValueError(
            f"At temperature 0 all {num_samples} completions of a benchmark's problem would be the same. Take 1, or "
            "raise the temperature of their sampling."
        )
    return sampling


class RolloutBackend:
    """
    Generates with the engine of the rollouts, on all processes together. Each yields all completions.

    The seeds of requests are not used: the random numbers are those of the processes.

    Args:
        sample (`Callable[[list[list[int]], Sampling], list[list[int]]]`):
            Token ids of the completions of prompts. All processes call it at once, with as many prompts.
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
        end_token_ids (`list[int]`):
            Tokens that end a completion.
        batch_size (`int`, *optional*):
            Most prompts per process and call. `None` for an engine that schedules by itself.
        max_length (`int`, *optional*):
            Most tokens of a prompt and its completion.
    """

    def __init__(
        self,
        sample: Callable[[list[list[int]], Sampling], list[list[int]]],
        accelerator: Accelerator,
        end_token_ids: list[int],
        batch_size: int | None,
        max_length: int | None,
    ):
        self._sample = sample
        self._accelerator = accelerator
        self._end_token_ids = end_token_ids
        self._batch_size = batch_size
        self.max_length = max_length

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """See [`~trl_opsd.sampling.Backend`]."""
        num_processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        together = self._batch_size * num_processes if self._batch_size else max(1, len(requests))
        for start in range(0, len(requests), together):
            prompts = [request.prompt_ids for request in requests[start : start + together]]
            num_prompts = len(prompts)
            prompts += prompts[:1] * (-num_prompts % num_processes)
            share = len(prompts) // num_processes
            mine = self._sample(prompts[rank * share : (rank + 1) * share], sampling)
            completions = gather_object(mine) if num_processes > 1 else mine
            if len(completions) != len(prompts) or not all(completions):
                raise ValueError(
                    f"The engine of the rollouts gave {sum(map(bool, completions))} completions to {len(prompts)} "
                    "prompts of benchmarks. Its own messages may say why."
                )
            for index, ids in enumerate(completions[:num_prompts], start):
                yield index, Completion(ids, terminated=bool(ids) and ids[-1] in self._end_token_ids)


class BenchmarkCallback(TrainerCallback):
    """
    Evaluates before training, every few steps, and at the end.

    The samples of each evaluation are kept in `eval/step-<step>` of the output folder, in the form of `trl-opsd eval`,
    so that `trl-opsd compare` compares any two. Training goes on with the random numbers it would have had.

    Example:

    ```python
    >>> from trl_opsd.eval.in_training import BenchmarkCallback

    >>> trainer.add_callback(BenchmarkCallback(trainer, ["aime24", "problems.yaml"], steps=50, num_samples=4))
    ```

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Trainer whose model is evaluated, by the engine of its rollouts.
        benchmarks (`Sequence[str]` or `Mapping[str, Sequence[Problem]]`):
            Names that `trl-opsd eval --list` shows, or YAML files; or the problems themselves, by the benchmark's
            name.
        steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two evaluations.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions of each problem.
        limit (`int`, *optional*):
            Number of problems of each benchmark that is named, from its beginning. `None` takes all.
        sampling (`Mapping[str, Any]`, *optional*):
            Fields of [`~trl_opsd.sampling.Sampling`]. What is left out is as in the rollouts.
        system_prompt (`str`, *optional*):
            System message before each question.

    Raises:
        ValueError: If a benchmark cannot be loaded, if a value is out of its range, or if math-verify is not
            installed.
    """

    def __init__(
        self,
        trainer: "SelfDistillationTrainer",
        benchmarks: Sequence[str] | Mapping[str, Sequence[Problem]],
        *,
        steps: int = 50,
        num_samples: int = 1,
        limit: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
    ):
        for name, value in {"steps": steps, "num_samples": num_samples, "limit": limit}.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._sampling = make_sampling(sampling, num_samples, trainer.args)
        if not isinstance(benchmarks, Mapping):
            benchmarks = load_problems(benchmarks, limit)
        self._problems = {
            name: [replace(problem, benchmark=name) for problem in problems] for name, problems in benchmarks.items()
        }
        self._trainer = trainer
        self._num_samples = num_samples
        self._every = steps
        self._system_prompt = system_prompt
        tokenizer: Any = trainer.teacher_prompt.tokenizer
        template = trainer.chat_template or tokenizer.chat_template
        self._chat = ChatFormat(
            tokenizer,
            chat_template=template,
            chat_template_kwargs=trainer.args.chat_template_kwargs,
            apply_chat_template=template is not None,
            system_prompt=system_prompt,
        )
        self._backend = RolloutBackend(
            lambda prompt_ids, sampling: trainer.sample(prompt_ids, sampling, stream=_STREAM),
            trainer.accelerator,
            trainer.eos_token_ids,
            _batch_size(trainer),
            trainer.context_length,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Also at a step that is resumed from, if the run ended before this was done
        if state.global_step >= state.max_steps or state.global_step % self._every == 0:
            self._evaluate_once(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop or state.global_step % self._every == 0:
            self._evaluate_once(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Training that was stopped after its last step. Not when it has ended: `load_best_model_at_end` comes before
        if control.should_training_stop:
            self._evaluate_once(args, state, control)

    def _evaluate_once(self, args: Any, state: Any, control: Any) -> None:
        logged = {name for entry in state.log_history if entry["step"] == state.global_step for name in entry}
        if not all(f"eval_{name}/mean_tokens" in logged for name in self._problems):
            self._evaluate(args, state, control)

    def _evaluate(self, args: Any, state: Any, control: Any) -> None:
        step = state.global_step
        problems = [problem for rows in self._problems.values() for problem in rows]
        generated: Iterator[Any]
        if state.is_world_process_zero:
            generated = evaluate(
                problems, self._backend, self._chat, self._sampling, num_samples=self._num_samples, seed=args.seed
            )
        else:  # generates its share, and leaves the grading
            asked = [(problem, index) for problem in problems for index in range(self._num_samples)]
            requests = make_requests(asked, self._backend, self._chat, self._sampling, args.seed)
            generated = self._backend.generate(requests, self._sampling)
        progress = tqdm(
            generated,
            desc=f"Benchmarks at step {step}",
            total=len(problems) * self._num_samples,
            disable=args.disable_tqdm or not state.is_local_process_zero,
            leave=False,
        )
        samples = list(progress)
        logs: dict[str, float] = {}
        failure = None
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / "eval" / f"step-{step}"
            by_benchmark = {name: [row for row in samples if row.benchmark == name] for name in self._problems}
            try:
                self._keep(folder, args, by_benchmark)
                for name, rows in by_benchmark.items():
                    summary = summarize(rows)
                    write_json(folder / name / "metrics.json", {"summary": summary})
                    logs |= {f"eval_{name}/{metric}": value for metric, value in _metrics(summary).items()}
            except (OSError, ValueError) as error:
                failure = f"The samples of benchmarks cannot be kept in {folder}: {error}. Once they can, resume."
        # A failure too, or the other processes would wait for ever
        logs, failure = broadcast_object_list([logs, failure])
        if failure is not None:
            raise ValueError(failure)
        should_log = control.should_log
        with evaluation_mode(self._trainer.model):  # or the metrics of the training step would be logged as well
            self._trainer.log(logs)
        control.should_log = should_log  # the step has yet to be logged

    def _keep(self, folder: Path, args: Any, samples: dict[str, list[Sample]]) -> None:
        settings = {
            "num_samples": self._num_samples,
            "seed": args.seed,
            **asdict(self._sampling),
            "system_prompt": self._system_prompt,
            "chat_template_kwargs": args.chat_template_kwargs,
            "scorer_version": SCORER_VERSION,
        }
        open_run(folder, settings, {}, overwrite=True)
        for name, rows in samples.items():
            keep_problems(folder / name / "problems.jsonl", map(self._chat.rendered, self._problems[name]))
            file = SampleFile(folder / name / "samples.jsonl")
            for row in rows:
                file.append(replace(row, seed=None))  # see RolloutBackend
            file.close()


def _batch_size(trainer: "SelfDistillationTrainer") -> int | None:
    if not trainer.use_vllm:
        return trainer.args.per_device_eval_batch_size
    # An engine in the process schedules all by itself; a server has `vllm_server_request_timeout` for each request
    return None if trainer.vllm_mode == "colocate" else 64


def _metrics(summary: Summary) -> dict[str, float]:
    metrics = {
        "mean_tokens": summary.mean_tokens.value,
        "truncation_rate": summary.truncation_rate.value,
        "num_ungraded": summary.num_ungraded,
        "num_uncompared": summary.num_uncompared,
    }
    if summary.avg_at_k is not None:
        k = max(summary.pass_at_k)
        metrics[f"avg@{k}"] = summary.avg_at_k.value
        for end, bound in (("low", summary.avg_at_k.low), ("high", summary.avg_at_k.high)):
            if bound is not None:
                metrics[f"avg@{k}_{end}"] = bound
        if k > 1:
            metrics[f"pass@{k}"] = summary.pass_at_k[k].value
    return metrics
