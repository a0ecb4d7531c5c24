"""The teacher reads the prompt that several rollouts share once, and scores them as if it had not."""

import pytest
import torch
from peft import LoraConfig
from tiny import make_model
from transformers import Lfm2Config, Lfm2ForCausalLM

from trl_opsd import SelfDistillationTrainer


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
        with trainer.teacher.weights(trainer.model) as module:
            states, _ = trainer.loss.networks.teacher_states(
                module, ids, mask, batch["divergence_mask"].bool(), groups
            )
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
            trainer.loss.networks.can_share_prompts = share
            trainer.train()
            weights.append(trainer.model.state_dict())
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


def embeddings_of(trainer):
    with trainer.teacher.weights(trainer.model) as teacher:
        return [teacher.get_input_embeddings()]
