"""The evaluation of `trl-opsd eval` while a model trains, on the engine its rollouts come from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..eval.backends import Completion, Request, Sampling
from ..eval.benchmark import Problem, load_benchmark
from ..eval.chat import ChatFormat
from ..eval.evaluate import evaluate, make_requests
from ..eval.metrics import Summary, summarize
from ..eval.run_folder import SampleFile, keep_problems, open_run, write_json
from ..eval.samples import Sample
from ..eval.scorer import SCORER_VERSION
from .random_numbers import random_numbers


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
            raise ValueError(f"`eval_benchmarks` names {benchmark.name} twice. Name each once.")
        problems[benchmark.name] = benchmark.problems(limit)
    return problems


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
        """See [`~trl_opsd.eval.backends.Backend`]."""
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
                    "prompts of `eval_benchmarks`. Its own messages may say why."
                )
            for index, ids in enumerate(completions[:num_prompts], start):
                yield index, Completion(ids, terminated=bool(ids) and ids[-1] in self._end_token_ids)


class BenchmarkCallback(TrainerCallback):
    """
    Evaluates before training, every few steps, and at the end.

    The samples of each evaluation are kept in `eval/step-<step>` of the output folder, in the form of `trl-opsd eval`,
    so that `trl-opsd compare` compares any two. Training goes on with the random numbers it would have had.

    Args:
        problems (`dict[str, list[Problem]]`):
            Problems by benchmark.
        backend ([`RolloutBackend`]):
            What generates.
        chat ([`~trl_opsd.eval.chat.ChatFormat`]):
            Renders the prompts.
        sampling ([`~trl_opsd.eval.backends.Sampling`]):
            How to draw tokens.
        num_samples (`int`):
            Completions of each problem.
        every (`int`):
            Optimizer steps between two evaluations.
        stream (`int`):
            Which of several streams of random numbers this process draws from.
        log (`Callable[[dict[str, float]], None]`):
            Called with the metrics, on every process.
    """

    def __init__(
        self,
        problems: dict[str, list[Problem]],
        backend: RolloutBackend,
        chat: ChatFormat,
        sampling: Sampling,
        num_samples: int,
        every: int,
        stream: int,
        log: Callable[[dict[str, float]], None],
    ):
        self._problems = problems
        self._backend = backend
        self._chat = chat
        self._sampling = sampling
        self._num_samples = num_samples
        self._every = every
        self._stream = stream
        self._log = log

    def on_train_begin(self, args, state, control, **kwargs):
        # Also at a step that is resumed from, if the run ended before this was done
        if state.global_step >= state.max_steps or state.global_step % self._every == 0:
            self._evaluate_once(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_training_stop or state.global_step % self._every == 0:
            self._evaluate_once(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
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
        with random_numbers(args.seed, step, self._stream, device=args.device):
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
                failure = (
                    f"The samples of `eval_benchmarks` cannot be kept in {folder}: {error}. Once they can, resume."
                )
        # A failure too, or the other processes would wait for ever
        logs, failure = broadcast_object_list([logs, failure])
        if failure is not None:
            raise ValueError(failure)
        should_log = control.should_log
        self._log(logs)
        control.should_log = should_log  # the step has yet to be logged

    def _keep(self, folder: Path, args: Any, samples: dict[str, list[Sample]]) -> None:
        settings = {
            "num_samples": self._num_samples,
            "seed": args.seed,
            **asdict(self._sampling),
            "system_prompt": args.eval_benchmarks_system_prompt,
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
