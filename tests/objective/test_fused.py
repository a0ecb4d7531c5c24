import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd.objective import Head, Objective, fused_divergence
from trl_opsd.objective.memory import reuse_freed_memory


DIVERGENCES = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.0),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("jsd", 1.0),
]
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3)]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@dataclasses.dataclass
class Inputs:
    """Hidden states, heads, tokens and weights; the student's tensors are leaves."""

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    student_head: Head
    teacher_head: Head
    token_ids: torch.Tensor
    weights: torch.Tensor

    @property
    def trained(self):
        tensors = (self.student_hidden, self.student_head.weight, self.student_head.bias)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def fused(self, divergence="forward_kl", jsd_weight=0.5, block_rows=None, kernel="eager", **options):
        budget = {}
        if block_rows is not None:
            itemsize = 8 if self.student_hidden.dtype == torch.float64 else 4
            row_bytes = 2 * itemsize * self.student_head.weight.size(0)
            budget = {"memory_budget": (block_rows + 0.1) * row_bytes * 8 / 7 / 2**20}
        objective = Objective(divergence, jsd_weight, top_k=options.pop("top_k", 2), **options)
        return fused_divergence(*self.tensors, objective, kernel=kernel, **budget)

    @property
    def tensors(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def with_student(self, hidden=None, **head):
        return dataclasses.replace(
            self,
            student_hidden=self.student_hidden if hidden is None else hidden,
            student_head=dataclasses.replace(self.student_head, **head),
        )


def make_inputs(
    rows=6, vocabulary=7, size=3, bias=False, tied=False, dtype=torch.float64, seed=0, scale=1.0, softcap=None
):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def head(size):
        return Head(leaf(vocabulary, size), leaf(vocabulary) if bias else None, scale, softcap)

    student_head = head(size)
    return Inputs(
        student_hidden=leaf(rows, size),
        teacher_hidden=leaf(rows, size if tied else size + 1).detach(),
        student_head=student_head,
        teacher_head=student_head if tied else head(size + 1),
        token_ids=torch.randint(vocabulary, (rows,), generator=generator),
        weights=torch.rand(rows, generator=generator, dtype=torch.float64),
    )


def probabilities(hidden, head, temperature):
    logits = torch.einsum("nh,vh->nv", hidden, head.weight)
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.softmax(logits / temperature, dim=-1)


def dense_entries(inputs, divergence, beta=0.5, temperature=1.0):
    """Entries of the divergence, in plain probabilities, as the papers write them."""
    p_s = probabilities(inputs.student_hidden, inputs.student_head, temperature)
    p_t = probabilities(inputs.teacher_hidden, inputs.teacher_head, temperature).detach()
    if divergence == "forward_kl" or (divergence, beta) == ("jsd", 0.0):
        return p_t * torch.log(p_t / p_s)
    if divergence == "reverse_kl" or (divergence, beta) == ("jsd", 1.0):
        return p_s * torch.log(p_s / p_t)
    m = beta * p_t + (1 - beta) * p_s
    return beta * p_t * torch.log(p_t / m) + (1 - beta) * p_s * torch.log(p_s / m)


def dense_divergence(inputs, divergence, beta=0.5, clip=None, temperature=1.0):
    entries = dense_entries(inputs, divergence, beta, temperature)
    return (entries if clip is None else entries.clamp(max=clip)).sum(-1)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs.trained)


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(list(actual), list(expected), **(tolerance or EXACT))


def assert_equals_dense(inputs, divergence, beta, clip, temperature, **options):
    output = inputs.fused(divergence, beta, clip=clip, temperature=temperature, **options)
    expected = dense_divergence(inputs, divergence, beta, clip, temperature)
    loss = (expected * inputs.weights).sum()

    assert_close([output.loss, output.divergence], [loss, expected.detach()])
    assert_close(gradients(output.loss, inputs), gradients(loss, inputs))
    return output


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("clip", [None, 1e6, 0.02])
@pytest.mark.parametrize("temperature", [0.7, 1.1])
def test_equals_the_dense_formula(divergence, beta, clip, temperature):
    for bias in (False, True):
        output = assert_equals_dense(make_inputs(bias=bias), divergence, beta, clip, temperature)

        assert output.clipped.any().item() == (clip == 0.02)
        assert output.finite.all()


