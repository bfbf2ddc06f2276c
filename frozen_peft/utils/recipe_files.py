# SPDX-License-Identifier: Apache-2.0
"""Recipe files: flat YAML whose fields are those of `training.recipe`, and the ones that ship. Imports no torch."""

import difflib
from pathlib import Path
from typing import Any

import yaml

__all__ = ["find_recipe", "read_recipe", "shipped_files", "shipped_recipes"]

_PACKAGE = Path(__file__).parents[1]
# An installed package has them inside (setup.py puts them there); in a checkout they lie beside it.
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
_TEXT_TAG = "tag:yaml.org,2002:str"


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
    return {name: path for name, path in shipped_files().items() if path.suffix == ".yaml" and "/" not in name}


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
    for copy in (Path(f"{name}.yaml"), Path(f"{name}.yml")):
        if copy.is_file() and copy.read_bytes() != recipes[name].read_bytes():
            raise ValueError(
                f"{name} is a recipe that ships, and {copy} lies here and is another. Write {copy} to take yours, and "
                f"`frozen-peft recipes {name} > FILE` to have a file of the one that ships."
            )
    return recipes[name]


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, a few lines of which, written out, fill any memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="a recipe has no aliases; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


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
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        keys = [key for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
        values = loader.construct_document(root) if root else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # Characters that YAML does not allow, bytes that are not UTF-8, dates that no calendar has, endless nesting.
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of fields to values, got {type(values).__name__}")
    lines: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if key.tag != _TEXT_TAG:
            raise ValueError(f"{path}, line {line}: a field's name is text, got {str(key.value)[:60]!r}")
        if key.value in lines:
            raise ValueError(f"{path}, line {line}: `{key.value}` is already given on line {lines[key.value]}")
        lines[key.value] = line
    return values, lines
