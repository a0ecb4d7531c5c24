"""The guards of a run: what they are shown, and what is done when one of them sees trouble."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .base import Guard
from .guards import Benchmark
from .non_finite import SkipNonFiniteSteps


logger = logging.get_logger(__name__)


class Guards(TrainerCallback):
    """
    Shows each guard what is measured, and warns or ends the training. What they see is alike on all processes, and so
    is what they decide.

    Args:
        guards (`Mapping[str, Guard]`):
            Guards by name. Those whose action is `"ignore"` are left out.
        asked_for (`frozenset[str]`):
            Names of those that were asked for, which are to measure something.

    Attributes:
        skipper ([`SkipNonFiniteSteps`]):
            Skips and counts the steps whose gradient is not finite.
        messages (`list[str]`):
            What has been warned of.
        reason (`str`, *optional*):
            Why the training was ended, if it was.
        trouble_since (`int`, *optional*):
            Step that the trouble began with, if the run is to be rolled back.
    """

    def __init__(self, guards: Mapping[str, Guard], asked_for: frozenset[str] = frozenset()):
        self._guards = {name: guard for name, guard in guards.items() if guard.action != "ignore"}
        self._asked_for = asked_for & self._guards.keys()
        self._unseen = {name for name in self._asked_for if not getattr(guards[name], "score", None)}
        self._warned: set[str] = set()
        self._saved: list[int] = []
        self._latest: Callable[[], Mapping[str, float]] = dict
        self._num_skipped, self._is_main_process = 0, True
        self.skipper = SkipNonFiniteSteps()
        self.messages: list[str] = []
        self.reason: str | None = None
        self.trouble_since: int | None = None

    def watch(self, latest: Callable[[], Mapping[str, float]]) -> None:
        """
        Say where measurements come from.

        Args:
            latest (`Callable[[], Mapping[str, float]]`):
                Gives the metrics of the optimizer step that was just taken, by name.
        """
        self._latest = latest

    def tell(self, text: str) -> None:
        """Warn, once for all processes."""
        self.messages.append(text)
        if self._is_main_process:
            logger.warning(text)

    @property
    def can_roll_back(self) -> bool:
        """Whether a guard may roll the run back."""
        return any(guard.action == "rollback" for guard in self._guards.values())

    def best_checkpoints(self) -> list[int]:
        """
        Steps of the checkpoints that were saved before the trouble, the best one first: the one with the best
        evaluation among those at whose step there was one, else the last.
        """
        return self._best(self._saved, math.inf if self.trouble_since is None else self.trouble_since)

    def kept(self, folder: Path, best: str | None) -> tuple[str | None, int]:
        """
        What has to outlast `save_total_limit` for a rollback, now or later.

        Args:
            folder (`Path`):
                Checkpoint that is being saved.
            best (`str`, *optional*):
                The best checkpoint, where no guard may roll the run back.

        Returns:
            `tuple[str | None, int]`: the checkpoint that is the best for certain, and the number of the newest ones.
        """
        if not self.can_roll_back:
            return best, 0
        saved = [*self._saved, int(folder.name.rpartition("-")[2])]
        doubt = min(guard.doubt for guard in self._guards.values() if guard.action == "rollback")
        steps = self._best(saved, doubt)
        certain = str(folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{steps[0]}")) if steps else None
        return certain, len({step for step in saved if step >= doubt}) + 1

    def _best(self, saved: Iterable[int], before: float) -> list[int]:
        scores = next((one.scores for one in self._guards.values() if isinstance(one, Benchmark)), {})
        steps = sorted({step for step in saved if step < before}, reverse=True)
        return sorted(steps, key=lambda step: -scores.get(step, -math.inf))

    def current(self) -> dict[str, float]:
        """
        What is logged: the steps skipped so far and, by guard, how often in a row something has been beyond its
        limits, where it is.
        """
        beyond = {f"guards/{name}": guard.beyond for name, guard in self._guards.items() if guard.beyond}
        return {"skipped_steps/total": self.skipper.skipped_steps, **beyond}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "guards": {name: [type(guard).__name__, guard.state_dict()] for name, guard in self._guards.items()},
            "saved": self._saved,
            **self.skipper.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what [`state_dict`] returned. A guard that was not there begins with what it sees first."""
        for name, (kind, its) in state["guards"].items():
            if name in self._guards and type(self._guards[name]).__name__ == kind:
                self._guards[name].load_state_dict(its)
        self._saved = list(state["saved"])
        self.skipper.load_state_dict(state)
        self._num_skipped, self._unseen = self.skipper.skipped_steps, set()

    def on_train_begin(self, args, state, control, **kwargs):
        self.reason, self.trouble_since, self._is_main_process = None, None, state.is_world_process_zero
        if state.global_step and state.global_step not in self._saved:
            self._saved.append(state.global_step)  # the one that is resumed from

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.skipper.on_pre_optimizer_step(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        num_skipped, self._num_skipped = self._num_skipped, self.skipper.skipped_steps
        measured = {**self._latest(), "skipped_steps": float(self._num_skipped > num_skipped)}
        self._observe(False, measured, args, state, control)
        if self._unseen:
            names = ", ".join(f"`{name}`" for name in sorted(self._unseen))
            self.tell(
                f"What `guards` asks {names} to watch was not measured in the first step: as long as it is not, "
                "nothing is watched. docs/guards.md says what each of them reads."
            )
        self._unseen = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._observe(True, logs or {}, args, state, control)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step not in self._saved:
            self._saved.append(state.global_step)

    def _observe(
        self,
        is_log: bool,
        measured: Mapping[str, float],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        for name, guard in self._guards.items():
            if guard.reads_log != is_log or not guard.observe(state.global_step, measured):
                continue
            self._unseen.discard(name)
            if guard.blind and name in self._asked_for - self._warned:
                self._warned.add(name)
                self.tell(f"What `guards` asks `{name}` to watch is not watched. {guard.blind}")
            if guard.has_trouble and not (guard.action == "warn" and name in self._warned):
                self._act(name, guard, args, state, control)

    def _act(
        self, name: str, guard: Guard, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        text = (
            f"Guard `{name}` at step {state.global_step}: {guard.seen} It began with step {guard.since}. What usually "
            f"helps: {guard.advice}"
        )
        if guard.action == "warn":
            self._warned.add(name)
            text += f" The training goes on; with `guards={{'{name}': {{'action': 'stop'}}}}` it would end here."
        else:
            control.should_training_stop = True
            self.reason = self.reason or text
            text += " The training ends here."
            if not guard.reads_log:
                control.should_log = True
        if guard.action == "rollback":
            self.trouble_since = min(guard.since or 0, self.trouble_since or guard.since or 0)
        if guard.action == "stop" or (guard.action == "rollback" and not self.best_checkpoints()):
            control.should_save = args.save_strategy != "no"
        self.tell(text)