@pytest.mark.parametrize(("divergence", "beta"), KINDS)
@pytest.mark.parametrize("clip", [None, 0.02])
def test_head_with_bias_scale_and_softcap(divergence, beta, clip):
    assert_equals_dense(make_inputs(bias=True, scale=1.7, softcap=2.0), divergence, beta, clip, 1.1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    data=st.data(),
    divergence=st.sampled_from(DIVERGENCES),
    rows=st.integers(0, 6),
    vocabulary=st.integers(1, 13),
    size=st.integers(1, 4),
    block_rows=st.sampled_from([None, 1, 2, 5, 100]),
    temperature=st.floats(0.3, 3.0),
    clip=st.none() | st.floats(1e-4, 1.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_weight_temperature_and_clip(
    data, divergence, rows, vocabulary, size, block_rows, temperature, clip, seed
):
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(-3, 3), min_size=rows, max_size=rows))
    bias, tied = data.draw(st.booleans()), data.draw(st.booleans())
    inputs = make_inputs(rows, vocabulary, size, bias=bias, tied=tied, seed=seed)
    inputs.weights = torch.tensor(weights, dtype=torch.float64)

    assert_equals_dense(inputs, *divergence, clip, temperature, block_rows=block_rows)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradcheck(divergence, beta, clip):
    inputs = make_inputs(rows=3, vocabulary=4, size=2, bias=True, softcap=3.0)

    def loss(hidden, weight, bias):
        student = inputs.with_student(hidden, weight=weight, bias=bias)
        return student.fused(divergence, beta, clip=clip, temperature=1.1, block_rows=2).loss * 2.5

    assert torch.autograd.gradcheck(loss, inputs.trained)


@pytest.mark.parametrize(
    ("divergence", "beta", "value", "pull"),
    [
        # Student (1/2, 1/2), teacher (3/4, 1/4): values and gradients wrt the first logit by hand
        ("forward_kl", 0.5, 0.130812035941137, -0.25),
        ("jsd", 0.0, 0.130812035941137, -0.25),
        ("reverse_kl", 0.5, 0.143841036225890, -0.274653072167027),
        ("jsd", 1.0, 0.143841036225890, -0.274653072167027),
        # 3/4 · 1/2 · 1/2 · ln(7/9) and 1/4 · 1/2 · 1/2 · ln(5/11)
        ("jsd", 0.25, 0.024870035701797, -0.047121455302670),
        ("jsd", 0.75, 0.026048220951153, -0.049278585022767),
    ],
)
def test_directions_by_hand(divergence, beta, value, pull):
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    logits = Head(torch.eye(2, dtype=torch.float64))  # hidden states that are the logits

    output = fused_divergence(
        student, teacher, logits, logits, torch.tensor([1]), torch.ones(1), Objective(divergence, beta)
    )
    output.loss.backward()

    assert output.loss.item() == pytest.approx(value, abs=1e-14)
    assert student.grad.tolist() == [pytest.approx([pull, -pull], abs=1e-14)]


def test_clip_by_hand():
    # Entries of the forward KL: 3/4 ln(3/2) = 0.304 and 1/4 ln(1/2) = -0.173. Only the first is above the clip, and
    # what is left pulls the student away from the teacher's second token: d = (0, -1/4), p = (1/2, 1/2).
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    logits = Head(torch.eye(2, dtype=torch.float64))

    output = fused_divergence(
        student, teacher, logits, logits, torch.tensor([0]), torch.ones(1), Objective("forward_kl", clip=0.05)
    )
    output.loss.backward()

    assert output.loss.item() == pytest.approx(0.05 - 0.25 * math.log(2), abs=1e-14)
    assert output.clipped.tolist() == [1.0]
    assert student.grad.tolist() == [pytest.approx([0.125, -0.125], abs=1e-14)]


