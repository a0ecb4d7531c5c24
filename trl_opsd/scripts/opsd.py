from typing import TYPE_CHECKING

from trl import DatasetMixtureConfig, ModelConfig

from trl_opsd.scripts.utils import RecipeParser, SelfDistillationScriptArguments, make_recipe_parser, run


if TYPE_CHECKING:
    from trl_opsd import OPSDConfig


def main(
    script_args: SelfDistillationScriptArguments,
    training_args: "OPSDConfig",
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    from trl_opsd import OPSDTrainer

    run(OPSDTrainer, script_args, training_args, model_args, dataset_args)


def make_parser(prog: str | None = None) -> RecipeParser:
    from trl_opsd import OPSDConfig

    help = "Train a model to solve problems as if it had read their solutions (OPSD)."
    return make_recipe_parser(help, OPSDConfig, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
