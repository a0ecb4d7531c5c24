"""`trl-opsd plan`: what a recipe takes on some GPUs, before a weight is loaded."""

import json
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_opsd.files import recipes_folder
from trl_opsd.methods import TRAINABLE, config_class, method_of_recipe


if TYPE_CHECKING:
    from trl import ModelConfig

    from trl_opsd.plan.models import Model
    from trl_opsd.plan.setting import Setting
    from trl_opsd.plan.sharding import Sharding
    from trl_opsd.trainer.config import SelfDistillationConfig

# Where no length is given, and the dataset is not read
_PROMPT_TOKENS = 512
_LENGTHS = ("prompt_tokens", "teacher_prompt_tokens", "completion_tokens", "mean_completion_tokens")


def make_parser() -> ArgumentParser:
    """
    Makes the parser of the command.

    Returns:
        [`~argparse.ArgumentParser`]:
            The parser. What it does not know are fields of the training command.
    """
    parser = ArgumentParser(
        prog="trl-opsd plan",
        usage="trl-opsd plan --config recipe.yaml --gpus 8xH100-80GB [--any_field value]",
        description="Says what a recipe takes on given GPUs, before a weight is loaded: memory of each GPU by part "
        "and phase, time of an optimizer step by phase, what limits them, and the smallest changes that make it fit. "
        "Any field of the training command may be given too, and takes precedence over the recipe.",
        epilog="Exit status: 0 if it fits, 1 if it does not, 2 if something is wrong. docs/plan.md says how the "
        "figures are made and how far they have been checked.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="recipe, as for the training command")
    parser.add_argument(
        "--method",
        choices=list(TRAINABLE),
        metavar="METHOD",
        help="training command the recipe is for (default: what its folder, or else the file, is called)",
    )
    parser.add_argument(
        "--gpus",
        required=True,
        help="number and kind of the GPUs that train, 8xH100-80GB; one that is not known by its memory, dense bf16 "
        "FLOP/s, memory bandwidth and bandwidth to the others, 8x:80GB,990TFLOPS,3350GB/s,450GB/s; or 1xCPU, memory "
        "only",
    )
    parser.add_argument(
        "--accelerate_config", help="name in recipes/accelerate, or file, as for the training command: its sharding"
    )
    parser.add_argument(
        "--sharding",
        help="single, ddp, zero1, zero2, zero3 or fsdp2, in place of such a file (default: single for one "
        "GPU, else ddp)",
    )
    parser.add_argument(
        "--model_config",
        type=Path,
        help="config.json of the model, or its folder, where the Hub cannot be asked for it",
    )
    parser.add_argument(
        "--teacher_model_config",
        action="append",
        default=[],
        help="the same, of an external teacher; of one of several by its name, NAME=FILE, for each of them",
    )
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        help=f"tokens of the longest prompt; the dataset is not read (default: {_PROMPT_TOKENS})",
    )
    parser.add_argument(
        "--teacher_prompt_tokens",
        type=int,
        help="tokens of the longest teacher prompt (default: `max_teacher_prompt_length`, or else a prompt and a "
        "completion)",
    )
    parser.add_argument(
        "--completion_tokens", type=int, help="tokens of the longest completion (default: `max_completion_length`)"
    )
    parser.add_argument(
        "--mean_completion_tokens",
        type=int,
        help="tokens of a completion in the mean, by which time is planned (default: the longest, so that time is an "
        "upper bound)",
    )
    parser.add_argument(
        "--vllm_server_gpus",
        type=int,
        default=1,
        help="GPUs of the vLLM server that samples, if one does (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds, in place of tables")
    return parser


def main(argv: Sequence[str]) -> int:
    """
    Plans a run.

    Args:
        argv (`Sequence[str]`):
            Arguments after `plan`.

    Returns:
        `int`:
            Exit status: 0 if it fits, 1 if it does not, 2 if something is wrong, 130 if interrupted.
    """
    asked, fields = make_parser().parse_known_args(argv)
    try:
        return _plan(asked, fields)
    except (ValueError, OSError) as error:
        print(f"trl-opsd plan: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trl-opsd plan: interrupted.", file=sys.stderr)
        return 130