def test_temperature_divides_both_sides_and_multiplies_nothing():
    student = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    logits = Head(torch.eye(3, dtype=torch.float64))

    def loss(factor, temperature):
        hidden = (student * factor, teacher * factor)
        tokens, weights = torch.tensor([0]), torch.ones(1)
        objective = Objective("reverse_kl", temperature=temperature)
        return fused_divergence(*hidden, logits, logits, tokens, weights, objective).loss

    assert_close([loss(4.0, 4.0)], [loss(1.0, 1.0)])
    assert not torch.isclose(loss(1.0, 4.0), loss(1.0, 1.0))


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_symmetric_and_mirrored(divergence, beta):
    inputs = make_inputs(tied=True)
    swapped = dataclasses.replace(
        inputs, student_hidden=inputs.teacher_hidden, teacher_hidden=inputs.student_hidden.detach()
    )
    mirror = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl", "jsd": "jsd"}[divergence]

    assert_close([swapped.fused(mirror, 1 - beta).divergence], [inputs.fused(divergence, beta).divergence])


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_equal_to_student_gives_no_loss_and_no_gradient(divergence, beta, clip, dtype):
    inputs = make_inputs(rows=5, vocabulary=11, bias=True, tied=True, dtype=dtype)
    inputs.teacher_hidden = inputs.student_hidden.detach().clone()
    exact = divergence != "jsd" or beta in (0.0, 1.0)

    output = inputs.fused(divergence, beta, clip=clip, temperature=1.1)

    epsilon = torch.finfo(dtype).eps
    assert output.divergence.abs().max() <= (0.0 if exact else 4 * epsilon)
    assert all(gradient.abs().max() < 100 * epsilon for gradient in gradients(output.loss, inputs))
    assert_close([output.student_log_prob], [output.teacher_log_prob])


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_clip_above_every_entry_changes_nothing(divergence, beta):
    inputs = make_inputs(bias=True)
    free = inputs.fused(divergence, beta)

    for clip in (1e3, math.inf):
        clipped = inputs.fused(divergence, beta, clip=clip)
        assert torch.equal(clipped.loss, free.loss)
        assert all(
            torch.equal(a, b)
            for a, b in zip(gradients(clipped.loss, inputs), gradients(free.loss, inputs), strict=True)
        )
        free = inputs.fused(divergence, beta)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_clip_is_a_bound_on_each_entry_from_above_only(divergence):
    inputs = make_inputs(rows=20)
    entries = dense_entries(inputs, divergence).detach()
    clip = entries.amax(-1).median().item() + 1e-6

    output = inputs.fused(divergence, clip=clip)

    assert torch.equal(output.clipped.bool(), (entries > clip).any(-1))
    assert output.clipped.sum() == 10
    assert_close([output.divergence], [torch.where(entries > clip, clip, entries).sum(-1)])


def test_tiny_clip_turns_the_loss_negative():
    assert (make_inputs().fused("forward_kl", clip=1e-6).divergence < 0).all()


@pytest.mark.parametrize("clip", [None, 0.02])
def test_block_rows_change_nothing(clip):
    inputs = make_inputs(rows=11, bias=True)
    whole = inputs.fused("jsd", clip=clip, block_rows=11)
    expected = gradients(whole.loss, inputs)

    for block_rows in (1, 2, 3, 10, 50, None):
        output = inputs.fused("jsd", clip=clip, block_rows=block_rows)
        assert_close(output, whole)
        assert_close(gradients(output.loss, inputs), expected)


