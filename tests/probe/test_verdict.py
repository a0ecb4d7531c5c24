"""Verdicts on made-up worlds, of which it is known what the teacher knows and where it has it from."""

import random

import pytest

from trl_opsd.probe.summary import summarize
from trl_opsd.probe.verdict import CONCLUSIONS, judge


ARMS = ["student", "teacher", "none", "other_solution"]
SOLUTION = "First add the ones and carry, then add the tens: row ROW gives the answer"


def records(tokenizer, rates, number=150, texts=None, lengths=None, follows=0.0, same=False, seed=0):
    """
    Rows of a world in which each arm is right so often, writes such texts, and copies another's answer so often.

    Args:
        rates: By arm, how often it is right. Arms that are not there have written nothing.
    """
    draw = random.Random(seed)
    found = []
    for row in range(number):
        for arm in ARMS:
            text = (texts or {}).get(arm, "I take this and that and so I get ROW").replace("ROW", str(row))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: (lengths or {}).get(arm)]
            one = {"text": text, "token_ids": ids, "truncated": False, "answer": None}
            one["correct"] = draw.random() < rates.get(arm, 0.0)
            one["follows_other"] = draw.random() < follows if arm == "other_solution" else None
            record = {"row": row, "arm": arm, "completions": [one] if arm in rates else [], "read": "x"}
            if arm == "student":
                one["rewards"], rollout = None, ids
            else:
                ids = rollout
                size = 0.3 if arm == "teacher" else 0.1
                values = dict.fromkeys(("student_log_prob", "teacher_log_prob"), [-1.0] * len(ids))
                values |= {"divergence": [size] * len(ids), "known": [True] * len(ids)}
                values |= {"student_entropy": [1.0] * len(ids), "teacher_entropy": [0.5] * len(ids)}
                record |= {"reads_same": same, "scores": [values]}
            found.append(record)
    return found


@pytest.fixture
def judged(tokenizer):
    def judge_world(rates, solution=SOLUTION, **world):
        made = records(tokenizer, rates, **world)
        summary = summarize(made, ARMS, tokenizer, lambda row: solution.replace("ROW", str(row)) if solution else None)
        return judge(summary), summary

    return judge_world


def test_a_gap_that_needs_the_solution_is_worth_training(judged):
    verdict, summary = judged({"student": 0.3, "teacher": 0.65, "none": 0.3, "other_solution": 0.35})
    assert verdict.conclusion == "worth_training"
    gap = summary["differences"]["teacher"]["accuracy"]
    assert gap["low"] < 0.35 < gap["high"]
    first = verdict.sentences[0]
    whole = [round(100 * gap[name]) for name in ("value", "low", "high")]
    assert first.startswith("The teacher is {} [{}, {}] points better".format(*whole))
    assert "points remain with another problem's solution" in first


def test_no_gap_is_nothing_to_learn(judged):
    verdict, _ = judged({"student": 0.02, "teacher": 0.02, "none": 0.02, "other_solution": 0.02}, number=400)
    assert verdict.conclusion == "nothing_to_learn"


def test_a_teacher_that_reads_the_same_has_nothing_to_teach_however_the_samples_fall(judged):
    rates = {"student": 0.2, "teacher": 0.5, "none": 0.2}
    assert judged(rates, same=True)[0].conclusion == "nothing_to_learn"
    assert judged(rates)[0].conclusion != "nothing_to_learn"


def test_a_gap_that_any_solution_gives_comes_from_the_prompt(judged):
    verdict, _ = judged({"student": 0.2, "teacher": 0.6, "none": 0.2, "other_solution": 0.6})
    assert verdict.conclusion == "only_the_prompt"
    assert "with another problem's solution" in verdict.sentences[-1]
    verdict, _ = judged({"student": 0.2, "teacher": 0.6, "none": 0.6, "other_solution": 0.1})
    assert verdict.conclusion == "only_the_prompt"
    assert "reading the question alone" in verdict.sentences[-1]


@pytest.mark.parametrize("how", ["words", "answers"])
def test_a_teacher_that_copies(judged, how):
    rates = {"student": 0.2, "teacher": 0.9, "none": 0.2, "other_solution": 0.0}
    world = {"texts": {"teacher": SOLUTION}} if how == "words" else {"follows": 0.9}
    verdict, summary = judged(rates, **world)
    assert verdict.conclusion == "copies"
    if how == "words":
        assert summary["copying"]["verbatim"]["teacher"]["value"] > 0.8
        assert summary["copying"]["verbatim"]["student"]["value"] == 0.0
    else:
        assert 0.8 < summary["copying"]["follows_other"]["low"] < 0.9


def test_what_the_student_writes_as_well_is_no_copy(judged):
    texts = dict.fromkeys(("student", "teacher"), SOLUTION)
    rates = {"student": 0.2, "teacher": 0.9, "none": 0.2, "other_solution": 0.0}
    assert judged(rates, texts=texts)[0].conclusion == "worth_training"


def test_too_few_rows_decide_nothing_and_say_how_many_would(judged):
    verdict, summary = judged({"student": 0.4, "teacher": 0.5, "none": 0.4, "other_solution": 0.4}, number=20)
    assert verdict.conclusion == "undecided"
    accuracy = summary["differences"]["teacher"]["accuracy"]
    needed = round(20 * ((accuracy["high"] - accuracy["low"]) / 2 / 0.05) ** 2)
    assert f"About {needed} rows" in verdict.sentences[-1]


def test_brevity_is_worth_learning(judged):
    rates = dict.fromkeys(ARMS, 1.0)
    verdict, summary = judged(rates, number=100, lengths={"teacher": 20})
    assert verdict.conclusion == "worth_training"
    assert "brevity" in verdict.sentences[-1]
    assert summary["differences"]["teacher"]["shorter"]["low"] > 0.1


def test_a_context_that_no_row_has(judged):
    verdict, summary = judged({"student": 0.4, "none": 0.4})
    assert summary["differences"]["teacher"] is None
    assert verdict.conclusion == "undecided"
    assert "No row has a context" in verdict.sentences[0]


def test_divergence_remaining_is_a_ratio_on_the_same_tokens(judged):
    _, summary = judged({"student": 0.2, "teacher": 0.6, "none": 0.2, "other_solution": 0.2}, number=20)
    divergence = summary["divergence"]
    assert divergence["divergence"]["value"] == pytest.approx(0.3)
    assert divergence["entropy_gap"]["value"] == pytest.approx(-0.5)
    assert divergence["remaining"]["other_solution"]["value"] == pytest.approx(1 / 3)
    assert sum(its["num_tokens"] for its in divergence["by_kind"].values()) == divergence["num_tokens"]
    assert sum(its["num_tokens"] for its in divergence["by_position"]) == divergence["num_tokens"]
    assert sum(its["share"] or 0 for its in divergence["by_kind"].values()) == pytest.approx(1)


def test_rows_of_which_an_arm_is_missing_wait(tokenizer):
    rates = dict.fromkeys(ARMS, 0.5)
    made = records(tokenizer, rates, number=10)
    assert summarize(made[:-1], ARMS, tokenizer, lambda row: None)["num_rows"] == 9


def test_every_conclusion_has_words():
    assert set(CONCLUSIONS) == {"worth_training", "nothing_to_learn", "only_the_prompt", "copies", "undecided"}
