"""Samples made up for the tests."""

from trl_opsd.eval.samples import Sample


def make_sample(problem_id="p0", sample_index=0, correct=True, **fields):
    defaults = {
        "benchmark": "made-up",
        "seed": sample_index,
        "completion": "So it is 7.",
        "num_tokens": 10,
        "terminated": True,
        "reference": "7",
        "answer": "7" if correct else "8",
        "answer_format": "boxed",
    }
    return Sample(problem_id=problem_id, sample_index=sample_index, correct=correct, **{**defaults, **fields})


def make_run(*verdicts, **fields):
    """One problem per list of verdicts."""
    return [
        make_sample(f"p{problem:03d}", index, correct, **fields)
        for problem, correct_ones in enumerate(verdicts)
        for index, correct in enumerate(correct_ones)
    ]
