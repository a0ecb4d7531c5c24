import json
from dataclasses import asdict

import pytest
import torch
from rollouts import make_rollouts
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import SelfDistillationTrainer
from trl_opsd.methods.cipo import CIPOConfig, Corrections, Ratio


def rows_of(*numbers):
    return [
        {"prompt": [{"role": "user", "content": f"{number} + 3?"}], "answer": str(number + 3)} for number in numbers
    ]


def remembered(source, *rates, num_rollouts=8):
    """Show a source a batch of original prompts, number 0 and so on, with these shares of right rollouts."""
    rows = [{**row, "anchor_correct": None} for row in rows_of(*range(len(rates)))]
    groups = []
    for number, rate in enumerate(rates):
        rewards = [float(index < rate * num_rollouts) for index in range(num_rollouts)]
        texts = [f"y{number}.{index}" for index in range(num_rollouts)]
        groups.append(make_rollouts(rewards, texts))
    source.remember(list(zip(rows, groups, strict=True)))


def exchanged(source, number=4, fits=lambda prompt: True, step=1):
    """What takes the place of rows, text of the prompt and whether its attempt is right, and how many rows stay."""
    made = source(rows_of(*range(100, 100 + number)), fits, step, 0)
    assert len(made) == number
    shown = [(row["prompt"][-1]["content"], row["anchor_correct"]) for row in made]
    return [pair for pair in shown if pair[1] is not None], sum(pair[1] is None for pair in shown)


@pytest.fixture
def source():
    return Corrections(template="{prompt}|{attempt}")


@pytest.mark.parametrize(
    ("before", "num_below", "reward", "expected"),
    [(0.7, 0, 0.5, 0.405), (0.8, 0, 0.8, 0.3), (None, 0, 0.8, 0.3), (1.0, 2, 1.0, 0.252), (0.1, 9, -1.0, 0.867)],
)
def test_ratio(before, num_below, reward, expected):
    ratio = Ratio(before=before, num_below=num_below)
    ratio.update(reward)
    assert ratio.value == pytest.approx(min(max(expected, 0.2), 0.8), abs=2e-3)
    assert (ratio.before, ratio.num_below) == (reward, num_below + 1 if reward < 0.8 else 0)


def test_ratio_is_clipped():
    for reward, limit in ((1.0, 0.2), (-1.0, 0.8)):
        ratio = Ratio()
        for _ in range(30):
            ratio.update(reward)
        assert ratio.value == limit


def test_at_first_there_is_nothing_to_correct(source):
    assert exchanged(source) == ([], 4)


def test_corrections_show_attempts_of_the_batch_before_and_not_whether_they_are_right(source):
    remembered(source, 0.5, 0.5, 0.5, 0.5)
    shown, num_originals = exchanged(source, number=8)
    assert num_originals == 4
    assert [is_right for _, is_right in shown].count(True) == 1  # ⌊0.3 · 4⌋
    for text, is_right in shown:
        number, attempt = text.split(" + 3?|")
        assert attempt == (f"y{number}.0" if is_right else f"y{number}.4")
    assert len({text for text, _ in shown}) == 4
    assert exchanged(source, number=8, step=2)[0] != shown
    right, wrong = (Corrections()._prompt(rows_of(1)[0], text)[-1]["content"] for text in ("A", "B"))
    assert right.replace("A\n", "B\n") == wrong


def test_middling_prompts_come_first():
    for step in range(5):
        source = Corrections(template="{prompt}|{attempt}", ratio=1.0)
        remembered(source, 0.25, 0.375, 0.75, 0.875, 0.5)
        assert {text[0] for text, _ in exchanged(source, number=6, step=step)[0]} == {"1", "2", "4"}


@pytest.mark.parametrize(
    ("rates", "number", "num_right", "num_wrong"),
    [
        ((0.0, 0.0, 0.0), 6, 0, 3),  # nothing right
        ((1.0, 1.0, 1.0), 6, 3, 0),  # filled up with right ones
        ((0.5,), 8, 1, 1),  # of one prompt, one of each kind
    ],
)
def test_what_there_is_not_enough_of(source, rates, number, num_right, num_wrong):
    remembered(source, *rates)
    kinds = [is_right for _, is_right in exchanged(source, number)[0]]
    assert (kinds.count(True), kinds.count(False)) == (num_right, num_wrong)


def test_attempts_that_leave_no_room_are_not_shown_and_counted(source):
    remembered(source, 0.0, 0.0)
    shown, _ = exchanged(source, fits=lambda prompt: "y0" not in prompt[-1]["content"])
    assert [text for text, _ in shown] == ["1 + 3?|y1.0"]
    assert source.rates([], [])["corrections/too_long_rate"] == (1, 2)


def test_plain_prompts_stay_plain(source):
    row = {"prompt": "1 + 3?", "anchor_correct": None}
    source.remember([(row, make_rollouts((0.0,)))])
    made = source([{"prompt": "2 + 3?"}] * 2, lambda prompt: isinstance(prompt, str), 1, 0)
    assert {row["prompt"] for row in made} == {"1 + 3?|y0", "2 + 3?"}


def test_corrections_are_not_corrected(source):
    row = {**rows_of(1)[0], "anchor_correct": False}
    source.remember([(row, make_rollouts((0.0, 1.0)))])
    assert exchanged(source) == ([], 4)


