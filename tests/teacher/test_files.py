"""Checkpoints of other weights are refused, by name."""

import pytest
import torch
from tiny import make_model

from trl_opsd.teacher import CopiedTeacher, Periodic


def make_teacher(tokenizer, **overrides):
    return CopiedTeacher(make_model(tokenizer, **overrides), Periodic(1), lambda model: model)


def test_checkpoint_without_a_teacher(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"holds no teacher\.safetensors"):
        make_teacher(tokenizer).load(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"intermediate_size": 80}, r"'model\.layers\.0\.mlp\.down_proj\.weight' has the shape \(32, 64\) there"),
        ({"num_hidden_layers": 1}, r"and None here \(11 differ in all"),
    ],
)
def test_checkpoint_of_another_model(tokenizer, tmp_path, overrides, message):
    make_teacher(tokenizer).save(tmp_path, is_main_process=True)
    with pytest.raises(ValueError, match=message):
        make_teacher(tokenizer, **overrides).load(tmp_path)


def test_only_the_main_process_writes(tokenizer, tmp_path):
    make_teacher(tokenizer).save(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_weights_come_back(tokenizer, tmp_path):
    make_teacher(tokenizer, seed=3).save(tmp_path, is_main_process=True)
    teacher = make_teacher(tokenizer, seed=4)
    teacher.load(tmp_path)
    with teacher.weights(None) as model:
        for name, value in make_model(tokenizer, seed=3).state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
