# SPDX-License-Identifier: Apache-2.0
"""What the commands without a recipe share: their parser, and the options that several of them have."""

import argparse
import runpy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from frozen_peft.data import Marks
from frozen_peft.demo import model_source

__all__ = ["CommandParser", "given_marks", "load_chosen_model", "load_function", "require_writable", "spelled"]

DTYPES = ["auto", "bfloat16", "float16", "float32"]
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class CommandParser(argparse.ArgumentParser):
    """Options of a command, with `-` or `_` between the words of their names, and whole names only.

    Args:
        command: Its name.
        text: What it does, in lines and paragraphs that stay; of its module's docstring all but the first.
        joint: What stands between the words of its options in texts: `-` or `_`.
    """

    def __init__(self, command: str, text: str | None, joint: str = "-"):
        super().__init__(
            prog=f"frozen-peft {command}",
            description=(text or "").partition("\n\n")[2],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._joint = joint
        self._section: Any = self

    def section(self, title: str, text: str | None = None) -> None:
        """Puts the options that follow under a title."""
        self._section = self.add_argument_group(title, text)

    def option(self, name: str, text: str, default: Any = None, **settings: Any) -> None:
        """Adds an option. Its value is of the type of its default, which the help says; one of False is a flag.

        Args:
            name: In underscores.
            text: For the help.
            default: Its value where it is not given.
            settings: What else `add_argument` takes.
        """
        if default is False:
            settings["action"] = "store_true"
        elif default is not None:
            settings.setdefault("type", type(default))
            settings.setdefault("metavar", "N" if isinstance(default, int | float) else None)
            text += " (default: %(default)s)"
        self._section.add_argument(spelled(f"--{name}", self._joint), default=default, help=text, **settings)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options that a command line gives."""
        return self.parse_args([spelled(text, self._joint) for text in arguments])

    def refuse_idle(self, options: argparse.Namespace, names: Iterable[str], why: str) -> None:
        """Refuses what was given and does nothing.

        Raises:
            ValueError: One of the options has another value than its default.
        """
        for name in names:
            if getattr(options, name) != self.get_default(name):
                raise ValueError(f"{spelled(f'--{name}', self._joint)} has no effect {why}")

    def add_model(self, model_text: str, adapter_text: str) -> None:
        """Adds which model is loaded and how, for `load_chosen_model`."""
        self.section("model")
        self.option("model", model_text, metavar="ID_OR_DIR", required=True)
        self.option("adapter", adapter_text, metavar="ID_OR_DIR")
        self.option(
            "tokenizer",
            "tokenizer and chat template (default: the adapter's where its folder has them, else the model's)",
            metavar="ID_OR_DIR",
        )
        self.option("revision", "branch, tag or commit of a model on the hub", "main")
        self.option(
            "dtype",
            "type of the loaded weights; auto: the checkpoint's own",
            "auto",
            type=lambda text: SHORT_DTYPES.get(text, text),
            choices=DTYPES,
        )
        self.option("load_in_4bit", "quantize the base to 4 bit", False)
        self.option("trust_remote_code", "run code that comes with the model", False)
        self.option("allow_pickle", "read weights that are pickles (tensors only, no code is run)", False)

    def add_cost(self, batch_size: int, batch_text: str) -> None:
        """Adds the sizes of what runs together."""
        self.section("cost", "These change nothing but time and memory.")
        self.option("batch_size", batch_text, batch_size)
        self.option("prefill_chunk_size", "context tokens per forward; 0: all in one", 2048)

    def add_marks(self, text: str) -> None:
        """Adds what instructions are told by, for `given_marks`."""
        self.section("marks", text)
        self.option("tag", "what stands between <NAME> and </NAME>", metavar="NAME", action="append")
        self.option("field", 'messages with "NAME": true', metavar="NAME", action="append")
        self.option("role", "messages of that role", metavar="ROLE", action="append")
        self.option("regex", "what a regular expression matches", metavar="PATTERN", action="append")
        text = "messages that F(message) is true of; runs the file"
        self.option("predicate", text, metavar="FILE.py:F", action="append")


def spelled(argument: str, joint: str) -> str:
    """An option, with a value or without, with `joint` between the words of its name; any other argument as it is."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    return "--" + name[2:].replace("-", joint).replace("_", joint) + equals + value


def given_marks(options: argparse.Namespace, prefix: str = "") -> Marks | None:
    """The marks that a command line gives; None where there are none.

    Args:
        options: With what `add_marks` added, or with some of it under another name.
        prefix: Before each name.
    """
    tags, fields, roles, patterns, predicates = (
        getattr(options, prefix + name, None) or () for name in ("tag", "field", "role", "regex", "predicate")
    )
    if not any((tags, fields, roles, patterns, predicates)):
        return None
    return Marks(tuple(tags), tuple(fields), tuple(roles), tuple(patterns), tuple(map(load_function, predicates)))


def load_chosen_model(options: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """Loads a model as the options of `add_model` say, and its tokenizer."""
    # At first use: torch and transformers take seconds to import.
    from frozen_peft.evaluation import load_model

    names = ("tokenizer", "revision", "dtype", "load_in_4bit", "trust_remote_code", "allow_pickle")
    settings = {setting: getattr(options, setting) for setting in names}
    return load_model(model_source(name), options.adapter, **settings)


def load_function(name: str) -> Callable[..., Any]:
    """Runs a Python file and returns one of its functions.

    Only for what the user names on the command line: a name that stands in a dataset or a recipe must not come here.

    Args:
        name: `FILE.py:FUNCTION`.

    Raises:
        ValueError: The name has another form, or the file fails or has no such function.
        FileNotFoundError: There is no such file.
    """
    file, colon, function_name = name.rpartition(":")
    if not colon or not function_name.isidentifier() or not file.endswith(".py"):
        raise ValueError(f"{name!r} does not name a function, expected FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    try:
        function = runpy.run_path(str(path)).get(function_name)
    except Exception as error:  # the file is the user's, so anything may be raised in it
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{path} has no function `{function_name}`")
    return function


def require_writable(output: Path | None, option: str = "--output") -> None:
    """Refuses a file that could not be written once all is done.

    Raises:
        ValueError: It is a folder, or would lie in one that is not there.
    """
    if output is None:
        return
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{option} {output}: there is no folder {output.absolute().parent}")
    if output.is_dir():
        raise ValueError(f"{option} {output} is a folder; give the name of a file")
