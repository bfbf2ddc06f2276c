# SPDX-License-Identifier: Apache-2.0
"""The parser of commands that take a recipe.

TRL's `TrlParser` does the parsing, so recipes are also TRL configuration files. Added here are the checks that it
leaves out (unknown, repeated and ill-typed fields, with file and line) and a help text that begins with the fields
that matter.
"""

import argparse
import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import TrlParser

from frozen_peft.cli.arguments import spelled
from frozen_peft.config import WRITING_FIELDS
from frozen_peft.report import is_secret
from frozen_peft.report.run_record import ReportArguments
from frozen_peft.training.recipe import AdapterArguments, DataArguments, ModelArguments, groups_of, machine_defaults
from frozen_peft.utils.recipe_files import find_recipe, read_recipe

__all__ = ["RecipeParser"]

# The inherited fields that most runs set. `--help` shows these, `--help-all` the other hundred too.
_COMMON_FIELDS = [
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "loss_type",
    "completion_only_loss",
    "assistant_only_loss",
    "logging_steps",
    "eval_strategy",
    "save_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "trust_remote_code",
    "report_to",
    "seed",
]
# Those of preferences.
_METHOD_FIELDS = [
    "beta",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "ld_alpha",
    "use_weighting",
    "desirable_weight",
    "undesirable_weight",
    "precompute_ref_log_probs",
]
# Errors name these, or the text of another field does.
_NOT_SHOWN = ("allow_pickle", "check_memory", "max_example_tokens")
# What a command adds to an inherited field's meaning.
_TEXTS = {
    "output_dir": "Where adapter, checkpoints and metrics are written.",
    "bf16": "Compute in bfloat16; on by default where an accelerator does.",
    "resume_from_checkpoint": "Folder, or auto: the last whole checkpoint (also --resume). Auto starts anew where "
    "`output_dir` has none; true is the same, and an error there.",
}
_ALIASES = {"resume_from_checkpoint": ["--resume"]}
_EVERYTHING_ELSE = "everything else"
# Of a field that neither recipe nor command line gives.
_NOT_GIVEN = object()


