import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trl_opsd.eval import benchmark as benchmarks
from trl_opsd.eval.benchmark import Benchmark, benchmark_names, load_benchmark
from trl_opsd.playground.world import WORLDS


@pytest.fixture
def data(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Benchmark("mine", str(path))

    return write


SHIPPED = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("MathArena/aime_2025", None, "train", "problem", "answer"),
    "amc": ("math-ai/amc23", None, "test", "question", "answer"),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train", "Question", "Correct Answer"),
    "hmmt_feb25": ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "playground_opsd": ("playground_opsd.jsonl", None, "train", "question", "answer"),
    "playground_opsdc": ("playground_opsdc.jsonl", None, "train", "question", "answer"),
}


def test_shipped_benchmarks():
    found = {}
    for name in benchmark_names():
        benchmark = load_benchmark(name)
        assert benchmark.name == name
        assert benchmark.description
        assert benchmark.licence != "not stated"
        found[name] = (
            benchmark.dataset_name.removeprefix(f"{benchmarks._FOLDER}/"),
            benchmark.dataset_config,
            benchmark.dataset_split,
            benchmark.question_column,
            benchmark.answer_column,
        )
    assert found == SHIPPED


@pytest.mark.parametrize("name", list(WORLDS))
def test_playground_problems_are_the_worlds_held_out_ones(name):
    problems = load_benchmark(f"playground_{name}").problems()

    held_out = WORLDS[name].splits()["test"]
    asked = [(problem.prompt, problem.reference) for problem in problems]
    assert asked == [(row["prompt"][0]["content"], row["answer"]) for row in held_out]


