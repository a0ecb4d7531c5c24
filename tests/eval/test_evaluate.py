from collections import Counter

import pytest

from trl_opsd.eval.benchmark import Problem
from trl_opsd.eval.chat import ChatFormat
from trl_opsd.eval.evaluate import evaluate, sample_seed
from trl_opsd.eval.metrics import summarize
from trl_opsd.sampling import Completion, Sampling


SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=20)
PROBLEMS = [Problem("a", "p", "1+1?", "2"), Problem("a", "q", "1+2?", "3"), Problem("b", "p", "1+3?", "4")]


class Scripted:
    """Says \\boxed{2} to everything, last request first; every third one is cut off."""

    def __init__(self, tokenizer, max_length=None):
        self.tokenizer, self.max_length, self.requests = tokenizer, max_length, []

    def generate(self, requests, sampling):
        self.requests = list(requests)
        ids = self.tokenizer("<think>3</think>\\boxed{2}<|im_end|>", add_special_tokens=False)["input_ids"]
        for index in reversed(range(len(requests))):
            yield index, Completion(ids if index % 3 else ids[:-1], terminated=index % 3 != 0)


@pytest.mark.needs("math_verify")
def test_samples(tokenizer):
    backend = Scripted(tokenizer)
    chat = ChatFormat(tokenizer)

    samples = list(evaluate(PROBLEMS, backend, chat, SAMPLING, num_samples=2, seed=7))

    assert [(s.benchmark, s.problem_id, s.sample_index) for s in samples][::-1] == [
        (problem.benchmark, problem.problem_id, index) for problem in PROBLEMS for index in range(2)
    ]
    for sample, request in zip(reversed(samples), backend.requests, strict=True):
        assert sample.completion == "<think>3</think>\\boxed{2}"
        assert (sample.answer, sample.answer_format) == ("2", "boxed")
        assert sample.correct == (sample.reference == "2")
        assert sample.num_tokens == 13 - (not sample.terminated)
        assert sample.seed == request.seed == sample_seed(7, sample.problem_id, sample.sample_index)
    assert {s.reference for s in samples if s.correct} == {"2"}
    assert [chat.encode(problem.prompt) for problem in PROBLEMS for _ in range(2)] == [
        request.prompt_ids for request in backend.requests
    ]


def test_what_is_done_is_not_done_again(tokenizer):
    chat = ChatFormat(tokenizer)
    everything = list(evaluate(PROBLEMS, Scripted(tokenizer), chat, SAMPLING, num_samples=3))
    done = {("a", "p", 1), ("b", "p", 0)}

    rest = list(evaluate(PROBLEMS, Scripted(tokenizer), chat, SAMPLING, num_samples=3, done=done))

    keys = Counter((s.benchmark, s.problem_id, s.sample_index) for s in rest)
    assert len(rest) == 7
    assert not done & set(keys)
    assert {(s.benchmark, s.problem_id, s.sample_index, s.seed) for s in rest} < {
        (s.benchmark, s.problem_id, s.sample_index, s.seed) for s in everything
    }


def test_prompts_that_do_not_fit_are_named_before_anything_is_generated(tokenizer):
    chat = ChatFormat(tokenizer)
    length = len(chat.encode("1+1?"))
    backend = Scripted(tokenizer, max_length=length + 19)

    with pytest.raises(ValueError, match=rf"Problem p of a has {length} tokens.*to at most 19\.$"):
        list(evaluate(PROBLEMS, backend, chat, SAMPLING))
    assert not backend.requests
    assert len(list(evaluate(PROBLEMS, Scripted(tokenizer, length + 20), chat, SAMPLING))) == 3


def test_seeds_differ_and_stay():
    seeds = {sample_seed(seed, problem, index) for seed in range(5) for problem in "abc" for index in range(5)}

    assert len(seeds) == 75
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert sample_seed(0, "a", 0) == 2256114219


@pytest.mark.needs("math_verify")
def test_answer_that_cannot_be_compared_says_why(tokenizer):
    class Rambling(Scripted):
        def generate(self, requests, sampling):
            ids = self.tokenizer(f"\\boxed{{{'x+' * 600}1}}", add_special_tokens=False)["input_ids"]
            yield 0, Completion(ids, terminated=True)

    (sample,) = evaluate(PROBLEMS[:1], Rambling(tokenizer), ChatFormat(tokenizer), SAMPLING)
    assert sample.correct is False
    assert sample.error is not None
    assert summarize([sample]).num_uncompared == 1
