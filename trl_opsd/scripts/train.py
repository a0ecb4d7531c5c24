"""Train a model: `trl-opsd <method>`, or `accelerate launch -m trl_opsd.scripts.train <method>`."""

import sys

from trl import DatasetMixtureConfig, ModelConfig

from trl_opsd.methods import TRAINABLE, config_class, summary
from trl_opsd.scripts.utils import RecipeParser, SelfDistillationScriptArguments, run


def make_parser(method: str, prog: str | None = None) -> RecipeParser:
    """
    Makes the parser of a training command.

    Args:
        method (`str`):
            A method, or `"distill"` for none.
        prog (`str`, *optional*):
            Name of the program in help and errors.

    Returns:
        [`RecipeParser`]:
            Parser into `(SelfDistillationScriptArguments, configuration of the method, ModelConfig,
            DatasetMixtureConfig)`.

    Raises:
        ValueError: If there is no such method.
    """
    from trl_opsd.trainer.config import RETIRED

    return RecipeParser(
        (SelfDistillationScriptArguments, config_class(method), ModelConfig, DatasetMixtureConfig),
        prog=prog,
        retired=RETIRED,
        usage="%(prog)s --config recipe.yaml [--any_field value]",
        description=f"{summary(method)} A recipe file has any of the fields below as keys; flags take precedence over "
        "it. Started as `trl-opsd`, flags of `accelerate launch` and `--accelerate_config name_or_path` may be mixed "
        "in.",
    )


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
