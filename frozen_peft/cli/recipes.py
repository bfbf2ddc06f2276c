# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft recipes`: the recipes that ship, which every command that takes a recipe finds by name."""

import argparse
import ast
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from frozen_peft.cli.errors import reported

__all__ = ["find_recipe", "run", "shipped_files", "shipped_recipes"]

_PACKAGE = Path(__file__).parents[1]
# An installed package has them inside (setup.py puts them there); in a checkout they lie beside it.
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
_ACCELERATE = "accelerate/"
_ENDINGS = (".yaml", ".yml")


def run(arguments: Sequence[str]) -> None:
    """Lists the recipes, or prints one.

    Args:
        arguments: Command-line arguments after `recipes`.

    Raises:
        CommandError: There is no recipe of that name.
    """
    parser = argparse.ArgumentParser(
        prog="frozen-peft recipes",
        description="Lists the recipes that ship, or prints one as it stands, to be edited: "
        "`frozen-peft recipes tier2_behavior > mine.yaml`.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one to print; without it, all are listed")
    name = parser.parse_args(arguments).name
    files = shipped_files()
    if name is None:
        print(_listing(files))
        return
    with reported():
        if name not in files:
            raise FileNotFoundError(f"no recipe {name} ships; there are: {', '.join(files)}")
    sys.stdout.write(files[name].read_text(encoding="utf-8"))


def shipped_files() -> dict[str, Path]:
    """All that ships, by name.

    Recipes of `train` go by what they are called (`tier2_behavior`), files for `accelerate launch` by folder and name
    (`accelerate/ddp`), and the script that is there to be read by its file's name.
    """
    paths = {path.relative_to(RECIPES): path for path in sorted(RECIPES.rglob("*"))}
    files = {name.with_suffix("").as_posix(): path for name, path in paths.items() if name.suffix == ".yaml"}
    return files | {name.as_posix(): path for name, path in paths.items() if name.suffix == ".py"}


def shipped_recipes() -> dict[str, Path]:
    """The recipes of `train` among them."""
    return {
        name: path
        for name, path in shipped_files().items()
        if path.suffix == ".yaml" and not name.startswith(_ACCELERATE)
    }


def find_recipe(name: str) -> Path:
    """Returns the file that the user means: one of that name if there is one, else the recipe that ships.

    Args:
        name: A file, or a name of `shipped_recipes`.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: It is a recipe that ships, and an edited copy of it, with the ending, lies where the user is.
    """
    if Path(name).is_file():
        return Path(name)
    recipes = shipped_recipes()
    if name not in recipes:
        nearest = difflib.get_close_matches(Path(name).stem, recipes, n=1)
        guess = f"; did you mean {nearest[0]}?" if nearest else ""
        raise FileNotFoundError(
            f"no recipe {name}: it is neither a file (looked in {Path.cwd()}) nor one that ships, which are "
            f"{', '.join(recipes)}{guess}"
        )
    for copy in (Path(name + ending) for ending in _ENDINGS):
        if copy.is_file() and copy.read_bytes() != recipes[name].read_bytes():
            raise ValueError(
                f"{name} is a recipe that ships, and {copy} lies here and is another. Write {copy} to take yours, and "
                f"`frozen-peft recipes {name} > FILE` to have a file of the one that ships."
            )
    return recipes[name]


def _listing(files: Mapping[str, Path]) -> str:
    """Names and first sentences, in three groups."""
    recipes = shipped_recipes()
    groups = {
        "for frozen-peft train, inspect and plan, which take these names:": [*recipes],
        "for accelerate launch --config_file, which takes a file, one for each way to share the work:": [
            name for name in files if name.startswith(_ACCELERATE)
        ],
        "to read, the method without abstractions:": [name for name, path in files.items() if path.suffix == ".py"],
    }
    width = max(map(len, files))
    lines: list[str] = []
    for title, names in groups.items():
        lines += [title, *(f"  {name:<{width}}  {_first_sentence(files[name])}" for name in names), ""]
    return "\n".join([*lines, "frozen-peft recipes NAME > FILE gives one to edit, with a reason at each setting."])


def _first_sentence(path: Path) -> str:
    """The first sentence of a file's header: what it is for."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        header = ast.get_docstring(ast.parse(text)) or ""
    else:
        header = " ".join(line.removeprefix("#").strip() for line in text.partition("\n#\n")[0].splitlines())
    return header.partition("\n")[0].partition(". ")[0].rstrip(".") + "."
