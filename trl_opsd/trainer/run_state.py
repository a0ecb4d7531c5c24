"""
What a resumed run needs beside its weights and its optimizer: every part with state saves itself under its name.

[`RunState`] is the list of those parts, and knows which runs a checkpoint fits.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..files import locked
from ..serving import ServerError
from .asking import BatchError
from .checkpoints import begin, finish, is_complete, move_later, newest_complete, read_state


# What the teacher reads, what leftover rollouts are, and what the position of a run counts in
_FIXED_SETTINGS = (
    "teacher",
    "privileged_context",
    "context_kwargs",
    "teacher_chat_template_kwargs",
    "teacher_generation_prefix",
    "success_threshold",
    "completions",
    "completions_kwargs",
    "curriculum",
    "prompts",
    "prompts_kwargs",
    "target",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "shuffle_dataset",
    "seed",
)
_WAY_OUT = "Resume with what it was written with, or start a new run from its weights with `model`."


@runtime_checkable
class Stateful(Protocol):
    """A part whose state JSON can hold, and is the same on every process."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. Called on every process."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what [`state_dict`] returned. Called on every process."""


class StatefulFiles(Protocol):
    """A part that keeps its state in files of its own."""

    def save(self, directory: Path, is_main_process: bool) -> None:
        """Write what a resumed run needs. Called on every process."""

    def load(self, directory: Path) -> None:
        """Take up what [`save`] wrote. Called on every process."""


class Attributes:
    """
    Attributes of an object, as a [`Stateful`] part.

    Args:
        owner (`Any`):
            The object.
        names (`str`):
            Of its attributes, by their names in checkpoints.
    """

    def __init__(self, owner: Any, **names: str):
        self._owner, self._names = owner, names

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self._owner, attribute) for name, attribute in self._names.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, attribute in self._names.items():
            setattr(self._owner, attribute, state[name])


class LeftoverRollouts:
    """
    Micro-batches that are left over between two generations, which a resumed run could not sample again, as a
    [`StatefulFiles`] part. Each process has its own.

    Args:
        position ([`Attributes`]):
            `step`, the number of micro-batches done, and `pending`, those of the generation.
        num_micro_batches (`int`):
            How many there are from one generation to the next.
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
    """

    def __init__(self, position: Attributes, num_micro_batches: int, accelerator: Accelerator):
        self._position, self._num_micro_batches = position, num_micro_batches
        self._name, self._device = f"rollouts_{accelerator.process_index}.pt", accelerator.device

    def save(self, directory: Path, is_main_process: bool) -> None:
        state = self._position.state_dict()
        if state["step"] % self._num_micro_batches == 0:
            state["pending"] = None
        torch.save(state, directory / self._name)

    def load(self, directory: Path) -> None:
        state = torch.load(directory / self._name, map_location="cpu", weights_only=True)
        self._position.load_state_dict(send_to_device(state, self._device))


class RunState:
    """
    The parts of a run that have state, and what tells the run from others.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
        args ([`~transformers.TrainingArguments`]):
            Configuration of the run.
        train_dataset (`str`):
            What tells its data from others, see [`dataset_summary`].
        fingerprints (`dict[str, str | None]`):
            Those of its `"model"` and, if it has an external one, its `"teacher"`. Those of the main process count.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: TrainingArguments,
        train_dataset: str,
        fingerprints: dict[str, str | None],
    ):
        self._accelerator = accelerator
        self._args = args
        self._train_dataset = train_dataset
        (self._fingerprints,) = broadcast_object_list([fingerprints])
        self._parts: dict[str, Stateful | StatefulFiles] = {}

    def add(self, name: str, part: Stateful | StatefulFiles) -> None:
        """
        Have a part saved and restored with the run.

        Args:
            name (`str`):
                Name of its state in checkpoints.
            part ([`Stateful`] or [`StatefulFiles`]):
                The part.

        Raises:
            ValueError: If there is one of that name.
        """
        if name in self._parts:
            raise ValueError(f"The run has a part named {name!r} already. Choose another name.")
        self._parts[name] = part

    def checkpoint(self, asked: str | bool | None) -> str | None:
        """
        The checkpoint to resume from.

        Args:
            asked (`str` or `bool`, *optional*):
                A folder, or `True` for the newest complete checkpoint of the run's own.

        Returns:
            `str`, *optional*: its folder, if any was asked for.

        Raises:
            ValueError: If there is none, or this run is not the one that wrote it.
        """
        if not asked:
            return None
        if asked is True:
            asked = newest_complete(str(self._args.output_dir))
            if asked is None:
                raise ValueError(
                    f"There is no complete checkpoint in `output_dir={self._args.output_dir}` to resume from. Start "
                    "without `resume_from_checkpoint`."
                )
        self._check_same_run(asked, read_state(Path(asked)))
        return asked

    def load(self, directory: Path, only: Collection[str] | None = None) -> None:
        """Restore all parts, or some of them. Called on every process."""
        states = read_state(directory)["parts"]
        for name, part in self._parts.items():
            if only is not None and name not in only:
                continue
            if isinstance(part, Stateful):
                part.load_state_dict(states[name])
            else:
                part.load(directory)

    @contextmanager
    def saving(self, directory: Path, best: str | None, num_newest: int) -> Iterator[None]:
        """
        A checkpoint, incomplete until the block, which writes weights and optimizer, has ended without an error. Older
        ones beyond `save_total_limit` go when this one is complete, and not before. All processes enter it.

        Args:
            directory (`Path`):
                The checkpoint.
            best (`str`, *optional*):
                The best checkpoint, which stays whatever its age.
            num_newest (`int`):
                How many of the newest stay, whatever the limit.
        """
        args = self._args
        directory.mkdir(parents=True, exist_ok=True)  # on every machine
        if args.should_save:
            begin(directory)
        self._accelerator.wait_for_everyone()
        files = [part for part in self._parts.values() if not isinstance(part, Stateful)]
        for part in files if not args.save_only_model else ():
            part.save(directory, args.should_save)
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            yield
        finally:
            args.save_total_limit = limit
        self._accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, directory / TRAINING_ARGS_NAME)  # with the limit
            finish(directory, self._record())
            rotate_checkpoints(str(directory.parent), limit and max(limit, num_newest), best, use_mtime=True)

    def move_later(self, output_dir: Path, step: int) -> Path | None:
        """See [`~trl_opsd.trainer.checkpoints.move_later`]. All processes call this at once."""
        self._accelerator.wait_for_everyone()  # they have been read
        aside = move_later(output_dir, step) if self._args.should_save else None
        return broadcast_object_list([aside])[0]

    def is_saved(self, directory: Path) -> bool:
        """Whether there is a complete checkpoint. All processes are told what the main process finds."""
        return broadcast_object_list([is_complete(directory)])[0]

    @contextmanager
    def rescuing(self, where: Callable[[], tuple[Path, int, bool]], save: Callable[[], None]) -> Iterator[None]:
        """
        Ends with a checkpoint, where one can be made, when a server fails, of a sampler or a teacher, wherever it was
        asked, and when a batch cannot be made. All processes enter it.

        Args:
            where (`Callable[[], tuple[Path, int, bool]]`):
                Gives the folder of the checkpoint, optimizer steps done, and whether the step in hand has begun with
                rollouts of a generation that is gone.
            save (`Callable[[], None]`):
                Makes the checkpoint.

        Raises:
            ServerError, BatchError: With what became of the run.
        """
        try:
            yield
        except (ServerError, BatchError) as error:
            raise type(error)(f"{error} {self._rescued(*where(), save)}") from error

    def _rescued(self, directory: Path, num_steps: int, is_between: bool, save: Callable[[], None]) -> str:
        if num_steps == 0:
            return "No step had been trained."
        if is_between:
            return "Resume from the last checkpoint: between two generations none could be made."
        if not self.is_saved(directory):
            only_model, self._args.save_only_model = self._args.save_only_model, False
            save()
            self._args.save_only_model = only_model
        return f"The run is saved in {directory}: mend that and resume with `resume_from_checkpoint`."

    @contextmanager
    def alone(self) -> Iterator[None]:
        """
        Keeps other runs out of the output folder. All processes enter it.

        Raises:
            ValueError: On every process, if another run works there.
        """
        failure = None
        with ExitStack() as stack:
            if self._accelerator.is_main_process:
                try:
                    # Of a name that is not pushed to the Hub with the rest
                    stack.enter_context(locked(Path(str(self._args.output_dir)), "_lock"))
                except ValueError as error:  # the others wait to hear of it
                    failure = str(error)
            (failure,) = broadcast_object_list([failure])
            if failure is not None:
                raise ValueError(failure)
            yield

    def _record(self) -> dict[str, Any]:
        return {
            "only_model": self._args.save_only_model,
            "settings": self._settings(),
            "fingerprints": self._fingerprints,
            "parts": {
                name: part.state_dict() if isinstance(part, Stateful) else None for name, part in self._parts.items()
            },
        }

    def _settings(self) -> dict[str, Any]:
        settings = {name: getattr(self._args, name) for name in _FIXED_SETTINGS}
        teachers: dict[str, Any] = getattr(self._args, "teachers", None) or {}
        settings["teachers"] = {name: its["teacher"] for name, its in teachers.items()}
        settings["num_processes"] = self._accelerator.num_processes
        settings["train_dataset"] = self._train_dataset
        # As they come back from a file; what JSON cannot hold counts by its type
        return json.loads(json.dumps(settings, default=lambda value: type(value).__name__))

    def _check_same_run(self, checkpoint: str, state: dict[str, Any]) -> None:
        if state["only_model"]:
            raise ValueError(
                f"{checkpoint} was written with `save_only_model=True` and holds no more than weights. Start a new "
                "run from them with `model`."
            )
        settings = self._settings()
        names = settings.keys() ^ state["settings"].keys()
        if "parts" not in state or names:
            what = sorted(names) or ["the counts, which have moved into `parts`"]
            raise ValueError(
                f"{checkpoint} was written by another version of this library: it differs in {', '.join(what)}. "
                "Resume with that version, or start a new run from its weights with `model`."
            )
        for name, value in settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"{checkpoint} was written with `{name}={state['settings'][name]!r}` and cannot be resumed with "
                    f"`{name}={value!r}`: its teacher, its position in the data or its leftover rollouts would not "
                    "fit. Resume with the same, or start a new run from its weights with `model`."
                )
        for name in sorted(self._parts.keys() ^ state["parts"].keys()):
            has, lacks = ("this run", "it") if name in self._parts else ("it", "this run")
            raise ValueError(
                f"{checkpoint} is of another run: {has} has the state of {name!r}, {lacks} has not. {_WAY_OUT}"
            )
        self._check_fingerprints(checkpoint, state["fingerprints"])

    def _check_fingerprints(self, checkpoint: str, theirs: dict[str, str | None]) -> None:
        for name, model, same in (
            (
                "model",
                "The policy",
                "the same `model` in the same dtype. (What training made of it is in the checkpoint.)",
            ),
            ("teacher", "The external teacher", "the same model as the teacher, in the same dtype or on a server."),
        ):
            if theirs.get(name) not in (None, self._fingerprints.get(name)):
                raise ValueError(
                    f"{model} is not the one {checkpoint} was started with: it was {theirs[name]!r} and is "
                    f"{self._fingerprints.get(name)!r}, by its name or its initial weights. Resume with {same}"
                )


def dataset_summary(dataset: Dataset | IterableDataset, columns: tuple[str, ...]) -> str:
    """What tells one dataset from another: its length, and what is in these columns in up to 64 rows."""
    if isinstance(dataset, Dataset):
        name, some = f"{len(dataset)} rows", dataset.select(np.linspace(0, len(dataset) - 1, 64, dtype=int))
    else:
        name, some = "stream", dataset.take(1)
    text = json.dumps([[row.get(column) for column in columns] for row in some], sort_keys=True, default=str)
    return f"{name}, fingerprint {hashlib.sha256(text.encode()).hexdigest()[:16]}"
