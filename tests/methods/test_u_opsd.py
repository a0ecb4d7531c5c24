import pytest
from rollouts import make_rollouts

from trl_opsd.context import Rollouts
from trl_opsd.methods.u_opsd import MajorityForOther


ROW = {"prompt": [{"role": "user", "content": "2 + 3?"}]}


def boxed(answer):
    return "I do not know" if answer is None else rf"It is \boxed{{{answer}}}."


def made(answers, lengths=None, **settings):
    """What the teacher of each rollout reads, by its position, and what is logged of the group."""
    context = MajorityForOther(template="{prompt}|{attempt}", **settings)
    lengths = lengths or [1] * len(answers)
    texts = [f"{index}: {boxed(answer)}" for index, answer in enumerate(answers)]
    rollouts = make_rollouts([None] * len(answers), texts, token_ids=[[1] * length for length in lengths])
    groups = [Rollouts(rollouts, index) for index in range(len(rollouts))]
    found = [context.teacher_messages(ROW, group) for group in groups]
    read = {
        index: int(messages[-1]["content"].rpartition("|")[2][0])
        for index, messages in enumerate(found)
        if messages is not None
    }
    return read, {
        name.removeprefix("votes/"): pair for name, pair in context.rates([ROW] * len(groups), groups).items()
    }


def test_the_shortest_that_agrees_teaches_one_that_does_not():
    read, rates = made(["5", "6", "5", "5", "5"], [4, 9, 2, 3, 2])
    assert read == {1: 2}
    assert rates == {
        "unreadable_rate": (0, 5),
        "unanimous_rate": (0, 5),
        "below_threshold_rate": (0, 5),
        "mean_share": (4.0, 5),
    }


def test_answers_are_compared_by_the_scorer():
    assert made(["0.5", "1/2", r"\frac{2}{4}", "0.6"])[0] == {3: 0}
    assert made(["0.5", "1/2", "3", "3", "3"], same_answer="operator.eq")[0].keys() <= {0, 1}


def test_what_the_user_reads_answers_by():
    read, _ = made(["5", "6", "5"], answer_of="builtins.len", same_answer="operator.eq")
    assert read == {}  # all texts are equally long


def test_settings_for_what_the_paper_says_twice():
    answers, lengths = ["5", "5", "5", "6", "7"], [4, 6, 5, 2, 3]
    assert made(answers, lengths, agreeing="longest", other="longest")[0] == {4: 1}
    drawn = [made(answers, lengths, seed=seed)[0] for seed in range(20)]
    assert [*map(dict, sorted({tuple(read.items()) for read in drawn}))] == [{3: 0}, {4: 0}]
    assert made(answers, lengths, seed=7)[0] == drawn[7]


def test_seed_breaks_ties():
    drawn = {next(iter(made(["5", "6", "5", "6"], seed=seed)[0].items())) for seed in range(40)}
    assert drawn == {(1, 0), (3, 0), (0, 1), (2, 1)}


@pytest.mark.parametrize(
    ("answers", "rate"),
    [(["5", "5", "5"], "unanimous_rate"), (["5", None, None], "unanimous_rate"), ([None] * 3, "unreadable_rate")],
)
def test_a_group_without_two_sides_teaches_nothing_and_is_counted(answers, rate):
    read, rates = made(answers)
    assert read == {}
    assert {name for name, (number, _) in rates.items() if number and name != "mean_share"} == {rate}
    assert rates[rate] == (3, 3)


def test_what_cannot_be_read_is_on_neither_side():
    for seed in range(10):
        assert made(["5", None, "5", "6", None], seed=seed)[0] == {3: 0}
    assert made(["5", None, None, "6", "5"], threshold=0.6)[0] == {3: 0}  # 2 of 3


def test_threshold():
    answers = ["5", "5", "6", "7", "8"]
    read, rates = made(answers)
    assert read == {}
    assert rates["below_threshold_rate"] == (5, 5)
    assert len(made(answers, threshold=0.4)[0]) == 1
    assert made(["5", "5", "5", "6"], threshold=0.75)[0] == {3: 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"`threshold` must be in \[0, 1\], got 1.5"),
        ({"agreeing": "best"}, r"`agreeing` must be one of \['shortest', 'longest'\], got 'best'"),
        ({"other": "all"}, r"`other` must be one of \['any', 'longest'\], got 'all'"),
        ({"answer_of": "mine"}, "`answer_of='mine'` cannot be imported"),
        ({"same_answer": "operator.same"}, "`same_answer='operator.same'` cannot be imported"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MajorityForOther(**settings)
