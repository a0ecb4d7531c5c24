"""The teacher reads the prompt that several rollouts share once, and scores them as if it had not."""

import gc

import pytest
import torch
from flash_attention import FlashAttention, use_flash_attention
from peft import LoraConfig
from placement import place
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from trl_opsd.scoring import can_share_prompts, pays_off, positions, states_with_shared_prompts


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2))


def gemma3():
    """Five layers with a sliding window, then one without."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 6}, sliding_window=6))


def llama(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))


SHARING = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "qwen3-eager": lambda: Qwen3ForCausalLM._from_config(Qwen3Config(**SIZES), attn_implementation="eager"),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "gemma3-sliding": gemma3,
    "gpt2": gpt2,
    "llama-linear-rope": lambda: llama("linear"),
}
NOT_SHARING = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2)),
    "llama-dynamic-rope": lambda: llama("dynamic"),
    "llama-longrope": lambda: llama("longrope"),
}


@pytest.fixture
def batch():
    """Three prompts of different lengths, shared by 3, 1 and 2 rows in a mixed order; completions of 1 to 9 tokens."""
    torch.manual_seed(1)
    prompts = [torch.randint(1, 50, (length,)).tolist() for length in (13, 4, 20)]
    groups = [2, 0, 1, 0, 2, 0]
    ids, mask = [], []
    for row, group in enumerate(groups):
        completion = torch.randint(1, 50, ([9, 3, 1, 5, 2, 9][row],)).tolist()
        left, right = 20 - len(prompts[group]), 9 - len(completion)
        ids.append([0] * left + prompts[group] + completion + [0] * right)
        mask.append([0] * left + [1] * (len(prompts[group]) + len(completion)) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(groups) + 7


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_states_equal_those_of_whole_sequences(name, batch):
    ids, mask, groups = batch
    torch.manual_seed(0)
    model = place(SHARING[name]()).eval()
    assert can_share_prompts(model)
    backbone = model.base_model
    expected = backbone(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).last_hidden_state
    expected = expected[:, -10:-1]
    states = states_with_shared_prompts(backbone, ids, mask, 9, groups)
    selected = mask[:, -9:].bool()
    assert expected[selected].std() > 0.1
    torch.testing.assert_close(states[selected], expected[selected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "mistral-sliding", "gemma3-sliding"])
@torch.no_grad()
def test_states_equal_under_flash_attention(name, batch, monkeypatch):
    """Completions are fewer than the keys they attend to, and the prompts of a sliding window are cut."""
    flash = FlashAttention()
    flash.install(monkeypatch)
    ids, mask, groups = batch
    torch.manual_seed(0)
    model = place(SHARING[name]()).eval()
    selected = mask[:, -9:].bool()
    expected = states_with_shared_prompts(model.base_model, ids, mask, 9, groups)[selected]
    use_flash_attention(model)
    torch.testing.assert_close(
        states_with_shared_prompts(model.base_model, ids, mask, 9, groups)[selected], expected, rtol=1e-5, atol=1e-5
    )
    assert flash.boundaries[0] == [0, 20, 33, 37]
    assert flash.boundaries[-1] == [0, 9, 12, 13, 18, 20, 29]


def test_keys_and_values_are_let_go(model):
    ids = torch.zeros(4, 20, dtype=torch.int64, device=model.device)
    gc.collect()
    gc.disable()
    try:
        states_with_shared_prompts(model.model, ids, torch.ones_like(ids), 6, torch.zeros(4))
        assert not [one for one in gc.get_objects() if isinstance(one, DynamicLayer)]
    finally:
        gc.enable()


@pytest.mark.parametrize("name", NOT_SHARING)
def test_models_that_remember_more_than_keys_and_values_do_not_share(name):
    assert not can_share_prompts(NOT_SHARING[name]())


@pytest.mark.parametrize(
    ("num_rows", "num_prompts", "prompt", "completion", "expected"),
    [
        (8, 1, 2048, 256, True),
        (4, 1, 128, 128, True),
        (2, 1, 32, 32, False),  # a second pass costs more than 32 tokens
        (8, 1, 32, 512, False),  # 5 % of the tokens
        (8, 8, 2048, 256, False),
    ],
)
def test_shares_where_it_was_measured_to_be_faster(num_rows, num_prompts, prompt, completion, expected):
    shared = num_prompts * prompt + num_rows * completion
    assert pays_off(num_rows * (prompt + completion), shared) is expected


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "saved", "expected"),
    [
        (1024, 3072, 3500, False),  # Qwen3-0.6B
        (1024, 3072, 3700, True),
        (4096, 12288, 200, False),  # Qwen3-8B
        (4096, 12288, 300, True),
        (16384, 53248, 127, False),
    ],
)
def test_a_gpu_shares_where_a_layer_has_more_to_save_than_its_launches(
    hidden_size, intermediate_size, saved, expected
):
    config = Qwen3Config(hidden_size=hidden_size, intermediate_size=intermediate_size)

    assert pays_off(2 * saved, saved, config) is expected
