"""GRPO's own loss comes from the divergence's forward pass of the student, and is what it is in one of its own."""

import pytest
import torch
from peft import LoraConfig
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
MICRO_BATCHES = 3


def rollout(prompts, trainer):
    """Completions of 1 to 7 tokens."""
    ids = [[10 + (7 * index + token) % 40 for token in range(1 + 3 * index % 7)] for index in range(len(prompts))]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}


def letters(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(peft_config=None, train_dataset=dataset, **settings):
        defaults = {"per_device_train_batch_size": 8, "num_generations": 4, "policy_loss_coef": 0.7}
        trainer = SelfDistillationTrainer(
            model=make_model(tokenizer),
            reward_funcs=letters,
            args=SelfDistillationConfig(**{**training_args, "divergence_clip": 0.1, **defaults, **settings}),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            rollout_func=rollout,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = MICRO_BATCHES
        return trainer

    return make


@pytest.fixture
def rows(dataset):
    """Four rollouts of each of two prompts, of which the second is too long with its context."""
    return [dict(dataset[0], solution="5")] * 4 + [dict(dataset[1], solution="far too long " * 60)] * 4


SKIP_OVERLONG = {"max_teacher_prompt_length": 600, "overlong_teacher_prompt": "skip"}


def noisy(log_probs, seed):
    torch.manual_seed(seed)
    return log_probs + 0.3 * torch.randn_like(log_probs)


def make_batch(trainer, rows):
    """A micro-batch in which all is present that a loss may read, and some tokens of one row are not the student's."""
    batch = trainer._generate_and_score_completions(rows)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    log_probs, _ = trainer.loss.networks.log_probs(trainer.model, ids, mask, batch["completion_ids"].size(1), 8)
    for seed, name in enumerate(("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")):
        batch[name] = noisy(log_probs, seed)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    for row in (1, 5):
        batch["tool_mask"][row, 1:3] = 0
    batch["divergence_mask"] &= batch["tool_mask"].bool()
    batch["num_divergence_tokens"] = batch["divergence_mask"].sum().float()
    return batch


def loss_and_gradient(trainer, batch, compute_loss=None):
    trainer.model.zero_grad()
    loss = (compute_loss or trainer._compute_loss)(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def separate(trainer, batch):
    """The two losses in a forward pass each, on the whole micro-batch."""
    trainer.grpo_loss.shares_pass = trainer.grpo_loss.takes_part = False
    networks = trainer.loss.networks
    max_tokens, networks.max_tokens = networks.max_tokens, None
    divergence = loss_and_gradient(trainer, batch)
    advantages = batch["advantages"] * trainer.args.policy_loss_coef
    policy = loss_and_gradient(
        trainer, {**batch, "advantages": advantages}, lambda *args: GRPOTrainer._compute_loss(trainer, *args)
    )
    trainer.grpo_loss.shares_pass = trainer.grpo_loss.takes_part = True
    networks.max_tokens = max_tokens
    trainer.statistics["train"].reduce(trainer.accelerator.gather)
    trainer.statistics["train"].take()
    assert policy[1].abs().max() > 1e-3 * divergence[1].abs().max() > 0
    return divergence, policy


def assert_is_sum(trainer, batch):
    divergence, policy = separate(trainer, batch)
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(divergence[0] + policy[0], rel=1e-5, abs=1e-6)
    expected = divergence[1] + policy[1]
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("max_tokens", [None, 500])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_is_the_sum_of_two_losses(make_trainer, rows, loss_type, level, peft_config, max_tokens):
    trainer = make_trainer(
        peft_config,
        loss_type=loss_type,
        importance_sampling_level=level,
        max_tokens_per_microbatch=max_tokens,
        **SKIP_OVERLONG,
    )
    batch = make_batch(trainer, rows)
    trainer.beta = trainer.args.beta = 0.1
    assert batch["divergence_mask"].any(1).tolist() == [True] * 4 + [False] * 4
    num_forwards = []
    one_pass = trainer.loss._student_loss
    trainer.loss._student_loss = lambda *args: num_forwards.append(1) or one_pass(*args)
    assert_is_sum(trainer, batch)
    assert len(num_forwards) == (2 if max_tokens is None else 6)  # that of the divergence alone is the first


@pytest.mark.parametrize(
    "changes",
    [
        {"off_policy_mask_threshold": 0.05},
        {"top_entropy_quantile": 0.5},
        {"use_vllm": True, "vllm_importance_sampling_correction": True},
        {"delta": 1.1},
        {"without_old": True, "beta": 0.0},
        {"advantages_of_tokens": True},
        {"temperature": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_whatever_grpo_reads(make_trainer, rows, loss_type, changes):
    settings = {name: changes[name] for name in ("delta", "temperature") if name in changes}
    trainer = make_trainer(loss_type=loss_type, **settings, **SKIP_OVERLONG)
    batch = make_batch(trainer, rows)
    trainer.beta = trainer.args.beta = changes.get("beta", 0.1)
    for name in changes.keys() - {"beta", "without_old", "advantages_of_tokens", *settings}:
        setattr(trainer, name, changes[name])
    if trainer.use_vllm:
        batch["importance_sampling_ratio"] = torch.rand_like(batch["old_per_token_logps"]) + 0.5
    if "without_old" in changes:
        del batch["old_per_token_logps"]
    if "advantages_of_tokens" in changes:
        batch["advantages"] = batch["advantages"].unsqueeze(1) * torch.rand_like(batch["old_per_token_logps"])
    assert_is_sum(trainer, batch)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_values_that_do_not_matter_are_not_computed(make_trainer, rows, loss_type, monkeypatch):
    """Ratios to the log-probabilities themselves are 1; a loss that is linear in them has to know them."""
    trainer = make_trainer(loss_type=loss_type)
    batch = trainer._generate_and_score_completions(rows)
    calls = []
    log_probs_of = trainer.loss.networks.log_probs_of
    monkeypatch.setattr(trainer.loss.networks, "log_probs_of", lambda *args: calls.append(1) or log_probs_of(*args))
    assert_is_sum(trainer, batch)
    assert len(calls) == (loss_type in ("cispo", "vespo"))


def test_rounding_takes_no_part_in_a_ratio(make_trainer, rows, monkeypatch):
    """In half precision, log-probabilities computed in two ways differ by hundredths."""
    trainer = make_trainer(num_iterations=2)
    trainer.model.to(torch.bfloat16)
    batch = trainer._generate_and_score_completions(rows)
    found = []
    log_probs_of = trainer.loss.networks.log_probs_of
    monkeypatch.setattr(
        trainer.loss.networks, "log_probs_of", lambda *args: found.append(log_probs_of(*args)) or found[-1]
    )
    loss_and_gradient(trainer, batch)
    difference = (found[0][0] - batch["old_per_token_logps"]) * batch["completion_mask"]
    assert found[0][0].std() > 0.1
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize(("loss_type", "level"), [("grpo", "token"), ("bnpo", "sequence"), ("cispo", "token")])
def test_what_grpo_logs_is_that_of_the_whole_micro_batch(make_trainer, rows, loss_type, level):
    trainer = make_trainer(loss_type=loss_type, importance_sampling_level=level, **SKIP_OVERLONG)
    batch = make_batch(trainer, rows)
    trainer.beta = trainer.args.beta = 0.1
    logged = []
    for max_tokens in (None, 500):
        trainer.loss.networks.max_tokens = max_tokens
        trainer.accelerator.sync_gradients = True
        trainer._compute_loss(trainer.model, dict(batch))
        logged.append(trainer.statistics["train"].take())
    trainer._metrics["train"].clear()
    GRPOTrainer._compute_loss(trainer, trainer.model, dict(batch, advantages=0.7 * batch["advantages"]))
    expected = {name: value for name, (value,) in trainer._metrics["train"].items() if name != "entropy"}
    assert expected.keys() >= {"kl", "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/low_min"}
    for values in logged:
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("max_tokens", [None, 500])
@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2, "num_iterations": 2}, {"beta": 0.1}], ids=str)
def test_training_is_that_of_a_forward_pass_of_its_own(make_trainer, dataset, settings, max_tokens):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, **settings}
    trainers = [
        make_trainer(LORA, dataset, **settings, max_tokens_per_microbatch=limit) for limit in (max_tokens, None)
    ]
    trainers[1].grpo_loss.shares_pass = False
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
    for one, other in zip(*(trainer.state.log_history for trainer in trainers), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "entropy", "distillation_loss", "kl", "clip_ratio/region_mean"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for name, value in trainers[0].model.state_dict().items():
        torch.testing.assert_close(value, trainers[1].model.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_evaluation_reports_the_loss_of_both(make_trainer, rows, loss_type):
    trainer = make_trainer(loss_type=loss_type)
    trainer.model.eval()
    with torch.no_grad():
        batch = trainer._generate_and_score_completions(rows)
        both = trainer._compute_loss(trainer.model, batch).item()
        trainer.grpo_loss.shares_pass = False
        apart = trainer._compute_loss(trainer.model, batch).item()
        trainer.grpo_loss.takes_part = False
        divergence = trainer._compute_loss(trainer.model, batch).item()
    assert both == pytest.approx(apart, rel=1e-5)
    assert abs(both - divergence) > 1e-4


@pytest.mark.parametrize(
    ("settings", "shared"),
    [({}, True), ({"distillation_temperature": 0.5}, False), ({"entropy_coef": 0.1}, False)],
    ids=str,
)
def test_where_a_second_pass_stays(make_trainer, rows, settings, shared):
    trainer = make_trainer(**settings)
    assert trainer.grpo_loss.shares_pass is shared
    widths = []
    trainer.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: torch.is_grad_enabled() and widths.append(args[0].shape)
    )
    batch = trainer._generate_and_score_completions(rows)
    loss_and_gradient(trainer, batch)
    assert len(widths) == (1 if shared else 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_temperature": 0.5}, "`distillation_temperature=0.5`"),
        ({"entropy_coef": 0.1}, "`entropy_coef=0.1`"),
        ({"top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2`"),
    ],
)
def test_passes_are_refused_where_the_whole_micro_batch_is_needed(make_trainer, settings, message):
    with pytest.raises(ValueError, match=f"`max_tokens_per_microbatch=500` cannot be combined with {message}"):
        make_trainer(max_tokens_per_microbatch=500, **settings)