def _plan(asked: Namespace, fields: list[str]) -> int:
    from rich.console import Console

    from trl_opsd.plan.planning import make_plan, suggestions
    from trl_opsd.plan.tables import as_json, show

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of fields that transformers renames, at each start of a run
        setting, name = read_setting(asked, fields)
    plan = make_plan(setting)
    suggested = [] if plan.fits else suggestions(plan)
    if asked.json:
        print(json.dumps(as_json(plan, suggested), indent=2))
    else:
        show(plan, name, suggested, Console())
    return 0 if plan.fits else 1


def read_setting(asked: Namespace, fields: list[str]) -> "tuple[Setting, str]":
    """
    What the command is asked to plan.

    Args:
        asked ([`~argparse.Namespace`]):
            Arguments of the command.
        fields (`list[str]`):
            Fields of the training command.

    Returns:
        `tuple[Setting, str]`: the run, and what it is called.

    Raises:
        ValueError: If it is not known what to plan, naming the argument.
    """
    from trl import DatasetMixtureConfig, ModelConfig, get_peft_config

    from trl_opsd.plan.hardware import parse_gpus
    from trl_opsd.plan.setting import Setting
    from trl_opsd.scripts.inputs import SelfDistillationScriptArguments
    from trl_opsd.scripts.recipe import RecipeParser
    from trl_opsd.trainer.checks.settings import RETIRED

    for name in (*_LENGTHS, "vllm_server_gpus"):
        if (value := getattr(asked, name)) is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    num_gpus, gpu = parse_gpus(asked.gpus)
    sharding = _sharding(asked, num_gpus)
    if not (asked.method or asked.config):
        raise ValueError("No recipe to plan: give `--config recipe.yaml`, or fields and `--method`.")
    method = asked.method or method_of_recipe(asked.config)
    classes = (SelfDistillationScriptArguments, _for_processes(config_class(method), num_gpus), ModelConfig)
    parser = RecipeParser((*classes, DatasetMixtureConfig), prog="trl-opsd plan", retired=RETIRED)
    config = [] if asked.config is None else ["--config", str(asked.config)]
    _, args, model_args, _ = parser.parse_args_and_config([*config, *fields])
    if bool(args.use_cpu) != gpu.is_cpu:
        wanted = (
            "use_cpu: true, and so on no GPU: `--gpus 1xCPU`" if args.use_cpu else "a GPU, unless `use_cpu` is set"
        )
        raise ValueError(f"`--gpus {asked.gpus}` contradicts the recipe, which trains with {wanted}.")
    if model_args.model_name_or_path is None:
        raise ValueError("No model to plan for: set `model_name_or_path` to a Hub id or a local folder.")
    policy = _policy(asked, model_args, args, get_peft_config(model_args))
    _check_experts(policy, args)
    lengths = _lengths(asked, args, policy)
    externals = _externals(asked, args)
    setting = Setting(
        args, gpu, num_gpus, sharding, policy, lengths, externals, asked.vllm_server_gpus, asked.mean_completion_tokens
    )
    return setting, f"trl-opsd {method}, {model_args.model_name_or_path}"


def _for_processes(config: "type[SelfDistillationConfig]", number: int) -> "type[SelfDistillationConfig]":
    """A configuration that many processes would make, on a machine that need have no GPU."""

    def complete(self: Any) -> None:
        trains_on_cpu, self.use_cpu = self.use_cpu, True
        config.__post_init__(self)
        self.use_cpu = trains_on_cpu

    return type(config.__name__, (config,), {"world_size": property(lambda self: number), "__post_init__": complete})


def _sharding(asked: Namespace, num_gpus: int) -> "Sharding":
    from trl_opsd.plan.sharding import named, read_accelerate_config

    if asked.accelerate_config is None:
        return named(asked.sharding or ("single" if num_gpus == 1 else "ddp"), num_gpus)
    if asked.sharding is not None:
        raise ValueError("`--sharding` and `--accelerate_config` say the same: leave one out.")
    path, folder = Path(asked.accelerate_config), recipes_folder() / "accelerate"
    if not path.is_file():
        path = folder / f"{asked.accelerate_config}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"`--accelerate_config {asked.accelerate_config}` is neither a file nor one of: {known}.")
    found = read_accelerate_config(path)
    if found.kind == "single" and num_gpus > 1:
        raise ValueError(f"`--accelerate_config {asked.accelerate_config}` is one process, and `--gpus` names more.")
    return found


