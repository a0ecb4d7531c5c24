"""`trl-opsd compare`: what changed between two evaluated runs."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_opsd.report.plots import check_matplotlib


# Settings that change what a model samples, whatever the model
_SAMPLING = {
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "chat_template_kwargs",
    "apply_chat_template",
    "system_prompt",
}


def make_parser() -> ArgumentParser:
    """
    Makes the parser of the command.

    Returns:
        [`~argparse.ArgumentParser`]:
            The parser.
    """
    parser = ArgumentParser(
        prog="trl-opsd compare",
        description="Compares two runs of `trl-opsd eval`, problem by problem: accuracy, length, truncation and "
        "epistemic markers, each with the 95 % interval of the difference, and a verdict that says when there is no "
        "detectable difference.",
        epilog="Intervals are over problems like these. docs/evaluation_metrics.md defines every metric.",
        allow_abbrev=False,
    )
    parser.add_argument("base", type=Path, metavar="BASE_DIR", help="folder of the run to compare with")
    parser.add_argument("new", type=Path, metavar="NEW_DIR", help="folder of the other run")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder to write to: comparison.json, comparison.md, and per benchmark the plots accuracy.png (against "
        "the token budget), lengths.png and changes.png (default: only the console)",
    )
    parser.add_argument(
        "--common_only",
        action="store_true",
        help="leave out benchmarks and problems that only one run has, and say how many (default: an error)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """
    Compares two runs.

    Args:
        argv (`Sequence[str]`):
            Arguments after `compare`.

    Returns:
        `int`:
            Exit status: 0, or 2 if the runs cannot be compared.
    """
    args = make_parser().parse_args(argv)
    try:
        _compare(args.base, args.new, args.output_dir, args.common_only)
    except (ValueError, OSError) as error:
        print(f"trl-opsd compare: error: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(base: Path, new: Path, output_dir: Path | None, common_only: bool) -> None:
    if output_dir is not None:
        check_matplotlib()
        output_dir.mkdir(parents=True, exist_ok=True)
    settings = [_read_settings(folder) for folder in (base, new)]
    versions = {version for one in settings if (version := _flatten(one).get("settings.scorer_version"))}
    if len(versions) > 1:
        raise ValueError(
            f"The runs were graded by different versions of the scorer ({', '.join(sorted(versions))}), which do not "
            "agree on every answer. Run the older one's `trl-opsd eval` again, as it was: it grades the completions "
            "that are there anew, and generates none. Samples taken while training keep their version: evaluate the "
            "checkpoint instead."
        )
    benchmarks, left_out = _shared_benchmarks(base, new, common_only)

    from rich.console import Console

    from trl_opsd.eval.compare import compare
    from trl_opsd.eval.run_folder import read_samples, write_json
    from trl_opsd.report.evaluation import (
        Rows,
        budget_plot,
        change_plot,
        comparison_rows,
        length_plot,
        save_plots,
        show,
        to_markdown,
    )

    names = (base.resolve().name, new.resolve().name)
    names = ("base", "new") if names[0] == names[1] else names
    tables = [Rows("Settings", ["", *names], *_settings(*settings))]
    comparisons = []
    for benchmark in benchmarks:
        samples = [read_samples(folder / benchmark / "samples.jsonl") for folder in (base, new)]
        try:
            comparison = compare(samples[0], samples[1], common_only)
        except ValueError as error:
            raise ValueError(f"{benchmark}: {error}") from error
        comparisons.append(comparison)
        tables.append(comparison_rows(*names, comparison))
        prompts = [_read_prompts(folder / benchmark / "problems.jsonl") for folder in (base, new)]
        if any(prompts[0][name] != prompts[1][name] for name in prompts[0].keys() & prompts[1].keys()):
            tables[-1].notes.append(
                "The prompts differ, by the chat template, a system prompt or the benchmark's own: see problems.jsonl."
            )
        if output_dir is not None:
            common = set.intersection(*({sample.problem_id for sample in run} for run in samples))
            lengths = [[sample.num_tokens for sample in run if sample.problem_id in common] for run in samples]
            plots = {"lengths": length_plot(dict(zip(names, lengths, strict=True)))}
            if comparison.changes:
                plots["accuracy"] = budget_plot(dict(zip(names, (comparison.base, comparison.new), strict=True)))
                plots["changes"] = change_plot(comparison)
            (output_dir / benchmark).mkdir(exist_ok=True)
            save_plots(plots, output_dir / benchmark)
    if left_out:
        tables[0].notes.append(f"Left out because only one run has them: {', '.join(left_out)}.")

    console = Console()
    for table in tables:
        show(table, console)
    if output_dir is not None:
        text = "\n".join(map(to_markdown, tables))
        (output_dir / "comparison.md").write_text(text, encoding="utf-8")
        content = {"base": settings[0], "new": settings[1], "left_out": left_out, "comparisons": comparisons}
        write_json(output_dir / "comparison.json", content)
        console.print(f"Written to {output_dir}.", markup=False)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no run.json: name the folder of a run of `trl-opsd eval`.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings.")
    return settings


def _read_prompts(path: Path) -> dict[str, str]:
    rows = map(json.loads, path.read_bytes().splitlines() if path.is_file() else [])
    return {row["problem_id"]: row["prompt"] for row in rows}


def _shared_benchmarks(base: Path, new: Path, common_only: bool) -> tuple[list[str], list[str]]:
    found = [{path.parent.name for path in folder.glob("*/samples.jsonl")} for folder in (base, new)]
    shared, left_out = sorted(found[0] & found[1]), sorted(found[0] ^ found[1])
    if not shared:
        raise ValueError(f"{base} and {new} have no benchmark in common (<run>/<benchmark>/samples.jsonl).")
    if left_out and not common_only:
        raise ValueError(f"Only one run has {', '.join(left_out)}. Leave it out with --common_only.")
    return shared, left_out


def _settings(base: dict[str, Any], new: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows of the model, of the sampling and of all else that differs, and a warning where the sampling does."""
    flat = [_flatten(base), _flatten(new)]
    shown, differing = [], []
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        values = [settings.get(name, "–") for settings in flat]
        is_sampling = not _SAMPLING.isdisjoint(name.split("."))
        if values[0] != values[1] and is_sampling:
            differing.append(name)
        if name == "settings.model_name_or_path" or is_sampling or values[0] != values[1]:
            shown.append([name, *map(str, values)])
    if not differing:
        return shown, []
    return shown, [
        f"Warning: the runs were sampled differently ({', '.join(differing)}). What differs below may come from that."
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
