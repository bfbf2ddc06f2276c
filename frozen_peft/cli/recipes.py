# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft recipes`: the recipes that ship, which every command that takes a recipe finds by name.

Lists the recipes that ship, or prints one as it stands, to be edited:
`frozen-peft recipes tier2_behavior > mine.yaml`.
"""

import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from frozen_peft.cli.arguments import CommandParser
from frozen_peft.cli.errors import reported
from frozen_peft.utils.recipe_files import shipped_files, shipped_recipes
from frozen_peft.utils.tables import aligned

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Lists the recipes, or prints one.

    Args:
        arguments: Command-line arguments after `recipes`.

    Raises:
        CommandError: There is no recipe of that name.
    """
    parser = CommandParser("recipes", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one to print; without it, all are listed")
    name = parser.read(arguments).name
    files = shipped_files()
    if name is None:
        print(_listing(files))
        return
    with reported():
        if name not in files:
            raise FileNotFoundError(f"no recipe {name} ships; there are: {', '.join(files)}")
    sys.stdout.write(files[name].read_text(encoding="utf-8"))


def _listing(files: Mapping[str, Path]) -> str:
    """Names and first sentences, in three groups."""
    groups = {
        "for frozen-peft train, inspect and plan, which take these names:": list(shipped_recipes()),
        "for accelerate launch --config_file, which takes a file, one for each way to share the work:": [
            name for name in files if name.startswith("accelerate/")
        ],
        "to read, the method without abstractions:": [name for name in files if name.endswith(".py")],
    }
    names = [name for group in groups.values() for name in group]
    rows = dict(zip(names, aligned([(name, _first_sentence(files[name])) for name in names]), strict=True))
    lines: list[str] = []
    for title, group in groups.items():
        lines += [title, *(rows[name] for name in group), ""]
    return "\n".join([*lines, "frozen-peft recipes NAME > FILE gives one to edit, with a reason at each setting."])


def _first_sentence(path: Path) -> str:
    """The first sentence of a file's header: what it is for."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        header = ast.get_docstring(ast.parse(text)) or ""
    else:
        header = " ".join(line.removeprefix("#").strip() for line in text.partition("\n#\n")[0].splitlines())
    return header.partition("\n")[0].partition(". ")[0].rstrip(".") + "."