def test_risk(source):
    source._shown = [None, True, False]
    correct = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert source.reward(correct).tolist() == [[0.0, 0.0], [0.0, -1.0], [0.0, 0.0]]
    assert Corrections(risk=0.0).reward(correct[:0]).numel() == 0


def test_the_ratio_follows_what_became_of_right_attempts(source):
    right, wrong = ({**rows_of(1)[0], "anchor_correct": is_right} for is_right in (True, False))
    source.remember([(right, make_rollouts((1.0, -1.0, 1.0, 1.0))), (wrong, make_rollouts((0.0, 0.0)))])
    assert source.ratio.before == 0.5
    source.remember([(wrong, make_rollouts((0.0, 0.0)))])
    assert source.ratio.before == 0.5


def test_state(source):
    remembered(source, 0.5, 0.0)
    source.ratio.update(0.3)
    resumed = Corrections(template="{prompt}|{attempt}")
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert asdict(resumed.ratio) == asdict(source.ratio)
    assert exchanged(resumed) == exchanged(source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, r"`share` and `ratio` must be in \[0, 1\], got 1.5 and 0.3"),
        ({"risk": -1.0}, "`risk` must not be negative, got -1"),
        ({"template": "{prompt}"}, "has no '{attempt}'"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Corrections(**settings)


def begins_with_a(completions, anchor_correct=None, **kwargs):
    return [float(completion[0]["content"].startswith("a")) for completion in completions]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    """Of two rollouts of a prompt, the second is wrong."""

    def turn(trainer, prompt_ids, *args, **kwargs):
        texts = ["a" if index % 2 == 0 else "b" for index in range(len(prompt_ids))]
        return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turn)

    def make(reward_funcs=begins_with_a, train_dataset=dataset, **settings):
        args = {**training_args, "num_generations": 2, "max_completion_length": 8, "warmup_steps": 0, **settings}
        return SelfDistillationTrainer(
            make_model(tokenizer), reward_funcs, CIPOConfig(**args), train_dataset, processing_class=tokenizer
        )

    return make


def batches_of(trainer, rows, num_batches=2):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return [
        trainer._generate_and_score_completions([row for row in rows for _ in range(2)]) for _ in range(num_batches)
    ]


def test_advantages_of_corrections(make_trainer, dataset):
    """Twice as large where a right attempt was shown; those of other prompts are what they would be."""
    trainer = make_trainer(prompts_kwargs={"ratio": 1.0})
    first, second = batches_of(trainer, dataset.select(range(4)))
    assert first["advantages"].tolist() == [0.5, -0.5] * 4
    assert sorted(second["advantages"].view(-1, 2)[:, 0].tolist()) == [0.5, 0.5, 1.0, 1.0]
    free = make_trainer(prompts_kwargs={"ratio": 1.0, "risk": 0.0})
    assert batches_of(free, dataset.select(range(4)))[1]["advantages"].tolist() == [0.5, -0.5] * 4


def test_scaled_advantages_do_not_show_the_risk(make_trainer, dataset):
    settings = {"scale_rewards": "group"}
    with pytest.warns(UserWarning, match="`risk=1.0` changes no advantage"):
        trainer = make_trainer(prompts_kwargs={"ratio": 1.0}, **settings)
    free = make_trainer(prompts_kwargs={"ratio": 1.0, "risk": 0.0}, **settings)
    found, expected = (batches_of(one, dataset.select(range(4)))[1]["advantages"] for one in (trainer, free))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_failed_attempts_cost_nothing(make_trainer, dataset):
    trainer = make_trainer(prompts_kwargs={"ratio": 0.0})
    second = batches_of(trainer, dataset.select(range(4)))[1]
    assert second["rewards"].min() == 0.0


def test_a_share_of_nothing_is_grpo(make_trainer):
    off = make_trainer(prompts_kwargs={"share": 0.0})
    parent = make_trainer(prompts=None)
    for trainer in (off, parent):
        torch.manual_seed(0)
        trainer.train()
    for name, value in parent.model.state_dict().items():
        assert off.model.state_dict()[name].equal(value)


def test_reward_is_one_more_whatever_weights_are_set(make_trainer, dataset):
    functions = [begins_with_a]
    trainer = make_trainer(reward_funcs=functions, reward_weights=[2.0], prompts_kwargs={"ratio": 1.0})
    assert functions == [begins_with_a]
    assert trainer.reward_weights.tolist() == [2.0, 1.0]
    second = batches_of(trainer, dataset.select(range(4)))[1]
    assert sorted(second["rewards"].tolist()) == [-1.0, -1.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]


def test_bad_input(make_trainer, dataset):
    with pytest.raises(ValueError, match=r"adds to rewards\. Pass `reward_funcs`"):
        make_trainer(reward_funcs=None, policy_loss_coef=0.0, divergence_coef=1.0)
    with pytest.raises(ValueError, match=r"is no subclass of `trl_opsd.sampling.prompts.PromptSource`"):
        make_trainer(prompts="collections.Counter")
    with pytest.raises(ValueError, match="`prompts='corrections'` is none of"):
        make_trainer(prompts="corrections")
    short = make_trainer(prompts=f"{__name__}.Short")
    with pytest.raises(ValueError, match=r"Short of `prompts` gave 1 rows for 4. Give one for each"):
        batches_of(short, dataset.select(range(4)))


class Short(Corrections):
    def __call__(self, rows, fits, step, seed):
        return list(rows)[:1]
