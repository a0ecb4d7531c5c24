"""Texts of two writers, with stand-ins that each go on with a text of their own."""

from dataclasses import replace
from itertools import pairwise

import pytest
from tiny import make_tokenizer

from trl_opsd.generate import Attempt, Problems, Writer, make_maker
from trl_opsd.sampling import Sampling


STUDENT, TEACHER = make_tokenizer(), make_tokenizer()
END = STUDENT.eos_token_id
PROMPTS = {"student": "What? ", "teacher": "It is 3. What? "}
# What each would say by itself: words of style are letters, words of capability are digits
STREAMS = {"student": "so we add 12 and 3 then hm </t> it is", "teacher": "first 4 5 6 well 7 </t> no"}


def ids_of(text):
    return STUDENT(text, add_special_tokens=False)["input_ids"]


class World:
    """Each writer goes on with its stream where it left off, after the text that it is shown; `streams` are by try."""

    def __init__(self, streams=STREAMS, wrong=(), num_rows=1, max_new_tokens=200, temperature=1.0, **given):
        self.streams, self.wrong = streams, wrong
        self.places, self.asked = {}, []
        prompts = {by: [ids_of(text) for _ in range(num_rows)] for by, text in (PROMPTS | given).items()}
        prompts["teacher"] = [ids if given.get("teacher", "") is not None else None for ids in prompts["teacher"]]
        tokenizers = {"student": STUDENT, "teacher": TEACHER}
        self.problems = Problems(
            rows=[{"prompt": f"{row}?"} for row in range(num_rows)],
            prompt_ids=prompts["student"],
            hinted_prompt_ids=prompts["teacher"],
            sample=None,
            grade=self.grade,
            mix=None,
            sampling=Sampling(temperature, 1.0, 0, max_new_tokens),
            decode=lambda row, ids: STUDENT.decode(ids),
            writers={
                by: Writer(prompts[by], tokenizers[by], lambda *asked, by=by: self.sample(by, *asked))
                for by in ("student", "teacher")
            },
            has_second_model=True,
        )

    def sample(self, by, rows, prompt_ids, what, max_new_tokens):
        attempts = []
        for row, ids in zip(rows, prompt_ids, strict=True):
            text = STUDENT.decode(ids)
            assert text.startswith(PROMPTS[by])
            self.asked.append((by, text.removeprefix(PROMPTS[by]), max_new_tokens, what))
            number, place = self.places.get((row, by), (0, 0))
            if by == "student" and len(ids) == len(self.problems.prompt_ids[row]):  # another try
                number, place = (0, 0) if not place else (number + 1, 0)
                self.places[row, "teacher"] = (number, 0)
            stream = self.streams[by]
            stream = stream if isinstance(stream, str) else stream[min(number, len(stream) - 1)]
            # What the other has not heard of it comes again
            added = stream[place : place + max_new_tokens]
            self.places[row, by] = (number, place)
            self.heard = text
            tokens = ids_of(added) + [END] * (place + max_new_tokens > len(stream))
            tokens = tokens[:max_new_tokens]
            attempts.append(Attempt(row, "", tokens, seed=7 + number, truncated=tokens[-1:] != [END]))
        return attempts

    def heard_so_far(self, row, by, kept):
        number, place = self.places[row, by]
        self.places[row, by] = (number, place + kept)

    def grade(self, attempts):
        return [replace(attempt, reward=1.0, correct=attempt.completion not in self.wrong) for attempt in attempts]


def make(world, by_style=None, **kwargs):
    """Run the maker with a classifier of words, which also tells the stand-ins how much of theirs was kept."""

    def boundary(before, written, by):
        found = []
        for row, text in enumerate(written):
            cut = None if by_style is None else by_style(text, by)
            end = (
                len(text) if cut is None else next((n for n in range(cut, len(text)) if text[n].isspace()), len(text))
            )
            world.heard_so_far(row, by, end)
            found.append(cut)
        return found

    return make_maker("tessy", {"end_of_thinking": "</t>", "answer_tokens": 60, "boundary": boundary, **kwargs})(
        world.problems
    )


def always(label):
    """A classifier that calls everything style, or everything capability: the first character already is."""
    return lambda text, by: 1 if (label == "style") == (by == "teacher") else None


def by_digits(text, by):
    """Digits are capability. White space belongs to what stands before it."""
    for place, character in enumerate(text):
        if not character.isspace() and character.isdigit() == (by == "student"):
            return place + 1
    return None


def test_where_all_is_style_the_student_writes_all():
    world = World()
    made = make(world, always("style"))
    assert {by for by, *_ in world.asked} == {"student"}
    [record] = made.records
    assert record["spans"] == [{"by": "student", "text": record["completion"]}]
    assert record["completion"].startswith("so we add 12 and 3 then hm </t>")


def test_where_all_is_capability_the_teacher_thinks_and_the_student_answers():
    """The student begins, so its first word stays its own."""
    world = World()
    made = make(world, always("capability"))
    [record] = made.records
    first, thinking, answer = record["spans"]
    assert first == {"by": "student", "text": "so"}
    assert thinking == {"by": "teacher", "text": STREAMS["teacher"].partition("</t>")[0] + "</t>"}
    assert answer["by"] == "student"
    assert record["completion"] == "so" + thinking["text"] + answer["text"]
    (by, read, longest, what) = world.asked[-1]
    assert (by, read, longest, what) == ("student", "so" + thinking["text"], 60, "answers")


