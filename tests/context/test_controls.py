import pytest
from datasets import Dataset

from trl_opsd.context import (
    HintContext,
    NoContext,
    OtherSolutionContext,
    PartialSolutionContext,
    ShuffledSolutionContext,
)


def row(solution, question="Why?"):
    return {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]} | {
        "solution": solution
    }


def shown(context, its_row):
    """What the teacher reads in place of the solution."""
    messages = context.teacher_messages(its_row, None)
    if messages is None:
        return None
    assert messages[0] == its_row["prompt"][0]
    question, answer = messages[1]["content"].split("|")
    assert question == its_row["prompt"][1]["content"]
    return answer


def test_none_is_the_prompt_itself():
    its_row = row("Because.")

    assert NoContext().teacher_messages(its_row, None) == its_row["prompt"]
    assert NoContext.columns == ()


def test_hint():
    (message,) = HintContext().teacher_messages(
        {"prompt": [{"role": "user", "content": "Why?"}], "hint": "Think of A."}, None
    )

    assert HintContext().columns == ("hint",)
    assert message["content"].startswith("Why?\n\n")
    assert "hint: Think of A." in message["content"]


class TestOtherSolution:
    @staticmethod
    def context(rows, **kwargs):
        context = OtherSolutionContext(template="{prompt}|{solution}", **kwargs)
        context.read_dataset(Dataset.from_list(rows))
        return context

    def test_never_the_own_one_and_always_the_same(self):
        rows = [row(f"Solution {number}.", f"Question {number}?") for number in range(20)]
        context = self.context(rows)
        given = [shown(context, its_row) for its_row in rows]

        assert all(
            text in {other["solution"] for other in rows if other is not its_row}
            for text, its_row in zip(given, rows, strict=True)
        )
        assert given == [shown(self.context(rows), its_row) for its_row in rows]
        assert len(set(given)) > 5
        assert given != [shown(self.context(rows, seed=1), its_row) for its_row in rows]

    def test_neither_one_that_reads_the_same_nor_another_one_of_the_same_problem(self):
        rows = [row("A."), row("B."), row("A.", "How?"), row("C.", "How?")]
        for seed in range(10):
            assert shown(self.context(rows, seed=seed), rows[0]) == "C."

    def test_plain_prompts(self):
        rows = [{"prompt": question, "solution": question[0]} for question in ("A?", "B?")]
        context = self.context(rows)
        asked = {**rows[0], "prompt": [{"role": "user", "content": "A?"}]}  # as the trainer hands it over

        assert context.teacher_messages(asked, None)[0]["content"] == "A?|B"

    def test_there_is_no_other(self):
        with pytest.raises(ValueError, match=r"No other problem has a `solution` that differs from 'A\.'"):
            shown(self.context([row("A."), row("A.", "How?")]), row("A."))

    @pytest.mark.parametrize("dataset", [None, Dataset.from_list([row("A.")]).to_iterable_dataset()])
    def test_streams_are_refused(self, dataset):
        with pytest.raises(ValueError, match="needs a `train_dataset` that is no stream"):
            OtherSolutionContext().read_dataset(dataset)


@pytest.mark.parametrize(
    ("share", "solution", "part"),
    [
        (0.5, "One two,\n three four five.", "One two,"),
        (0.5, "One two,\n three four.", "One two,"),
        (0.75, "One two,\n  three four.", "One two,\n  three"),
        (0.5, "Three.", None),
        (0.01, "One two three.", None),
    ],
)
def test_partial_solution(share, solution, part):
    assert shown(PartialSolutionContext(template="{prompt}|{solution}", share=share), row(solution)) == part


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0])
def test_share_that_leaves_no_part(share):
    with pytest.raises(ValueError, match=f"`share` .* must be above 0 and below 1, got {share}"):
        PartialSolutionContext(share=share)


@pytest.mark.parametrize(
    ("solution", "pieces", "between"),
    [
        ("First line. It goes on.\n\nSecond.\nThird.", ["First line. It goes on.", "Second.", "Third."], "\n"),
        ("One. Two! Is it 2.5? Three.", ["One.", "Two!", "Is it 2.5?", "Three."], " "),
        ("One. Two.", ["One.", "Two."], " "),
    ],
)
def test_shuffled_solution(solution, pieces, between):
    context = ShuffledSolutionContext(template="{prompt}|{solution}")
    text = shown(context, row(solution))

    assert text.split(between) != pieces if between == "\n" else text != solution
    assert sorted(text.split("\n")) == sorted(pieces) if between == "\n" else sorted(text) == sorted(solution)
    assert all(piece in text for piece in pieces)
    assert text == shown(ShuffledSolutionContext(template="{prompt}|{solution}"), row(solution))


def test_nothing_to_shuffle_no_context():
    context = ShuffledSolutionContext()
    for solution in ("One sentence.", "Again.\nAgain."):
        assert context.teacher_messages(row(solution), None) is None
