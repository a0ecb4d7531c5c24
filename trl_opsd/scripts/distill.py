from typing import TYPE_CHECKING

from trl import DatasetMixtureConfig, ModelConfig

from trl_opsd.scripts.utils import RecipeParser, SelfDistillationScriptArguments, make_recipe_parser, run


if TYPE_CHECKING:
    from trl_opsd import SelfDistillationConfig


def main(
    script_args: SelfDistillationScriptArguments,
    training_args: "SelfDistillationConfig",
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    from trl_opsd import SelfDistillationTrainer

    run(SelfDistillationTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(prog: str | None = None) -> RecipeParser:
    from trl_opsd import SelfDistillationConfig

    help = "Train with on-policy self-distillation, every part of it chosen by fields."
    return make_recipe_parser(help, SelfDistillationConfig, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
