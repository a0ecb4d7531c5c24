"""Models of every family that people train, tiny and random: loss and gradient are those of a plain loop."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from placement import place
from plain_loop import Method, Row, loss_and_gradient, plain, probabilities

from trl_opsd import OPSDConfig, RLSDConfig, SelfDistillationTrainer


SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
FAMILIES = {
    "Qwen3": {},
    "Qwen3Moe": EXPERTS,
    "Llama": {},
    "SmolLM3": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3": {"config": "Gemma3Text", "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Mistral": {"sliding_window": 8},
    "Phi3": {"original_max_position_embeddings": 2048},  # Phi-4's
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "Glm4Moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "Cohere2": {"logit_scale": 0.3, "sliding_window": 8},
    "Granite": {"logits_scaling": 3.0},
    "FalconH1": STATES,
    "NemotronH": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
        "moe_intermediate_size": 16,
    },
    "Mamba": {"state_size": 8},
}

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "in_proj", "x_proj"]
COMPLETIONS = [[40, 12, 77, 3], [9, 81, 33, 54, 20, 66, 3], [25, 3], [17, 92, 45, 60, 31]]
REWARDS = [0.0, 1.0, 1.0, 0.0]
METHODS = {
    "opsd": (OPSDConfig, {}, Method("forward_kl", clip=0.05, temperature=1.1)),
    "rlsd": (
        RLSDConfig,
        {"num_generations": 2},
        Method(divergence_coef=0.0, policy_loss_coef=1.0, epsilon_high=0.28, loss_type="dapo"),
    ),
}


def make(family, tokenizer):
    torch.manual_seed(0)
    settings = dict(FAMILIES[family])
    config_class = getattr(transformers, f"{settings.pop('config', family)}Config")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**SIZES, **special, **settings}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return place(model)


def rollout(prompts, trainer):
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": COMPLETIONS, "logprobs": None}


def with_the_teacher(student, teacher, row, advantage):
    """RLSD's, by hand: λ = 1/2, ε = 0.2."""
    token_ids = torch.tensor(row.completion)[:, None]
    with torch.no_grad():
        p_s, p_t = (
            probabilities(plain(model), prompt, row.completion, 1.0).gather(1, token_ids)[:, 0]
            for model, prompt in ((student, row.prompt), (teacher, row.teacher_prompt))
        )
    ratio = p_t / p_s if advantage > 0 else p_s / p_t
    return [advantage * (0.5 + 0.5 * value) for value in ratio.clamp(0.8, 1.2).tolist()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_dense_formula(tokenizer, dataset, training_args, monkeypatch, family, trained, method):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    config_class, settings, formula = METHODS[method]
    teacher = make(family, tokenizer)
    trainer = SelfDistillationTrainer(
        make(family, tokenizer),
        reward_funcs=None if method == "opsd" else lambda completions, **kwargs: REWARDS,
        args=config_class(**{**training_args, **settings, "router_aux_loss_coef": 0.0}),  # it is none of the formula's
        train_dataset=dataset,
        processing_class=tokenizer,
        rollout_func=rollout,
        peft_config=LoraConfig(r=2, target_modules=LINEAR) if trained == "lora" else None,
    )
    model = trainer.model
    assert isinstance(model, PeftModel) == (trained == "lora")
    generator = torch.Generator().manual_seed(1)
    learns = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in learns.values():
        value.data += 0.05 * torch.randn(value.shape, generator=generator).to(value.device)
    data = [dataset[index] for index in (0, 0, 1, 1)]
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, trainer._generate_and_score_completions(data))
    loss.backward()

    rows = []
    for row, completion, reward in zip(data, COMPLETIONS, REWARDS, strict=True):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False, **(trainer.args.chat_template_kwargs or {})
        )
        made = Row(prompt, trainer.teacher_prompt.token_ids(row, None), completion)
        if method == "rlsd":
            made.advantage = with_the_teacher(model, teacher, made, (reward - 0.5) / (0.5**0.5 + 1e-4))
        rows.append(made)
    expected_loss, expected = loss_and_gradient(model, teacher, rows, formula)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-3, abs=1e-5)
    largest = max(expected[name].abs().max() for name in learns if name in expected).item()
    assert largest > 1e-5
    for name, value in learns.items():
        if name in expected:
            torch.testing.assert_close(value.grad.double(), expected[name], rtol=1e-2, atol=1e-4 * largest, msg=name)
        else:
            assert value.grad is None or not value.grad.any(), name
