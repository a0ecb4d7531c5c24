"""Train a model: `trl-opsd <method>`, or `accelerate launch -m trl_opsd.scripts.train <method>`."""

import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl import DatasetMixtureConfig, ModelConfig

from trl_opsd.methods import TRAINABLE, config_class, summary
from trl_opsd.scripts.benchmarks import callback_values
from trl_opsd.scripts.inputs import SelfDistillationScriptArguments, load_datasets, load_reward_funcs
from trl_opsd.scripts.recipe import RecipeParser


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer


def make_parser(method: str, prog: str | None = None, **kwargs: Any) -> RecipeParser:
    """
    Makes the parser of a training command.

    Args:
        method (`str`):
            A method, or `"distill"` for none.
        prog (`str`, *optional*):
            Name of the program in help and errors.
        **kwargs:
            Further keyword arguments of [`RecipeParser`].

    Returns:
        [`RecipeParser`]:
            Parser into `(SelfDistillationScriptArguments, configuration of the method, ModelConfig,
            DatasetMixtureConfig)`.

    Raises:
        ValueError: If there is no such method.
    """
    from trl_opsd.trainer.checks.settings import RETIRED

    return RecipeParser(
        (SelfDistillationScriptArguments, config_class(method), ModelConfig, DatasetMixtureConfig),
        prog=prog,
        retired=RETIRED,
        usage="%(prog)s --config recipe.yaml [--any_field value]",
        description=f"{summary(method)} A recipe file has any of the fields below as keys; flags take precedence over "
        "it. Started as `trl-opsd`, flags of `accelerate launch` and `--accelerate_config name_or_path` may be mixed "
        "in.",
        **kwargs,
    )


def says_how_to_resume(command: Callable[..., None]) -> Callable[..., None]:
    """Make Ctrl-C end a training command in words, with status 130."""

    @wraps(command)
    def interruptible(*args: Any) -> None:
        try:
            command(*args)
        except KeyboardInterrupt:
            (training_args,) = (argument for argument in args if hasattr(argument, "output_dir"))
            if training_args.process_index == 0:
                print(
                    "Interrupted. `--resume_from_checkpoint auto` goes on from the last checkpoint in "
                    f"{training_args.output_dir}, if there is one.",
                    file=sys.stderr,
                )
            raise SystemExit(130) from None

    return interruptible


