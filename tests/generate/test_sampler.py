"""Completions that are written down and known again, with a stand-in for what generates."""

import pytest

from trl_opsd.generate.sampler import Sampler
from trl_opsd.sampling import Completion, Sampling


class Backend:
    """Gives the seed as the completion, the last request first. Odd prompts never end."""

    def __init__(self):
        self.loaded, self.sampled = 0, []

    def load(self):
        self.loaded += 1
        return self

    def generate(self, requests, sampling):
        for position, request in reversed(list(enumerate(requests))):
            self.sampled.append(request.prompt_ids)
            yield position, Completion([request.seed], terminated=request.prompt_ids[0] % 2 == 0)


@pytest.fixture
def sample(tmp_path):
    """Samples for prompts, and gives what generates."""

    def run(prompts, seed=0, path=tmp_path / "completions.jsonl"):
        backend = Backend()
        decode = lambda row, prompt, completion: f"{row} {prompt} {completion}"  # noqa: E731
        sampler = Sampler(path, backend.load, decode, Sampling(1.0, 1.0, 0, 8), seed)
        attempts = sampler(range(len(prompts)), prompts, "tries")
        sampler.close()
        return attempts, backend

    return run


def test_each_gets_its_own_whatever_the_order(sample):
    attempts, backend = sample([[2], [3], [2]])
    assert [attempt.row for attempt in attempts] == [0, 1, 2]
    assert [attempt.truncated for attempt in attempts] == [False, True, False]
    for attempt, prompt in zip(attempts, [[2], [3], [2]], strict=True):
        assert attempt.token_ids == [attempt.seed]
        assert attempt.completion == f"{attempt.row} {prompt} [{attempt.seed}]"
    assert len({attempt.seed for attempt in attempts}) == 3
    assert backend.loaded == 1


def test_only_what_is_missing_is_sampled(sample):
    first, _ = sample([[2], [3]])
    again, backend = sample([[3], [2], [2]])
    assert backend.sampled == [[2]]
    # A row that has moved keeps its completion
    assert [(one.seed, one.truncated) for one in again[:2]] == [(one.seed, one.truncated) for one in first[::-1]]
    assert [attempt.row for attempt in again] == [0, 1, 2]
    _, backend = sample([[3], [2]])
    assert not backend.loaded


def test_another_seed_gives_others(sample, tmp_path):
    first, _ = sample([[2]])
    other, _ = sample([[2]], seed=1, path=tmp_path / "other.jsonl")
    assert first[0].seed != other[0].seed


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"row": 0}'])
def test_a_line_that_is_no_completion(sample, tmp_path, line):
    sample([[2]])
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"completions\.jsonl, line 2, is no completion"):
        sample([[2]])