class RecipeParser(TrlParser):
    """`TrlParser` for the fields of a recipe, with checked recipes and grouped help.

    Args:
        command: The command's name.
        text: What it does, as `CommandParser` takes it.
        own_fields: A dataclass of the fields that it has besides those of a recipe, which come first.
        own_title: The title of their section in the help.
        every_field: The help has those that no section names too.
        method: Whose fields these are. Recipes of another are read with those of their own.
    """

    def __init__(
        self,
        command: str = "train",
        text: str | None = None,
        own_fields: type | None = None,
        own_title: str = "",
        every_field: bool = False,
        method: str = "sft",
    ) -> None:
        self._method = method
        self._made_with = (command, text, own_fields, own_title, every_field)
        own = {} if own_fields is None else {own_title: _names(own_fields)}
        groups = groups_of(method)
        self._sections = {**own, **_recipe_sections(groups[-1]), _EVERYTHING_ELSE: []}
        self._every_field = every_field
        self._groups: dict[str, Any] = {}
        # What `add_argument` adds, by field and by option.
        self.fields: dict[str, argparse.Action] = {}
        self._options: set[str] = set()
        prog = f"frozen-peft {command}"
        super().__init__(
            [*([] if own_fields is None else [own_fields]), *groups, ReportArguments],
            prog=prog,
            usage=f"{prog} RECIPE [--field value ...]",
            description=(text or "").partition("\n\n")[2],
            epilog=f"{prog} --help-all lists every field.",
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=119),
            add_help=False,
            # Abbreviations would let a misspelt field set another one.
            allow_abbrev=False,
        )
        self.set_defaults(**machine_defaults())

    def add_argument(self, option: Any, *_: Any, **settings: Any) -> argparse.Action:
        """Adds a field under one spelling to its section of the help, and remembers it."""
        if not self._groups:
            self._groups.update({title: self.add_argument_group(title) for title in self._sections})
        name = settings.get("dest", option.removeprefix("--"))
        title = next((title for title, names in self._sections.items() if name in names), _EVERYTHING_ELSE)
        text = _TEXTS.get(name) or settings.get("help", "")
        if title == "training" and not self._every_field:
            # Texts of inherited fields are long.
            text = text.partition(". ")[0].rstrip(".") + "."
        if settings.get("default") not in (None, ""):
            text += " (default: %(default)s)"
        # A boolean field has two actions; the first added is the field, the second its `--no_` complement.
        if name in self.fields:
            text = argparse.SUPPRESS
        else:
            settings["metavar"] = _kind(settings)
        if title == _EVERYTHING_ELSE and not self._every_field:
            text = argparse.SUPPRESS
        settings["help"] = text
        action = self._groups[title].add_argument(option, *_ALIASES.get(name, ()), **settings)
        self.fields.setdefault(name, action)
        self._options.update(action.option_strings)
        return action

    def of(self, arguments: Sequence[str]) -> "RecipeParser":
        """The parser of the method that these arguments, or their recipe, name.

        Raises:
            ValueError: There is no such method, or the recipe cannot be read.
            FileNotFoundError: There is no such recipe.
        """
        path, rest = _split(arguments)
        values = {} if path is None else read_recipe(path)[0]
        method = _last(rest, "--method") or values.get("method", "sft")
        groups_of(method)
        return self if method == self._method else RecipeParser(*self._made_with, method)

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
        if (parser := self.of(arguments)) is not self:
            return parser.parse(arguments)
        path, rest = _split(arguments)
        if path is not None:
            self._check_recipe(path)
        for token in rest:
            option = token.partition("=")[0]
            if option.startswith("--") and option not in self._options:
                raise ValueError(self._unknown(option.removeprefix("--").replace("-", "_"), "command line"))
        recipe = [] if path is None else ["--config", str(path)]
        try:
            *instances, unused = self.parse_args_and_config([*recipe, *rest], return_remaining_strings=True)
        except (TypeError, AttributeError, LookupError, ArithmeticError, ImportError, RecursionError) as error:
            # What transformers and TRL do with a value of a kind that they do not expect.
            raise ValueError(
                f"a field of {path or 'the command line'} is amiss: {type(error).__name__}: {error}"
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
        if (parser := self.of(arguments)) is not self:
            return parser.given(arguments)
        path, rest = _split(arguments)
        values = {} if path is None else read_recipe(path)[0]
        parsed, _ = self.parse_known_args(rest, argparse.Namespace(**dict.fromkeys(self.fields, _NOT_GIVEN)))
        return values | {name: value for name, value in vars(parsed).items() if value is not _NOT_GIVEN}

    def error(self, message: str) -> Any:
        """Raises instead of printing a usage of several hundred lines."""
        raise ValueError(message)

    def _check_recipe(self, path: Path) -> None:
        values, lines = read_recipe(path)
        for name, value in values.items():
            place = f"{path}, line {lines[name]}"
            if name == "env":
                # TrlParser's own field. It could have any library load code or write elsewhere.
                raise ValueError(f"{place}: `{name}`: a recipe sets no environment variables; set them in the shell")
            if name not in self.fields:
                raise ValueError(self._unknown(name, place))
            problem = _misfit(self.fields[name], value)
            if problem:
                problem = "does not fit; its value is secret and not shown" if is_secret(name) else problem
                raise ValueError(f"{place}: `{name}` {problem}")

    def _unknown(self, name: str, place: str) -> str:
        nearest = difflib.get_close_matches(name, self.fields, n=1, cutoff=0.5)
        remedy = f"did you mean `{nearest[0]}`?" if nearest else f"{self.prog} --help-all lists the fields"
        return f"{place}: unknown field `{name}`; {remedy}"


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe's file, if one is named, and the arguments behind it."""
    rest = [spelled(text, "_") for text in arguments]
    if not rest or rest[0].startswith("-"):
        return None, rest
    return find_recipe(rest[0]), rest[1:]


def _last(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option, which may be given as `--option value` or `--option=value`; the last one counts."""
    found = None
    for index, text in enumerate(arguments):
        name, has_value, value = text.partition("=")
        if name == option:
            found = value if has_value else next(iter(arguments[index + 1 : index + 2]), None)
    return found


def _names(group: type) -> list[str]:
    return [item.name for item in dataclasses.fields(group) if item.name not in _NOT_SHOWN]


def _recipe_sections(config: type) -> dict[str, list[str]]:
    """Titles and field names of the groups that `--help` shows, in order."""
    plain = next(base for base in config.__mro__ if base.__module__.partition(".")[0] == "trl")
    inherited = {item.name: item.default for item in dataclasses.fields(plain)}
    ours = dataclasses.fields(config)
    # What TRL's lacks, then what it has with another default. `distill_` and how answers are written is of use to one
    # loss only, whose help names it.
    own = [
        item.name
        for item in ours
        if item.name not in inherited and not item.name.startswith("distill_") and item.name not in WRITING_FIELDS
    ]
    own += [item.name for item in ours if item.name in inherited and item.default != inherited[item.name]]
    return {
        "frozen context": own,
        "model": _names(ModelArguments),
        "data": _names(DataArguments),
        "adapters": _names(AdapterArguments),
        "training": [
            *(name for name in _COMMON_FIELDS if name not in own),
            *(name for name in _METHOD_FIELDS if name not in own),
            *_names(ReportArguments),
        ],
    }


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
            return f"takes {str(action.metavar).replace('|', ' or ')}, got {item!r}"
        if action.choices is not None and parsed not in action.choices:
            return f"takes one of {', '.join(map(str, action.choices))}; got {item!r}"
    return None


def _kind(settings: Mapping[str, Any]) -> str:
    """What kind of value a field takes, in a word."""
    if "choices" in settings:
        text = "|".join(map(str, settings["choices"]))
        return text if len(text) <= 80 else "name"
    kind = getattr(settings["type"], "__name__", "value")
    return {"string_to_bool": "true|false", "str": "text"}.get(kind, kind)
