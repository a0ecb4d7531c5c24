"""
From what was sampled to what the loss reads: rollouts, their groups, teacher prompts, tensors. It is handed values and
functions and knows no trainer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from trl.trainer.utils import pad

from ..context import (
    AnsweredContext,
    MarkingContext,
    Memory,
    Reading,
    Rollout,
    Rollouts,
    SampledContext,
    TeacherPrompt,
)
from ..scoring import Images, keep_groups_together
from ..signal import Signals
from .asking import Gather, sample_once, together
from .images import teacher_images
from .metrics import Metrics, add_contexts, add_degeneration
from .rewards import reward_streams, total_rewards


@dataclass
class Generation:
    """
    What is sampled for the rows of this process. All but the rows is known once they have been rewarded.

    Args:
        rows (`list[Mapping[str, Any]]`):
            Dataset rows, in the end with the prompt that the model has read.
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            Decoded completions, as text or messages.
        token_ids (`list[list[int]]`):
            Tokens of the completions, those of tools included.
        rewards (`torch.Tensor` of shape `(num_rollouts, num_reward_funcs)`):
            Of all processes. NaN where a function did not apply.
        feedback (`list[str | None]`):
            What was said about each.
        tools (`list[list[Callable] | None]`):
            Tools that the prompt of each shows.
        empty (`set[int]`, *optional*):
            Positions of completions without a token of their own.
        contrasts (`list[list[list[int]]]`, *optional*):
            Token ids of the prompts that the teacher reads each completion after for contrast.
        teacher_images (`list[Images]`, *optional*):
            Images of the teacher's prompt of each row with a context.
        replaced (`set[int]`, *optional*):
            Positions of completions that are others than the student's own rollouts of their prompts.
        num_discarded_tokens (`int`, *optional*, defaults to `0`):
            Tokens that were sampled for completions and are in none.
        has_turns (`bool`, *optional*, defaults to `False`):
            Whether a turn has been sampled.
        groups (`list[Rollouts]`, *optional*):
            For each row the rollouts of its prompt, if anybody reads them.
        said (`list[Any]`, *optional*):
            What was sampled, or said, about each for a context that asks.
    """

    rows: list[Mapping[str, Any]]
    completions: list[Any] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    rewards: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    feedback: list[str | None] = field(default_factory=list)
    tools: list[list[Callable[..., Any]] | None] = field(default_factory=list)
    empty: set[int] = field(default_factory=set)
    contrasts: list[list[list[int]]] = field(default_factory=list)
    teacher_images: list[Images | None] = field(default_factory=list)
    replaced: set[int] = field(default_factory=set)
    num_discarded_tokens: int = 0
    has_turns: bool = False
    groups: Sequence[Rollouts | None] = ()
    said: Sequence[Any] = ()

    def finish(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Any],
        completions: list[Any],
        token_ids: list[list[int]],
        rewards: torch.Tensor,
        feedback: list[str | None],
        tools: list[list[Callable[..., Any]] | None],
    ) -> None:
        """Note what became of the rows, whose prompts the model has read as `prompts`."""
        self.rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]
        self.completions, self.token_ids, self.rewards = completions, token_ids, rewards
        self.feedback, self.tools = feedback, tools

    def num_sampled_tokens(self, model_tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that were sampled, from the mask of shape `(B, T)` of those that no tool wrote."""
        return model_tokens.sum() + self.num_discarded_tokens - model_tokens[sorted(self.empty)].sum()

    def is_truncated(self, position: int, end_ids: Sequence[int]) -> bool:
        """Whether a completion was cut off before one of the tokens that end it."""
        return position not in self.empty and self.token_ids[position][-1] not in end_ids


