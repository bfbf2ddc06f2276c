# SPDX-License-Identifier: Apache-2.0
"""Recipes: flat YAML files whose fields are those of the command's dataclasses, and the parser that reads them.

TRL's `TrlParser` does the parsing, so recipes are also TRL configuration files. Added here are the checks that it
leaves out (unknown, repeated and ill-typed fields, with file and line) and a help text that begins with the fields
that matter.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from frozen_peft.cli.recipes import find_recipe
from frozen_peft.report import is_secret

__all__ = ["RecipeParser", "read_recipe"]

# TrlParser's own field, which is refused here: environment variables for the run.
_ENVIRONMENT_FIELD = "env"
_MAX_DEPTH = 20
_TEXT_TAG = "tag:yaml.org,2002:str"
# Of a field that neither recipe nor command line gives.
_NOT_GIVEN = object()


class RecipeParser(TrlParser):
    """`TrlParser` with checked recipes and grouped help.

    Args:
        dataclass_types: The dataclasses whose fields may be given.
        prog: How the command is called, for its help.
        description: What the command does.
        sections: Titles and field names of the groups that `--help` shows, in order. `--help-all` adds the rest.
        inherited: Titles of the sections whose texts are another library's: `--help` shows their first sentences.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        *,
        prog: str,
        description: str,
        sections: Mapping[str, Sequence[str]],
        inherited: Collection[str] = (),
    ) -> None:
        # Abbreviations would let a misspelt field set another one.
        super().__init__(dataclass_types, prog=prog, description=description, add_help=False, allow_abbrev=False)
        self._sections = sections
        self._inherited = inherited
        # A boolean field has two actions; the first added is the field, the second its `--no_` complement.
        self._fields: dict[str, argparse.Action] = {}
        for action in self._actions:
            self._fields.setdefault(action.dest, action)

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Reads `[RECIPE] [--field value ...]`, where a field on the command line wins over the recipe.

        Args:
            arguments: Command-line arguments after the command's name. RECIPE is a file or the name of one that ships.

        Returns:
            One instance of each dataclass.

        Raises:
            ValueError: A field is unknown or given twice in the recipe, a value does not fit its field, or the recipe
                is not a flat YAML mapping, or its name could mean two.
            FileNotFoundError: There is no such recipe.
        """
        rest = list(arguments)
        recipe: list[str] = []
        if rest and not rest[0].startswith("-"):
            path = str(find_recipe(rest.pop(0)))
            self._check_recipe(path)
            recipe = ["--config", path]
        for token in rest:
            option = token.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                raise ValueError(self._unknown(option.removeprefix("--").replace("-", "_"), "command line"))
        try:
            *instances, unused = self.parse_args_and_config([*recipe, *rest], return_remaining_strings=True)
        except (TypeError, AttributeError, LookupError, ArithmeticError, ImportError, RecursionError) as error:
            # What transformers and TRL do with a value of a kind that they do not expect.
            kind = type(error).__name__
            raise ValueError(
                f"a field of {' '.join(recipe[1:]) or 'the command line'} is amiss: {kind}: {error}"
            ) from error
        if unused:
            raise ValueError(
                f"unexpected argument {unused[0]!r}: give at most one recipe, first, and then --field value"
            )
        return tuple(instances)

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Returns the fields that a recipe and the command line give, where the command line wins.

        Args:
            arguments: What `parse` has accepted.
        """
        rest = list(arguments)
        values = read_recipe(find_recipe(rest.pop(0)))[0] if rest and not rest[0].startswith("-") else {}
        every = {action.dest: _NOT_GIVEN for action in self._actions if action.dest is not argparse.SUPPRESS}
        parsed, _ = self.parse_known_args(rest, argparse.Namespace(**every))
        return values | {name: value for name, value in vars(parsed).items() if value is not _NOT_GIVEN}

    def help(self, *, every_field: bool = False) -> str:
        """Returns the help text.

        Args:
            every_field: Also the fields that no section names.
        """
        sections = {title: list(names) for title, names in self._sections.items()}
        if every_field:
            shown = {name for names in sections.values() for name in names}
            sections["everything else"] = [name for name in self._fields if name not in shown]
        brief = () if every_field else [name for title in self._inherited for name in sections[title]]
        formatter = _FieldFormatter(self.prog, brief)
        formatter.add_usage(f"{self.prog} RECIPE [--field value ...]", [], [], prefix="usage: ")
        formatter.add_text(self.description)
        for title, names in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(self._fields[name] for name in names)
            formatter.end_section()
        if not every_field:
            formatter.add_text(f"{self.prog} --help-all lists every field.")
        return formatter.format_help().rstrip()

    def describe(self, **texts: str) -> None:
        """Replaces the help of fields, for what the command adds to an inherited field's meaning."""
        for name, text in texts.items():
            self._fields[name].help = text

    def alias(self, option: str, name: str) -> None:
        """Lets a field be given by another option on the command line, where a recipe uses its own name."""
        self._option_string_actions[option] = self._fields[name]

    def error(self, message: str) -> Any:
        """Raises instead of printing a usage of several hundred lines."""
        raise ValueError(message)

    def _check_recipe(self, path: str) -> None:
        values, lines = read_recipe(path)
        for name, value in values.items():
            place = f"{path}, line {lines[name]}"
            if name == _ENVIRONMENT_FIELD:
                # It could have any library load code or write elsewhere.
                raise ValueError(f"{place}: `{name}`: a recipe sets no environment variables; set them in the shell")
            if name not in self._fields:
                raise ValueError(self._unknown(name, place))
            problem = _misfit(self._fields[name], value)
            if problem:
                problem = "does not fit; its value is secret and not shown" if is_secret(name) else problem
                raise ValueError(f"{place}: `{name}` {problem}")

    def _unknown(self, name: str, place: str) -> str:
        nearest = difflib.get_close_matches(name, self._fields, n=1, cutoff=0.5)
        remedy = f"did you mean `{nearest[0]}`?" if nearest else f"{self.prog} --help-all lists the fields"
        return f"{place}: unknown field `{name}`; {remedy}"


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Reads a recipe as plain data; nothing in it is executed.

    Args:
        path: A YAML file.

    Returns:
        The fields' values, and the line on which each field stands, counted from 1.

    Raises:
        ValueError: The file is not YAML, not a mapping, or has a field twice.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_bombs(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except _RefusedError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Characters that YAML does not allow, bytes that are not UTF-8, dates that no calendar has.
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: a recipe is a mapping of fields to values, got {type(values).__name__}")
    lines: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT_TAG:
            raise ValueError(f"{path}, line {line}: a field's name is text, got {str(key.value)[:60]!r}")
        if key.value in lines:
            raise ValueError(f"{path}, line {line}: `{key.value}` is already given on line {lines[key.value]}")
        lines[key.value] = line
    return values, lines


def _refuse_bombs(path: str | Path, text: str) -> None:
    """Refuses what a few lines of, written out, fill any memory or stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"{path}, line {event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(f"{place}: `*{event.anchor}`: a recipe has no aliases; write the value out")
        if depth > _MAX_DEPTH:
            raise _RefusedError(f"{place}: more than {_MAX_DEPTH} lists or mappings within each other")


class _RefusedError(ValueError):
    """What is said already as the user should read it."""


def _misfit(action: argparse.Action, value: Any) -> str | None:
    """Says what is wrong with a recipe's value, which argparse takes as a default and so does not check."""
    if isinstance(value, list) and action.nargs != "+" and action.type is not str:
        return f"takes one value, got the list {value}"
    for item in value if isinstance(value, list) else [value]:
        if item is None or isinstance(item, dict):
            continue  # null and nested options are for the dataclass to judge
        if isinstance(item, bool) and action.type is str:
            return f"takes text, and YAML reads an unquoted yes, no, on or off as {item}: put it in quotes"
        try:
            parsed = action.type(str(item)) if callable(action.type) else item
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            expected = getattr(action.type, "__name__", "value").replace("string_to_bool", "true or false")
            return f"takes {expected}, got {item!r}"
        if action.choices is not None and parsed not in action.choices:
            return f"takes one of {', '.join(map(str, action.choices))}; got {item!r}"
    return None


class _FieldFormatter(argparse.HelpFormatter):
    """One spelling per field, its kind of value, its text (of `brief` fields the first sentence) and its default."""

    def __init__(self, prog: str, brief: Collection[str]) -> None:
        super().__init__(prog, max_help_position=34, width=108)
        self._brief = brief

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "value")
        if action.choices is not None:
            kind = "|".join(map(str, action.choices))
            kind = kind if len(kind) <= 80 else "name"
        elif kind == "string_to_bool":
            kind = "true|false"
        elif kind == "str":
            kind = "text"
        return f"{action.option_strings[0]} {kind}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest in self._brief:
            text = text.partition(". ")[0].rstrip(".") + "."
        if action.default in (None, "", dataclasses.MISSING):
            return text
        return f"{text} (default: %(default)s)"
