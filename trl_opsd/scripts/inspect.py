"""`trl-opsd inspect`: what the teacher wants of every token of some rollouts, on one page."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trl_opsd.files import write_whole
from trl_opsd.methods import TRAINABLE, method_of_recipe


if TYPE_CHECKING:
    from trl_opsd import SelfDistillationTrainer


def make_parser() -> ArgumentParser:
    """
    Makes the parser of the command.

    Returns:
        [`~argparse.ArgumentParser`]:
            The parser. What it does not know are fields of the training command.
    """
    parser = ArgumentParser(
        prog="trl-opsd inspect",
        usage="trl-opsd inspect RUN|MODEL --config recipe.yaml [--any_field value]",
        description="Samples rollouts, or reads given ones, and writes a page on which every token is coloured by "
        "what the teacher wants, with both sides' most probable tokens. Any field of the training command may be "
        "given too, and takes precedence over the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help="output folder or checkpoint of a run, whose weights and teacher are taken, or a model's id or folder, "
        "which takes the place of the recipe's",
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe, as for the training command")
    parser.add_argument(
        "--method",
        choices=list(TRAINABLE),
        metavar="METHOD",
        help="training command the recipe is for (default: what its folder, or else the file, is called)",
    )
    parser.add_argument(
        "--rollouts",
        type=int,
        default=16,
        help="number of rollouts to sample, `num_generations` each of rows spread evenly over the dataset, the same "
        "ones each time; of a stream, the first (default: 16)",
    )
    parser.add_argument(
        "--held_out", action="store_true", help="take rows of `dataset_test_split`, not those that are trained on"
    )
    parser.add_argument(
        "--completions",
        type=Path,
        help="JSON lines to read in place of sampling: `row`, the position of a dataset row, and `completion`, "
        "text, or `completion_ids`",
    )
    parser.add_argument("--top_k", type=int, default=8, help="most probable tokens to show of each side (default: 8)")
    parser.add_argument(
        "--output", type=Path, default=Path("inspect.html"), help="page to write (default: inspect.html)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """
    Writes a token page.

    Args:
        argv (`Sequence[str]`):
            Arguments after `inspect`.

    Returns:
        `int`:
            Exit status: 0, 2 if something is wrong, 130 if interrupted, with a page of the rollouts that were there.
    """
    asked, fields = make_parser().parse_known_args(argv)
    try:
        for name in ("rollouts", "top_k"):
            if getattr(asked, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(asked, name)}.")
        with TemporaryDirectory() as folder:
            page, is_whole = _page(
                asked, [*fields, "--output_dir", folder, "--report_to", "none", "--eval_strategy", "no"]
            )
        write_whole(asked.output, page)
    except (ValueError, OSError) as error:
        print(f"trl-opsd inspect: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trl-opsd inspect: interrupted. No page was written.", file=sys.stderr)
        return 130
    print(f"Page: {asked.output.resolve()}")
    return 0 if is_whole else 130


def _page(asked: Namespace, fields: list[str]) -> tuple[str, bool]:
    """The page, and whether all that was asked for is on it."""
    from trl_opsd.report.token_page import inspected_rollouts, reward_facts, token_page
    from trl_opsd.scripts.inputs import load_datasets, load_reward_funcs
    from trl_opsd.scripts.train import make_parser as make_training_parser
    from trl_opsd.scripts.train import make_trainer
    from trl_opsd.trainer.score import reward, score

    method = asked.method or method_of_recipe(asked.config)
    hint = "It has no meaning here: a page is made in one process."
    parser = make_training_parser(method, "trl-opsd inspect", launch_hint=hint)
    script_args, args, model_args, dataset_args = parser.parse_args_and_config(
        ["--config", str(asked.config), *fields]
    )
    run = _checkpoint(Path(asked.model))
    if run is None:
        model_args.model_name_or_path = asked.model
    script_args.eval_benchmarks = None
    train, held_out = load_datasets(script_args, dataset_args, with_eval=asked.held_out)
    trainer = make_trainer(script_args, args, model_args, train, reward_funcs=load_reward_funcs(script_args))
    if run is not None:
        from trl_opsd.trainer.score import restore

        restore(trainer, run)
    dataset = held_out if asked.held_out else train
    if asked.completions:
        numbers, rows, ids = _given(asked.completions, dataset, trainer)
    else:
        numbers, rows, ids = _sampled(asked, dataset, trainer)
    is_whole = len(ids) == len(rows)
    numbers, rows = numbers[: len(ids)], rows[: len(ids)]
    size = 1 if asked.completions else trainer.num_generations
    rewards = reward(trainer, rows, ids) if trainer.reward_funcs else None
    scored = score(trainer, rows, ids, rewards, size, num_listed=asked.top_k, with_streams=True)
    names = trainer.reward_func_names, trainer.reward_weights
    facts: list[dict[str, Any]] = [{"row": number} for number in numbers]
    for its, completion, values in zip(facts, ids, [None] * len(rows) if rewards is None else rewards, strict=True):
        its |= {} if values is None else reward_facts(values, *names)
        its |= {} if completion[-1] in trainer.eos_token_ids else {"truncated": "yes"}
    given = trainer.signals.coefficients, trainer.teacher.knows_entropy, facts
    rollouts = inspected_rollouts(scored, ids, *given)
    about = [
        ("student", str(run or asked.model)),
        ("teacher", f"{args.teacher}: {trainer.teacher.description}"),
        ("privileged context", args.privileged_context),
        ("loss", trainer.signals.description),
        ("divergence", args.objective().description),
        ("rows", f"{'held out' if asked.held_out else 'trained on'}, of {script_args.dataset_name}"),
        ("completions", str(asked.completions or f"sampled at temperature {args.temperature:g}")),
    ]
    return token_page(f"Rollouts of {asked.model}", rollouts, about, trainer.teacher_prompt.tokenizer), is_whole


def _checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run, or a folder of its own, has; `None` for a model."""
    from trl_opsd.trainer.checkpoints import STATE_FILE, newest_complete

    if (folder / STATE_FILE).is_file():
        return folder
    newest = newest_complete(str(folder)) if folder.is_dir() else None
    if newest is None and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter and no checkpoint. Name a checkpoint of the run.")
    return None if newest is None else Path(newest)


