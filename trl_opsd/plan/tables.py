"""A plan as tables and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .memory import GIB
from .planning import Change, Plan
from .setting import Setting


_UNCONFIRMED = (
    "Planned, not measured: what passes take was checked on a CPU, and against one H100 for small models; no GPU "
    "confirmed the times, sharded runs, vLLM's pool and the overhead. See docs/plan.md."
)


def show(plan: Plan, title: str, suggested: Sequence[tuple[list[Change], Plan]], console: Console) -> None:
    """
    Print a plan.

    Args:
        plan ([`Plan`]):
            What a run takes.
        title (`str`):
            What is planned.
        suggested (`Sequence`):
            See [`suggestions`].
        console ([`~rich.console.Console`]):
            Where to.
    """
    console.print(title, markup=False, highlight=False)
    for line in assumptions(plan):
        console.print(f"  {line}", markup=False, highlight=False)
    console.print(_memory_table(plan))
    if plan.durations:
        console.print(_time_table(plan))
    for line in verdict(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for changes, then in suggested:
        flags = " ".join(f"--{name} {value}" for change in changes for name, value in change.flags.items())
        costs = "; ".join(change.costs for change in changes)
        seconds = f", {then.seconds:,.0f} s a step" if then.durations else ""
        text = f"  {flags}: {then.largest.total / GIB:.1f} GiB{seconds} ({costs})"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(_UNCONFIRMED, markup=False, highlight=False, soft_wrap=True)


def assumptions(plan: Plan) -> list[str]:
    """What the figures are for."""
    setting = plan.setting
    args, policy, lengths = setting.args, setting.policy, setting.lengths
    trained = f"{policy.num_trained / 1e6:,.1f} M of them trained" if setting.is_lora else "all trained"
    teachers = [
        f"teacher {one.args.teacher if name is None else f'{name}, {one.args.teacher}'}: {_whose_weights(one)}"
        for name, one in setting.each.items()
    ]
    sampler = "transformers" if not args.use_vllm else f"vLLM, {args.vllm_mode}"
    return [
        f"{policy.num_parameters / 1e9:.2f} B parameters in {str(policy.dtype).removeprefix('torch.')}, {trained}; "
        f"precision {setting.precision}; sharding {setting.sharding.kind}; {'; '.join(teachers)}",
        f"{setting.num_gpus} x {setting.gpu.name}, {setting.gpu.memory / GIB:.1f} GiB each; sampled by {sampler}; "
        f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}",
        f"rows as long as may be: prompt {lengths.prompt:,}, teacher's prompt {lengths.teacher_prompt:,}, completion "
        f"{lengths.completion:,} tokens; {setting.rows_per_pass} of {args.per_device_train_batch_size} rows at once, "
        f"{setting.rows_per_step} rows per process and optimizer step",
    ]


def _whose_weights(setting: Setting) -> str:
    if setting.external is not None:
        return f"another model of {setting.external.num_parameters / 1e9:.2f} B"
    if setting.args.teacher_server_base_url is not None:
        return "on a server"
    return "a copy of the policy" if setting.copies_teacher else "the policy's weights"


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, and what limits it."""
    largest, memory = plan.largest, plan.setting.gpu.memory
    part = max(largest.parts, key=lambda name: largest.parts[name])
    words = "fits" if largest.total <= memory else "does not fit"
    lines = [
        f"Memory {words}: {largest.total / GIB:.1f} of {memory / GIB:.1f} GiB, most in {largest.name}, of which "
        f"{part} {largest.parts[part] / GIB:.1f} GiB.",
        *plan.problems,
    ]
    if plan.durations:
        slowest = max(plan.durations, key=lambda one: one.seconds)
        mean = plan.setting.mean_completion
        bound = f"with completions of {mean:,} tokens" if mean else "at most"
        lines.append(
            f"Time: {plan.seconds:,.1f} s a step {bound}, {slowest.seconds / plan.seconds:.0%} of it {slowest.name}, "
            f"limited by {slowest.limit}."
        )
        if plan.setting.args.max_steps > 0:
            hours = plan.seconds * plan.setting.args.max_steps / 3600
            lines.append(f"{plan.setting.args.max_steps:,} steps: {hours:,.1f} hours {bound}.")
    return lines


def as_json(plan: Plan, suggested: Sequence[tuple[list[Change], Plan]]) -> dict[str, Any]:
    """
    A plan as JSON holds it: bytes and seconds.

    Args:
        plan ([`Plan`]):
            What a run takes.
        suggested (`Sequence`):
            See [`suggestions`].
    """
    setting = plan.setting
    return {
        "fits": plan.fits,
        "gpus": setting.num_gpus,
        "gpu": setting.gpu._asdict(),
        "sharding": setting.sharding._asdict(),
        "lengths": setting.lengths._asdict(),
        "rows_per_pass": setting.rows_per_pass,
        "parameters": setting.policy.num_parameters,
        "trained_parameters": setting.policy.num_trained,
        "peak_bytes": plan.largest.total,
        "peak_phase": plan.largest.name,
        "memory": {phase.name: phase.parts for phase in plan.phases},
        "seconds": {one.name: {"seconds": one.seconds, "limit": one.limit} for one in plan.durations},
        "problems": plan.problems,
        "suggestions": [
            {
                "flags": {name: value for change in changes for name, value in change.flags.items()},
                "costs": [change.costs for change in changes],
                "peak_bytes": then.largest.total,
                "seconds": then.seconds,
            }
            for changes, then in suggested
        ],
        "unconfirmed": _UNCONFIRMED,
    }


def _memory_table(plan: Plan) -> Table:
    table = Table(title="GiB of each GPU, by part and phase", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right", style="bold" if phase is plan.largest else None)
    names = dict.fromkeys(name for phase in plan.phases for name in phase.parts)
    for name in names:
        sizes = [phase.parts.get(name, 0) for phase in plan.phases]
        if any(sizes):
            table.add_row(name, *(f"{size / GIB:.2f}" if size else "–" for size in sizes))
    table.add_section()
    table.add_row("in all", *(f"{phase.total / GIB:.2f}" for phase in plan.phases))
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="seconds of an optimizer step", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("limited by")
    for one in plan.durations:
        table.add_row(one.name, f"{one.seconds:,.2f}", f"{one.seconds / plan.seconds:.0%}", one.limit)
    table.add_section()
    table.add_row("in all", f"{plan.seconds:,.2f}", "", "")
    return table
