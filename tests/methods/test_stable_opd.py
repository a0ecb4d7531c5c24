import math

import pytest
import torch
from three_tokens import P_S, P_T, make_batch, make_scores

from trl_opsd.methods.stable_opd import GoldOnly, GoldRollout, TeacherReward
from trl_opsd.sampling.sources import Completions, Prompts
from trl_opsd.signal import TokenScores
from trl_opsd.trainer.metrics import Metrics, add_degeneration


FIELDS = ("known", "student_log_prob", "teacher_log_prob", "student_entropy", "teacher_entropy", "divergence")


def complete(source, num_rows, process_index=0):
    """Rollouts are single tokens that tell their row, gold completions the row's text and an end."""
    asked = []

    def some_rollouts(rows):
        asked.extend(rows)
        return Completions([[100 + row] for row in rows], [[-0.5] for _ in rows])

    prompts = Prompts(
        rows=[{"completion": f"{row}", "gold": f"1{row}"} for row in range(num_rows)],
        step=0,
        seed=0,
        process_index=process_index,
        rollouts=None,
        some_rollouts=some_rollouts,
        sample=None,
        sample_teacher=None,
        teacher_prompt=None,
        prompt_with=None,
        share_in_top_k=None,
        encode=lambda text: [int(text), 0],
        grade=None,
        group=None,
    )
    return source(prompts), asked


def test_the_last_of_every_four_is_gold():
    found, asked = complete(GoldRollout(), 8)
    assert found.ids == [[100], [101], [102], [3, 0], [104], [105], [106], [7, 0]]
    assert found.replaced == {3, 7}
    assert found.log_probs[3] == [None, None]
    assert asked == [0, 1, 2, 4, 5, 6]  # nothing is sampled in vain


def test_groups_may_lie_on_several_processes():
    source = GoldRollout(column="gold", every=3)
    assert complete(source, 4, 0)[0].replaced == {2}
    assert complete(source, 4, 1)[0].replaced == {1}
    assert complete(source, 4, 2)[0].replaced == {0, 3}
    assert complete(source, 4, 1)[0].ids[1] == [11, 0]
    assert (source.columns, source.group_size) == (("gold",), 3)
    assert complete(source, 2, 0)[0].replaced == set()


def test_every_rollout_cannot_be_gold():
    with pytest.raises(ValueError, match="`every` of `completions_kwargs` must be at least 2, got 1"):
        GoldRollout(every=1)


def test_streams_of_gold_and_of_rollouts():
    own, gold = make_scores(), make_scores(p_s=P_T, p_t=P_S)
    scores = TokenScores(*(torch.cat([getattr(one, name) for one in (own, gold)]) for name in FIELDS))
    batch = make_batch(torch.ones(2, 3, dtype=torch.bool), replaced=torch.tensor([False, True]))
    shaped = TeacherReward()(batch, scores)
    assert shaped[0].tolist() == pytest.approx([-1.098612, 0.510826, 1.098612], abs=1e-6)
    assert shaped[1].tolist() == [0.0] * 3
    assert GoldOnly()(batch, None).flatten().tolist() == [False, True]
    assert GoldOnly.terms == ("likelihood",)
    assert not TeacherReward.needs_reward
    unread = TeacherReward()(make_batch(torch.ones(1, 3, dtype=torch.bool)), make_scores(known=(True, False, True)))
    assert unread[0, 1] == 0.0


def test_expected_gradient_is_that_of_the_reverse_kl():
    logits = torch.tensor(P_S).log().requires_grad_()
    advantages = TeacherReward()(make_batch(torch.ones(1, 3, dtype=torch.bool)), make_scores())[0]
    surrogate = (torch.tensor(P_S) * advantages * torch.log_softmax(logits, 0)).sum()
    (gradient,) = torch.autograd.grad(surrogate, logits)
    assert gradient.tolist() == pytest.approx([-0.421532, 0.272065, 0.149467], abs=2e-6)


def test_what_the_paper_watches():
    metrics = Metrics()
    texts = ["so we try again " * 700, "It is 7.", "so we try again " * 700, "so we try again " * 700]
    truncated, counted = torch.tensor([True, False, False, True]), torch.tensor([True, True, True, False])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    correct = torch.tensor([0.0, 1.0, math.nan, 1.0])
    add_degeneration(metrics, texts, mask, truncated, correct, counted)
    metrics.reduce(lambda own: own)
    assert metrics.take() == {
        "rollouts/mean_length": 2.0,
        "rollouts/truncated_rate": pytest.approx(1 / 3),
        "rollouts/repetition_rate": pytest.approx(2 / 3),
        "rollouts/correct_rate": 0.5,
    }
