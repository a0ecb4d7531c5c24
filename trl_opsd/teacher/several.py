from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .base import Read, Teacher, TokenTargets


# In a batch, the position of the teacher of each row
NUMBER = "teacher_number"


class SeveralTeachers(Teacher):
    """
    Several teachers, of which each row names its own, such as that of its domain, as in the multi-teacher
    distillation of [MiMo-V2-Flash](https://huggingface.co/papers/2601.02780).

    Args:
        members (`Mapping[str, Teacher]`):
            The teachers by their names.
        column (`str`):
            Column of the rows with the name.
        is_alone (`bool`):
            Whether there is one process, so that a teacher none of whose rows is there need not run. Where there are
            others, all run all teachers, whose passes may meet in collective operations.
    """

    def __init__(self, members: Mapping[str, Teacher], column: str, is_alone: bool):
        self.members, self._column, self._is_alone = members, column, is_alone
        self.description = "; ".join(f"{name}: {one.description}" for name, one in members.items())
        self.knows_entropy = all(one.knows_entropy for one in members.values())
        known = {name: one.fingerprint for name, one in members.items() if one.fingerprint is not None}
        self.fingerprint = "; ".join(f"{name}: {its}" for name, its in known.items()) or None

    def weights(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """
        See [`Teacher.weights`].

        Raises:
            TypeError: Always: each member has its own.
        """
        raise TypeError("Several teachers have no weights in common: ask one of `members`.")

    def annotate(
        self,
        prompts: Sequence[list[int] | None],
        batch: dict[str, torch.Tensor],
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """
        See [`Teacher.annotate`].

        Raises:
            ValueError: If a row names no teacher.
        """
        names = list(self.members)
        for row in rows:
            if row.get(self._column) not in names:
                raise ValueError(
                    f"`{self._column}` of a row is {row.get(self._column)!r}, and `teachers` has {names}. Correct the "
                    "row, or leave it out."
                )
        number = torch.tensor([names.index(row[self._column]) for row in rows], device=batch["completion_ids"].device)
        columns = {NUMBER: number}
        for index, one in enumerate(self.members.values()):
            own = number == index
            its = [prompt if is_own else None for prompt, is_own in zip(prompts, own.tolist(), strict=True)]
            for name, values in one.annotate(its, batch, rows).items():
                place = own.view(-1, *[1] * (values.ndim - 1))
                columns[name] = values.where(place, columns[name]) if name in columns else values
        return columns

    def targets(
        self, policy: nn.Module, rows: dict[str, Any], selected: torch.Tensor, read: Read
    ) -> list[TokenTargets]:
        given = []
        for index, one in enumerate(self.members.values()):
            own = selected & (rows[NUMBER] == index).unsqueeze(1)
            if self._is_alone and not own.any() and selected.any():
                continue
            its = {**rows, "divergence_mask": own}
            given += [target._replace(tokens=own[selected]) for target in one.targets(policy, its, own, read)]
        return given

    def shared_tokens(self, num_tokens: int) -> int | None:
        numbers = (one.shared_tokens(num_tokens) for one in self.members.values())
        return min((number for number in numbers if number is not None), default=None)

    def on_step_end(self, step: int) -> None:
        for one in self.members.values():
            one.on_step_end(step)

    def save(self, directory: Path, is_main_process: bool) -> None:
        for name, one in self.members.items():
            if is_main_process:
                self._folder(directory, name).mkdir(parents=True, exist_ok=True)
            one.save(self._folder(directory, name), is_main_process)

    def load(self, directory: Path) -> None:
        for name, one in self.members.items():
            one.load(self._folder(directory, name))

    def _folder(self, directory: Path, name: str) -> Path:
        return directory / "teachers" / name
