import torch
from objective.plain import assert_close, make_case, make_objective, plain_loss

from trl_opsd.objective import Head, Readings


def raised(teacher, plain, contrast):
    return plain + 0.5 * (teacher - contrast)


def with_readings(case, combine=raised):
    """The teacher's states after three prompts, and a case whose teacher has the combined logits as its states."""
    generator = torch.Generator().manual_seed(1)
    size = case.teacher_hidden.shape
    states = [case.teacher_hidden, *(torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))]
    return case.replace(teacher_hidden=Readings(tuple(states), combine))


def stated(case, temperature):
    """The same target, as the logits of a teacher whose head changes nothing."""
    head, readings = case.teacher_head, case.teacher_hidden
    logits = [head.finish.logits(states @ head.weight.T).detach() / temperature for states in readings.states]
    target = readings.combine(*(values.log_softmax(dim=-1) for values in logits)) * temperature
    return case.replace(teacher_hidden=target, teacher_head=Head(torch.eye(target.size(1), dtype=target.dtype)))


def test_equals_the_loss_from_a_teacher_with_these_logits():
    for cell in (("jsd", 0.5, "full", "bucket"), ("forward_kl", 0.5, "teacher_top_k", "renormalize")):
        objective = make_objective(cell, temperature=1.3)
        case = with_readings(make_case(bias=True, scale=0.7, softcap=5.0))
        expected = stated(case, 1.3)
        loss, values = plain_loss(expected, objective)
        gradients = case.gradients(loss)
        # A few rows at a time change nothing
        for output in (case.fused(objective), case.fused(objective, memory_budget=1e-3)):
            assert_close([output.loss], [loss])
            assert_close([getattr(output, name) for name in values], values.values())
            assert_close(case.gradients(output.loss), gradients)


def test_a_row_that_is_not_finite_after_one_prompt_is_left_out():
    case = with_readings(make_case())
    case.teacher_hidden.states[2][1, 0] = torch.nan
    output = case.fused(make_objective(("jsd", 0.5, "full", "bucket")))
    assert output.finite.tolist() == [index != 1 for index in range(6)]
    assert output.loss.isfinite()


def test_no_gradient_reaches_the_teacher():
    case = with_readings(make_case(tied=True))
    readings = case.teacher_hidden
    for states in readings.states:
        states.requires_grad_()
    case.fused(make_objective(("jsd", 0.5, "full", "bucket"))).loss.backward()
    assert all(states.grad is None for states in readings.states)
    assert case.student_hidden.grad.abs().max() > 1e-3
