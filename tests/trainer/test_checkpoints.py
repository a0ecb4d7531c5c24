"""A resumed run equals the uninterrupted one, bit for bit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import make_model

from trl_opsd import SelfDistillationTrainer


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    rows = Dataset.from_list(list(dataset) * 4)

    def make(lora=False, init_lora_weights=True, use_dora=False, **settings):
        args = SelfDistillationTrainer.config_class(
            **{
                **training_args,
                "save_strategy": "steps",
                "save_steps": 3,
                "max_steps": 7,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2,
                **settings,
            }
        )
        return SelfDistillationTrainer(
            model=make_model(tokenizer),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=4,
                lora_alpha=16,
                target_modules=["q_proj", "down_proj"],
                init_lora_weights=init_lora_weights,
                use_dora=use_dora,
            )
            if lora
            else None,
        )

    return make


def teacher_weights(trainer):
    with trainer.teacher.weights(trainer.model) as teacher, torch.no_grad():
        ids = torch.tensor([trainer.preview_prompts()[1]])
        return teacher(ids).logits.clone()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("teacher", [{"teacher": "initial"}, {"teacher": "periodic", "teacher_update_steps": 2}])
def test_resumed_equals_uninterrupted(make_trainer, lora, teacher):
    whole = make_trainer(lora=lora, **teacher)
    whole.train()
    resumed = make_trainer(lora=lora, **teacher)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))

    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert torch.equal(teacher_weights(whole), teacher_weights(resumed))
    for first, second in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        timed = {"step_time"}
        assert {k: v for k, v in first.items() if k not in timed} == {
            k: v for k, v in second.items() if k not in timed
        }


@pytest.mark.parametrize("lora", [False, True])
def test_periodic_teacher_is_the_policy_of_its_last_refresh(make_trainer, lora):
    trainer = make_trainer(lora=lora, teacher="periodic", teacher_update_steps=4, save_steps=4, max_steps=4)
    start = teacher_weights(trainer)
    trainer.train()
    with torch.no_grad():
        ids = torch.tensor([trainer.preview_prompts()[1]])
        policy = trainer.model.eval()(ids).logits
    assert torch.equal(teacher_weights(trainer), policy)
    assert not torch.equal(start, policy)

    trainer = make_trainer(lora=lora, teacher="periodic", teacher_update_steps=4, max_steps=3)
    trainer.train()
    assert torch.equal(teacher_weights(trainer), start)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": False, "use_dora": True}])
def test_adapter_that_does_not_start_at_zero_is_copied(make_trainer, settings):
    """Switching it off would not give back the initial policy."""
    trainer = make_trainer(lora=True, save_strategy="no", max_steps=3, **settings)
    ids = torch.tensor([trainer.preview_prompts()[1]])
    with torch.no_grad():
        initial = trainer.model.eval()(ids).logits
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(ids).logits, initial, atol=1e-3)
    assert torch.equal(teacher_weights(trainer), initial)
    trainer.train()
    assert torch.equal(teacher_weights(trainer), initial)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not [name for name in trained if "teacher" in name]


def test_checkpoint_contents(make_trainer, tokenizer):
    trainer = make_trainer(teacher="periodic", teacher_update_steps=2, max_steps=3)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    state = json.loads((checkpoint / "self_distillation_state.json").read_text())
    assert state == {"teacher": "periodic", "num_generated_tokens": trainer._num_generated_tokens}
    weights = load_file(checkpoint / "teacher.safetensors")
    assert weights.keys() == dict(trainer.model.named_parameters()).keys()
    reloaded = type(trainer.model).from_pretrained(checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value)


def test_resuming_with_another_teacher_is_refused(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    with pytest.raises(ValueError, match="cannot be resumed with `teacher='periodic'`"):
        make_trainer(teacher="periodic").train(
            resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3")
        )


def test_resuming_from_another_trainers_checkpoint_is_refused(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    (checkpoint / "self_distillation_state.json").unlink()
    with pytest.raises(ValueError, match="was not written by SelfDistillationTrainer"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))


def test_fsdp_copy_without_weights_is_refused(make_trainer, monkeypatch):
    """With RAM-efficient loading, only the first process has weights when the copy is made."""
    trainer = make_trainer()
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True))
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: true"):
        trainer._make_teacher(adapter_starts_at_zero=False)
