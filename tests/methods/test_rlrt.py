import pytest
import torch
from three_tokens import P_S, P_T, advantages_of, make_batch, make_scores

from trl_opsd.methods.rlrt import ReversedTeacher
from trl_opsd.methods.rlsd import TeacherWeighted


@pytest.mark.parametrize(
    ("clip", "sign", "expected"),
    [
        (1.0, 1.0, [1.5, 0.8, 0.666667]),
        (1.0, -1.0, [-0.666667, -1.333333, -1.5]),
        (0.2, 1.0, [1.1, 0.9, 0.9]),
        (0.2, -1.0, [-0.9, -1.1, -1.1]),
    ],
)
def test_exact_values(clip, sign, expected):
    found = advantages_of(ReversedTeacher(mix=0.5, clip=clip), sign, make_scores())
    assert found.tolist() == [pytest.approx(expected, rel=1e-5)]
    assert (found.sign() == sign).all()


def test_wrong_rollouts_are_grpos():
    """The gate is essential: without it length and entropy run away."""
    advantages = torch.tensor(-0.123456789).expand(1, 3)
    assert advantages_of(ReversedTeacher(), -0.123456789, make_scores(), correct=False).equal(advantages)


def test_off_it_is_grpo_and_asks_for_nothing():
    off = ReversedTeacher(mix=0.0)
    assert not off.needs_scores
    assert advantages_of(off, 0.123456789, make_scores()).equal(torch.tensor(0.123456789).expand(1, 3))


def test_student_and_teacher_exchanged_give_rlsd():
    exchanged = advantages_of(ReversedTeacher(clip=0.2), 0.8, make_scores(p_s=P_T, p_t=P_S))
    torch.testing.assert_close(exchanged, advantages_of(TeacherWeighted(clip=0.2), 0.8, make_scores()))


def test_unclipped_ratios_are_each_others_inverse():
    wide = {"mix": 1.0, "clip": 1e6}
    scores = make_scores()
    product = advantages_of(ReversedTeacher(**wide), 1.0, scores) * advantages_of(TeacherWeighted(**wide), 1.0, scores)
    torch.testing.assert_close(product, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("part", "is_right", "rate"),
    [
        (ReversedTeacher(clip=1.0), True, (1, 3)),
        (ReversedTeacher(clip=0.2), True, (3, 3)),
        (ReversedTeacher(clip=0.2), False, (0, 0)),
        (TeacherWeighted(clip=0.7), False, (1, 3)),
    ],
    ids=str,
)
def test_clipped_ratios_are_counted(part, is_right, rate):
    logged = {}
    batch = make_batch(
        torch.ones(1, 3, dtype=torch.bool), correct=is_right, log=lambda name, *its: logged.update({name: its})
    )
    part(batch, make_scores())
    assert logged == {"teacher_ratio_clipped_rate": rate}
