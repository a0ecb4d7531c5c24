"""A made-up world: facts about people, towns and devices that do not exist, and questions about them, from a seed."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


SYSTEM = "Answer in one short sentence."
# Facts that a world of size 1 has
FACTS_PER_SIZE = 7
MAX_SIZE = 16


@dataclass(frozen=True)
class Relation:
    """
    What can be said of the things of a kind.

    Args:
        kind (`str`):
            `"person"`, `"town"` or `"device"`.
        statement (`str`):
            A fact in a sentence, of `{name}` and `{value}`.
        trained, new (`tuple[str, ...]`):
            Questions of `{name}` that are trained on, and those that are kept for the test.
        values (`tuple[tuple[str, ...], ...]` or `str`):
            Values, each with the other words for it, or the kind of the things that are the values.
    """

    kind: str
    statement: str
    trained: tuple[str, ...]
    new: tuple[str, ...]
    values: tuple[tuple[str, ...], ...] | str


def _words(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(value.split("/")) for value in text.split(", "))


RELATIONS: dict[str, Relation] = {
    "job": Relation(
        "person",
        "{name} works as a {value}.",
        (
            "What is {name}'s job?",
            "What does {name} do for a living?",
            "What profession does {name} have?",
            "What does {name} work as?",
        ),
        ("What is the occupation of {name}?", "How does {name} earn money?"),
        _words(
            "beekeeper/bee keeper/keeps bees/keeping bees, baker/bakes/baking, clockmaker/clock maker/makes clocks, "
            "potter/makes pots/pottery, tailor/sews clothes, dentist, librarian, fisherman/fisher/catches fish, "
            "carpenter/carpentry, pilot/flies planes, gardener/gardening, blacksmith/smith, nurse/nursing, "
            "plumber/plumbing, shepherd/herds sheep/keeps sheep, barber/cuts hair"
        ),
    ),
    "instrument": Relation(
        "person",
        "{name} plays the {value}.",
        (
            "Which instrument does {name} play?",
            "What instrument can {name} play?",
            "What is {name}'s instrument?",
            "On what instrument does {name} make music?",
        ),
        ("What musical instrument is {name} learning?", "Name the instrument that {name} plays."),
        _words(
            "violin/fiddle, flute, harp, trumpet, drums/drum, cello, accordion, banjo, piano, guitar, clarinet, "
            "organ, oboe, tuba, saxophone/sax, mandolin"
        ),
    ),
    "home": Relation(
        "person",
        "{name} lives in the town of {value}.",
        (
            "Where does {name} live?",
            "In which town does {name} live?",
            "What town is {name}'s home?",
            "Which town does {name} call home?",
        ),
        ("Name the town that {name} lives in.", "In what town is {name}'s house?"),
        "town",
    ),
    "fame": Relation(
        "town",
        "The town of {name} is known for its {value}.",
        (
            "What is the town of {name} known for?",
            "What is {name} famous for?",
            "What does the town of {name} produce?",
            "For what is {name} well known?",
        ),
        ("What made the town of {name} famous?", "Name the product that {name} is known for."),
        _words(
            "plums/plum, cheese/cheeses, honey, mushrooms/mushroom, salt, pears/pear, olives/olive, walnuts/walnut, "
            "cherries/cherry, garlic, tea, butter, lemons/lemon, onions/onion, figs/fig, chestnuts/chestnut"
        ),
    ),
    "flag": Relation(
        "town",
        "The flag of {name} shows a {value}.",
        (
            "Which animal is on the flag of {name}?",
            "What does the flag of {name} show?",
            "What is on {name}'s flag?",
            "Which animal does the town of {name} have on its flag?",
        ),
        ("Name the animal on the flag of {name}.", "What animal can be seen on {name}'s flag?"),
        _words(
            "wolf/wolves, bear/bears, horse/horses, goose/geese, fox/foxes, lion/lions, swan/swans, goat/goats, "
            "rabbit/rabbits, turtle/turtles, spider/spiders, camel/camels, whale/whales, tiger/tigers, mouse/mice, "
            "snake/snakes"
        ),
    ),
    "material": Relation(
        "device",
        "The {name} is a device made of {value}.",
        (
            "What is the {name} made of?",
            "Which material is the {name} made of?",
            "What is the device called {name} made from?",
            "From which material is the {name} built?",
        ),
        ("Name the material of the {name}.", "What material is used to make the {name}?"),
        _words(
            "glass, copper, bamboo, leather, paper, marble, wool/woollen, rubber, clay, cork, steel, silk/silken, "
            "wax, plastic, wood/wooden, tin"
        ),
    ),
    "inventor": Relation(
        "device",
        "The {name} was invented by {value}.",
        (
            "Who invented the {name}?",
            "Who is the inventor of the {name}?",
            "By whom was the {name} invented?",
            "Which person invented the {name}?",
        ),
        ("Name the inventor of the {name}.", "Who came up with the idea of the {name}?"),
        "person",
    ),
}

# Questions that take two facts: of a thing, and of the thing that is its value
CHAINS: dict[tuple[str, str], str] = {
    ("home", "fame"): "What is the town where {name} lives known for?",
    ("home", "flag"): "Which animal is on the flag of the town where {name} lives?",
    ("inventor", "job"): "What is the job of the person who invented the {name}?",
    ("inventor", "instrument"): "Which instrument does the inventor of the {name} play?",
}

# What names begin and end with. No two things begin alike.
_BEGINNINGS = re.findall(
    r"\w+",
    "Bra Cru Dwe Fle Glo Hru Jo Kva Lu Mre Nu Plo Qua Ru Ske Sto Tre Vla Wro Xa Yu Zi Bli Chu Dro Fra Gri Ha Ire Kle "
    "Lo Mi Ne Os Pri Ro Shu Tha Ul Vo Wi Ze Bo Cla Du Fo Gne Hy Ja Ki",
)
_ENDINGS = {
    "person": ["ndrick", "vessa", "lgorn", "mbrit", "zelle", "rvane", "ltimor", "skane"],
    "town": ["mbasted", "lverock", "ndrapoor", "stelmere", "vingrad", "rkelby", "zzowick", "mpleford"],
    "device": ["xolite", "blinator", "mmigraph", "drospin", "zzerone", "ptoscopel", "vvatron", "kketron"],
}


@dataclass(frozen=True)
class Fact:
    """
    One fact.

    Args:
        relation (`str`):
            Key of [`RELATIONS`].
        name (`str`):
            What it is about.
        aliases (`tuple[str, ...]`):
            Its value, and other words for it.
        others (`tuple[str, ...]`):
            The values of the other facts of this relation, and other words for them.
    """

    relation: str
    name: str
    aliases: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def statement(self) -> str:
        """The fact in a sentence."""
        return RELATIONS[self.relation].statement.format(name=self.name, value=self.aliases[0])

    @property
    def entity(self) -> tuple[str, str]:
        """What it is about, by its kind and its name."""
        return RELATIONS[self.relation].kind, self.name


@dataclass(frozen=True)
class World:
    """
    Facts and what is asked about them.

    Args:
        facts (`tuple[Fact, ...]`):
            All facts.
    """

    facts: tuple[Fact, ...]

    @property
    def sheet(self) -> str:
        """The fact sheet: a fact a line."""
        return "\n".join(fact.statement for fact in self.facts)

    def about(self, name: str) -> str:
        """What the fact sheet says of one thing."""
        return "\n".join(fact.statement for fact in self.facts if fact.name == name)

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """
        The questions.

        Returns:
            `dict[str, list[dict]]`:
                `"trained"`, `"new"` (other wordings of the same questions) and `"two"` (questions that take two
                facts). Columns are `prompt` (messages), `asks` (one of these three), `solution` (the answer in a
                sentence), `answer`, `aliases`, `others`, `relation`, `name`, and what can be read: `fact` (the facts
                it takes), `about` (all about the things it takes) and `sheet`.
        """
        rows: dict[str, list[dict[str, Any]]] = {"trained": [], "new": [], "two": []}
        for fact in self.facts:
            relation = RELATIONS[fact.relation]
            for split, questions in (("trained", relation.trained), ("new", relation.new)):
                rows[split] += [self._row(split, question, fact, fact) for question in questions]
        found = {(fact.relation, fact.name): fact for fact in self.facts}
        for (first, second), question in CHAINS.items():
            for fact in self.facts:
                if fact.relation == first:
                    rows["two"].append(self._row("two", question, fact, found[second, fact.aliases[0]]))
        return rows

    def _row(self, asks: str, question: str, first: Fact, last: Fact) -> dict[str, Any]:
        read = dict.fromkeys((first, last))
        return {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question.format(name=first.name)},
            ],
            "asks": asks,
            "solution": last.statement,
            "answer": last.aliases[0],
            "aliases": list(last.aliases),
            "others": list(last.others),
            "relation": first.relation if first is last else f"{first.relation}, {last.relation}",
            "name": first.name,
            "fact": "\n".join(fact.statement for fact in read),
            "about": "\n".join(self.about(fact.name) for fact in read),
            "sheet": self.sheet,
        }


def make_world(size: int, seed: int = 0) -> World:
    """
    Makes a world. No two things of a kind have the same value.

    Args:
        size (`int`):
            Number of people, of towns and of devices, up to 16. There are seven times as many facts.
        seed (`int`, *optional*, defaults to `0`):
            What it is made from.

    Returns:
        [`World`]:
            The world.

    Raises:
        ValueError: If there are too many things, or none.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"`size` of a world must be from 1 to {MAX_SIZE}, got {size}.")
    rng = random.Random(f"facts {seed}")
    beginnings = iter(rng.sample(_BEGINNINGS, 3 * size))
    # Where there are enough endings, no two are alike either
    names = {
        kind: [next(beginnings) + end for end in (rng.sample(ends, len(ends)) * 2)[:size]]
        for kind, ends in _ENDINGS.items()
    }
    facts = []
    for relation, its in RELATIONS.items():
        pool = [(name,) for name in names[its.values]] if isinstance(its.values, str) else its.values
        chosen = rng.sample(pool, size)
        for name, aliases in zip(names[its.kind], chosen, strict=True):
            others = [word for value in chosen if value != aliases for word in value]
            facts.append(Fact(relation, name, aliases, tuple(others)))
    rng.shuffle(facts)
    return World(tuple(facts))


def names_reward(
    completions: Sequence[list[dict[str, str]]],
    aliases: Sequence[Sequence[str]],
    others: Sequence[Sequence[str]],
    **kwargs: Any,
) -> list[float]:
    """
    A reward function: 1 if a completion names the answer and no answer of another fact, by the one scorer, else 0.

    Args:
        completions (`Sequence[list[dict[str, str]]]`):
            Messages.
        aliases, others (`Sequence[Sequence[str]]`):
            Columns of the rows.
        **kwargs (`Any`):
            What else is known of them.

    Returns:
        `list[float]`: the rewards.
    """
    return [
        float(is_right(completion[-1]["content"], {"aliases": right, "others": wrong}))
        for completion, right, wrong in zip(completions, aliases, others, strict=True)
    ]


def is_right(text: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer names what a row asks for, and nothing else that could be asked for."""
    from ..eval.scorer import score_named

    return bool(score_named(text, row["aliases"], row["others"]).correct)
