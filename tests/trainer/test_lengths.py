"""Prompt and completion share the model's context."""

import pytest
from datasets import Dataset
from tiny import make_model, make_tokenizer

from trl_opsd import OPSDCConfig, OPSDConfig, SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.trainer.lengths import fit_completions, prompt_budget


@pytest.fixture
def trained_on(training_args):
    def make(rows, context, config=OPSDConfig, **settings):
        tokenizer = make_tokenizer()
        values = {name: value for name, value in training_args.items() if name != "max_completion_length"}
        return SelfDistillationTrainer(
            make_model(tokenizer, max_position_embeddings=context),
            args=config(**{**values, **settings}),
            train_dataset=rows,
            processing_class=tokenizer,
        )

    return make


def longest(trainer, rows):
    return max(len(trainer.teacher_prompt.token_ids(row, None)) for row in rows)


@pytest.mark.parametrize(
    ("config", "length"), [(OPSDConfig, 1024), (OPSDCConfig, 8192), (SelfDistillationConfig, 512)]
)
def test_the_default_stays_where_it_fits(config, length, trained_on, dataset, recwarn):
    trainer = trained_on(dataset, 16384, config)
    assert trainer.args.max_completion_length == trainer.max_completion_length == length
    assert type(trainer.args.max_completion_length) is int
    assert not [warning for warning in recwarn if "Completions end" in str(warning.message)]


def test_the_default_gives_way_to_the_prompts(trained_on, dataset):
    with pytest.warns(UserWarning, match=r"Completions end after \d+ tokens and not 1024") as caught:
        trainer = trained_on(dataset, 1200)
    assert len([warning for warning in caught if "Completions end" in str(warning.message)]) == 1
    prompts = longest(trainer, dataset)
    assert 1200 - 1024 < prompts < 600
    assert trainer.max_completion_length == 1200 - prompts
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_longest_prompt_is_looked_for_in_all_data(trained_on, dataset):
    long = {**dataset[0], "solution": dataset[0]["solution"] + " and so on" * 40}
    with pytest.warns(UserWarning, match="Completions end after"):
        trainer = trained_on(Dataset.from_list([*dataset, long]), 1800)
    assert trainer.max_completion_length == 1800 - longest(trainer, [long])


def test_prompts_are_left_at_least_half_of_the_context(trained_on, dataset):
    rows = Dataset.from_list([*dataset, {**dataset[0], "solution": "so on " * 300}])
    with pytest.raises(ValueError, match=r"Row 16 of `train_dataset`: .* budget of 600"):
        trained_on(rows, 1200)
    with pytest.warns(UserWarning, match="Completions end after"):
        trainer = trained_on(rows, 1200, overlong_teacher_prompt="skip")
    assert trainer.max_completion_length == 1200 - longest(trainer, dataset)


def test_a_stream_leaves_the_budget(trained_on, dataset):
    with pytest.warns(UserWarning, match="Completions end after 750 tokens and not 1024"):
        trainer = trained_on(dataset.to_iterable_dataset(), 1500)
    assert trainer.max_completion_length == trainer.teacher_prompt.max_length == 750


def test_a_length_that_is_set_has_to_fit(trained_on, dataset):
    with pytest.raises(ValueError, match="more than the budget of 176"):
        trained_on(dataset, 1200, max_completion_length=1024)


@pytest.mark.parametrize(
    ("settings", "context", "budget", "length"),
    [
        ({}, None, None, 1024),
        ({}, 4096, 3072, 1024),
        ({}, 1024, 512, 512),
        ({"max_teacher_prompt_length": 1000}, 1024, 1000, 24),
        ({"max_teacher_prompt_length": 100}, 4096, 100, 1024),
        ({"max_completion_length": 1000}, 1024, 24, 1000),
        ({"max_completion_length": None}, 1024, 1024, None),
    ],
)
def test_shares(settings, context, budget, length, tmp_path):
    args = OPSDConfig(str(tmp_path), use_cpu=True, **settings)
    assert prompt_budget(args, context) == budget
    fit_completions(args, context, budget or 0)
    assert args.max_completion_length == length


def test_a_budget_that_leaves_nothing(tmp_path):
    args = OPSDConfig(str(tmp_path), use_cpu=True, max_teacher_prompt_length=1024)
    with pytest.raises(ValueError, match=r"leaves 1023 beside a completion of 1 .*too little for `max_teacher_prompt"):
        prompt_budget(args, 1024)
