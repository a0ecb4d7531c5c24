"""What is trained on, given stand-ins for what samples and grades."""

import pytest

from trl_opsd.sampling.sources import (
    SOURCES,
    Completions,
    CompletionSource,
    FromDataset,
    FromTeacher,
    HintedRetry,
    OnPolicy,
    Prompts,
)
from trl_opsd.trainer.batch import Generation
from trl_opsd.trainer.completing import Completing, Engines


ROWS = [{"number": number, "completion": f"given {number}"} for number in range(8)]


class World:
    """Rollouts are [row, 0], retries [row, 1] and the teacher's samples [row, 2]; `right` says which are right."""

    num_generations = 1

    def __init__(self, right=(), contexts=range(8), log_probs=False, others=0):
        self.right, self.contexts, self.log_probs, self.others = set(right), set(contexts), log_probs, others
        self.sampled, self.graded = [], []

    def sample(self, prompts):
        self.sampled.append(len(prompts))
        ids = [[prompt[0], 1 if prompt[1:] == ["hint"] else 0] for prompt in prompts]
        return ids, [[-1.0, -1.0] for _ in ids] if self.log_probs else None

    def grade(self, rows, prompt_ids, ids):
        assert prompt_ids == [[row["number"]] for row in rows]
        self.graded.append(len(rows))
        return [tuple(completion) in self.right for _, completion in zip(rows, ids, strict=True)]

    def near(self, prompt_ids, ids, k):
        self.compared = [(tuple(prompt), tuple(its)) for prompt, its in zip(prompt_ids, ids, strict=True)]
        return [sum(its) / k for its in ids]

    def gather(self, items):
        return [*items, self.others]  # of another process

    def complete(self, source, step=0, process_index=0):
        prompts = [[row] for row in range(8)]
        engines = Engines(
            sample=self.sample,
            sample_teacher=lambda asked: [[prompt[0], 2] for prompt in asked],
            teacher_prompt=lambda row, context: [row["number"], "hint"] if row["number"] in self.contexts else None,
            share_in_top_k=self.near,
            encode=lambda text: [int(text.split()[-1]), 9],
            grade=self.grade,
            process_index=process_index,
            num_generations=self.num_generations,
            gather=self.gather,
        )
        self.completing = Completing(engines, Generation(ROWS), prompts, lambda: self.sample(prompts))
        return self.completing(source, seed=1, step=step)


class Compares(CompletionSource):
    """Keeps how near two of the rows are."""

    def __call__(self, prompts):
        self.found = prompts.share_in_top_k([5, 3], [[6, 2], [4]], 4)
        return prompts.rollouts()


@pytest.mark.parametrize("others", [0, 3])
def test_completions_are_compared_with_the_rows_prompts(others):
    """As many on all processes, of which what is there besides counts for nothing."""
    world, source = World(others=others), Compares()
    world.complete(source)
    assert source.found == [2.0, 1.0]
    assert world.compared == [((5,), (6, 2)), ((3,), (4,)), *[((0,), ())] * (max(others, 2) - 2)]


def test_on_policy_is_what_was_sampled():
    assert World().complete(OnPolicy()).ids == [[row, 0] for row in range(8)]


class Groups(CompletionSource):
    """Keeps the values of each row's group."""

    def __call__(self, prompts):
        self.found = prompts.group([None for _ in prompts.rows])
        return prompts.rollouts()


@pytest.mark.parametrize(("process_index", "expected"), [(0, [*"aaabbbcc"]), (1, [*"cdddeeef"])])
def test_values_of_a_group_come_from_both_processes(process_index, expected):
    """Eight rows each, in groups of three, named by letters. The third lies on both."""
    source, world = Groups(), World()
    world.num_generations, world.gather = 3, lambda items: [*"aaabbbcc", *"cdddeeef", *"ff"]
    world.complete(source, process_index=process_index)
    assert source.found == [[letter] * 3 for letter in expected]


@pytest.mark.parametrize(("source", "mark"), [(FromDataset, 9), (FromTeacher, 2)])
def test_share_of_others(source, mark):
    for lmbda, expected in ((0.0, 8), (0.5, 4), (0.75, 2)):
        completions = World(log_probs=True).complete(source(lmbda=lmbda))
        assert [ids[0] for ids in completions.ids] == list(range(8))
        assert {row for row in range(8) if completions.ids[row][1] == mark} == completions.replaced
        assert len(completions.replaced) == expected
        assert completions.rates["completions/off_policy_rate"] == (expected, 8)
        for row, log_probs in enumerate(completions.log_probs or []):
            assert log_probs == ([None, None] if row in completions.replaced else [-1.0, -1.0])


def test_which_rows_depends_on_step_and_process_and_how_many_does_not():
    source = FromDataset(lmbda=0.45)
    found = [World().complete(source, step, process).replaced for step in range(20) for process in (0, 1)]
    assert len({frozenset(rows) for rows in found}) > 20
    numbers = [len(rows) for rows in found]
    assert numbers[::2] == numbers[1::2]
    assert set(numbers) == {4, 5}


def test_rows_without_a_context_stay_on_policy():
    completions = World(contexts=[2, 5]).complete(FromTeacher())
    assert completions.replaced == {2, 5}
    assert completions.ids[3] == [3, 0]


def test_a_right_retry_takes_the_place_of_a_wrong_rollout():
    # 0 and 1 are right at once; 2 and 3 when tried again; 4 has no context
    world = World(right=[(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)], contexts=[0, 1, 2, 3, 5, 6, 7], log_probs=True)
    completions = world.complete(HintedRetry())
    assert completions.replaced == {2, 3}
    assert completions.ids == [[row, int(row in (2, 3))] for row in range(8)]
    assert completions.log_probs[2] == [None, None]
    assert completions.log_probs[5] == [-1.0, -1.0]
    assert completions.rates == {
        "completions/off_policy_rate": (2, 8),
        "completions/retry_rate": (5, 8),
        "completions/retry_success_rate": (2, 5),
    }
    assert world.sampled == [8, 5]
    assert world.graded == [8, 5]
    assert world.completing.num_sampled == 2 * (8 + 5)


def test_what_cannot_be_graded_is_not_tried_again():
    world = World()
    world.grade = lambda rows, prompt_ids, ids: [None] * len(rows)
    assert world.complete(HintedRetry()).rates["completions/retry_rate"] == (0, 8)


def test_processes_sample_and_grade_as_many():
    world = World(right=[(row, 0) for row in range(8)], others=3)  # nothing to try again here, three rows elsewhere
    completions = world.complete(HintedRetry())
    assert not completions.replaced
    assert world.sampled == [8, 3]
    assert world.graded == [8, 3]

    world = World(right=[(row, 0) for row in range(8)])  # nor elsewhere
    world.complete(HintedRetry())
    assert world.sampled == [8]
    assert world.graded == [8]


@pytest.mark.parametrize("lmbda", [-0.1, 1.0, 1.2])
@pytest.mark.parametrize("name", ["dataset", "teacher"])
def test_bad_shares(name, lmbda):
    with pytest.raises(ValueError, match=r"`lmbda` of `completions_kwargs` must be in \[0, 1\)"):
        SOURCES[name](lmbda=lmbda)


def test_a_source_that_forgets_a_prompt():
    class Forgetful(CompletionSource):
        def __call__(self, prompts: Prompts) -> Completions:
            return Completions([[1]])

    with pytest.raises(ValueError, match="Forgetful gave 1 completions to 8 prompts"):
        World().complete(Forgetful())