@pytest.mark.parametrize(("divergence", "beta"), KINDS)
def test_rows_do_not_depend_on_each_other(divergence, beta):
    inputs = make_inputs(rows=4)
    whole = inputs.fused(divergence, beta)
    whole_gradient = gradients(whole.loss, inputs)[0]

    for row in range(4):
        alone = dataclasses.replace(
            inputs,
            student_hidden=inputs.student_hidden[[row]].detach().requires_grad_(),
            teacher_hidden=inputs.teacher_hidden[[row]],
            token_ids=inputs.token_ids[[row]],
            weights=inputs.weights[[row]],
        )
        output = alone.fused(divergence, beta)
        assert_close([value[0] for value in output[1:]], [value[row] for value in whole[1:]])
        assert_close([gradients(output.loss, alone)[0][0]], [whole_gradient[row]])


def test_no_rows():
    inputs = make_inputs(rows=0, bias=True)

    output = inputs.fused()

    assert output.loss.item() == 0.0
    assert all(len(value) == 0 for value in output[1:])
    assert [gradient.count_nonzero().item() for gradient in gradients(output.loss, inputs)] == [0, 0, 0]


def test_weights_of_zero():
    inputs = make_inputs(bias=True)
    inputs.weights = torch.zeros(6)

    output = inputs.fused()

    assert output.loss.item() == 0.0
    assert (output.divergence > 0).all()
    assert [gradient.count_nonzero().item() for gradient in gradients(output.loss, inputs)] == [0, 0, 0]


@pytest.mark.parametrize("bias", [False, True])
def test_metrics(bias):
    inputs = make_inputs(bias=bias)
    p_s = probabilities(inputs.student_hidden, inputs.student_head, 1.1).detach()
    p_t = probabilities(inputs.teacher_hidden, inputs.teacher_head, 1.1).detach()
    rows = range(6)

    output = inputs.fused("reverse_kl", temperature=1.1)

    assert_close([output.student_entropy], [torch.special.entr(p_s).sum(-1)])
    assert_close([output.teacher_entropy], [torch.special.entr(p_t).sum(-1)])
    assert_close([output.student_log_prob], [p_s[rows, inputs.token_ids].log()])
    assert_close([output.teacher_log_prob], [p_t[rows, inputs.token_ids].log()])
    assert output.clipped.tolist() == [0.0] * 6
    assert not any(value.requires_grad for value in output[1:])