@dataclass(frozen=True)
class TeacherInputs:
    """
    Makes what the teacher reads of a generation, and what is known of its rewards.

    Args:
        teacher_prompt ([`TeacherPrompt`]):
            Renders the context.
        signals ([`Signals`]):
            Say what is read of it.
        reward_weights (`torch.Tensor`):
            Weights of the reward functions.
        success_threshold (`float`):
            Least reward of a correct rollout.
        end_ids (`Sequence[int]`):
            Tokens that end a completion.
        pad_token_id (`int`):
            Token to pad with.
        pad_to_multiple_of (`int`, *optional*):
            What widths are multiples of.
        process_index (`int`):
            Of this process.
        num_processes (`int`):
            Number of processes, each with as many rows.
        gather (`Callable`):
            From a list of each process to the list of all.
        sample (`Callable`):
            From prompts to completions of the current policy, sampled as the context says; for all processes at once.
        memories (`Sequence[Memory]`):
            Who sees all prompts and rollouts that are trained on.
    """

    teacher_prompt: TeacherPrompt
    signals: Signals
    reward_weights: torch.Tensor
    success_threshold: float
    end_ids: Sequence[int]
    pad_token_id: int
    pad_to_multiple_of: int | None
    process_index: int
    num_processes: int
    gather: Gather
    sample: Callable[[list[list[int]]], list[list[int]]]
    memories: Sequence[Memory] = ()

    def __call__(
        self,
        generation: Generation,
        student_ids: Sequence[list[int]],
        num_generations: int,
        metrics: Metrics,
    ) -> tuple[list[list[int] | None], dict[str, torch.Tensor]]:
        """
        Make them for the rows of this process.

        Args:
            generation ([`Generation`]):
                What was sampled.
            student_ids (`Sequence[list[int]]`):
                Token ids of the student's prompts.
            num_generations (`int`):
                Rollouts of a prompt.
            metrics ([`Metrics`]):
                Where the lengths of what a context sampled go.

        Returns:
            `tuple[list[list[int] | None], dict[str, torch.Tensor]]`: the teacher's prompts, `None` for rows without a
            context, and the tensors of [`collate`] and [`reward_streams`], with `replaced` and `truncated`, bool of
            shape `(B,)`.
        """
        first = self.process_index * len(generation.rows)
        rewards = total_rewards(generation.rewards, self.reward_weights)
        streams = reward_streams(rewards, self.success_threshold, num_generations)
        groups: Sequence[Rollouts | None] = [None] * len(generation.rows)
        is_read = getattr(self.teacher_prompt.context, "reads_rollouts", True)
        if is_read or self.memories:
            rollouts = make_rollouts(generation, streams, first, num_generations, self.end_ids)
            is_spread = num_generations > 1 and self.num_processes > 1
            groups = make_groups(rollouts, first, num_generations, self.gather if is_spread else None)
            generation.groups = groups
            for name, pair in self._rates(generation.rows, groups).items():
                metrics.add_rate(name, *generation.rewards.new_tensor(pair))
        groups, gather = (groups, self.gather) if is_read else ([None] * len(generation.rows), list)
        generation.said = said = self._said(generation, groups, student_ids[0], metrics)
        readings = together(lambda: self._readings(generation, groups), gather)  # or they were made before the run
        prompts = [None if reading is None else reading.ids for reading in readings]
        has_target = self.signals.target is not None
        if self.signals.needs_contrast or has_target:
            generation.contrasts = together(lambda: self._contrasts(generation, groups, prompts), gather)
        if has_target:  # which is made of both
            prompts = [its if some else None for its, some in zip(prompts, generation.contrasts, strict=True)]
        generation.teacher_images = [
            None if prompt is None or reading is None else reading.images
            for prompt, reading in zip(prompts, readings, strict=True)
        ]
        tensors = collate(prompts, student_ids, self.pad_token_id, self.pad_to_multiple_of)
        if has_target:
            tensors |= self._other_prompts(generation.contrasts, student_ids)
        if self.signals.needs_spans:
            tensors |= self._spans(generation, cast(Sequence[Rollouts], groups), said, metrics)
        own, positions = slice(first, first + len(prompts)), range(len(prompts))
        tensors |= {name: values[own] for name, values in streams.items()}
        tensors["replaced"] = torch.tensor([position in generation.replaced for position in positions])
        tensors["truncated"] = torch.tensor([generation.is_truncated(it, self.end_ids) for it in positions])
        return prompts, tensors

    def _readings(self, generation: Generation, groups: Sequence[Rollouts | None]) -> list[Reading | None]:
        rows = zip(generation.rows, groups, generation.tools, generation.said, strict=True)
        unread = generation.empty | (set() if self.signals.reads_replaced else generation.replaced)
        return [None if index in unread else self.teacher_prompt.reading(*its) for index, its in enumerate(rows)]

    def _contrasts(
        self, generation: Generation, groups: Sequence[Rollouts | None], prompts: Sequence[list[int] | None]
    ) -> list[list[list[int]]]:
        rows = zip(prompts, generation.rows, groups, generation.tools, strict=True)
        return [
            [] if prompt is None else self.teacher_prompt.contrast_ids(row, rollouts, tools)
            for prompt, row, rollouts, tools in rows
        ]

    def _other_prompts(
        self, contrasts: Sequence[Sequence[list[int]]], student_ids: Sequence[list[int]]
    ) -> dict[str, torch.Tensor]:
        """What the teacher reads besides its own prompt for a target; the student's prompts are in the batch."""
        if (most := max(map(len, contrasts))) > 1:
            raise ValueError(
                f"{type(self.teacher_prompt.context).__name__} gives {most} prompts to contrast one rollout with, and "
                "`target` reads one. Have its `contrast_messages` return one."
            )
        prompts = [some[0] if some else student for some, student in zip(contrasts, student_ids, strict=True)]
        groups = _numbered(student_ids)
        tensors = _prompt_tensors("contrast_prompt", prompts, self.pad_token_id, self.pad_to_multiple_of)
        return {"prompt_groups": groups, **tensors}

    def into(
        self,
        batch: dict[str, Any],
        generation: Generation,
        num_generations: int,
        annotate: Callable[[Sequence[list[int] | None], dict[str, Any], list[Mapping[str, Any]]], Mapping[str, Any]],
        metrics: Metrics,
        is_training: bool,
    ) -> list[list[int] | None]:
        """
        Put them into a generation batch.

        Args:
            batch (`dict[str, Any]`):
                Generation batch.
            generation ([`Generation`]):
                What was sampled.
            num_generations (`int`):
                Rollouts of a prompt.
            annotate (`Callable`):
                From the teacher's prompts, the batch and the rows to what the teacher adds to it.
            metrics ([`Metrics`]):
                Where rates and lengths go.
            is_training (`bool`):
                Whether it is trained on, and so remembered.

        Returns:
            `list[list[int] | None]`: the teacher's prompts, `None` for rows without a context.
        """
        masks = batch["prompt_mask"].bool()
        student_ids = [ids[mask].tolist() for ids, mask in zip(batch["prompt_ids"], masks, strict=True)]
        teacher_ids, tensors = self(generation, student_ids, num_generations, metrics)
        batch.update(annotate(teacher_ids, batch, generation.rows))
        groups = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_groups")}
        batch.update({name: values.to(masks.device) for name, values in tensors.items()})
        batch.update(groups)  # no work for the device
        if any(batch.get("images", ())) or any(generation.teacher_images):
            given = generation.teacher_images, generation.completions, batch.get("images")
            batch["teacher_images"] = teacher_images(self.teacher_prompt, *given)
        add_contexts(metrics, batch, len(generation.empty), has_rewards=generation.rewards.size(1) > 0)
        has_tokens = torch.tensor([position not in generation.empty for position in range(len(masks))])
        counted = has_tokens.to(masks.device) & ~batch["replaced"]
        texts = list(map(_text, generation.completions))
        seen = batch["completion_mask"], batch["truncated"], batch["correct"]
        add_degeneration(metrics, texts, *seen, counted)
        if is_training and self.memories:
            rows = zip(generation.rows, cast(Sequence[Rollouts], generation.groups), strict=True)
            everyone = self.gather([(row, group.all) for row, group in rows if group.index == 0])
            said = iter(self.gather(list(generation.said)))
            everything = [(row, [replace(rollout, said=next(said)) for rollout in group]) for row, group in everyone]
            for memory in self.memories:
                memory.remember(everything)
        return teacher_ids

    def _rates(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Rollouts]) -> dict[str, tuple[float, float]]:
        those = {id(part): part for part in (self.teacher_prompt.context, *self.memories) if hasattr(part, "rates")}
        return {name: pair for part in those.values() for name, pair in cast(Any, part).rates(rows, groups).items()}

    def _said(
        self, generation: Generation, groups: Sequence[Rollouts | None], stand_in: list[int], metrics: Metrics
    ) -> list[Any]:
        """What the current policy writes, or somebody else says, for a context that asks, if it is read."""
        context, nothing = self.teacher_prompt.context, [None] * len(generation.rows)
        if not self.signals.needs_context:
            return nothing
        if isinstance(context, AnsweredContext):
            rows = [
                None if index in generation.empty else (row, cast(Rollouts, rollouts))
                for index, (row, rollouts) in enumerate(zip(generation.rows, groups, strict=True))
            ]
            return together(lambda: self.teacher_prompt.answers(rows), self.gather)
        return self._written(generation, groups, stand_in, metrics) if isinstance(context, SampledContext) else nothing

    def _spans(
        self, generation: Generation, groups: Sequence[Rollouts], said: Sequence[Any], metrics: Metrics
    ) -> dict[str, torch.Tensor]:
        """The tokens that a context marks, bool of shape `(B, T)`, by kind."""
        kinds = cast(MarkingContext, self.teacher_prompt.context).kinds
        marked = torch.zeros(len(kinds), len(groups), max(map(len, generation.token_ids)), dtype=torch.bool)
        asked = dropped = given = unreadable = num_tokens = 0
        for index, (row, rollouts, its) in enumerate(zip(generation.rows, groups, said, strict=True)):
            if index in generation.empty:
                continue
            marks, masks = self.teacher_prompt.marks(row, rollouts, its)
            for kind, mask in masks.items():
                marked[kinds.index(kind), index, : len(mask)] = torch.tensor(mask)
            asked, unreadable = asked + marks.was_asked, unreadable + (not marks.is_readable)
            dropped, given = dropped + marks.num_dropped, given + marks.num_dropped + len(marks.spans)
            num_tokens += marks.was_asked * len(rollouts.own.token_ids)
        rates = {
            "spans/unreadable_rate": (unreadable, asked),
            "spans/dropped_rate": (dropped, given),
            "spans/token_rate": (int(marked.sum()), num_tokens),
        }
        metrics.add_rates(rates, generation.rewards.device)
        return {f"spans/{kind}": mask for kind, mask in zip(kinds, marked, strict=True)}

    def _written(
        self, generation: Generation, groups: Sequence[Rollouts | None], stand_in: list[int], metrics: Metrics
    ) -> list[str | None]:
        """What the current policy writes for a context that samples."""
        questions = [
            None if index in generation.empty else self.teacher_prompt.sample_ids(row, rollouts)
            for index, (row, rollouts) in enumerate(zip(generation.rows, groups, strict=True))
        ]
        answers = sample_once(questions, self.sample, self.gather, stand_in)
        given = [ids for ids in answers if ids is not None]
        number, device = torch.tensor(len(given)), generation.rewards.device
        num_cut = torch.tensor(sum(bool(ids) and ids[-1] not in self.end_ids for ids in given))
        num_tokens = torch.tensor(sum(map(len, given)))
        metrics.add_rate("context_samples/mean_length", num_tokens.to(device), number.to(device))
        metrics.add_rate("context_samples/truncated_rate", num_cut.to(device), number.to(device))
        decode = self.teacher_prompt.tokenizer.decode
        return [None if ids is None else cast(str, decode(ids, skip_special_tokens=True)) for ids in answers]


