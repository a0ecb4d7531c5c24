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
from trl_opsd.real_model.arms import ARMS, PAGED, PARTS, TUNING_SEED, RealRun
from trl_opsd.real_model.questions import questions
from trl_opsd.real_model.work import WORK


def smaller(part, **settings):
    return replace(PARTS[part], settings=PARTS[part].settings | settings)


PARTS_HERE = {
    "facts": smaller("facts", size=1),
    "brevity": smaller("brevity", rollout_tokens=8, answer_tokens=8),
    "skill": smaller("skill", rollout_tokens=8, train=12, test=4),
}
PART = PARTS_HERE["facts"]
KINDS = ("sft", "sft_teacher", "sft_mixsd", "sdft", "opsd_reverse_kl_clipped")
OTHERS = ("brevity_sft", "opsdc_frozen", "skill_sft", "skill_star", "skill_grpo", "skill_opsd_other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_path):
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        answer_at_random(patch)
        for part in PARTS_HERE.values():
            result = train.run(RealRun(part, model=model_path), folder)
            assert result["final"]["divergence"] == 0.0
    return folder


def spec(model_path, arm, **kwargs):
    short = replace(ARMS[arm], batch_size=8 if arm == "skill_grpo" else 4, steps=min(ARMS[arm].steps, 4))
    part = PARTS_HERE[ARMS[arm].bases[0]]
    return RealRun(part, kwargs.pop("seed", 1), replace(short, evaluate_every=2), 5e-3, model=model_path, **kwargs)


def answer_at_random(patch):
    """A tiny model never names anything: without this, no answer of its would be right."""
    for module, name in (("playground.facts", "is_right"), ("real_model.work", "solves")):
        patch.setattr(f"trl_opsd.{module}.{name}", lambda text, row: len(text) % 2 == 0)
    works = {name: replace(work, is_right=lambda text, row: len(text) % 2 == 0) for name, work in WORK.items()}
    patch.setattr("trl_opsd.real_model.work.WORK", works)


@pytest.fixture
def right_at_random(monkeypatch):
    answer_at_random(monkeypatch)


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
        row["prompt"][-1]["content"] for row in make_world(1, 1).rows()["new"][:6]
    ]


@pytest.mark.cpu("so are the runs")
@pytest.mark.parametrize("arm", OTHERS)
def test_an_arm_of_another_part_learns_and_is_tested(folder, model_path, arm, right_at_random):
    result = train.run(spec(model_path, arm), folder)
    assert result["steps"] == 4
    assert [set(point) >= {"step", "test", "mean_tokens"} for point in result["curve"]] == [True] * 3
    assert set(result["final"]) == {"test", "mean_tokens", "unrelated", "solved", "divergence"}
    assert result["final"]["divergence"] > 0.0
    assert (result["generated_tokens"] > 0) == (arm != "skill_sft")


@pytest.mark.cpu("so are the runs")
def test_the_one_run_that_is_shown_leaves_its_tokens(folder, model_path):
    train.run(spec(model_path, PAGED[0], seed=PAGED[1]), folder)
    page = (folder / "tokens.html").read_text()
    assert "before the training" in page
    assert "after the training" in page


def test_a_seed_trains_on_some_questions_and_is_tested_on_others(folder):
    for part in ("brevity", "skill"):
        known = json.loads((folder / "bases" / part / "responses.json").read_text())
        asked = [
            {split: {row["prompt"][-1]["content"] for row in its} for split, its in rows.items()}
            for rows in (WORK[part].rows(PARTS_HERE[part].settings, seed, known) for seed in (1, 2))
        ]
        assert all(its["train"] and its["test"] and not its["train"] & its["test"] for its in asked)
        assert asked[0]["test"] != asked[1]["test"]


def test_what_is_asked_briefly_is_not_asked_of_what_is_kept():
    assert not {question for question, _ in questions()} & {question for question, _ in retention.QUESTIONS}
    assert len({question for question, _ in questions()}) == len(questions())


def test_questions_are_asked_at_the_end_and_not_just_before_it():
    asked = {
        steps: sorted(train.watched_steps(steps, every)) for steps, every in ((75, 18), (40, 10), (30, 7), (1, 1))
    }
    assert asked == {75: [18, 36, 54, 75], 40: [10, 20, 30, 40], 30: [7, 14, 21, 30], 1: [1]}


def test_brevity_is_tuned_for_length_and_right_answers():
    run = RealRun(PARTS["brevity"], TUNING_SEED, ARMS["opsdc_frozen"], 1e-3)
    assert run.score({"final": {"test": 0.9, "mean_tokens": 10.0}}, {"mean_tokens": 40.0}) == pytest.approx(0.65)


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
