"""What must hold for the loss and its gradient, on rollouts that are fixed so that only the trainer varies."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model

from trl_opsd import OPSDConfig, OPSDTrainer, SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.objective import pointwise_divergence
from trl_opsd.scoring import completion_states


LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
SAME_CONTEXT = {"privileged_context": "template", "context_kwargs": {"template": "{prompt}"}}


def fixed_rollouts(prompts, trainer):
    """Completions of different lengths that depend on nothing but the prompt."""
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    tokenizer = trainer.processing_class
    completions = [tokenizer(f"It is {text[8:]}", add_special_tokens=False)["input_ids"] for text in texts]
    completions = [ids[: 3 + sum(ids) % 5] for ids in completions]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": completions, "logprobs": None}


@pytest.fixture(autouse=True)
def _quiet_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(model, trainer_class=SelfDistillationTrainer, peft_config=None, train_dataset=dataset, **settings):
        args = trainer_class.config_class(**{"shuffle_dataset": False, **training_args, **settings})
        return trainer_class(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            rollout_func=fixed_rollouts,
        )

    return make


def loss_of(trainer, rows, **extra_inputs):
    """Loss of a batch as the training step computes it, and its gradient."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`
    batch = trainer._generate_and_score_completions(list(rows))
    loss = trainer._compute_loss(trainer.model, {**batch, **extra_inputs})
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def dense_token_losses(trainer, row, temperature):
    """Token losses of one row from whole logits, without any padding, each side by itself."""
    tokenizer, model = trainer.processing_class, trainer.model
    rollout = fixed_rollouts([row["prompt"]], trainer)
    completion = rollout["completion_ids"][0]
    log_probs = []
    for prompt_ids in (rollout["prompt_ids"][0], trainer.teacher_prompt.token_ids(row, None)):
        logits = model(torch.tensor([prompt_ids + completion])).logits[0, len(prompt_ids) - 1 : -1]
        log_probs.append(torch.log_softmax(logits / temperature, dim=-1))
    assert tokenizer.decode(completion).startswith("It")
    entries, _ = pointwise_divergence(log_probs[0], log_probs[1].detach(), trainer.args.divergence)
    clip = trainer.args.divergence_clip
    return (entries if clip is None else entries.clamp(max=clip)).sum(-1)


def assert_same_gradients(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    scale = max(gradient.abs().max() for gradient in first.values())
    for name in first:
        assert (first[name] - second[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_no_loss_and_no_gradient_where_teacher_and_student_read_the_same(make_trainer, model, dataset, divergence):
    trainer = make_trainer(model, teacher="live", divergence=divergence, **SAME_CONTEXT)
    loss, gradients = loss_of(trainer, dataset.select(range(4)))
    assert abs(loss) < 1e-6
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-6


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", lambda tokens: torch.stack([t.mean() for t in tokens]).mean()),
        ("dapo", lambda tokens: torch.cat(tokens).mean()),
        ("bnpo", lambda tokens: torch.cat(tokens).mean()),
        ("dr_grpo", lambda tokens: torch.cat(tokens).sum() / (len(tokens) * 8)),
        ("luspo", lambda tokens: torch.stack([t.sum() for t in tokens]).mean()),
    ],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("clip", [None, 0.02])
def test_padded_batch_equals_unpadded_dense_formula(
    make_trainer, model, dataset, loss_type, expected, divergence, clip
):
    """Alignment on both sides, divergence, temperature, clip and aggregation, in one independent computation."""
    trainer = make_trainer(
        model, teacher="live", loss_type=loss_type, divergence=divergence, divergence_clip=clip, temperature=1.3
    )
    rows = dataset.select(range(4))
    prompt_lengths = {len(trainer.teacher_prompt.token_ids(row, None)) for row in rows}
    assert len(prompt_lengths) > 1
    loss, gradients = loss_of(trainer, rows)

    model.zero_grad()
    tokens = [dense_token_losses(trainer, row, temperature=1.3) for row in rows]
    assert len({len(t) for t in tokens}) > 1
    reference = expected(tokens)
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    assert_same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 1])
def test_importance_ratios_weight_the_tokens(make_trainer, model, dataset, per_token, max_tokens):
    rows = dataset.select(range(4))
    trainer = make_trainer(model, teacher="live", max_tokens_per_microbatch=max_tokens)
    tokens = [dense_token_losses(trainer, row, temperature=1.0) for row in rows]
    ratios = 0.25 + 2.0 * torch.rand(len(tokens), max(map(len, tokens)) if per_token else 1)
    reference = torch.stack([(ratio[: len(t)] * t).mean() for ratio, t in zip(ratios, tokens, strict=True)]).mean()
    reference.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_of(trainer, rows, importance_sampling_ratio=ratios)
    assert reference.item() != pytest.approx(torch.stack([t.mean() for t in tokens]).mean().item(), rel=1e-2)
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    assert_same_gradients(expected, gradients)


def test_gradient_depends_on_the_teacher(make_trainer, model, dataset):
    rows = list(dataset.select(range(4)))
    trainer = make_trainer(model, teacher="live")
    _, gradients = loss_of(trainer, rows)
    _, other = loss_of(trainer, [{**row, "solution": "no idea"} for row in rows])
    assert any((gradients[name] - other[name]).abs().max() > 1e-4 for name in gradients)


