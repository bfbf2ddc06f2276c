# SPDX-License-Identifier: Apache-2.0
"""The command line: `frozen-peft COMMAND`.

Each command is one module of this package with a function `run(arguments)`, imported when the command is called.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence

from frozen_peft.cli.errors import CommandError, reported
from frozen_peft.utils import noise
from frozen_peft.utils.tables import aligned

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "demo": "move a disposition into the weights of a tiny model; three minutes on two cores",
    "strip": "remove marked instructions from contexts, and make variants of these",
    "sample": "sample decisions from a model that has its instructions in place",
    "pairs": "make preference pairs of probes, or of decisions with and without instructions",
    "plan": "say what a training takes, from the model's configuration alone",
    "recipes": "list the recipes that ship, or print one to edit",
    "train": "train adapters from a recipe",
    "inspect": "compare the gradient of a frozen context with the full one, before a run",
    "evaluate": "measure with probes what a model prefers, before training and after",
    "report": "show what happened in a run, in one HTML file",
    "merge": "write the model that a base and its adapters are together",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit status: 0, or 2 where the user can mend what went wrong, after one message on standard error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"frozen-peft: no command {name!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        # An error from below is a bug, whose traceback is needed, but where a command only reads what the user gave.
        with warnings.catch_warnings(), reported(raised_in="frozen_peft"):
            for text, category in noise.WARNINGS:
                warnings.filterwarnings("ignore", text, category)
            importlib.import_module(f"frozen_peft.cli.{name}").run(rest)
    except CommandError as error:
        print(f"frozen-peft {name}: {error}", file=sys.stderr)
        return 2
    return 0


def _usage() -> str:
    return "\n".join(
        [
            "usage: frozen-peft COMMAND [arguments]",
            "",
            "Train how a model responds in long contexts, without the backward pass through them.",
            "",
            "commands:",
            *aligned(list(COMMANDS.items())),
            "",
            "frozen-peft COMMAND --help explains a command.",
        ]
    )