def _dtype(name: str | None, config: Any) -> Any:
    import torch

    found = getattr(config, "dtype", None) if name == "auto" else name or "float32"
    return getattr(torch, found) if isinstance(found, str) else found or torch.float32


def _policy(asked: Namespace, model_args: "ModelConfig", args: Any, peft_config: Any) -> "Model":
    from trl_opsd.plan.models import Model, load_config

    init = args.model_init_kwargs or {}
    config = load_config(
        model_args.model_name_or_path,
        asked.model_config,
        "--model_config",
        revision=init.get("revision", model_args.model_revision),
        trust_remote_code=args.trust_remote_code,
    )
    return Model(
        config,
        _dtype(init.get("dtype", model_args.dtype), config),
        peft_config,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        nested=model_args.use_bnb_nested_quant,
        attention=init.get("attn_implementation", model_args.attn_implementation),
    )


def _check_experts(policy: "Model", args: Any) -> None:
    """As GRPOTrainer decides whether a mixture of experts has an auxiliary loss."""
    text, coef = policy.text_config, args.router_aux_loss_coef
    coef = getattr(text, "router_aux_loss_coef", 0.0) if coef is None else coef
    if hasattr(text, "output_router_logits") and coef:
        raise ValueError(
            f"The auxiliary loss of this mixture of experts (`router_aux_loss_coef={coef}`) takes a forward pass of "
            "GRPOTrainer's own, with logits of whole rows, which is not planned. Set `router_aux_loss_coef` to 0.0."
        )


def _externals(asked: Namespace, args: Any) -> "dict[str | None, Model]":
    from trl_opsd.trainer.several import each_teacher

    teachers = {
        name: its
        for name, its in each_teacher(args).items()
        if its.teacher == "external" and its.teacher_server_base_url is None
    }
    files: dict[str | None, Path] = {}
    for given in asked.teacher_model_config:
        name, _, file = given.partition("=") if args.teacher == "several" else (None, "", given)
        if name not in teachers:
            known = " or ".join(f"`{its}=FILE`" for its in teachers) if args.teacher == "several" else "no file"
            raise ValueError(f"`--teacher_model_config {given}` is of no external teacher. Give {known}.")
        files[name] = Path(file)
    return {name: _external(its, files.get(name)) for name, its in teachers.items()}


def _external(args: Any, file: Path | None) -> "Model":
    from trl_opsd.plan.models import Model, load_config

    kwargs = dict(args.teacher_model_init_kwargs or {})
    name = args.teacher_model_name_or_path
    config = load_config(name, file, "--teacher_model_config", trust_remote_code=args.trust_remote_code)
    return Model(
        config, _dtype(kwargs.get("dtype"), config), is_trained=False, attention=kwargs.get("attn_implementation")
    )


def _lengths(asked: Namespace, args: Any, policy: "Model") -> Any:
    from trl_opsd.plan.setting import Lengths

    completion = asked.completion_tokens or args.max_completion_length
    if completion is None:
        raise ValueError("`max_completion_length` is unset: say how long completions are by `--completion_tokens`.")
    context = getattr(policy.text_config, "max_position_embeddings", None) or 2**62
    room = max(1, context - completion)
    prompt = asked.prompt_tokens or min(_PROMPT_TOKENS, room)
    longest = args.max_teacher_prompt_length or prompt + completion
    teacher_prompt = asked.teacher_prompt_tokens or min(longest, room)
    for name, length in (("--prompt_tokens", prompt), ("--teacher_prompt_tokens", teacher_prompt)):
        if length > room:
            raise ValueError(
                f"`{name} {length}` and completions of {completion} tokens do not fit the model's context of "
                f"{context}."
            )
    return Lengths(prompt, teacher_prompt, completion)
