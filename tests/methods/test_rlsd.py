import pytest
import torch
from three_tokens import advantages_of, make_batch, make_scores

from trl_opsd.methods.rlsd import TeacherWeighted


@pytest.mark.parametrize(("sign", "expected"), [(1.0, [0.9, 1.1, 1.1]), (-1.0, [-1.1, -0.9, -0.9])])
def test_exact_values(sign, expected):
    found = advantages_of(TeacherWeighted(mix=0.5, clip=0.2), sign, make_scores())
    assert found.tolist() == [pytest.approx(expected)]


def test_off_it_is_grpo_and_asks_for_nothing():
    off = TeacherWeighted(mix=0.0)
    assert not off.needs_scores
    advantages = torch.tensor([[0.123456789]])
    assert off(make_batch(torch.ones(1, 3).bool(), advantages=advantages), None).equal(advantages)
    # bit for bit, also when there are scores
    assert advantages_of(off, 0.123456789, make_scores()).equal(advantages.expand(1, 3))


def test_teacher_that_is_the_student_changes_nothing():
    found = advantages_of(TeacherWeighted(), 0.7, make_scores(p_t=(0.6, 0.3, 0.1)))
    assert found.tolist() == [pytest.approx([0.7] * 3)]


def test_what_the_teacher_has_not_read_keeps_its_advantage():
    found = advantages_of(TeacherWeighted(mix=0.3), 0.7, make_scores(known=(True, False, True)))
    assert found[0, 1] == torch.tensor(0.7)
    assert found[0, 0] != torch.tensor(0.7)
