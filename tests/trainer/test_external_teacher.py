"""An external teacher has a dtype and a quantisation of its own."""

from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.teacher import make_teacher


@pytest.fixture
def make_args(tokenizer, training_args, tmp_path):
    """Settings with a teacher that was saved in bf16."""
    path = str(tmp_path / "external")
    make_model(tokenizer, seed=5, hidden_size=48).bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)

    def make(**settings):
        return SelfDistillationConfig(**training_args, teacher="external", teacher_model_name_or_path=path, **settings)

    return make


@pytest.mark.parametrize(
    ("kwargs", "dtype"), [(None, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)], ids=["default", "bf16"]
)
def test_dtype(kwargs, dtype, make_args, model, tokenizer, dataset):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = make_args(teacher_model_init_kwargs=kwargs)
    trainer = SelfDistillationTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

    with trainer.teacher.weights(trainer.model) as teacher:
        assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert min(losses) > 0.1
    for name, value in trainer.model.state_dict().items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(("offloads", "fsdp"), [(True, None), (False, SimpleNamespace())], ids=["offload", "fsdp"])
def test_quantised_weights_are_neither_offloaded_nor_sharded(offloads, fsdp, model, monkeypatch):
    loaded = SimpleNamespace(is_quantized=True)
    monkeypatch.setattr("trl_opsd.teacher.make.create_model_from_path", lambda *args, **kwargs: loaded)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=None))
    with pytest.raises(ValueError, match=r"quantised teacher .*drop `quantization_config` from `teacher_model_init_k"):
        make_teacher("external", accelerator, model, model_name_or_path="a model", offloads=offloads)


def padded(model, num_tokens):
    """The same model with more rows than the tokenizer has tokens, whose logits are not small."""
    before = len(model.lm_head.weight)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for index, row in enumerate(model.lm_head.weight.data[before:]):
        row.copy_(torch.arange(len(row)).mul(1 + index).cos())
    return model


def rollout(prompts, trainer):
    ids = trainer._tokenize_prompts(prompts)[0]
    return {
        "prompt_ids": ids,
        "completion_ids": [[40 + index, 12, 77, 3] for index in range(len(ids))],
        "logprobs": None,
    }


@pytest.mark.parametrize(("policy_size", "teacher_size"), [(106, 128), (120, 106), (120, 128)])
def test_padding_of_a_vocabulary_is_left_out(
    policy_size, teacher_size, tokenizer, dataset, training_args, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def trained_with(sizes):
        path = str(tmp_path / str(sizes))
        padded(make_model(tokenizer, seed=5), sizes[1]).save_pretrained(path)
        tokenizer.save_pretrained(path)
        args = SelfDistillationConfig(**training_args, teacher="external", teacher_model_name_or_path=path)
        policy = padded(make_model(tokenizer), sizes[0])
        trainer = SelfDistillationTrainer(
            policy, args=args, train_dataset=dataset, processing_class=tokenizer, rollout_func=rollout
        )
        trainer.train()
        return trainer.state.log_history[0]["loss"], trainer.model.state_dict()

    loss, trained = trained_with((policy_size, teacher_size))
    assert f"over {teacher_size} tokens and the policy over {policy_size}; their tokenizer has 106" in caplog.text
    assert caplog.text.count("is padding") == 1  # and not at every step
    caplog.clear()
    least = min(policy_size, teacher_size)
    expected_loss, expected = trained_with((least, least))
    assert "padding" not in caplog.text
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name][: len(value)], value, msg=name)
