from typing import TYPE_CHECKING

from trl import DatasetMixtureConfig, ModelConfig

from trl_opsd.scripts.utils import RecipeParser, SelfDistillationScriptArguments, make_recipe_parser, run


if TYPE_CHECKING:
    from trl_opsd import OPSDCConfig


def main(
    script_args: SelfDistillationScriptArguments,
    training_args: "OPSDCConfig",
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    from trl_opsd import OPSDCTrainer

    run(OPSDCTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(prog: str | None = None) -> RecipeParser:
    from trl_opsd import OPSDCConfig

    help = "Train a model to reason in fewer tokens (OPSDC)."
    return make_recipe_parser(help, OPSDCConfig, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
