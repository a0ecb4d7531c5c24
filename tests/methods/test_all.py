"""Every method, on a tiny model whose rollouts are made up: that it trains, by its formula, and resumes."""

import copy
import math

import pytest
import torch
from methods.stand_ins import STAND_INS, Sampler, Seen, begins_with_r, feedback_on
from plain_loop import Row, loss_and_gradient, plain, probabilities
from rollouts import make_rollouts
from tiny import make_model
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import SelfDistillationTrainer, cli
from trl_opsd.context import Rollouts
from trl_opsd.methods import METHODS, config_class


SMALL = {
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
WITHOUT_A_CONTEXT = {"teacher": "live", "privileged_context": "none", "context_kwargs": None}
WITHOUT_A_CONTEXT |= {"teacher_update_steps": None, "teacher_update_rate": None}
REWARDED = [name for name, stand_in in STAND_INS.items() if stand_in.has_reward]


@pytest.fixture
def sampler(tokenizer, monkeypatch):
    """Completes all prompts, also those of TRL's trainer."""
    sampler = Sampler(tokenizer)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args, **kwargs: (sampler(prompt_ids), None)
    )
    return sampler


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, sampler):
    def make(name, **settings):
        stand_in = STAND_INS[name]
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=begins_with_r if stand_in.has_reward else None,
            args=config_class(name)(**{**training_args, **SMALL, **stand_in.settings, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def are_equal(one, other):
    assert one.keys() == other.keys()
    return all(value.equal(other[name]) for name, value in one.items())


def logged(trainer):
    """What each step logged, without what a clock says."""
    return [
        {name: value for name, value in entry.items() if "time" not in name}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def rows_for(trainer):
    """A generation batch. Among groups, there is one with two right rollouts, one with one and one with none."""
    if trainer.args.num_generations == 1:
        return [trainer.train_dataset[index] for index in range(8)]
    return [trainer.train_dataset[index] for index in (0, 2, 3) for _ in range(4)]


def batch_of(trainer, rows):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(rows)


def gradient_of(trainer, batch):
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in trainer.model.named_parameters()}


def size(gradient):
    return max(0.0 if value is None else value.abs().max().item() for value in gradient.values())


def count_teacher_passes(trainer):
    networks, passes = trainer.loss.networks, []
    targets = networks.targets
    networks.targets = lambda *args: passes.append(trainer.state.global_step) or targets(*args)
    return passes


def test_there_is_a_stand_in_for_every_method():
    assert STAND_INS.keys() == METHODS.keys()


# That it trains


@pytest.mark.parametrize("name", METHODS)
def test_trains(make_trainer, name, tmp_path):
    trainer, method = make_trainer(name), config_class(name).method
    before = weights(trainer)
    steps = logged(trained(trainer))
    assert len(steps) == 2
    for entry in steps:
        assert math.isfinite(entry["loss"])
        assert entry["grad_norm"] > 1e-5
        assert entry.keys() >= set(STAND_INS[name].metrics)
        assert ("reward" in entry) == STAND_INS[name].has_reward
    assert all(not value.equal(before[key]) for key, value in weights(trainer).items())

    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"trained with {method.name}, a method introduced in [{method.title}]" in card
    assert f"https://huggingface.co/papers/{method.paper}" in card
    assert method.citation.splitlines()[0] in card
    assert trainer.model.model_tags[:2] == ["trl", "trl-opsd"]
    assert method.name.lower() in trainer.model.model_tags


@pytest.mark.parametrize("name", METHODS)
def test_has_a_command(name, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith(f"usage: trl-opsd {name} ")


# That its loss is the formula's


def shifted(model, seed):
    """The model after some training, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def grpo_advantages(rewards, num_generations):
    if num_generations == 1:
        return [0.0] * len(rewards)
    groups = torch.tensor(rewards).view(-1, num_generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def read_by_the_teacher(trainer, sampler, rows, texts, rewards):
    """Prompts that are made from rollouts that this file knows."""
    size, prompts, feedback = trainer.args.num_generations, [], list(map(feedback_on, texts))
    for index, row in enumerate(rows):
        start = index - index % size
        group = make_rollouts(*(values[start : start + size] for values in (rewards, texts, feedback)))
        rollouts = Rollouts(group, index % size)
        asked = trainer.teacher_prompt.sample_ids(row, rollouts)
        told = (
            None if asked is None else trainer.processing_class.decode(sampler([asked])[0], skip_special_tokens=True)
        )
        prompts.append(trainer.teacher_prompt.token_ids(row, rollouts, None, told))
        if trainer.args.privileged_context == "peers":
            shows_feedback = "feedback" in trainer.args.context_kwargs and feedback[index] is not None
            others_are_right = any(peer.correct for peer in rollouts.others())
            assert (prompts[-1] is not None) == (others_are_right or shows_feedback)
    return prompts


def plain_rows(trainer, name, rows, sampler, sampled_by, read_by):
    """What a method trains on, made here. The models are those that sampled, and that the teacher had at that time."""
    tokenizer, stand_in, made = trainer.processing_class, STAND_INS[name], []
    templated = {"add_generation_prompt": True, "return_dict": False, **(trainer.args.chat_template_kwargs or {})}
    prompts = [tokenizer.apply_chat_template(row["prompt"], **templated) for row in rows]
    completions = sampler(prompts)
    if name == "star":
        completions = [again(trainer, sampler, *pair) for pair in zip(rows, completions, strict=True)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    rewards = [float(text.startswith("R")) for text in texts]
    advantages = grpo_advantages(rewards, trainer.args.num_generations)
    read = read_by_the_teacher(trainer, sampler, rows, texts, rewards)
    for prompt, teacher_prompt, ids, reward, advantage in zip(
        prompts, read, completions, rewards, advantages, strict=True
    ):
        token_ids, temperature = torch.tensor(ids)[:, None], stand_in.loss.temperature
        then, now = (probabilities(plain(model), prompt, ids, temperature) for model in (sampled_by, trainer.model))
        p_t = None if teacher_prompt is None else probabilities(read_by, teacher_prompt, ids, temperature)
        old, new = (p.gather(1, token_ids)[:, 0].log() for p in (then, now))
        seen = Seen(token_ids, reward == 1.0, advantage, (new - old).exp(), then, p_t)
        streams = {"advantage": advantage, **stand_in.formula(seen)}
        made.append(Row(prompt, teacher_prompt, ids, old_log_probs=old.tolist(), **streams))
    return made


def again(trainer, sampler, row, ids):
    """What STaR makes of a rollout that is wrong: a right retry, if there is one."""
    if sampler.tokenizer.decode(ids).startswith("R"):
        return ids
    [retry] = sampler([trainer.teacher_prompt.token_ids(row, None)])
    return retry if sampler.tokenizer.decode(retry).startswith("R") else ids


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_formula(make_trainer, sampler, name):
    """The policy has moved since the beginning when it samples, and once more before the loss."""
    trainer = make_trainer(name, num_iterations=2)
    initial, rows = plain(trainer.model), rows_for(trainer)
    shifted(trainer.model, 1)
    sampled_by = plain(trainer.model)
    read_by = sampled_by if STAND_INS[name].has_live_teacher else initial
    batch = batch_of(trainer, rows)
    shifted(trainer.model, 2)
    with torch.no_grad():
        made = plain_rows(trainer, name, rows, sampler, sampled_by, read_by)
    expected_loss, expected = loss_and_gradient(trainer.model, read_by, made, STAND_INS[name].loss)
    loss, gradient = gradient_of(trainer, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    assert gradient.keys() == expected.keys()
    assert size(expected) > 1e-3
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key].double(), value, rtol=1e-3, atol=1e-5 * size(expected), msg=key)


# That it is its parent algorithm where its own part is off