def make_rollouts(
    generation: Generation,
    streams: Mapping[str, torch.Tensor],
    first: int,
    num_generations: int,
    end_ids: Sequence[int],
) -> list[Rollout]:
    """
    Records of the rollouts of this process.

    Args:
        generation ([`Generation`]):
            What was sampled.
        streams (`Mapping[str, torch.Tensor]`):
            `rewards` and `correct`, as [`reward_streams`] gives them.
        first (`int`):
            Position of this process's first rollout among those of all processes.
        num_generations (`int`):
            Rollouts of a prompt.
        end_ids (`Sequence[int]`):
            Tokens that end a completion.
    """
    rewards, correct = (
        [None if value != value else value for value in streams[name].tolist()] for name in ("rewards", "correct")
    )
    rollouts = []
    for position, (completion, ids) in enumerate(zip(generation.completions, generation.token_ids, strict=True)):
        is_correct = correct[first + position]
        rollouts.append(
            Rollout(
                text=_text(completion),
                token_ids=[] if position in generation.empty else list(ids),
                reward=rewards[first + position],
                correct=None if is_correct is None else bool(is_correct),
                feedback=generation.feedback[position],
                truncated=generation.is_truncated(position, end_ids),
                index=(first + position) % num_generations,
                replaced=position in generation.replaced,
            )
        )
    return rollouts


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    contents = (message.get("content") or "" for message in completion)
    return "\n".join(
        "".join(part.get("text") or "" for part in its) if isinstance(its, list) else str(its) for its in contents
    )


