"""From the settings to the teacher."""

from types import SimpleNamespace

import pytest
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import make_model

from trl_opsd.teacher import make_teacher


@pytest.fixture
def make(tokenizer):
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None)

    def make(teacher, unfrozen=None, **lora):
        config = LoraConfig(**{"target_modules": ["q_proj"], **lora})
        policy = get_peft_model(make_model(tokenizer, attention_bias=True), config)
        if unfrozen is not None:
            policy.get_parameter(unfrozen).requires_grad_(True)
        return make_teacher(teacher, SimpleNamespace(state=state), policy, adapter_starts_at_zero=True)

    return make


def test_initial_policy_of_an_adapter_that_starts_at_zero_needs_no_copy(tokenizer):
    world = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None))
    for starts_at_zero, names in ((True, {"default"}), (False, {"default", "teacher"})):
        policy = get_peft_model(make_model(tokenizer), LoraConfig(target_modules=["q_proj"]))
        make_teacher("initial", world, policy, adapter_starts_at_zero=starts_at_zero)
        assert policy.peft_config.keys() == names


@pytest.mark.parametrize("teacher", ["initial", "periodic", "ema"])
@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"bias": "lora_only"}, r"layers\.0\.self_attn\.q_proj\.base_layer\.bias'"),
        ({"unfrozen": "base_model.model.model.norm.weight"}, r"base_model\.model\.model\.norm\.weight'"),
    ],
)
def test_base_model_that_trains_is_refused(make, teacher, settings, trained):
    """The teacher would drift with it: one that is to be the initial policy, too."""
    with pytest.raises(ValueError, match=rf"`teacher='{teacher}'` shares .*{trained} is trained .* `bias=\"none\"`"):
        make(teacher, **settings)
    make("live", **settings)


@pytest.mark.parametrize("teacher", ["initial", "periodic", "ema"])
@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}, {"use_dora": True}, {"lora_bias": True}],
    ids=str,
)
def test_all_that_belongs_to_an_adapter_may_train(make, teacher, settings):
    make(teacher, **settings)


@pytest.mark.parametrize("teacher", ["periodic", "ema"])
def test_adapters_that_can_have_no_twin_are_refused(tokenizer, teacher):
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    policy = get_peft_model(make_model(tokenizer), config)
    world = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None))
    with pytest.raises(ValueError, match=rf"`teacher='{teacher}'` needs a second adapter .*AdaLora.*`teacher='live'`"):
        make_teacher(teacher, world, policy)