# Gradient


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradient_depends_on_the_teacher(divergence, beta, clip):
    inputs = make_inputs()
    other = dataclasses.replace(inputs, teacher_hidden=inputs.teacher_hidden.flip(0))

    gradient, other_gradient = (
        gradients(case.fused(divergence, beta, clip=clip).loss, case)[0] for case in (inputs, other)
    )

    # The mean log-ratio of the sampled tokens, with the teacher detached, would fail here
    def log_ratio(case):
        p_s, p_t = probabilities(case.student_hidden, case.student_head, 1.0), case.fused().teacher_log_prob
        return (p_s[range(6), case.token_ids].log() - p_t).mean()

    assert torch.equal(gradients(log_ratio(inputs), inputs)[0], gradients(log_ratio(other), other)[0])
    assert ((gradient - other_gradient).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_step_against_the_gradient_approaches_the_teacher(divergence, beta):
    inputs = make_inputs(vocabulary=20)
    before = inputs.fused(divergence, beta)
    gradient = gradients(before.loss, inputs)[0]

    after = inputs.with_student(inputs.student_hidden.detach() - 0.1 * gradient).fused(divergence, beta)

    assert (after.divergence < before.divergence).all()


def test_teacher_receives_no_gradient():
    inputs = make_inputs(bias=True)
    inputs.teacher_hidden.requires_grad_()
    inputs.weights.requires_grad_()
    others = [inputs.teacher_hidden, inputs.teacher_head.weight, inputs.teacher_head.bias, inputs.weights]

    assert torch.autograd.grad(inputs.fused("jsd").loss, others, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_tied_head_receives_the_gradient_of_the_student_only(divergence, clip):
    tied = make_inputs(tied=True, bias=True)
    frozen = Head(tied.student_head.weight.detach().clone(), tied.student_head.bias.detach().clone())
    untied = dataclasses.replace(tied, teacher_head=frozen)

    found, expected = (gradients(case.fused(divergence, clip=clip).loss, case) for case in (tied, untied))

    assert_close(found, expected)


def test_frozen_head_leaves_the_gradient_of_the_hidden_states():
    inputs = make_inputs(bias=True)
    frozen = inputs.with_student(weight=inputs.student_head.weight.detach(), bias=inputs.student_head.bias.detach())
    frozen_weight = inputs.with_student(weight=inputs.student_head.weight.detach())

    hidden, _, bias = gradients(inputs.fused().loss, inputs)

    assert_close(gradients(frozen.fused().loss, frozen), [hidden])
    assert_close(gradients(frozen_weight.fused().loss, frozen_weight), [hidden, bias])


def test_trained_head_on_frozen_hidden_states():
    inputs = make_inputs(bias=True)
    frozen = inputs.with_student(inputs.student_hidden.detach())

    assert_close(gradients(frozen.fused().loss, frozen), gradients(inputs.fused().loss, inputs)[1:])


def test_backward_scales_and_accumulates():
    inputs = make_inputs(bias=True)
    expected = [3.5 * gradient for gradient in gradients(inputs.fused().loss, inputs)]

    loss = inputs.fused().loss
    (2 * loss).backward(retain_graph=True)
    (1.5 * loss).backward()

    assert_close([tensor.grad for tensor in inputs.trained], expected)


# Rows that are not finite


def blocked(bias, *tokens):
    bias = bias.detach().clone()
    bias[list(tokens)] = -math.inf
    return bias


@pytest.mark.parametrize(("divergence", "beta"), KINDS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_token_impossible_for_both_equals_a_smaller_vocabulary(divergence, beta, clip):
    inputs = make_inputs(bias=True)
    inputs.token_ids = torch.zeros(6, dtype=torch.int64)
    kept = [0, 1, 3, 4, 6]

    def with_heads(change):
        student, teacher = change(inputs.student_head), change(inputs.teacher_head)
        return dataclasses.replace(inputs, student_head=student, teacher_head=teacher)

    with_blocked = with_heads(lambda head: Head(head.weight.detach(), blocked(head.bias, 2, 5)))
    smaller = with_heads(lambda head: Head(head.weight.detach()[kept], head.bias.detach()[kept]))
    output, expected = (case.fused(divergence, beta, clip=clip) for case in (with_blocked, smaller))

    assert output.finite.all()
    assert_close(output, expected)
    assert_close(gradients(output.loss, with_blocked), gradients(expected.loss, smaller))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_token_impossible_for_one_side(side, divergence, beta, clip):
    inputs = make_inputs(bias=True)
    inputs.token_ids = torch.zeros(6, dtype=torch.int64)
    direction = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd") if divergence == "jsd" else divergence
    infinite = (direction, side) in {("forward_kl", "student"), ("reverse_kl", "teacher")}

    def with_bias(change):
        heads = {"student": inputs.student_head, "teacher": inputs.teacher_head}
        heads = {name: Head(head.weight.detach(), head.bias.detach()) for name, head in heads.items()}
        heads[side] = dataclasses.replace(heads[side], bias=change(heads[side].bias))
        return dataclasses.replace(inputs, student_head=heads["student"], teacher_head=heads["teacher"])

    output = (case := with_bias(lambda bias: blocked(bias, 2))).fused(divergence, beta, clip=clip)

    if infinite and clip is None:
        assert not output.finite.any()
        assert output.loss.item() == 0.0
        assert gradients(output.loss, case)[0].count_nonzero() == 0
        return
    # Logits of -1000 give the probability 0 without being infinite
    finite_case = with_bias(lambda bias: blocked(bias, 2).clamp(min=-1e3))
    expected = finite_case.fused(divergence, beta, clip=clip)
    assert output.finite.all()
    assert_close(output._replace(clipped_mass=expected.clipped_mass), expected)  # an infinite entry, an infinite mass
    assert_close(gradients(output.loss, case), gradients(expected.loss, finite_case))
    assert_close([output.divergence], [dense_limit(finite_case, direction, beta, clip)])


def dense_limit(inputs, direction, beta, clip):
    """The dense formula with 0 · log 0 = 0, from log-probabilities."""
    sides = ((inputs.student_hidden.detach(), inputs.student_head), (inputs.teacher_hidden, inputs.teacher_head))
    log_s, log_t = ((hidden @ head.weight.t() + head.bias).log_softmax(-1) for hidden, head in sides)
    p_s, p_t = log_s.exp(), log_t.exp()
    if direction == "forward_kl":
        entries = p_t * (log_t - log_s)
    elif direction == "reverse_kl":
        entries = p_s * (log_s - log_t)
    else:
        log_m = (beta * p_t + (1 - beta) * p_s).log()
        entries = beta * p_t * (log_t - log_m) + (1 - beta) * p_s * (log_s - log_m)
    return (entries if clip is None else entries.clamp(max=clip)).sum(-1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
@pytest.mark.parametrize(("divergence", "beta"), KINDS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_rows_that_are_not_finite_are_flagged_and_leave_the_others_alone(bad, sides, divergence, beta, clip):
    inputs = make_inputs(rows=6, bias=True)
    student_hidden, teacher_hidden = inputs.student_hidden.detach().clone(), inputs.teacher_hidden.clone()
    if sides != "teacher":
        student_hidden[2] = bad
    if sides != "student":
        teacher_hidden[2] = bad
    poisoned = dataclasses.replace(inputs, teacher_hidden=teacher_hidden).with_student(student_hidden.requires_grad_())
    kept = [0, 1, 3, 4, 5]
    without = dataclasses.replace(
        inputs,
        student_hidden=inputs.student_hidden.detach()[kept].requires_grad_(),
        teacher_hidden=inputs.teacher_hidden[kept],
        token_ids=inputs.token_ids[kept],
        weights=inputs.weights[kept],
    )

    output = poisoned.fused(divergence, beta, clip=clip, block_rows=4)
    expected = without.fused(divergence, beta, clip=clip)
    hidden, *head = gradients(output.loss, poisoned)
    expected_hidden, *expected_head = gradients(expected.loss, without)

    assert output.finite.tolist() == [1, 1, 0, 1, 1, 1]
    assert_close([output.loss], [expected.loss])
    assert output.divergence[2] == 0.0
    assert hidden[2].tolist() == [0.0] * 3
    assert_close([hidden[kept], *head], [expected_hidden, *expected_head])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_softcap_does_not_hide_infinite_hidden_states(side):
    inputs = make_inputs(rows=3, softcap=5.0)
    hidden = {"student": inputs.student_hidden.detach().clone(), "teacher": inputs.teacher_hidden.clone()}
    hidden[side][1, 0] = math.inf  # logits of plus and minus infinity, capped to finite ones
    poisoned = inputs.with_student(hidden["student"].requires_grad_())
    poisoned.teacher_hidden = hidden["teacher"]

    output = poisoned.fused()

    assert output.finite.tolist() == [1.0, 0.0, 1.0]
    assert torch.isfinite(output.loss)
    assert all(gradient.isfinite().all() for gradient in gradients(output.loss, poisoned))


# Precision


def in_precision(inputs, hidden, head, hidden_teacher=None):
    def cast(old, trained):
        weight, bias = old.weight.detach().to(head), old.bias.detach().to(head)
        return dataclasses.replace(old, weight=weight.requires_grad_(trained), bias=bias.requires_grad_(trained))

    return dataclasses.replace(
        inputs,
        student_hidden=inputs.student_hidden.detach().to(hidden).requires_grad_(),
        teacher_hidden=inputs.teacher_hidden.to(hidden_teacher or hidden),
        student_head=cast(inputs.student_head, True),
        teacher_head=cast(inputs.teacher_head, False),
        weights=inputs.weights.float(),
    )


@pytest.mark.parametrize(("divergence", "beta"), KINDS)
def test_bf16_inputs_are_close_to_fp32(divergence, beta):
    bf16 = in_precision(make_inputs(rows=64, vocabulary=31, size=16, bias=True), torch.bfloat16, torch.bfloat16)
    fp32 = in_precision(bf16, torch.float32, torch.float32)

    output, expected = (case.fused(divergence, beta, temperature=4.0) for case in (bf16, fp32))
    found = gradients(output.loss, bf16)

    assert {value.dtype for value in output if value is not output.listed_tokens} == {torch.float32}
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 3
    assert_close([output.loss], [expected.loss], rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(found, gradients(expected.loss, fp32), strict=True):
        assert (gradient - reference).norm() < 4e-3 * reference.norm()


def test_fp32_equals_fp64():
    fp64 = make_inputs(rows=16, vocabulary=50, bias=True)
    fp32 = in_precision(fp64, torch.float32, torch.float32)

    output, expected = fp32.fused("jsd"), fp64.fused("jsd")

    assert output.divergence.dtype == output.loss.dtype == torch.float32
    assert expected.divergence.dtype == expected.loss.dtype == torch.float64
    assert_close([output.loss.double()], [expected.loss], rtol=1e-4, atol=1e-6)
    for gradient, reference in zip(gradients(output.loss, fp32), gradients(expected.loss, fp64), strict=True):
        assert_close([gradient.double()], [reference], rtol=1e-3, atol=1e-5)


def test_many_rows_accumulate_in_fp32():
    # 1000 equal rows, a block each: a sum in bf16 would stop growing at 256
    one = in_precision(make_inputs(rows=1, vocabulary=5, size=4, bias=True), torch.bfloat16, torch.bfloat16)
    one.weights = torch.ones(1)
    many = dataclasses.replace(
        one,
        student_hidden=one.student_hidden.detach().repeat(1000, 1).requires_grad_(),
        teacher_hidden=one.teacher_hidden.repeat(1000, 1),
        token_ids=one.token_ids.repeat(1000),
        weights=torch.ones(1000),
    )

    output, expected = many.fused("reverse_kl", block_rows=1), one.fused("reverse_kl")

    assert output.loss.item() == pytest.approx(1000 * expected.loss.item(), rel=1e-4)
    for gradient, single in zip(gradients(output.loss, many)[1:], gradients(expected.loss, one)[1:], strict=True):
        assert_close([gradient.float()], [1000 * single.float()], rtol=1e-2, atol=1e-3)


class Record(TorchDispatchMode):
    """What the operations inside produce: the largest tensor in bytes, and the matrix products by their dtype."""

    def __enter__(self):
        reuse_freed_memory()  # it allocates, once in a process
        self.largest, self.products = 0, []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "matmul", "bmm"):
            self.products.append(result.dtype)
        return result


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divergence", "beta"), KINDS)
def test_autocast_rounds_the_operands_to_bf16_and_does_the_rest_in_fp32(divergence, beta, hidden_dtype, device):
    inputs = in_precision(make_inputs(rows=64, vocabulary=31, size=16, bias=True), hidden_dtype, torch.float32)
    reference = in_precision(inputs, torch.float32, torch.float32)

    with torch.autocast(device.type, torch.bfloat16):
        output = inputs.fused(divergence, beta, temperature=4.0)
    found = gradients(output.loss, inputs)
    bf16 = in_precision(in_precision(inputs, torch.bfloat16, torch.bfloat16), torch.float32, torch.float32)
    rounded, expected = (case.fused(divergence, beta, temperature=4.0) for case in (bf16, reference))

    assert_close([output.loss], [rounded.loss], rtol=2e-4, atol=1e-6)  # the bias is not rounded
    assert not torch.equal(output.loss, expected.loss)
    assert {value.dtype for value in output if value is not output.listed_tokens} == {torch.float32}
    assert [gradient.dtype for gradient in found] == [hidden_dtype, torch.float32, torch.float32]
    assert torch.isclose(output.loss, expected.loss, rtol=2e-2)
    for gradient, exact in zip(found, gradients(expected.loss, reference), strict=True):
        assert (gradient - exact).norm() < 3e-2 * exact.norm()


def test_bf16_hidden_states_and_fp32_head_without_autocast_multiply_in_fp32():
    inputs = in_precision(make_inputs(bias=True), torch.bfloat16, torch.float32)

    with Record() as record:
        inputs.fused()

    assert set(record.products) == {torch.float32}


def test_loss_scaling_keeps_small_gradients_in_fp16(device):
    # fp16 ends at 6e-8: the loss scale has to reach the gradients before they are rounded to it
    inputs = in_precision(make_inputs(rows=32, vocabulary=31, size=16, bias=True), torch.float32, torch.float32)
    inputs.weights = torch.full((32,), 1e-7)
    expected = gradients(inputs.fused().loss * 2**16, inputs)

    with torch.autocast(device.type, torch.float16):
        output = inputs.fused()

    for gradient, exact in zip(gradients(output.loss * 2**16, inputs), expected, strict=True):
        assert (gradient - exact).norm() < 2e-2 * exact.norm()


# Cost


@pytest.mark.parametrize(("divergence", "beta"), KINDS)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rows_never_exist(divergence, beta, clip, dtype):
    inputs = in_precision(make_inputs(rows=64, vocabulary=101, bias=True, softcap=3.0), dtype, dtype)

    with Record() as record:
        gradients(inputs.fused(divergence, beta, clip=clip, block_rows=8).loss, inputs)

    assert record.largest <= 9 * 101 * 4


@pytest.mark.cpu("a GPU's blocks follow its memory")
def test_default_block_does_not_grow_with_the_rows():
    vocabulary = 2**18
    inputs = make_inputs(rows=120, vocabulary=vocabulary, size=1, dtype=torch.float32)

    with Record() as record:
        gradients(inputs.fused().loss, inputs)

    assert record.largest <= 112 * vocabulary * 4  # two of them are seven eighths of 256 MiB


def test_matrix_products():
    inputs = make_inputs(bias=True)
    frozen = inputs.with_student(weight=inputs.student_head.weight.detach())

    counts = []
    for case in (inputs, frozen):
        with Record() as record:
            gradients(case.fused().loss, case)
        counts.append(len(record.products))

    assert counts == [4, 3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_only_the_projections_run(mode):
    inputs = make_inputs(bias=True)
    expected = inputs.fused("jsd", clip=0.05)

    with mode(), Record() as record:
        output = inputs.fused("jsd", clip=0.05)

    assert len(record.products) == 2
    assert not output.loss.requires_grad
    assert_close(output, [value.detach() for value in expected])


def test_nothing_to_train_only_the_projections_run():
    inputs = make_inputs()
    frozen = inputs.with_student(inputs.student_hidden.detach(), weight=inputs.student_head.weight.detach())

    with Record() as record:
        output = frozen.fused()

    assert len(record.products) == 2
    assert not output.loss.requires_grad


def test_heads_of_different_vocabularies():
    inputs = make_inputs(vocabulary=7)
    inputs.teacher_head = make_inputs(vocabulary=9).teacher_head

    with pytest.raises(ValueError, match=r"teacher's vocabulary has 9 entries and the student's 7\."):
        inputs.fused()
