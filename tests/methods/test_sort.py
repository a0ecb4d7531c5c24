import pytest
import torch
from rollouts import make_rollouts
from three_tokens import make_batch, make_scores

from trl_opsd.context import Rollouts
from trl_opsd.methods.sort import OfOwnRollouts, PlanGuided, PlanOfReference, ReferenceForFailure
from trl_opsd.sampling.sources import Completions, Prompts


ROW = {"prompt": [{"role": "user", "content": "2 + 3?"}], "solution": "It is 5."}


def completed(verdicts, own=None, group_size=4, encode=None):
    """What becomes of rollouts with these verdicts, of this process's rows."""
    own = own or range(len(verdicts))

    def unexpected(*args):
        raise AssertionError

    def group(values):
        assert list(values) == [verdicts[row] for row in own]
        return [verdicts[row - row % group_size :][:group_size] for row in own]

    prompts = Prompts(
        rows=[{"solution": f"s{row}"} for row in own],
        step=0,
        seed=0,
        process_index=0 if own[0] == 0 else 1,
        rollouts=lambda: Completions([[row] for row in own], [[-0.5] for _ in own]),
        grade=lambda rows, ids: [verdicts[row] for row in own],
        encode=encode or (lambda text: [100 + int(text[1:])]),
        group=group,
        **dict.fromkeys(OTHERS, unexpected),
    )
    return ReferenceForFailure()(prompts)


OTHERS = set(Prompts.__dataclass_fields__) - {
    *("rows", "step", "seed", "process_index", "rollouts", "grade", "encode", "group")
}


def test_the_reference_takes_the_last_place_of_a_group_that_failed():
    verdicts = [False, False, False, False, False, True, False, False, None, None, None, None]
    completions = completed(verdicts)
    assert completions.ids == [[0], [1], [2], [103], *[[row] for row in range(4, 12)]]
    assert completions.replaced == {3}
    assert completions.log_probs[2:4] == [[-0.5], [None]]
    assert completions.rates == {
        "completions/failed_group_rate": (1, 3),
        "completions/unfit_reference_rate": (0, 1),
    }


def test_of_a_group_on_two_processes_one_replaces():
    """The second group lies on both, and failed."""
    verdicts = [True, False, False, False, False, False, False, None, False, False, False, True]
    first, second = (completed(verdicts, own) for own in (range(6), range(6, 12)))
    assert first.replaced == set()
    assert second.replaced == {1}
    assert second.ids[1] == [107]
    assert first.rates["completions/failed_group_rate"] == (0, 1)
    assert second.rates["completions/failed_group_rate"] == (1, 2)


def test_a_reference_that_is_too_long_takes_no_place_and_is_counted():
    def encode(text):
        raise ValueError("too long")

    completions = completed([False] * 4, encode=encode)
    assert not completions.replaced
    assert completions.rates["completions/unfit_reference_rate"] == (1, 1)


def test_only_a_reference_has_a_plan():
    context = PlanOfReference(template="{prompt}|{plan}", sample_template="{prompt}!{solution}")
    group = make_rollouts((0.0, 0.0), replaced={1})
    own, reference = (Rollouts(group, index) for index in range(2))
    assert context.sample_messages(ROW, own) is None
    assert context.sample_messages(ROW, reference)[-1]["content"] == "2 + 3?!It is 5."
    assert context.sample_messages(ROW, None) is not None  # to see whether it fits
    assert context.teacher_messages(ROW, own, None) is None
    assert context.teacher_messages(ROW, reference, "add")[-1]["content"] == "2 + 3?|add"
    assert "It is 5." in PlanOfReference().sample_messages(ROW, reference)[-1]["content"]
    assert "It is 5." not in PlanOfReference().teacher_messages(ROW, reference, "add")[-1]["content"]


@pytest.mark.parametrize(("plan_weight", "expected"), [(0.5, 0.12), (0.0, 0.04), (1.0, 0.36)])
def test_weight_of_a_token(plan_weight, expected):
    """The losses of the notes, .386265, .128755 and 1.158795, are these times −log .04."""
    scores = make_scores((0.04, 0.5, 0.46), (0.36, 0.5, 0.14))
    found = PlanGuided(plan_weight)(make_batch(torch.ones(1, 3).bool(), replaced=True), scores)
    assert found[0, 0].item() == pytest.approx(expected)
    loss = {0.5: 0.386265, 0.0: 0.128755, 1.0: 1.158795}[plan_weight]
    assert -(found[0, 0] * torch.tensor(0.04).log()).item() == pytest.approx(loss, abs=1e-5)


def test_a_plan_that_says_nothing_leaves_the_probability():
    scores = make_scores((0.6, 0.3, 0.1), (0.6, 0.3, 0.1))
    found = PlanGuided()(make_batch(torch.ones(1, 3).bool(), replaced=True), scores)
    assert found[0].tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_nothing_else_is_learnt_by_likelihood():
    mask = torch.ones(1, 3).bool()
    assert not PlanGuided()(make_batch(mask, replaced=False), make_scores()).any()
    found = PlanGuided()(make_batch(mask, replaced=True), make_scores(known=(True, False, True)))
    assert (found[0] > 0).tolist() == [True, False, True]


def test_an_impossible_token_counts_all_the_same():
    scores = make_scores((1.0, 1e-38, 1.0), (1.0, 1e-38, 1.0))
    assert (PlanGuided(1.0)(make_batch(torch.ones(1, 3).bool(), replaced=True), scores) > 0).all()


def test_groups_with_a_reference_have_no_advantage():
    replaced = torch.tensor([False] * 3 + [True] + [False] * 4)
    batch = make_batch(torch.ones(8, 2).bool(), replaced=replaced, advantages=0.7, group_size=4)
    assert OfOwnRollouts()(batch, None).flatten().tolist() == pytest.approx([0.0] * 4 + [0.7] * 4)


def test_weight_out_of_range():
    with pytest.raises(ValueError, match=r"`plan_weight` must be in \[0, 1\], got 2"):
        PlanGuided(2)
