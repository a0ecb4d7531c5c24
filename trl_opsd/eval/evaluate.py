"""Generate and grade: the part of an evaluation that does not care where models come from or results go."""

import hashlib
from collections.abc import Collection, Iterator, Sequence

from ..sampling import Backend, Request, Sampling
from .benchmark import Problem
from .chat import ChatFormat
from .samples import Sample
from .scorer import score


SampleKey = tuple[str, str, int]


def evaluate(
    problems: Sequence[Problem],
    backend: Backend,
    chat: ChatFormat,
    sampling: Sampling,
    *,
    num_samples: int = 1,
    seed: int = 0,
    done: Collection[SampleKey] = frozenset(),
) -> Iterator[Sample]:
    """
    Samples answers to problems and grades each as it is finished.

    Args:
        problems (`Sequence[Problem]`):
            Problems of one or more benchmarks.
        backend ([`Backend`]):
            What generates.
        chat ([`ChatFormat`]):
            Renders the prompts and decodes the completions.
        sampling ([`Sampling`]):
            How to draw tokens.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions of each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed that those of all completions come from.
        done (`Collection[tuple[str, str, int]]`, *optional*):
            Benchmark, problem id and index of the samples there are already. They are left out.

    Yields:
        [`Sample`]:
            Graded completions, in the order in which they are finished.

    Raises:
        ValueError: If a prompt and the longest completion do not fit the model, before anything is generated.
    """
    asked = [
        (problem, index)
        for problem in problems
        for index in range(num_samples)
        if (problem.benchmark, problem.problem_id, index) not in done
    ]
    requests = make_requests(asked, backend, chat, sampling, seed)
    for position, completion in backend.generate(requests, sampling):
        problem, index = asked[position]
        text = chat.decode(requests[position].prompt_ids, completion.token_ids)
        verdict = score(text, problem.reference, problem.answer_type)
        yield Sample(
            benchmark=problem.benchmark,
            problem_id=problem.problem_id,
            sample_index=index,
            seed=requests[position].seed,
            completion=text,
            num_tokens=len(completion.token_ids),
            terminated=completion.terminated,
            reference=problem.reference,
            correct=verdict.correct,
            answer=verdict.answer,
            answer_format=verdict.answer_format,
            error=verdict.error,
        )


def make_requests(
    asked: Sequence[tuple[Problem, int]], backend: Backend, chat: ChatFormat, sampling: Sampling, seed: int
) -> list[Request]:
    """
    What to generate.

    Args:
        asked (`Sequence[tuple[Problem, int]]`):
            Problem and index of each completion.
        backend ([`Backend`]):
            What generates.
        chat ([`ChatFormat`]):
            Renders the prompts.
        sampling ([`Sampling`]):
            How to draw tokens.
        seed (`int`):
            Seed that those of all completions come from.

    Returns:
        `list[Request]`:
            One per completion.

    Raises:
        ValueError: If a prompt and the longest completion do not fit the model.
    """
    requests = []
    for problem, index in asked:
        prompt_ids = chat.encode(problem.prompt)
        if backend.max_length is not None and len(prompt_ids) + sampling.max_new_tokens > backend.max_length:
            left = backend.max_length - len(prompt_ids)
            advice = f"Lower `max_new_tokens` to at most {left}" if left > 0 else "Leave the problem out"
            raise ValueError(
                f"Problem {problem.problem_id} of {problem.benchmark} has {len(prompt_ids)} tokens. With "
                f"`max_new_tokens` = {sampling.max_new_tokens} that is more than the {backend.max_length} of the "
                f"model. {advice}."
            )
        requests.append(Request(prompt_ids, sample_seed(seed, problem.problem_id, index)))
    return requests


def sample_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """
    Seed of one completion: a hash, so that it depends on nothing but its arguments.

    Args:
        seed (`int`):
            Seed of the evaluation.
        problem_id (`str`):
            Problem.
        sample_index (`int`):
            Which of its completions.

    Returns:
        `int`:
            32-bit seed.
    """
    digest = hashlib.sha256(f"{seed} {sample_index} {problem_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
