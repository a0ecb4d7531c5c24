"""From what was sampled to what the teacher reads, with as many processes as one likes."""

import math

import pytest
import torch
from tiny import make_tokenizer

from trl_opsd.context import PeersContext, PlanContext, ReflectionContext, Rollout, SolutionContext, TeacherPrompt
from trl_opsd.serving import ServerError
from trl_opsd.signal import COEFFICIENTS, Signals
from trl_opsd.signal.advantage import GroupAdvantage
from trl_opsd.trainer.asking import BatchError, sample_once, together
from trl_opsd.trainer.batch import (
    Generation,
    TeacherInputs,
    collate,
    make_groups,
    make_rollouts,
)
from trl_opsd.trainer.metrics import Metrics
from trl_opsd.trainer.rewards import all_feedback, check_feedback, reward_streams, total_rewards


END = 2
nan = math.nan


def row(index):
    return {"prompt": f"Question {index}?", "solution": f"s{index}", "answer": f"a{index}"}


def make_generation(rewards, size=4, texts=None, rows=None, feedback=None, first=0, number=None, empty=()):
    """Of `number` rollouts from the `first` on, named `y0`, `y1`, ..., with the rewards of all processes."""
    number = len(rewards) if number is None else number
    own = range(first, first + number)
    return Generation(
        rows=rows or [row(index // size) for index in own],
        completions=texts or [f"y{index}" for index in own],
        token_ids=[[10 + index, END] for index in own],
        rewards=torch.tensor(rewards).view(len(rewards), -1),
        feedback=feedback or [None] * number,
        tools=[None] * number,
        empty=set(empty),
    )


def make_inputs(context, process_index=0, num_processes=1, gather=lambda values: values, sample=None, **settings):
    tokenizer = make_tokenizer()
    prompt = TeacherPrompt(context, tokenizer, {}, "", None, False)
    return TeacherInputs(
        teacher_prompt=prompt,
        signals=Signals(dict.fromkeys(COEFFICIENTS, 1.0), GroupAdvantage(), {}, {}),
        reward_weights=torch.ones(1),
        success_threshold=1.0,
        end_ids=(END,),
        pad_token_id=0,
        pad_to_multiple_of=None,
        process_index=process_index,
        num_processes=num_processes,
        gather=gather,
        sample=sample,
        **settings,
    )


def read(context, generation, size=4, metrics=None, **settings):
    """What the teacher reads of each row, as text, and the tensors."""
    inputs = make_inputs(context, **settings)
    prompts, tensors = inputs(generation, [[1]] * len(generation.rows), size, metrics or Metrics())
    decode = inputs.teacher_prompt.tokenizer.decode
    return [None if ids is None else decode(ids) for ids in prompts], tensors


def peers(text):
    """The rollouts that a teacher prompt shows, in order."""
    return None if text is None else [word for word in text.split() if word[0] == "y" and word[1:].isdigit()]


# Rewards


def test_total_rewards():
    rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan], [0.0, 0.0]])

    totals = total_rewards(rewards, torch.tensor([1.0, 0.5]))
    assert totals.tolist()[:2] + totals.tolist()[3:] == [2.0, 1.0, 0.0]
    assert totals[2].isnan()
    assert totals.dtype == torch.float32
    assert total_rewards(torch.zeros(3, 0), torch.zeros(0)).isnan().all()


def test_reward_streams():
    streams = reward_streams(torch.tensor([1.0, 0.4, 0.5, nan, nan, nan]), success_threshold=0.5, num_generations=2)

    torch.testing.assert_close(streams["correct"], torch.tensor([1.0, 0.0, 1.0, nan, nan, nan]), equal_nan=True)
    torch.testing.assert_close(streams["success_rate"], torch.tensor([0.5, 0.5, 1.0, 1.0, nan, nan]), equal_nan=True)
    assert {values.dtype for values in streams.values()} == {torch.float32}


# Records and groups


def test_records():
    generation = make_generation(
        [1.0, 0.0, nan, 1.0],
        texts=["Yes.", [{"role": "assistant", "content": "No"}, {"role": "tool", "content": None}], "", "x"],
        feedback=["Well done.", None, None, None],
        empty=[2],
    )
    generation.token_ids[1] = [7, 8]
    streams = reward_streams(generation.rewards[:, 0], 1.0, 2)
    first, second, third, fourth = make_rollouts(generation, streams, 0, 2, (END,))

    assert (first.text, first.token_ids, first.reward, first.correct, first.index) == ("Yes.", [10, END], 1.0, True, 0)
    assert (first.feedback, first.truncated) == ("Well done.", False)
    assert (second.text, second.reward, second.correct, second.truncated) == ("No\n", 0.0, False, True)
    assert (third.token_ids, third.reward, third.correct, third.truncated, third.index) == ([], None, None, False, 0)
    assert (fourth.correct, fourth.index) == (True, 1)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 6, 12])