@says_how_to_resume
def run(
    script_args: SelfDistillationScriptArguments,
    training_args: "SelfDistillationConfig",
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train, save and, if asked to, push a model.

    Args:
        script_args ([`SelfDistillationScriptArguments`]):
            Data and rewards.
        training_args ([`SelfDistillationConfig`]):
            Arguments of the trainer. `resume_from_checkpoint` may also be `"true"`, the newest checkpoint in
            `output_dir`, or `"auto"`, the same if there is one.
        model_args ([`~trl.ModelConfig`]):
            Model, LoRA and quantization.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of datasets, instead of `script_args.dataset_name`.
    """
    from trl_opsd.report import PromptPreviewCallback

    if model_args.model_name_or_path is None:
        raise ValueError("No model to train: set `model_name_or_path` to a Hub id or a local folder.")
    if training_args.process_index > 0:
        logging.getLogger("trl_opsd").setLevel(logging.ERROR)
    checkpoint = find_checkpoint(training_args.resume_from_checkpoint, str(training_args.output_dir))

    # The main process fills the cache of `datasets`, the others read it.
    with training_args.main_process_first(desc="loading the dataset"):
        train_dataset, eval_dataset = load_datasets(
            script_args, dataset_args, with_eval=training_args.eval_strategy != "no"
        )
    trainer = make_trainer(
        script_args,
        training_args,
        model_args,
        train_dataset,
        eval_dataset,
        load_reward_funcs(script_args),
    )
    trainer.add_callback(PromptPreviewCallback(trainer))

    if checkpoint is not None:
        trainer.accelerator.print(f"Resuming from {checkpoint}.")
    trainer.train(resume_from_checkpoint=checkpoint)
    ended = trainer.guards.reason
    trainer.accelerator.print("✅ Training completed." if ended is None else f"🛑 Training ended early. {ended}")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")

    if training_args.push_to_hub:
        # A model card can only name a dataset of the Hub.
        name = script_args.dataset_name
        trainer.push_to_hub(dataset_name=None if name is None or Path(name).expanduser().exists() else name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")

    trainer.accelerator.end_training()  # or threads of the processes' group may abort a process that is done


def make_trainer(
    script_args: SelfDistillationScriptArguments,
    training_args: "SelfDistillationConfig",
    model_args: ModelConfig,
    train_dataset: "Dataset | IterableDataset",
    eval_dataset: "Dataset | IterableDataset | None" = None,
    reward_funcs: Any = None,
) -> "SelfDistillationTrainer":
    """
    Make the trainer that a recipe describes, on rows that have been loaded.

    Args:
        script_args ([`SelfDistillationScriptArguments`]):
            Its system prompt is also that of benchmarks which have none of their own.
        training_args ([`SelfDistillationConfig`]):
            Arguments of the trainer. `model_init_kwargs` is completed with what `model_args` says, and wins over it.
        model_args ([`~trl.ModelConfig`]):
            Model, LoRA and quantization.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows to train on.
        eval_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows to evaluate on.
        reward_funcs (*optional*):
            Reward functions, as the trainer takes them.

    Returns:
        [`SelfDistillationTrainer`]:
            The trainer.
    """
    from trl import get_peft_config, get_quantization_config

    from trl_opsd import SelfDistillationTrainer

    model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    model_init_kwargs.update(cast(dict[str, Any], training_args.model_init_kwargs or {}))
    training_args.model_init_kwargs = model_init_kwargs
    benchmarks = callback_values(script_args, training_args, script_args.system_prompt)
    trainer = SelfDistillationTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.record.inputs = [script_args, model_args]
    if benchmarks is not None:
        from trl_opsd.eval.in_training import BenchmarkCallback

        trainer.add_callback(BenchmarkCallback(trainer, **benchmarks))
    if script_args.inspect_steps is not None:
        from trl_opsd.report import InspectCallback

        trainer.add_callback(InspectCallback(trainer, script_args.inspect_steps, script_args.inspect_rollouts))
    return trainer


def find_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """
    Find the checkpoint that `resume_from_checkpoint` asks for.

    Args:
        resume (`str` or `bool`, *optional*):
            Folder of a checkpoint, `"true"` for the newest in `output_dir`, or `"auto"` for the same if there is one.
        output_dir (`str`):
            Folder a run saves its checkpoints in.

    Returns:
        `str`, *optional*:
            Folder of the checkpoint, `None` to start from the beginning.
    """
    from trl_opsd.trainer.checkpoints import newest_complete, read_state

    choice = str(resume).lower()
    if choice in ("none", "false", "no"):
        return None
    if choice in ("true", "auto"):
        newest = newest_complete(output_dir)
        if newest is None and choice == "true":
            raise ValueError(
                f"`resume_from_checkpoint` is true, but {output_dir} has no complete checkpoint. Name one, or use "
                "`auto` to start from the beginning where there is none."
            )
        return newest
    read_state(Path(str(resume)))
    return str(resume)


def main() -> None:
    """Runs the command of this process."""
    method = sys.argv[1] if len(sys.argv) > 1 else ""
    if not method or method.startswith("-"):
        print(
            f"Name what to train with before all flags, one of: {', '.join(TRAINABLE)}. For example: "
            "accelerate launch -m trl_opsd.scripts.train opsd --config recipe.yaml",
            file=sys.stderr,
        )
        raise SystemExit(2)
    run(*make_parser(method).parse_args_and_config(sys.argv[2:]))


if __name__ == "__main__":
    main()
