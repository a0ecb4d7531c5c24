"""What is learnt in each part: the rows that are trained on and those that are tested, and what is right."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..context import PrivilegedContext, TemplateContext
from ..eval.scorer import score
from ..playground.facts import is_right, make_world, names_reward
from ..playground.recall import MAX_TOKENS, ask
from .questions import questions


# Rows by their split; "train" is trained on
Rows = dict[str, list[dict[str, Any]]]

# Ways to ask for a short answer, of which the shortest that leaves answers right is the teacher's
WORDINGS = (
    "{prompt} Answer in one word.",
    "{prompt}\n\nAnswer in a few words.",
    "{prompt} Answer in one short sentence.",
    "{prompt} Reply with the answer alone.",
    "{prompt}\n\nGive only the answer, without an explanation.",
    "{prompt} Be brief.",
    "Be brief. {prompt}",
)
_WORDING_QUESTIONS = 32

# Easy levels of reasoning-gym, which are probed for a gap between the model and the model that reads the answer
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "chain_sum, two digits": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "products": {"min_digits": 1, "max_digits": 1},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 10},
    "gcd": {"min_value": 2, "max_value": 20},
    "lcm": {"min_value": 1, "max_value": 12},
    "letter_counting": {"min_words": 2, "max_words": 3},
    "leg_counting": {"min_animals": 1, "max_animals": 1, "min_instances": 1, "max_instances": 5},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
    "word_sequence_reversal": {"min_words": 3, "max_words": 3},
    "family_relationships": {"min_family_size": 4, "max_family_size": 4},
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 3},
}
# The families whose answers are words
_WORDS = {"spell_backward", "word_sequence_reversal", "family_relationships", "needle_haystack"}
PROBED = 24


@dataclass(frozen=True)
class Work:
    """
    What is learnt in a part.

    Args:
        rows (`Callable[[Mapping, int, Mapping], dict[str, list[dict]]]`):
            From the part's settings, a seed and what was found `once`, rows by split.
        is_right (`Callable[[str, Mapping], bool]`):
            Whether an answer is right, by the one scorer.
        reward (`Callable`):
            The same as a reward function.
        once (`Callable`):
            From the base model, its tokenizer and the part's settings: what rows are made with, and what reports show.
    """

    rows: Callable[[Mapping[str, Any], int, Mapping[str, Any]], Rows]
    is_right: Callable[[str, Mapping[str, Any]], bool]
    reward: Callable[..., list[float]]
    once: Callable[[Any, Any, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


def examine(
    model: Any, tokenizer: Any, part: str, settings: Mapping[str, Any], rows: Rows, context: Any = None
) -> dict[str, list[dict[str, Any]]]:
    """
    Asks a model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        part (`str`):
            Key of [`WORK`].
        settings (`Mapping[str, Any]`):
            The part's.
        rows (`dict[str, list[dict]]`):
            What is asked, by split.
        context ([`PrivilegedContext`], *optional*):
            What the model reads besides.

    Returns:
        `dict[str, list[dict]]`: answers by split, see [`~trl_opsd.playground.recall.ask`].
    """
    limit = settings.get("answer_tokens", MAX_TOKENS)
    is_right = WORK[part].is_right
    return {
        name: ask(model, tokenizer, its, context, max_tokens=limit, is_right=is_right) for name, its in rows.items()
    }


# Facts


def _fact_rows(settings: Mapping[str, Any], seed: int, known: Mapping[str, Any]) -> Rows:
    rows = make_world(settings["size"], seed).rows()
    # One wording of each fact says enough of those that are trained on
    return {"train": rows["trained"], **rows, "trained": list({row["fact"]: row for row in rows["trained"]}.values())}


# Brevity


def _brief_row(question: str, aliases: Sequence[str]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "answer": aliases[0], "aliases": list(aliases), "others": []}


def _brief_rows(settings: Mapping[str, Any], seed: int, known: Mapping[str, Any]) -> Rows:
    """Each seed draws anew which of the questions that the model can answer are trained on and which are kept."""
    rows = [_brief_row(*question) for question in questions() if question[0] in known["answered"]]
    random.Random(f"brevity {seed}").shuffle(rows)
    kept = len(rows) * 2 // 5
    return {"train": rows[kept:], "test": rows[:kept]}


def _brief_once(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which questions the model answers, and what each way to ask for brevity makes of some of the answers."""

    def answers(rows: list[dict[str, Any]], context: PrivilegedContext | None = None) -> list[dict[str, Any]]:
        return examine(model, tokenizer, "brevity", settings, {"test": rows}, context)["test"]

    def figures(wording: str | None, its: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(answer["token_ids"]) for answer in its]
        right = [bool(answer["right"]) for answer in its]
        return {"wording": wording, "right": right, "lengths": lengths, "said": its[0]["said"]}

    rows = [_brief_row(*question) for question in questions()]
    pairs = [(row, answer) for row, answer in zip(rows, answers(rows), strict=True) if answer["right"]]
    answered = [row for row, _ in pairs]
    some = answered[:: max(1, len(answered) // _WORDING_QUESTIONS)]
    shown = {
        "asked": len(rows),
        "answered": len(answered),
        "mean_tokens": fmean(len(answer["token_ids"]) for _, answer in pairs),
        "wordings": [
            figures(wording, answers(some, None if wording is None else TemplateContext(wording)))
            for wording in (None, *WORDINGS)
        ],
    }
    return {"answered": [row["prompt"][0]["content"] for row in answered]}, shown


# A skill


def solves(text: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer is the row's."""
    return bool(score(text, row["answer"], row["answer_type"]).correct)


def solved_reward(
    completions: Sequence[list[dict[str, str]]], answer: Sequence[str], answer_type: Sequence[Any], **kwargs: Any
) -> list[float]:
    """
    A reward function: 1 if a completion gives the answer, by the one scorer, else 0.

    Args:
        completions (`Sequence[list[dict[str, str]]]`):
            Messages.
        answer, answer_type (`Sequence[str]`):
            Columns of the rows.
        **kwargs (`Any`):
            What else is known of them.

    Returns:
        `list[float]`: the rewards.
    """
    return [
        float(solves(completion[-1]["content"], {"answer": right, "answer_type": kind}))
        for completion, right, kind in zip(completions, answer, answer_type, strict=True)
    ]


def problems(family: str, number: int, seed: int) -> list[dict[str, Any]]:
    """
    Problems of a family, no two alike.

    Args:
        family (`str`):
            Key of [`FAMILIES`].
        number (`int`):
            How many, or fewer where there are none left.
        seed (`int`):
            What they are made from.

    Returns:
        `list[dict]`: rows with `prompt`, `answer`, `answer_type` and `solution`.
    """
    from reasoning_gym import create_dataset

    name = family.partition(",")[0]
    # Easy levels have few problems: several times as many are made as are asked for
    made = create_dataset(name, size=8 * number, seed=seed, **FAMILIES[family])
    answers = {row["question"].strip(): str(row["answer"]) for row in made}
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "answer": answer,
            "answer_type": "text" if name in _WORDS else "math",
            "solution": f"The answer is {answer}.",
        }
        for question, answer in list(answers.items())[:number]
    ]


def _skill_rows(settings: Mapping[str, Any], seed: int, known: Mapping[str, Any]) -> Rows:
    rows = problems(settings["family"], settings["train"] + settings["test"], seed)
    return {"train": rows[settings["test"] :], "test": rows[: settings["test"]]}


def _skill_once(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The probe: what the model solves of each family by itself, and while it reads the answer."""
    context, found = TemplateContext(settings["template"]), {}
    for family in FAMILIES:
        rows = {"test": problems(family, PROBED, seed=0)}
        bare, told = (examine(model, tokenizer, "skill", settings, rows, its)["test"] for its in (None, context))
        found[family] = {
            name: [bool(answer["right"]) for answer in its] for name, its in (("model", bare), ("told", told))
        } | {"question": bare[0]["question"]}
    return {}, {"families": found}


def _nothing(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {}


WORK: dict[str, Work] = {
    "facts": Work(_fact_rows, is_right, names_reward, _nothing),
    "brevity": Work(_brief_rows, is_right, names_reward, _brief_once),
    "skill": Work(_skill_rows, solves, solved_reward, _skill_once),
}