def make_groups(rollouts: list[Rollout], first: int, num_generations: int, gather: Gather | None) -> list[Rollouts]:
    """
    For each rollout of this process, the rollouts of its prompt, which may be spread over processes.

    Args:
        rollouts (`list[Rollout]`):
            Of this process.
        first (`int`):
            Position of the first among those of all processes.
        num_generations (`int`):
            Rollouts of a prompt.
        gather (`Callable`, *optional*):
            Collects the rollouts of all processes. `None` if there is one process, or one rollout for each prompt.
    """
    everything, first = (rollouts, first % num_generations) if gather is None else (gather(rollouts), first)
    groups = []
    for position, rollout in enumerate(rollouts, first):
        start = position - rollout.index
        groups.append(Rollouts(everything[start : start + num_generations], rollout.index))
    return groups


def collate(
    teacher_ids: Sequence[list[int] | None],
    student_ids: Sequence[list[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None,
) -> dict[str, torch.Tensor]:
    """
    Tensors of the teacher's prompts.

    Args:
        teacher_ids (`Sequence[list[int] | None]`):
            Token ids for each row, `None` for rows without a context.
        student_ids (`Sequence[list[int]]`):
            Token ids of the student's prompts, which stand in for those, and are not read.
        pad_token_id (`int`):
            Token to pad with, on the left.
        pad_to_multiple_of (`int`, *optional*):
            What the width is a multiple of.

    Returns:
        `dict[str, torch.Tensor]`: `teacher_prompt_ids` and `teacher_prompt_mask` of shape `(B, T)`,
        `teacher_prompt_groups` of shape `(B,)`, the same number for rows with the same prompt, and `has_context`, bool
        of shape `(B,)`.
    """
    given = [student if ids is None else ids for ids, student in zip(teacher_ids, student_ids, strict=True)]
    tensors = _prompt_tensors("teacher_prompt", given, pad_token_id, pad_to_multiple_of)
    return {**tensors, "has_context": torch.tensor([ids is not None for ids in teacher_ids])}


def _prompt_tensors(
    name: str, prompts: Sequence[list[int]], pad_token_id: int, pad_to_multiple_of: int | None
) -> dict[str, torch.Tensor]:
    tensors = [torch.tensor(ids) for ids in prompts]
    masks = [torch.ones_like(ids) for ids in tensors]
    return {
        f"{name}_groups": _numbered(prompts),
        f"{name}_ids": pad(tensors, pad_token_id, "left", pad_to_multiple_of),
        f"{name}_mask": pad(masks, 0, "left", pad_to_multiple_of),
    }


def _numbered(prompts: Sequence[list[int]]) -> torch.Tensor:
    """The same number for equal prompts."""
    first_rows: dict[tuple[int, ...], int] = {}
    return torch.tensor([first_rows.setdefault(tuple(ids), index) for index, ids in enumerate(prompts)])


def regrouped(
    micro_batches: list[dict[str, Any]], steps_per_generation: int, accumulation_steps: int
) -> list[dict[str, Any]]:
    """
    Micro-batches of a generation in which rows with the same teacher prompt meet.

    GRPO's shuffle scatters the rollouts of a prompt over micro-batches, where each would pay for the teacher's prompt
    again. Rows change places among the micro-batches of one optimizer step only, so that every step keeps the rows the
    shuffle gave it: the greatest common divisor never straddles two steps.

    Args:
        micro_batches (`list[dict[str, Any]]`):
            Micro-batches.
        steps_per_generation (`int`):
            Number of them.
        accumulation_steps (`int`):
            Micro-batches of an optimizer step.
    """
    window = math.gcd(steps_per_generation, accumulation_steps)
    return keep_groups_together(micro_batches, window, "teacher_prompt_groups")
