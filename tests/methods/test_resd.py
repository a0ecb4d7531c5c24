from dataclasses import replace

import pytest
import torch
from methods.stand_ins import Sampler, begins_with_r
from three_tokens import make_batch
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import RESDConfig, SelfDistillationTrainer
from trl_opsd.methods.resd import BySuccess


def weights_of(*correct, **kwargs):
    mask = torch.ones(len(correct), 2, dtype=torch.bool)
    return BySuccess(**kwargs)(make_batch(mask, correct=torch.tensor(correct)), None).flatten().tolist()


def test_exact_values():
    assert weights_of(True, False, False, False) == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    assert weights_of(True, False, False, False, success_power=2.0) == pytest.approx(
        [1.714286, *[0.761905] * 3], abs=1e-5
    )
    assert weights_of(True, False, False, False, failure_power=0.0) == pytest.approx([0.8, *[16 / 15] * 3])


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("correct", [True, False])
def test_all_alike_weigh_the_same(number, correct):
    assert weights_of(*[correct] * number) == pytest.approx([1.0] * number)


def test_share_of_successes_is_that_of_all_processes():
    """Of which there are two with the same rollouts, and one without a success."""
    mask = torch.ones(2, 2, dtype=torch.bool)
    batch = make_batch(mask, correct=torch.tensor([True, False]), gather=lambda own: torch.cat([own, own * 0]))
    found = BySuccess()(batch, None)
    assert found[0] / found[1] == pytest.approx(3.0)  # 1 − s to s, with s a quarter


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    sampler = Sampler(tokenizer)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args, **kwargs: (sampler(prompt_ids), None)
    )

    def make(**settings):
        settings = {"per_device_train_batch_size": 8, "max_completion_length": 8, "warmup_steps": 0, **settings}
        settings = {"context_kwargs": {"max_new_tokens": 8}, **settings}
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=begins_with_r,
            args=RESDConfig(**{**training_args, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def test_the_playbook_is_what_reflections_said(make_trainer, tmp_path):
    """It is read a batch later, is no part of evaluations, and goes into the checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(**settings)
    encode, end = trainer.processing_class, trainer.processing_class.eos_token_id

    def reflect(prompts, *args, **kwargs):
        return [[*encode(f"It jumps.\nLESSON: Check {trainer.state.global_step}.")["input_ids"], end] for _ in prompts]

    trainer.teacher_inputs = replace(trainer.teacher_inputs, sample=reflect)
    trainer.train()
    assert [lesson["text"] for lesson in trainer.context.lessons] == ["Check 0.", "Check 1."]
    resumed = make_trainer(**settings)
    resumed.run_state.load(tmp_path / "run" / "checkpoint-1")
    assert [lesson["text"] for lesson in resumed.context.lessons] == ["Check 0."]

    before = trainer.context.state_dict()
    trainer.model.eval()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in range(8)])
    assert trainer.context.state_dict() == before
    for ids in batch["teacher_prompt_ids"]:
        assert "1. Check 0.\n2. Check 1." in trainer.processing_class.decode(ids)
