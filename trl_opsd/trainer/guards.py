"""Which guards watch a run, and what is done with its checkpoints and its model when one of them rolls it back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..guard import GUARDS, Guard, Guards
from ..parts import make_part
from .config import SelfDistillationConfig
from .run_state import RunState


def make_guards(args: SelfDistillationConfig) -> Guards:
    """
    The guards of a run: all that ship, with their defaults where the configuration says nothing else, and those that
    only it names.

    Raises:
        ValueError: If there is no such guard, if its arguments do not fit, or if it cannot roll this run back.
    """
    given = cast(dict[str, Any], args.guards or {})
    guards = {
        name: make_part("guards", name, given.get(name), GUARDS) for name in [*GUARDS, *(given.keys() - GUARDS.keys())]
    }
    for name, guard in guards.items():
        if not isinstance(guard, Guard):
            raise ValueError(f"`guards` names {name!r}, which is no subclass of Guard.")
    made = Guards(guards, frozenset(given))
    if made.can_roll_back:
        _check_rollback(args)
    return made


def _check_rollback(args: SelfDistillationConfig) -> None:
    asked = "`guards` asks for the action 'rollback'"
    if args.save_strategy == "no":
        raise ValueError(
            f"{asked}, and `save_strategy='no'` saves no checkpoint to go back to. Save every few steps, or choose "
            "the action 'stop'."
        )
    for name in ("load_best_model_at_end", "metric_for_best_model"):
        if getattr(args, name):
            raise ValueError(
                f"{asked} and `{name}={getattr(args, name)!r}` for another best checkpoint. Leave it unset (the guard "
                "`benchmark` takes that metric as its `score`), or choose the action 'stop'."
            )
    if args.save_only_model and (args.deepspeed or args.fsdp):
        raise ValueError(
            f"{asked}, and a sharded model cannot load a checkpoint that was saved with `save_only_model=True`. Set "
            "it to `False`, or choose the action 'stop'."
        )


def roll_back(
    guards: Guards,
    run_state: RunState,
    args: SelfDistillationConfig,
    state: TrainerState,
    load_best: Callable[[], None],
) -> None:
    """
    Where a guard has ended a run to roll it back, load the best complete checkpoint from before the trouble, and move
    later ones aside. All processes call this at once.

    Args:
        guards ([`Guards`]):
            Know when the trouble began.
        run_state ([`RunState`]):
            Knows which checkpoints are complete, and takes up their states.
        args ([`SelfDistillationConfig`]):
            Configuration.
        state ([`~transformers.TrainerState`]):
            Its `best_model_checkpoint` becomes that checkpoint.
        load_best (`Callable[[], None]`):
            Loads the weights of that checkpoint.
    """
    if guards.trouble_since is None:
        return
    output_dir, since = Path(str(args.output_dir)), guards.trouble_since
    folders = {step: output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}" for step in guards.best_checkpoints()}
    best = next((step for step, folder in folders.items() if run_state.is_saved(folder)), None)
    if best is None:
        guards.tell(f"There is no complete checkpoint from before step {since}: the model stays what it is.")
        return
    state.best_model_checkpoint = str(folders[best])
    load_best()
    if not args.save_only_model:
        run_state.load(folders[best])
    aside = run_state.move_later(output_dir, best)
    moved = "" if aside is None else f" Later checkpoints are in {aside}."
    guards.tell(f"The model is that of {folders[best]} again, from before step {since}.{moved}")