def test_batch_order_and_padding_do_not_change_the_gradient(make_trainer, model, dataset):
    rows = list(dataset.select(range(4)))
    trainer = make_trainer(model, teacher="live")
    loss, gradients = loss_of(trainer, rows)
    for other_rows, settings in ((rows[::-1], {}), (rows, {"pad_to_multiple_of": 64})):
        other_loss, other = loss_of(make_trainer(model, teacher="live", **settings), other_rows)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradients, other)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_do_not_change_training(make_trainer, model, loss_type):
    start = copy.deepcopy(model)
    weights = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            copy.deepcopy(start),
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[2][name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start.state_dict()[name], value) for name, value in weights[0].items())


@pytest.mark.parametrize("peft_config", [None, LORA])
@pytest.mark.parametrize("teacher", ["initial", "live", "periodic"])
def test_gradient_checkpointing_does_not_change_training(make_trainer, model, peft_config, teacher):
    """The backward pass recomputes the student's activations, not the teacher's."""
    start = copy.deepcopy(model)
    weights = []
    for gradient_checkpointing in (False, True):
        trainer = make_trainer(
            copy.deepcopy(start),
            peft_config=peft_config,
            teacher=teacher,
            gradient_checkpointing=gradient_checkpointing,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


def test_left_padding_of_position_dependent_models_is_harmless(make_trainer, tokenizer, dataset):
    """GPT-2 adds learned absolute positions, so shifted prompts would be read as other inputs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=2048, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, eos_token_id=3, bos_token_id=3,
        )
    )  # fmt: skip
    trainer = make_trainer(model, teacher="live")
    rows = dataset.select(range(4))
    loss, _ = loss_of(trainer, rows)
    with torch.no_grad():
        tokens = [dense_token_losses(trainer, row, temperature=1.0) for row in rows]
    assert loss == pytest.approx(torch.stack([t.mean() for t in tokens]).mean().item(), rel=1e-5)


def test_full_fine_tuning_leaves_the_initial_teacher_bit_identical(make_trainer, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model, trainer_class=OPSDTrainer, max_steps=3)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    with trainer.teacher.weights(trainer.model) as teacher:
        for name, value in teacher.state_dict().items():
            assert torch.equal(before[name], value), name
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_lora_shares_the_base_model_and_trains_the_adapter_only(make_trainer, model, dataset):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model, trainer_class=OPSDTrainer, peft_config=LORA, max_steps=3)
    ids = torch.tensor([trainer.preview_prompts()[1]])
    with torch.no_grad(), trainer.teacher.weights(trainer.model) as teacher:
        scores = teacher(ids).logits
    trainer.train()

    adapter = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert adapter
    assert all("lora_" in name for name in adapter)
    _, gradients = loss_of(trainer, dataset.select(range(4)))
    assert gradients.keys() == adapter
    base = {n.replace(".base_layer", ""): v for n, v in trainer.model.get_base_model().state_dict().items()}
    for name, value in before.items():
        assert torch.equal(base[name], value), name
    with torch.no_grad():
        with trainer.teacher.weights(trainer.model) as teacher:
            assert teacher is trainer.model
            assert torch.equal(teacher(ids).logits, scores)
        assert not torch.equal(trainer.model(ids).logits, scores)


def test_dropout_reaches_the_student_only(make_trainer, tokenizer, dataset):
    model = make_model(tokenizer, attention_dropout=0.5)
    trainer = make_trainer(model, teacher="live", **SAME_CONTEXT)
    batch = trainer._generate_and_score_completions(list(dataset.select(range(2))))
    selected = batch["divergence_mask"].bool()
    ids = torch.cat([batch["teacher_prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["teacher_prompt_mask"], batch["completion_mask"]], dim=1)
    model.train()
    first, _ = trainer.loss.networks.teacher_states(model, ids, mask, selected, batch["teacher_prompt_groups"])
    second, _ = trainer.loss.networks.teacher_states(model, ids, mask, selected, batch["teacher_prompt_groups"])
    assert torch.equal(first, second)
    assert model.training
    assert not torch.equal(completion_states(model, ids, mask, selected), first)


def test_loss_falls_when_training_on_fixed_rollouts(make_trainer, model, dataset):
    rows = Dataset.from_list([dataset[0]] * 4)
    trainer = make_trainer(model, train_dataset=rows, max_steps=20, learning_rate=3e-3)
    before, _ = loss_of(trainer, rows)
    trainer.train()
    after, _ = loss_of(trainer, rows)
    assert after < 0.5 * before


def test_defaults_train(tokenizer, dataset, tmp_path, device):
    """`OPSDConfig()` itself, but for the device and the number of tokens and steps."""
    settings = {"use_cpu": device.type == "cpu", "max_completion_length": 4, "max_steps": 1, "report_to": "none"}
    args = OPSDConfig(str(tmp_path), **settings)
    rows = Dataset.from_list(list(dataset) * 2)
    trainer = OPSDTrainer(make_model(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_generalized_jsd_loss_is_public():
    logits = torch.randn(2, 3, 5)
    assert SelfDistillationTrainer.generalized_jsd_loss(logits, logits).item() == pytest.approx(0.0, abs=1e-6)
    assert SelfDistillationConfig is SelfDistillationTrainer.config_class
