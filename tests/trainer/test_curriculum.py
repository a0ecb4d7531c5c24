"""Rows that are drawn by what became of them, and what tells prompts and groups apart."""

import pytest
import torch
from datasets import Dataset
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.trainer import signals
from trl_opsd.trainer.signals import _of_the_group, prompt_key, prompt_keys


def is_even(completions, answer, **kwargs):
    return [float(int(number) % 2 == 0) for number in answer]


@pytest.fixture
def trained(tokenizer, dataset, training_args, monkeypatch):
    drawn = []

    def turn(trainer, prompt_ids, *args, **kwargs):
        drawn.append([tokenizer.decode(ids) for ids in prompt_ids])
        return [tokenizer("a")["input_ids"] for _ in prompt_ids], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turn)

    def train(resume_from_checkpoint=None, train_dataset=dataset, **settings):
        drawn.clear()
        args = {**training_args, "curriculum": "pass_rate", "max_steps": 12, "num_generations": 2, **settings}
        trainer = OPSDTrainer(
            make_model(tokenizer), is_even, OPSDConfig(**args), train_dataset, processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return trainer, [list(some) for some in drawn]

    return train


def test_resumed_run_draws_the_same(trained, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole, drawn = trained(**saving)
    assert len(drawn) == 12
    assert drawn[:8] != drawn[8:]
    assert whole.state.log_history[0]["curriculum/new_prompt_rate"] == 1.0
    assert whole.state.log_history[-2]["curriculum/new_prompt_rate"] < 1.0
    for step in (5, 10):
        resumed, rest = trained(str(tmp_path / "run" / f"checkpoint-{step}"), **saving)
        assert rest == drawn[step:]
        assert resumed.signals.state_dict() == whole.signals.state_dict()


def test_batches_are_groups_of_prompts_that_are_repeated_as_ever(trained):
    _, drawn = trained(steps_per_generation=2, gradient_accumulation_steps=2, max_steps=6)
    assert len(drawn) == 6
    for prompts in drawn:
        assert prompts[::2] == prompts[1::2]
        assert len(set(prompts)) == len(prompts) // 2 == 4


def test_what_is_decided_is_drawn_no_more(trained):
    """All rollouts of a prompt are right, or all are wrong. A batch is drawn before the one before is sampled."""
    _, drawn = trained(curriculum_kwargs={"floor": 1e-9}, max_steps=6)
    batches = [set(prompts) for prompts in drawn]
    for index, prompts in enumerate(batches):
        assert not prompts & set().union(*batches[: max(index - 1, 0)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum": "pass_rates"}, "`curriculum='pass_rates'` is none of .*Did you mean `pass_rate`"),
        ({"curriculum": "collections.Counter"}, "`curriculum` names Counter, which is no subclass of Curriculum"),
        ({"curriculum_kwargs": {"flor": 1}}, "do not fit `curriculum='pass_rate'`"),
        ({"shuffle_dataset": False}, "draws the rows, and `shuffle_dataset=False` keeps their order"),
    ],
)
def test_refused(trained, settings, message):
    with pytest.raises(ValueError, match=message):
        trained(**settings)


def test_refused_for_rows_that_are_not_known(trained, dataset):
    with pytest.raises(ValueError, match="draws rows by their prompts, which a streaming dataset"):
        trained(train_dataset=dataset.to_iterable_dataset())


def test_refused_without_rewards(tokenizer, training_args):
    row = {"prompt": [{"role": "user", "content": "3 + 4?"}], "solution": "7"}
    args = OPSDConfig(**training_args, curriculum="pass_rate")
    with pytest.raises(ValueError, match=r"goes by which rollouts are correct. Pass `reward_funcs`"):
        OPSDTrainer("unloaded", args=args, train_dataset=Dataset.from_list([row] * 8), processing_class=tokenizer)


def test_keys_of_prompts_do_not_depend_on_padding():
    ids, mask = torch.tensor([[0, 0, 5], [7, 5, 0]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    narrow = prompt_keys(torch.tensor([[0, 5]]), torch.ones(1, 2))
    found = prompt_keys(ids, mask)
    assert found[0] == narrow[0] == prompt_key([0, 5])
    assert found[1] == prompt_key([5, 0]) != found[0]
    assert prompt_keys(ids, torch.tensor([[0, 0, 1], [0, 1, 0]])).unique().numel() == 1


def test_prompts_are_told_apart_once_a_group(monkeypatch):
    asked = []
    monkeypatch.setattr(signals, "prompt_key", lambda ids: asked.append(ids) or 7)
    assert prompt_keys(torch.tensor([[0, 5]] * 4), torch.tensor([[0, 1]] * 4)).tolist() == [[7]] * 4
    assert asked == [[5]]


@pytest.mark.parametrize("process_index", [0, 1])
def test_values_of_a_group_on_two_processes(process_index):
    """Of three groups of four, the second is on both."""
    everything = torch.arange(12).view(12, 1)
    own = everything[6 * process_index :][:6]
    found = _of_the_group(lambda values: everything, process_index, 4, own)
    start = [0] * 4 + [4] * 4 + [8] * 4
    assert found.tolist() == [list(range(first, first + 4)) for first in start[6 * process_index :][:6]]