Completions = tuple[list[int], list[Any], list[list[int]]]
"""Of each completion: position of its row, the row, and its token ids."""


def _sampled(asked: Namespace, dataset: Any, trainer: "SelfDistillationTrainer") -> Completions:
    """Rollouts of rows, of the first ones alone where it is interrupted."""
    from tqdm.auto import tqdm

    from trl_opsd.sampling import Sampling

    args, size = trainer.args, int(trainer.num_generations)
    if args.max_completion_length is None:
        raise ValueError("Set `max_completion_length`: nothing limits the rollouts.")
    chosen = _spread(dataset, -(-asked.rollouts // size))
    numbers = [number for number, _ in chosen for _ in range(size)]
    rows = [row for _, row in chosen for _ in range(size)]
    sampling = Sampling(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_new_tokens=args.max_completion_length
    )
    prompts = trainer.tokenize_prompts([row["prompt"] for row in rows])
    ids: list[list[int]] = []
    batch = args.per_device_eval_batch_size
    with tqdm(total=len(prompts), desc="sampling", unit="rollout", disable=args.disable_tqdm) as bar:
        try:
            for start in range(0, len(prompts), batch):
                ids += trainer.sample(prompts[start : start + batch], sampling, stream=3)
                bar.update(len(ids) - bar.n)
        except KeyboardInterrupt:
            ids = ids[: len(ids) // size * size]
            if not ids:
                raise
    if len(ids) < len(prompts):
        print(f"trl-opsd inspect: interrupted. The page shows {len(ids)} of {len(prompts)} rollouts.", file=sys.stderr)
    return numbers, rows, ids


def _spread(dataset: Any, number: int) -> list[tuple[int, Any]]:
    """So many rows, evenly spread, with their positions; the first ones of a stream, whose end nobody knows."""
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        return list(enumerate(dataset.take(number)))
    number = min(number, len(dataset))
    return [
        (place, dataset[place]) for place in ((2 * turn + 1) * len(dataset) // (2 * number) for turn in range(number))
    ]


def _given(file: Path, dataset: Any, trainer: "SelfDistillationTrainer") -> Completions:
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "Rows of a stream have no position for `--completions` to name: set `dataset_streaming: false`."
        )
    tokenizer: Any = trainer.teacher_prompt.tokenizer
    numbers, rows, ids = [], [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            its = json.loads(line)
            numbers.append(range(len(dataset))[its["row"]])
            rows.append(dataset[numbers[-1]])
            given = its.get("completion_ids")
            ids.append(given or tokenizer(its["completion"], add_special_tokens=False)["input_ids"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"Line {number} of {file} needs `row`, the position of a dataset row, and `completion` or "
                f"`completion_ids`: {error!r}."
            ) from error
    if not rows:
        raise ValueError(f"{file} has no completions.")
    return numbers, rows, ids
