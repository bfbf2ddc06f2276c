# SPDX-License-Identifier: Apache-2.0
"""Private names of dependencies stand in `utils/compat`, each with its reason, and nowhere else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import frozen_peft

PACKAGE = Path(frozen_peft.__file__).parent
COMPAT = PACKAGE / "utils" / "compat"
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """What this package defines itself: functions, classes, fields, and attributes that it gives its objects."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
                    found.add(name)
    return found


OWN = own_names()


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a module uses and this package does not define; a hook that calls its parent's is no use."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name) if is_private(name) and name not in OWN:
                yield f"{node.lineno}: .{name}"
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"), args=[_, ast.Constant(name), *_]
            ):
                if is_private(str(name)) and name not in OWN:
                    yield f"{node.lineno}: {name!r}"
            case ast.ImportFrom(module=str(module)) if not module.startswith("frozen_peft"):
                path = [*module.split("."), *(alias.name for alias in node.names)]
                if any(map(is_private, path)):
                    yield f"{node.lineno}: import {'.'.join(path)}"


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_dependencies_stand_in_one_place(path: Path) -> None:
    if COMPAT not in path.parents:
        assert list(foreign_names(TREES[path])) == []


def test_a_private_name_elsewhere_would_be_found() -> None:
    planted = (
        "from trl.data_utils import _tokenize\nmodel._forward_hooks\ngetattr(model, '_buffers')\nsuper()._save()\n"
    )
    assert len(list(foreign_names(ast.parse(planted)))) == 3


@pytest.mark.parametrize("path", sorted(COMPAT.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_one_has_a_reason_an_end_and_a_test(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    entries = re.findall(r"# PRIVATE: (.*(?:\n# .*)*)", text)
    assert entries
    for entry in (" ".join(entry.replace("\n# ", " ").split()) for entry in entries):
        assert "Why: " in entry, entry
        assert "Goes when: " in entry, entry
        assert re.search(r"\d", entry.partition("Why: ")[0]), f"no version: {entry}"
    tests = (Path(__file__).parent / f"test_{path.stem}.py").read_text(encoding="utf-8")
    assert f"frozen_peft.utils.compat.{path.stem}" in tests
