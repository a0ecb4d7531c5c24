"""Every arm trains, from the same base and with as many tokens."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from trl_opsd.comparison.arms import ARMS
from trl_opsd.experiment import train
from trl_opsd.experiment.arms import BASES, TUNING_SEED
from trl_opsd.experiment.tasks import Split
from trl_opsd.experiment.train import Run, run
from trl_opsd.playground.world import make_tokenizer


pytestmark = pytest.mark.cpu("so is the comparison")

TRAINED = [name for name, arm in ARMS.items() if arm.trainer != "none"]
# Room for a gold completion
BATCH, LENGTH = 16, 30
TOKENS = 2 * BATCH * LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Few and short problems, and bases that know nothing. Everything else is real."""
    with pytest.MonkeyPatch.context() as patch:
        for base in list(BASES.values()):
            splits = {name: Split(32, ((2, "plain"),)) for name in base.family.splits}
            family = replace(base.family, splits=splits, max_completion_length=LENGTH)
            recipe = replace(base.recipe, steps=1, batch_size=4)
            patch.setitem(BASES, base.name, replace(base, family=family, recipe=recipe))
        folder = tmp_path_factory.mktemp("comparison")
        for base in ("middling", "verbose"):
            run(Run(BASES[base]), folder)
        yield folder


def short(name, **changes):
    return replace(ARMS[name], **{"tokens": TOKENS, "batch_size": BATCH, "evaluate_every": TOKENS // 4, **changes})


@pytest.mark.parametrize("name", TRAINED)
def test_every_arm_ends_with_the_tokens_of_the_others(folder, name):
    arm = short(name)
    result = run(Run(BASES[arm.bases[0]], 1, arm, 1e-3), folder)
    assert result["curve"][0]["step"] == 0
    assert result["curve"][-1]["step"] == result["steps"] >= 1
    assert result["curve"][-1]["generated_tokens"] == result["generated_tokens"]
    if name == "sft":
        assert result["generated_tokens"] == 0
        its = result["learner_tokens"] / result["steps"]  # prompts included
        assert (result["steps"] - 1) * its < 2 * TOKENS
        assert result["learner_tokens"] > TOKENS / 2
    else:
        # Closer than another step would be
        step = result["generated_tokens"] / result["steps"]
        assert abs(result["generated_tokens"] - TOKENS) <= step
        assert result["learner_tokens"] > 0
    assert set(result["final"]) == set(BASES[arm.bases[0]].family.held_out)


def test_a_token_counts_up_to_the_end_of_its_answer(folder):
    tokenizer, rows = make_tokenizer(), BASES["middling"].family.make(0)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompt, answers = [[8, 9]] * 3, [[5, 6, end, pad], [end, pad, pad, pad], [5, 5, 5, 5]]

    class Sampler:
        def generate(self, input_ids):
            return torch.tensor([[*its, *answer] for its, answer in zip(input_ids.tolist(), answers, strict=True)])

    class Model(Sampler):
        pass

    trainer = SimpleNamespace(model=Model(), processing_class=tokenizer)
    watch = train.make_watch(trainer, Run(BASES["middling"], 1, short("opsd"), 1e-3), rows)
    with watch.counting():
        trainer.model.generate(input_ids=torch.tensor(prompt))
    trainer.model.generate(input_ids=torch.tensor(prompt))
    assert watch.budgets()["generated_tokens"] == 3 + 1 + 4


def test_what_is_sampled_besides_rollouts_counts(folder):
    """A base that knows nothing is always wrong, so that STaR samples everything twice."""
    star, opsd = (run(Run(BASES["middling"], 1, short(name), 1e-3), folder) for name in ("star", "opsd"))
    per_step = [result["generated_tokens"] / result["steps"] for result in (star, opsd)]
    assert per_step[0] == pytest.approx(2 * per_step[1], rel=0.25)
    assert star["steps"] < opsd["steps"]


def test_tests_count_for_nothing_and_tuning_has_no_curve(folder):
    arm = short("opsd")
    watched = run(Run(BASES["middling"], 1, arm, 1e-3), folder)
    seldom = run(Run(BASES["middling"], 1, replace(arm, evaluate_every=10**6), 1e-3), folder)
    assert len(watched["curve"]) > len(seldom["curve"]) == 2
    assert watched["generated_tokens"] == seldom["generated_tokens"]
    tuning = run(Run(BASES["middling"], TUNING_SEED, arm, 1e-3), folder)
    assert tuning["curve"] == []
    assert tuning["generated_tokens"] == pytest.approx(TOKENS, rel=0.2)
    assert tuning["seconds"] > 0


def test_the_rate_follows_the_tokens(folder, monkeypatch):
    rates = []

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr("torch.optim.AdamW.step", step)
    arm = short("opsd", tokens=20 * BATCH * LENGTH, evaluate_every=10**6)
    result = run(Run(BASES["middling"], 1, arm, 1e-3), folder)
    assert len(rates) == result["steps"]
    shares = [number * result["generated_tokens"] / result["steps"] / arm.tokens for number in range(len(rates))]
    expected = [s / 0.1 if s < 0.1 else (1 + math.cos(math.pi * (s - 0.1) / 0.9)) / 2 for s in shares]
    assert rates == pytest.approx([1e-3 * value for value in expected], abs=1e-4)  # answers differ in length
    assert rates[0] == 0.0
    assert max(rates) > 9e-4
    assert rates[-1] < 1e-4


def test_an_arm_stops_at_its_most_steps(folder):
    result = run(Run(BASES["middling"], 1, short("opsd", tokens=10**6, steps=2), 1e-3), folder)
    assert result["steps"] == 2