def test_data_beside_the_description(tmp_path, monkeypatch):
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "sums.yaml").write_text("dataset_name: sums.jsonl\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert [problem.reference for problem in load_benchmark("../sums.yaml").problems()] == ["2"]


def test_problems_of_a_file(data):
    rows = [{"question": " What is 1 + 1? ", "answer": 2}, {"question": "What is $\\frac{1}{2}$?", "answer": "0.5"}]

    first, second = data(rows).problems()

    assert first.prompt.startswith("What is 1 + 1?\n")
    assert first.prompt.endswith("\\boxed{}.")
    assert (first.benchmark, first.reference, second.reference) == ("mine", "2", "0.5")
    assert first.problem_id != second.problem_id
    assert [problem.problem_id for problem in data(rows[::-1], "b.jsonl").problems()] == [
        second.problem_id,
        first.problem_id,
    ]
    assert data(rows).problems(limit=1) == [first]


def test_numbers_that_are_whole_are_whole_references(data):
    assert [
        p.reference for p in data([{"question": "a", "answer": 27.0}, {"question": "b", "answer": 0.5}]).problems()
    ] == [
        "27",
        "0.5",
    ]


def test_ids_levels_and_template(data):
    benchmark = replace(
        data([{"question": "q", "answer": "1", "key": 7, "hard": 5, "unit": "m"}]),
        id_column="key",
        level_column="hard",
        prompt_template="{{ question }} In {{ row.unit }}!",
    )

    (problem,) = benchmark.problems()

    assert (problem.problem_id, problem.level, problem.prompt) == ("7", "5", "q In m!")


def test_the_same_question_twice_is_two_problems(data):
    ids = [problem.problem_id for problem in data([{"question": "q", "answer": "1"}] * 3).problems()]

    assert ids == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"]


def test_choices_are_shuffled_the_same_way_every_time_and_evenly(data):
    rows = [{"question": f"{n}?", "answer": f"yes {n}", "b": "no", "c": "never", "d": "nowhere"} for n in range(400)]
    benchmark = replace(
        data(rows),
        wrong_choice_columns=("b", "c", "d"),
        answer_type="choice",
        prompt_template=load_benchmark("gpqa_diamond").prompt_template,
    )

    problems = benchmark.problems()

    for row, problem in zip(rows, problems, strict=True):
        assert f"\n{problem.reference}) {row['answer']}\n" in problem.prompt
        assert problem.prompt.count("\n\n") == 2
    counts = [sum(problem.reference == letter for problem in problems) for letter in "ABCD"]
    assert sum(counts) == 400
    assert min(counts) > 70  # of 100 expected, standard deviation 8.7
    # Each problem by itself: what else is in the file changes nothing
    assert replace(benchmark, dataset_name=data(rows[9:], "rest.jsonl").dataset_name).problems() == problems[9:]


@given(st.lists(st.text(min_size=1).filter(str.strip), unique_by=str.strip, min_size=1, max_size=8))
def test_every_question_reaches_its_prompt_unchanged(questions):
    benchmark = Benchmark("mine", "rows")
    template = benchmark._template()
    earlier = {}
    for question in questions:
        problem = benchmark._problem({"question": question, "answer": "1"}, template, earlier)
        assert problem.prompt.startswith(question.strip())
        assert problem.problem_id not in earlier
        earlier[problem.problem_id] = problem


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"problem": "q", "answer": "1"}], {}, "has no column `question`; its columns are `problem`, `answer`"),
        ([{"question": "q", "answer": "1"}], {"id_column": "key"}, "has no column `key`"),
        ([{"question": "q", "answer": "1"}, {"question": " ", "answer": "1"}], {}, "row 1 of .*`question` is empty"),
        ([{"question": "q", "answer": ""}], {}, "row 0 of .*`answer` is empty"),
        ([{"question": "q", "answer": None}, {"question": "q", "answer": "1"}], {}, "`answer` holds nothing"),
        ([{"question": "q", "answer": float("nan")}], {}, "`answer` holds nothing"),
        ([{"question": "q", "answer": ["1"]}], {}, "`answer` holds list"),
        (
            [{"question": "q", "answer": "1", "key": "a"}] * 2,
            {"id_column": "key"},
            "row 1 .*`key` has 'a' a second time",
        ),
        ([{"question": [{"role": "user", "content": "q"}] * 2, "answer": "1"}], {}, "one user message"),
        ([{"question": "q", "answer": "1"}], {"prompt_template": "{{ question }} {{ row.unit }}"}, "row 0 .*unit"),
    ],
)
def test_bad_rows(rows, changes, message, data):
    with pytest.raises(ValueError, match=message):
        replace(data(rows), **changes).problems()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_type": "maths"}, "Choose math, choice or text"),
        ({"wrong_choice_columns": ["b"]}, "`answer_type` must be choice"),
        ({"prompt_template": "{{ question"}, "`prompt_template` is malformed"),
        ({"prompt_template": "Say something."}, "never shows the question"),
        ({"prompt_template": 5}, "Benchmark mine: `prompt_template` must be text, got 5"),
        ({"dataset_revision": 1234567}, "`dataset_revision` must be text, got 1234567. Put it in quotes"),
        ({"wrong_choice_columns": 3}, "`wrong_choice_columns` must be a list of columns, got 3"),
        ({"wrong_choice_columns": "wrong", "answer_type": "choice"}, "must be a list of columns, got 'wrong'"),
        *(({"name": name}, "cannot be a folder of its own") for name in ("", ".", "..", "a/b", "a/", "/a")),
    ],
)
def test_bad_descriptions(changes, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(**{"name": "mine", "dataset_name": "rows.jsonl", **changes})


def test_description_in_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"dataset_name": "rows.jsonl", "answer_column": "solution"}))

    assert load_benchmark(str(path)) == Benchmark("mine", "rows.jsonl", answer_column="solution")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dataset_name": "rows.jsonl", "anser_column": "a"}, "unknown field `anser_column`"),
        ({"answer_column": "a"}, "has no `dataset_name`"),
        ("text", "describes no benchmark"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))

    with pytest.raises(ValueError, match=message):
        load_benchmark(str(path))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"no benchmark 'aime42'. Name one of aime24, "):
        load_benchmark("aime42")
    with pytest.raises(ValueError, match="Cannot read the benchmark"):
        load_benchmark(str(tmp_path / "nowhere.yaml"))
