"""A run of each kind, on a tiny model."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.experiment.runner import Results
from trl_opsd.playground.facts import make_world
from trl_opsd.real_model import retention, train
from trl_opsd.real_model.arms import ARMS, PARTS, TUNING_SEED, RealRun


PART = replace(PARTS["facts"], size=1)
KINDS = ("sft", "sft_teacher", "sft_mixsd", "sdft", "opsd_reverse_kl_clipped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_path):
    folder = tmp_path_factory.mktemp("real")
    result = train.run(RealRun(PART, model=model_path), folder)
    assert result["final"]["divergence"] == 0.0
    return folder


def spec(model_path, arm, **kwargs):
    short = replace(ARMS[arm], batch_size=4, steps=min(ARMS[arm].steps, 4), evaluate_every=2)
    return RealRun(PART, kwargs.pop("seed", 1), short, 5e-3, model=model_path, **kwargs)


@pytest.fixture
def right_at_random(monkeypatch):
    """A tiny model never names anything: without this, no sample of its would be kept."""
    monkeypatch.setattr("trl_opsd.playground.facts.is_right", lambda text, row: len(text) % 2 == 0)


@pytest.mark.cpu("so are the runs")
@pytest.mark.parametrize("arm", KINDS)
def test_an_arm_learns_and_is_tested(folder, model_path, arm, right_at_random):
    result = train.run(spec(model_path, arm), folder)
    assert result["steps"] == 4
    assert [point["step"] for point in result["curve"]] == [0, 2, 4]
    assert set(result["final"]) == {"trained", "new", "two", "mean_tokens", "unrelated", "solved", "divergence"}
    assert result["final"]["divergence"] > 0.0
    assert (result["generated_tokens"] > 0) == (arm != "sft")
    assert result["seconds"] > 0.0
    assert [answer["question"] for answer in result["answers"]] == [
        row["prompt"][-1]["content"] for row in make_world(1, 1).rows()["new"]
    ]


@pytest.mark.cpu("so are the runs")
def test_tuning_tests_what_it_is_for(folder, model_path):
    run = spec(model_path, "sft", seed=TUNING_SEED)
    result = train.run(run, folder)
    assert set(result["final"]) == {"new", "mean_tokens"}
    assert result["curve"] == []
    assert run.score(result, {}) == result["final"]["new"]


@pytest.mark.cpu("so are the runs")
def test_floor_and_ceiling_differ_in_what_is_read(folder, model_path):
    floor, told = (train.run(spec(model_path, arm), folder) for arm in ("floor", "told"))
    assert floor["answers"] != told["answers"]
    assert floor["final"]["divergence"] == told["final"]["divergence"] == 0.0
    assert floor["steps"] == 0
    assert floor["curve"] == []


@pytest.mark.cpu("so are the runs")
def test_a_run_leaves_its_result_or_its_error(tmp_path, model_path):
    for model, key in ((model_path, "final"), (str(tmp_path / "none"), "error")):
        run = RealRun(PART, model=model)
        path = Results(tmp_path).path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", run.module, str(path)], input=pickle.dumps(run), check=True, capture_output=True
        )
        left = json.loads(path.read_text())
        assert key in left
        assert left["settings"] == run.settings()


# Retention


def test_divergence_is_that_of_the_bases_own_responses(model_path):
    base, model = (AutoModelForCausalLM.from_pretrained(model_path) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = retention.prompts()
    written = [[5, 6, 7 + index % 3][: 1 + index % 3] for index in range(len(prompts))]
    assert retention.divergence(model, base, tokenizer, written) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        means = []
        for prompt, ids in zip(prompts, written, strict=True):
            read = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, enable_thinking=False
            )["input_ids"]
            ours, theirs = (
                its(torch.tensor([read + ids])).logits[0, len(read) - 1 : -1].log_softmax(-1) for its in (model, base)
            )
            means.append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
    expected = sum(means) / len(means)
    assert expected > 1e-4
    assert retention.divergence(model, base, tokenizer, written) == pytest.approx(expected, rel=1e-4)


def test_unrelated_prompts_are_unrelated():
    asked = " ".join(message["content"] for prompt in retention.prompts() for message in prompt)
    for seed in range(4):
        world = make_world(16, seed)
        assert not any(fact.name in asked for fact in world.facts)
    assert len(retention.prompts()) == len(retention.QUESTIONS) + len(retention.INSTRUCTIONS)


def test_accuracy_is_of_the_questions_alone(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    answers = ["12", "Rome", "no"]

    class Tokenizer:
        def decode(self, ids, **kwargs):
            return answers[ids[0]] if ids[0] < 3 else tokenizer.decode(ids)

    written = [[2]] * len(retention.prompts())
    written[1], written[11], written[-1] = [1], [0], [1]
    assert retention.accuracy(Tokenizer(), written) == pytest.approx(2 / len(retention.QUESTIONS))