def test_each_goes_on_at_the_boundary_and_within_its_cap():
    world = World()
    made = make(world, by_digits)
    [record] = made.records
    assert [(span["by"], span["text"]) for span in record["spans"]] == [
        ("student", "so we add 12"),
        ("teacher", "first"),
        ("student", " and 3"),
        ("teacher", " 4 5 6 wel"),  # a word is finished within the ten tokens
        ("student", " then hm </t>t is"),  # what a span says after the end of thinking is left out
    ]
    assert "".join(span["text"] for span in record["spans"]) == record["completion"]
    # All that is written is asked for in spans of at most so many tokens, but for the answer
    assert {(by, longest) for by, _, longest, what in world.asked if what is None} == {("student", 5), ("teacher", 10)}
    # Each reads what there is, as it is, after its own prompt
    texts = [read for _, read, _, _ in world.asked]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert all(record["completion"].startswith(read) for read in texts)


def test_provenance():
    [record] = make(World(), always("capability")).records
    assert {name: record[name] for name in ("prompt", "source", "row", "seed", "tries", "truncated", "correct")} == {
        "prompt": "0?",
        "source": "teacher_and_student",
        "row": 0,
        "seed": 7,
        "tries": 1,
        "truncated": False,
        "correct": True,
    }
    world = World()
    world.problems = replace(world.problems, has_second_model=False)
    assert make(world, always("style")).records[0]["source"] == "same_model_with_context"


def test_openings_and_the_teachers_own_end():
    world = World({"student": "so 1 </t> it", "teacher": "2 3 ANSWER 4"})
    made = make(
        world,
        by_digits,
        student_opening="<t>",
        teacher_opening="<a>",
        teacher_end_of_thinking="ANSWER",
    )
    [record] = made.records
    assert record["completion"].startswith("<t>so 12 3 </t>")
    assert record["spans"][0] == {"by": "opening", "text": "<t>"}
    assert all(read.startswith("<t>" if by == "student" else "<a>") for by, read, _, _ in world.asked)


def test_a_text_that_repeats_itself_is_begun_anew_and_given_up_in_the_end():
    streams = {"student": ["a b c " * 30, "well </t> done"], "teacher": "no"}
    [record] = make(World(streams), max_tries=3).records
    assert record["completion"].startswith("well </t>")
    assert (record["tries"], record["seed"]) == (2, 8)
    made = make(World({"student": "a b c " * 30, "teacher": "no"}), max_tries=2)
    assert not made.records
    assert made.dropped == {"repeating itself in the last of 2 tries": 1}


def test_a_rule_is_no_repetition():
    made = make(World({"student": "- - - " * 20 + "</t> done", "teacher": "no"}, max_new_tokens=400), max_tries=1)
    assert len(made.records) == 1


@pytest.mark.parametrize(
    ("world", "kwargs", "reason"),
    [
        (World({"student": "abc def ghi " * 9, "teacher": ""}, max_new_tokens=90), {}, "truncated"),
        (World({"student": "so </t> " + "yes and no, " * 9, "teacher": ""}), {}, "truncated"),
        (World({"student": "", "teacher": ""}), {}, "without a word"),
        (World({"student": "so </t> x", "teacher": ""}, wrong={"so </t>"}), {"keep": "correct"}, "wrong"),
    ],
    ids=["thinking", "answer", "nothing", "wrong"],
)
def test_what_is_given_up(world, kwargs, reason):
    made = make(world, max_tries=1, **kwargs)
    assert not made.records
    assert made.dropped == {f"{reason} in the last of 1 tries": 1}


def test_a_student_that_ends_without_an_end_of_thinking_is_done():
    [record] = make(World({"student": "it is 3", "teacher": ""})).records
    assert record["completion"] == "it is 3"


def test_rows_without_a_teachers_prompt_are_left_out():
    world = World()
    writers = dict(world.problems.writers)
    writers["teacher"] = replace(writers["teacher"], prompt_ids=[None])
    world.problems = replace(world.problems, writers=writers)
    assert make(world).dropped == {"without a context": 1}


def test_text_that_a_writer_reads_otherwise_is_left_out():
    """A character that the teacher's tokenizer does not know."""
    world = World()
    writers = dict(world.problems.writers)

    class Lossy:
        def __call__(self, text, **kwargs):
            return TEACHER(text.replace("s", ""), **kwargs)

        def decode(self, *args, **kwargs):
            return TEACHER.decode(*args, **kwargs)

    writers["teacher"] = replace(writers["teacher"], tokenizer=Lossy())
    world.problems = replace(world.problems, writers=writers)
    made = make(world, by_digits, max_tries=1)
    assert made.dropped == {"read otherwise by the teacher in the last of 1 tries": 1}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"boundary": "nowhere.boundary"}, "Cannot load `boundary='nowhere.boundary'` of the tessy maker"),
        ({"boundary": 3}, "which cannot be called"),
        ({"boundary": print, "student_tokens": 0}, "`student_tokens` of the tessy maker must be at least 1, got 0"),
        ({"boundary": print, "keep": "all"}, "must be one of finished, correct"),
        ({"boundary": print, "end_of_thinking": ""}, "no thinking would ever end"),
        ({}, r"do not fit `maker='tessy'`"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_maker("tessy", kwargs)


@pytest.mark.parametrize(
    ("boundary", "message"),
    [
        (lambda before, written, by: [], "gave 0 results for 1 spans"),
        (lambda before, written, by: [0], "gave 0 for a span of 5 characters, 'so we'"),
        (lambda before, written, by: [6], "gave 6 for a span of 5 characters"),
    ],
)
def test_bad_boundaries(boundary, message):
    with pytest.raises(ValueError, match=message):
        make(World(), boundary=boundary)


def test_settings_that_cannot_work_together():
    with pytest.raises(ValueError, match=r"`answer_tokens=60` .* leave nothing for the thinking"):
        make(World(max_new_tokens=60))
    with pytest.raises(ValueError, match="all tries of a row by the tessy maker are the same"):
        make(World(temperature=0.0))
