"""A model whose logits are more than one matrix makes of its hidden states is refused, or read as it is."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from placement import place
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.scoring import check_logits, completion_states, head_of


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
READ = {
    "Llama4": {"config": "Llama4Text", "num_local_experts": 2, "intermediate_size_mlp": 48},
    "RecurrentGemma": {"num_hidden_layers": 3, "logits_soft_cap": 2.0},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Gemma3": {"config": "Gemma3Text", "final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "Phi": {},
    "Qwen3": {},
}
REFUSED = {
    "ModernBertDecoder": ("differ by up to", {}),
    "Electra": ("width", {"embedding_size": 24, "is_decoder": True}),
    "Mpt": ("differ by up to", {"logit_scale": 0.5}),
}


def make(family, config=None, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{config or family}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return place(model)


def check(model):
    check_logits(model, torch.empty(0).device)


@pytest.mark.parametrize("family", READ)
def test_logits_are_the_models_own(family):
    model = make(family, **READ[family])
    check(model)
    ids = torch.arange(6, 16)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        states, head = completion_states(model, ids, mask, mask[:, 1:].bool()), head_of(model)
        logits = head.finish.logits(states @ head.weight.T)
        torch.testing.assert_close(logits, model(ids).logits[0, :-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_other_architectures_are_refused_by_name(family):
    said, settings = REFUSED[family]
    with pytest.raises(ValueError, match=rf"{family}ForCausalLM cannot be trained.*{said}"):
        check(make(family, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_that_is_not_declared(tokenizer, dtype):
    class Scaled(transformers.Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return type(output)(logits=output.logits * 0.9)

    model = make_model(tokenizer).to(dtype)
    check(model)
    model.__class__ = Scaled
    with pytest.raises(ValueError, match="differ by up to"):
        check(model)


def test_logits_that_are_cut_off(tokenizer):
    class Cut(transformers.Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return type(output)(logits=output.logits[..., :90])

    model = make_model(tokenizer)
    model.__class__ = Cut
    with pytest.raises(ValueError, match="there are 106, and 90 of the model's"):
        check(model)


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 8]}, True),
    ],
)
def test_an_adapter_on_the_head(tokenizer, settings, tied):
    """It begins at zero, so no comparison would show that the loss does not read it."""
    policy = get_peft_model(make_model(tokenizer, tie_word_embeddings=tied), LoraConfig(**settings))
    with pytest.raises(ValueError, match=r"head of Qwen3ForCausalLM.*target_modules.*trainable_token_indices"):
        check(policy)


def test_a_head_that_is_trained_as_a_whole(tokenizer):
    policy = get_peft_model(make_model(tokenizer), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        policy.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    check(policy)
    check(get_peft_model(make_model(tokenizer), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7])))


@pytest.mark.parametrize("whose", ["policy", "teacher"])
def test_the_trainer_checks_policy_and_teacher(training_args, dataset, tokenizer, tmp_path, whose):
    other = make("ModernBertDecoder", vocab_size=len(tokenizer))
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"teacher": "external", "teacher_model_name_or_path": str(tmp_path)} if whose == "teacher" else {}
    args = SelfDistillationConfig(**training_args, **settings)
    model = other if whose == "policy" else make_model(tokenizer)
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM cannot be trained"):
        SelfDistillationTrainer(model, args=args, processing_class=tokenizer, train_dataset=dataset)


def test_a_backbone_that_gives_no_states(tokenizer):
    model = make_model(tokenizer)
    model.base_model_prefix = "transformer"  # which it has not
    check(model)
    model.transformer, model.base_model_prefix = torch.nn.Identity(), "transformer"
    with pytest.raises(ValueError, match=r"its backbone \(Identity\) does not give hidden states by itself"):
        check(model)


def test_a_backbone_of_another_name(training_args, dataset, tokenizer):
    """Llama 4's, which GRPOTrainer does not find where it runs a pass of its own, as to balance experts."""
    same_prompt = {"privileged_context": "template", "context_kwargs": {"template": "{prompt}"}}
    settings = {"save_strategy": "steps", "save_steps": 1, "num_generations": 2, "learning_rate": 0.0}

    def make_trainer(coefficient):
        model = make("Llama4", **{**READ["Llama4"], "vocab_size": len(tokenizer), "max_position_embeddings": 2048})
        args = {**training_args, **same_prompt, **settings, "router_aux_loss_coef": coefficient}
        args = SelfDistillationConfig(**args)
        return SelfDistillationTrainer(model, args=args, processing_class=tokenizer, train_dataset=dataset)

    with pytest.raises(ValueError, match=r"Llama4ForCausalLM can be trained, but .*router_aux_loss_coef=0.001"):
        make_trainer(0.001)
    trainer = make_trainer(0.0)
    trainer.train()
    assert trainer.state.log_history[0]["distillation_loss"] == pytest.approx(0.0, abs=1e-6)
    trainer.train(resume_from_checkpoint=f"{training_args['output_dir']}/checkpoint-1")
    assert trainer.state.global_step == 2
