"""One graded completion: what the backends and the scorer write, and the metrics read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """
    One completion of one problem, graded.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        problem_id (`str`):
            Identifies the problem within the benchmark, the same in every run.
        sample_index (`int`):
            Which of the k completions of the problem, from 0.
        seed (`int`, *optional*):
            Seed the completion was sampled with. `None` while a model trains: completions have none of their own then.
        completion (`str`):
            Text of the completion, the thinking part included.
        num_tokens (`int`):
            Generated tokens, the end-of-turn token included.
        terminated (`bool`):
            Whether the model ended by itself. `False`: cut off at the token limit.
        reference (`str`):
            Right answer.
        correct (`bool`, *optional*):
            Whether the answer is right. `None` when the reference answer itself cannot be parsed.
        answer (`str`, *optional*):
            What was taken as the answer. `None` when the completion gives none.
        answer_format (`str`, *optional*):
            How it was given: `"boxed"`, `"answer_line"`, `"hashes"`, `"choice"` or `"bare"`.
        error (`str`, *optional*):
            Why the answer could not be compared with the reference, and therefore counts as wrong.
    """

    benchmark: str
    problem_id: str
    sample_index: int
    seed: int | None
    completion: str
    num_tokens: int
    terminated: bool
    reference: str
    correct: bool | None
    answer: str | None
    answer_format: str | None
    error: str | None = None
