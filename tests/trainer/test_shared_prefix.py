"""The teacher reads the prompt that several rollouts share once, and scores them as if it had not."""

import pytest
import torch
from peft import LoraConfig
from tiny import make_model
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

from trl_opsd import SelfDistillationTrainer
from trl_opsd.trainer.shared_prefix import can_share_prompts, pays_off, positions, states_with_shared_prompts


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
def test_states_equal_those_of_whole_sequences(name, batch, device):
    ids, mask, groups = batch
    torch.manual_seed(0)
    model = SHARING[name]().to(device).eval()
    assert can_share_prompts(model)
    backbone = model.base_model
    expected = backbone(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).last_hidden_state
    expected = expected[:, -10:-1]
    states = states_with_shared_prompts(backbone, ids, mask, 9, groups)
    selected = mask[:, -9:].bool()
    assert expected[selected].std() > 0.1
    torch.testing.assert_close(states[selected], expected[selected], rtol=1e-5, atol=1e-5)


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


class TestTeacher:
    @pytest.fixture(autouse=True)
    def _quiet_rollout_func(self, monkeypatch):
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    @pytest.fixture
    def make_trainer(self, tokenizer, dataset, training_args):
        def rollout(prompts, trainer):
            completions = [[10 + i, 11, *range(20, 20 + i % 4)] for i, _ in enumerate(prompts)]
            prompt_ids = trainer._tokenize_prompts(prompts)[0]
            return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

        def make(model, peft_config=None, **settings):
            return SelfDistillationTrainer(
                model=model,
                args=SelfDistillationTrainer.config_class(**{**training_args, **settings}),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=peft_config,
                rollout_func=rollout,
            )

        return make

    @staticmethod
    def teacher_states(trainer, rows, groups=None):
        """The teacher's states for a batch, and the number of tokens its backbone processed for them."""
        trainer.model.train()
        batch = trainer._generate_and_score_completions(rows)
        ids = torch.cat([batch["teacher_prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["teacher_prompt_mask"], batch["completion_mask"]], dim=1)
        groups = batch["teacher_prompt_groups"] if groups is None else groups
        processed = []

        def count(module, args):
            processed.append(args[0].numel())

        hooks = [m.register_forward_pre_hook(count) for m in embeddings_of(trainer)]
        states, _ = trainer._teacher_states(trainer.model, ids, mask, batch["loss_mask"].bool(), groups)
        for hook in hooks:
            hook.remove()
        return states, sum(processed), ids.numel()

    @pytest.mark.parametrize("gradient_checkpointing", [False, True])
    @pytest.mark.parametrize(
        ("teacher", "peft_config"),
        [("initial", LORA), ("initial", None), ("live", LORA), ("live", None), ("periodic", LORA)],
    )
    def test_scores_equal_and_tokens_drop(
        self, make_trainer, model, dataset, teacher, peft_config, gradient_checkpointing
    ):
        trainer = make_trainer(
            model, peft_config, teacher=teacher, num_generations=4, gradient_checkpointing=gradient_checkpointing
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)  # so that reading with the wrong adapter is seen
        rows = [dataset[index] for index in (0, 1, 2, 0, 0, 1, 0, 2)]
        shared, num_shared, num_padded = self.teacher_states(trainer, rows)
        apart, num_apart, _ = self.teacher_states(trainer, rows, groups=torch.arange(8))
        torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)
        assert num_apart == num_padded
        assert num_shared == num_padded - 5 * (num_padded // 8 - 5)  # three prompts instead of eight
        assert trainer.model.training

    def test_hybrid_model_reads_whole_sequences(self, make_trainer, tokenizer, dataset):
        torch.manual_seed(0)
        config = Lfm2Config(
            **{**SIZES, "vocab_size": len(tokenizer)},
            layer_types=["conv", "full_attention"] * 2,
            eos_token_id=tokenizer.eos_token_id,
        )
        trainer = make_trainer(Lfm2ForCausalLM(config), teacher="live", num_generations=4, max_steps=1)
        _, num_processed, num_padded = self.teacher_states(trainer, [dataset[0]] * 4)
        assert num_processed == num_padded
        trainer.train()

    def test_training_is_the_same(self, make_trainer, tokenizer, monkeypatch):
        weights = []
        for share in (True, False):
            trainer = make_trainer(make_model(tokenizer), num_generations=4, optim="sgd", learning_rate=0.1)
            trainer._can_share_prompts = share
            trainer.train()
            weights.append(trainer.model.state_dict())
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


def embeddings_of(trainer):
    with trainer.teacher.weights(trainer.model) as teacher:
        return [teacher.get_input_embeddings()]