def test_groups_may_be_spread_over_processes(num_processes):
    rewards = [float(index % 5 == 0) for index in range(12)]
    number = 12 // num_processes
    streams = reward_streams(torch.tensor(rewards), 1.0, 4)
    parts = [
        make_rollouts(make_generation(rewards, first=first, number=number), streams, first, 4, (END,))
        for first in range(0, 12, number)
    ]
    everything = [rollout for part in parts for rollout in part]
    groups = [
        group
        for index, part in enumerate(parts)
        for group in make_groups(part, index * number, 4, (lambda own: everything) if num_processes > 1 else None)
    ]

    assert [group.own.text for group in groups] == [f"y{index}" for index in range(12)]
    for index, group in enumerate(groups):
        start = index // 4 * 4
        assert group.texts == [f"y{other}" for other in range(start, start + 4)]
        assert group.rewards == rewards[start : start + 4]
        assert [one.text for one in group.others()] == [text for text in group.texts if text != f"y{index}"]
        assert {one.text for one in group.others(correct=True)} == {
            f"y{other}" for other in range(start, start + 4) if rewards[other] and other != index
        }


def test_rollouts_without_company_are_not_gathered():
    generation = make_generation([1.0] * 9, size=1, first=6, number=3)
    rollouts = make_rollouts(generation, reward_streams(torch.ones(9), 1.0, 1), 6, 1, (END,))
    groups = make_groups(rollouts, 6, 1, None)

    assert [group.texts for group in groups] == [["y6"], ["y7"], ["y8"]]


# What the teacher reads


