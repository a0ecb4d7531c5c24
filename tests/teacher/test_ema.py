"""The moving average: exact in fp32, and in half precision too."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model

from trl_opsd.teacher import EMA, CopiedTeacher


def unwrapped(model):
    return model


@pytest.fixture(params=["full", "lora", "dora", "modules_to_save"])
def make_policy(request, tokenizer):
    def make(dtype=torch.float32):
        policy = make_model(tokenizer).to(dtype)
        if request.param == "full":
            return policy
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            use_dora=request.param == "dora",
            modules_to_save=["lm_head"] if request.param == "modules_to_save" else None,
        )
        return get_peft_model(policy, config, autocast_adapter_dtype=False)

    return make


def trained(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad and "teacher" not in name.split(".")}


def teachers(policy, teacher):
    """The teacher's parameters by the name of the policy's."""
    with teacher.weights(policy) as module:
        parameters = dict(module.named_parameters())
        names = trained(policy)
        twins = {name: name if module is not policy else name.replace("default", "teacher") for name in names}
        return {name: parameters[twin].detach().clone() for name, twin in twins.items()}


def logits(module):
    with torch.no_grad():
        return module.eval()(torch.arange(6)[None]).logits


def move(policy, size):
    generator = torch.Generator().manual_seed(0)
    for parameter in trained(policy).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (size * noise).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_policy_and_takes_no_gradient(make_policy, dtype):
    policy = make_policy(dtype)
    names = trained(policy).keys()

    teacher = CopiedTeacher(policy, EMA(0.1), unwrapped)

    assert trained(policy).keys() == names
    expected = logits(policy)
    with teacher.weights(policy) as module:
        assert torch.equal(logits(module), expected)
        assert all(value.dtype == dtype for value in teachers(policy, teacher).values())


def test_it_moves_at_the_stated_rate(make_policy):
    policy = make_policy()
    teacher = CopiedTeacher(policy, EMA(0.1), unwrapped)
    expected = {name: value.detach().clone() for name, value in trained(policy).items()}

    for step in range(1, 4):
        move(policy, 0.1)
        teacher.on_step_end(step)
        for name, value in trained(policy).items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach()

    assert expected.keys()
    for name, value in teachers(policy, teacher).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_small_steps_add_up_in_half_precision(make_policy):
    """A bf16 average would not move at all: 0.001 of a difference is less than half of its last digit."""
    policy = make_policy(torch.bfloat16)
    teacher = CopiedTeacher(policy, EMA(0.001), unwrapped)
    start = teachers(policy, teacher)
    move(policy, 0.25)

    for step in range(300):
        teacher.on_step_end(step)

    share = 1 - 0.999**300
    for name, value in teachers(policy, teacher).items():
        expected = start[name].float().lerp(trained(policy)[name].detach().float(), share)
        torch.testing.assert_close(value.float(), expected, rtol=0.01, atol=2e-3)
        assert (value != start[name]).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_holds_the_average_itself(make_policy, dtype, tmp_path):
    policy = make_policy(dtype)
    teacher = CopiedTeacher(policy, EMA(0.001), unwrapped)
    move(policy, 0.25)
    for step in range(7):
        teacher.on_step_end(step)
    teacher.save(tmp_path, is_main_process=True)
    restored_policy = make_policy(dtype)
    restored = CopiedTeacher(restored_policy, EMA(0.001), unwrapped)
    restored.load(tmp_path)
    found = teachers(restored_policy, restored)
    for name, value in teachers(policy, teacher).items():
        assert torch.equal(found[name], value)
    for target, source in zip(trained(restored_policy).values(), trained(policy).values(), strict=True):
        target.data.copy_(source.data)

    for both in (teacher, restored):
        for step in range(200):  # what bf16 weights have lost would show up by now
            both.on_step_end(step)

    found = teachers(restored_policy, restored)
    for name, value in teachers(policy, teacher).items():
        assert torch.equal(found[name], value)
