"""An offloaded teacher is the same teacher, and holds no weights on the device between its passes."""

import pytest
import torch
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


@pytest.fixture
def train(tokenizer, dataset, training_args, tmp_path):
    make_model(tokenizer, seed=5, hidden_size=48).save_pretrained(tmp_path / "external")
    tokenizer.save_pretrained(tmp_path / "external")

    def run(teacher, **settings):
        if teacher == "external":
            settings["teacher_model_name_or_path"] = str(tmp_path / "external")
        args = SelfDistillationConfig(**{**training_args, "max_steps": 4, "teacher": teacher, **settings})
        # Tied embeddings: the head is the same tensor as the embedding
        model = make_model(tokenizer, tie_word_embeddings=True)
        trainer = SelfDistillationTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        return trainer

    return run


def result(trainer):
    names = ("loss", "distillation_loss", "teacher_entropy", "grad_norm")
    metrics = [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in names]
    return metrics, trainer.model.state_dict()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("teacher", ["initial", "periodic", "ema", "external"])
@pytest.mark.parametrize("num_generations", [1, 4])  # rollouts of a prompt share the teacher's pass over it
def test_offloaded_teacher_is_the_same_teacher(teacher, num_generations, train):
    settings = {"teacher_update_steps": 2} if teacher == "periodic" else {}
    held = train(teacher, num_generations=num_generations, **settings)
    offloaded = train(teacher, num_generations=num_generations, teacher_offload=True, **settings)

    metrics, weights = result(offloaded)
    expected, expected_weights = result(held)
    assert metrics == expected
    for name, value in expected_weights.items():
        assert torch.equal(weights[name], value), name
    with offloaded.teacher.weights(offloaded.model) as module:
        assert all(parameter.is_meta for parameter in module.parameters())
    with held.teacher.weights(held.model) as module:
        assert not any(parameter.is_meta for parameter in module.parameters())