def test_only_one_is_correct():
    texts, tensors = read(PeersContext(), make_generation([1.0, 0.0, 0.0, 0.0]))

    assert list(map(peers, texts)) == [None, ["y0"], ["y0"], ["y0"]]
    assert tensors["has_context"].tolist() == [False, True, True, True]
    assert tensors["correct"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert tensors["success_rate"].tolist() == [0.25] * 4
    assert tensors["teacher_prompt_groups"].tolist() == [0, 1, 1, 1]


def test_two_are_correct():
    texts, _ = read(PeersContext(correct=2, wrong=1), make_generation([1.0, 1.0, 0.0, 0.0]))

    assert list(map(peers, texts)) == [["y1", "y2"], ["y0", "y2"], ["y0", "y1", "y3"], ["y0", "y1", "y2"]]


def test_other_groups_change_nothing():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    context = PeersContext(correct=2, wrong=1)
    texts, tensors = read(context, make_generation(rewards))
    order = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    permuted = make_generation([rewards[index] for index in order], texts=[f"y{index}" for index in order])
    permuted.rows = [row(index // 4) for index in order]
    moved, moved_tensors = read(context, permuted)

    assert moved == [texts[index] for index in order]
    for name in ("rewards", "correct", "success_rate", "has_context"):
        assert torch.equal(moved_tensors[name], tensors[name][order])


def test_processes_read_what_one_process_reads():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    context = PeersContext(wrong=1)
    whole, tensors = read(context, make_generation(rewards))
    streams = reward_streams(torch.tensor(rewards), 1.0, 4)
    everything = make_rollouts(make_generation(rewards), streams, 0, 4, (END,))

    def gather(own):
        return everything if isinstance(own[0], Rollout) else own

    for process in range(4):
        generation = make_generation(rewards, first=2 * process, number=2)
        texts, own = read(context, generation, process_index=process, num_processes=4, gather=gather)
        assert texts == whole[2 * process : 2 * process + 2]
        for name in ("rewards", "correct", "success_rate", "has_context"):
            assert torch.equal(own[name], tensors[name][2 * process : 2 * process + 2])


class Blind(SolutionContext):
    def teacher_messages(self, row, rollouts):
        assert rollouts is None
        return super().teacher_messages(row, rollouts)


def test_nothing_is_gathered_for_a_context_that_does_not_read_rollouts():
    def gather(values):
        assert not isinstance(values[0], Rollout), "gathered"
        return values

    _, tensors = read(Blind(), make_generation([1.0, 0.0] * 2), size=2, num_processes=2, gather=gather)
    assert tensors["success_rate"].tolist() == [0.5] * 4
    with pytest.raises(AssertionError, match="gathered"):
        read(PeersContext(), make_generation([1.0, 0.0] * 2), size=2, num_processes=2, gather=gather)
    read(PeersContext(), make_generation([1.0, 0.0] * 2), size=1, num_processes=2, gather=gather)


def test_class_without_a_word_on_rollouts_reads_them():
    class Old:
        columns = ()

        def teacher_messages(self, row, rollouts):
            return [{"role": "user", "content": rollouts.texts[1 - rollouts.index]}]

    assert read(Old(), make_generation([0.0, 0.0]), size=2)[0] == ["y1", "y0"]


def test_an_empty_completion_has_no_context():
    texts, tensors = read(SolutionContext(), make_generation([1.0] * 4, empty=[1]))

    assert [text is None for text in texts] == [False, True, False, False]
    assert tensors["has_context"].tolist() == [True, False, True, True]


# What the policy writes


def answer(asked):
    """As a policy that repeats what it reads, and is cut off after an even number of tokens."""

    def sample(prompts):
        asked.append(prompts)
        return [[*ids, END] if len(ids) % 2 else list(ids) for ids in prompts]

    return sample


def test_all_prompts_are_sampled_from_in_one_call_and_equal_ones_share():
    asked, metrics = [], Metrics()
    context = PlanContext(template="{prompt} Plan: {plan}", sample_template="{prompt} {solution}")
    generation = make_generation([nan] * 4)
    texts, tensors = read(context, generation, size=2, sample=answer(asked), metrics=metrics)
    tokenizer = make_tokenizer()

    ((prompt,),) = asked  # all four rows are of one problem
    assert tokenizer.decode(prompt) == "Question 0? s0"
    assert all(text.startswith("Question 0? Plan: Question 0? s0") for text in texts)
    assert tensors["teacher_prompt_groups"].tolist() == [0] * 4
    metrics.reduce(lambda values: values)
    values = metrics.take()
    assert values["context_samples/mean_length"] == len(answer([])([prompt])[0])
    assert values["context_samples/truncated_rate"] == float(len(prompt) % 2 == 0)


def test_a_reflection_is_one_of_its_rollout():
    asked = []
    context = ReflectionContext(template="{prompt} {reflection}", sample_template="{prompt} {attempt} {answer}")
    texts, _ = read(context, make_generation([0.0] * 4, empty=[3]), sample=answer(asked))

    assert [make_tokenizer().decode(ids) for ids in asked[0]] == [f"Question 0? y{index} a0" for index in range(3)]
    assert [text and text.split()[4] for text in texts] == ["y0", "y1", "y2", None]


def test_sampled_text_that_is_empty_is_no_context():
    texts, tensors = read(PlanContext(), make_generation([nan] * 2), 2, sample=lambda prompts: [[] for _ in prompts])

    assert texts == [None, None]
    assert not tensors["has_context"].any()


def test_every_process_samples_as_many_prompts():
    def of_both(own):
        return lambda values: [*values, own]

    asked = []
    assert sample_once([[5], None, [5, 6]], answer(asked), of_both(3), [9]) == [[5, END], None, [5, 6]]
    assert asked == [[[5], [5, 6], [9]]]
    assert sample_once([None, None], answer(asked), of_both(1), [9]) == [None, None]
    assert asked[1:] == [[[9]]]
    assert sample_once([None], answer(asked), of_both(0), [9]) == [None]
    assert len(asked) == 2


# Tensors


def test_collate():
    tensors = collate([[5, 6, 7], None, [8], [8]], [[1], [2, 3], [4], [4]], pad_token_id=0, pad_to_multiple_of=4)

    assert tensors["teacher_prompt_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 2, 3], [0, 0, 0, 8], [0, 0, 0, 8]]
    assert tensors["teacher_prompt_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert tensors["teacher_prompt_groups"].tolist() == [0, 1, 2, 2]
    assert tensors["has_context"].tolist() == [True, False, True, True]
    assert tensors["has_context"].dtype == torch.bool


# Feedback


class Game:
    def __init__(self, feedback):
        self.feedback = feedback


class Tool:
    def feedback(self):
        """A tool of that name."""


def test_feedback_of_all_who_give_some():
    rows = [{"feedback": "Static."}, {"feedback": None}, {}]

    assert all_feedback(["Logged.", None, " "], [Game("Felt."), Game(None), Game("")], rows) == [
        "Logged.\n\nFelt.\n\nStatic.",
        None,
        None,
    ]
    assert all_feedback(None, None, rows) == ["Static.", None, None]
    assert all_feedback(None, [Tool()] * 3, [{}] * 3) == [None] * 3


def test_feedback_that_is_no_text():
    with pytest.raises(ValueError, match="The environment `Game` gives int as feedback on completion 1"):
        all_feedback(None, [Game("x"), Game(3)], [{}, {}])
    with pytest.raises(ValueError, match="The column `feedback` gives list"):
        all_feedback(None, None, [{"feedback": ["x"]}])
    with pytest.raises(ValueError, match="It gives feedback on 1 completions of 2"):
        check_feedback(["x"], 2, "It")


def test_if_one_process_fails_all_do():
    """Here, this one, another one, or none."""

    def fails():
        raise KeyError("spans")

    def elsewhere(failure):
        return lambda own: [*own, failure]

    assert together(lambda: [1, 2], elsewhere(None)) == [1, 2]
    with pytest.raises(BatchError, match="spans"):
        together(fails, elsewhere(None))
    with pytest.raises(BatchError, match="No spans"):
        together(lambda: [1], elsewhere((False, "No spans")))
    with pytest.raises(ServerError, match="No answer"):
        together(lambda: [1], elsewhere((True, "No answer")))
