"""Recipe files and flags, parsed into dataclasses."""

import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trl import TrlParser

from trl_opsd.help import did_you_mean
from trl_opsd.scripts.recipe_values import field_types, read_recipe, recipe_value


class RecipeParser(TrlParser):
    """
    [`~trl.TrlParser`] that refuses the keys and flags it does not know, and names the known one that comes closest.

    Args:
        dataclass_types (`Iterable[type]`, *optional*):
            Dataclasses to parse into.
        launch_hint (`str`, *optional*):
            What to do with a flag of `accelerate launch`. By default for commands that are launched.
        retired (`Mapping[str, str]`, *optional*):
            What took the place of fields that are gone, by their names.
        **kwargs:
            Keyword arguments of [`~argparse.ArgumentParser`].
    """

    def __init__(
        self,
        dataclass_types: Any = None,
        launch_hint: str = "Give it on the command line of `trl-opsd`, or to `accelerate launch` before `-m`.",
        retired: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        # Abbreviations would let a misspelt flag through, and take launch flags for ours.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._launch_hint = launch_hint
        self._retired = retired or {}
        self._field_types = field_types(self.dataclass_types)
        for action in self._actions:
            if f"--no_{action.dest}" in action.option_strings:
                action.help = f"Sets `{action.dest}` to false."
                action.default = SUPPRESS  # the default is that of the flag it negates

    def error(self, message: str) -> NoReturn:
        # Argparse would print the usage first, some two hundred flags.
        print(f"{self.prog}: error: {message} (`--help` explains every field)", file=sys.stderr)
        raise SystemExit(2)

    def split_args(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """
        Tell the arguments of the script from all others.

        Args:
            args (`Sequence[str]`):
                Command line.

        Returns:
            `tuple[list[str], list[str]]`:
                The flags this parser knows (`--config` included) with their values, and the remaining arguments.
        """
        ours: list[str] = []
        others: list[str] = []
        current = others
        for arg in args:
            flag, is_assigned, value = arg.partition("=")
            if flag == "--config":
                current = ours
                current.extend([flag, value] if is_assigned else [flag])
                continue
            if re.match(r"--?[A-Za-z]", arg):
                current = ours if flag in self._option_string_actions else others
            current.append(arg)
        if ours[-1:] == ["--config"]:
            raise ValueError("`--config` needs the path of a recipe file.")
        return ours, others

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        ours, others = self.split_args(list(sys.argv[1:] if args is None else args))
        if others:
            raise ValueError(self.explain_unknown(others[0]))
        if "--config" in ours:
            position = ours.index("--config")
            values = read_recipe(ours[position + 1])
            del ours[position : position + 2]
            os.environ.update({name: str(value) for name, value in values.pop("env", {}).items()})
            self.set_defaults_with_config(**values)
        return super().parse_args_and_config(
            ours, return_remaining_strings, fail_with_unknown_args, separate_remaining_strings
        )

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        known = [action.dest for action in self._actions]
        for key, value in kwargs.items():
            if key not in known:
                raise ValueError(self.explain_unknown(key))
            # YAML reads a bare `no` as false.
            if key.endswith("_strategy") and value is False:
                kwargs[key] = "no"
            kwargs[key] = recipe_value(key, kwargs[key], self._field_types.get(key, Any))
        return super().set_defaults_with_config(**kwargs)

    def explain_unknown(self, name: str) -> str:
        """
        Say what may have been meant by an unknown flag or key.

        Args:
            name (`str`):
                Flag (`--learning_rat`), key of a recipe file (`learning_rat`), or stray value.

        Returns:
            `str`:
                Error message.
        """
        from accelerate.commands.launch import launch_command_parser

        is_flag = name.startswith("-")
        name = name.partition("=")[0] if is_flag else name
        key = name.lstrip("-").replace("-", "_")
        what = f"the flag `{name}`" if is_flag else f"`{name}`"
        if key in self._retired:
            return f"Unknown field: {what} is none any more: {self._retired[key]}."
        launch_fields = {action.dest for action in launch_command_parser()._actions} | {"accelerate_config"}
        if key in launch_fields:
            return f"Unknown field: {what} belongs to `accelerate launch`. {self._launch_hint}"
        if not is_flag and Path(name).suffix in (".yaml", ".yml"):
            return f"Unknown field: {what}. Did you mean `--config {name}`?"
        dashes = "--" * is_flag
        known = [action.dest for action in self._actions] + (sorted(launch_fields) if is_flag else [])
        hint = did_you_mean(dashes + key, [dashes + field for field in known], "`--help` lists every field.")
        return f"Unknown field: {what}. {hint}"
