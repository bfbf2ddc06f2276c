# SPDX-License-Identifier: Apache-2.0
"""Every branch of the package that only a GPU takes is in the list of docs/gpu.md, with a test that runs it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import frozen_peft

PACKAGE = Path(frozen_peft.__file__).parent
ROOT = PACKAGE.parent
PAGE = ROOT / "docs" / "gpu.md"
HEADING = "## Branches that only a GPU takes"
# What such a branch asks for or uses.
DEVICE_TYPES = {"cuda", "xpu", "cpu"}
MODULES = {"cuda", "accelerator"}
NAMES = {
    "OutOfMemoryError", "_on_gpu", "causal_lower_right", "get_device_states", "has_16_bit_products",
    "has_flash_prefill", "is_cuda", "is_torch_bf16_gpu_available", "pin_memory", "pins", "record_stream",
    "set_device_states",
}  # fmt: skip
KEYWORDS = {"non_blocking", "out_dtype", "pin_memory"}


def marks_of(node: ast.AST) -> bool:
    """Whether a node of the syntax tree is a sign of such a branch."""
    match node:
        case ast.Compare():
            return any(isinstance(part, ast.Constant) and part.value in DEVICE_TYPES for part in each_part(node))
        case ast.Attribute(value=ast.Name("torch"), attr=name) if name in MODULES:
            return True
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name in NAMES
        case ast.keyword(arg=name):
            return name in KEYWORDS
        case ast.ExceptHandler(type=ast.AST() as caught):
            return marks_of(caught)
    return False


def each_part(node: ast.Compare) -> Iterator[ast.AST]:
    for part in (node.left, *node.comparators):
        yield from part.elts if isinstance(part, ast.Tuple) else (part,)


def functions_with_marks(tree: ast.AST) -> set[str]:
    """The functions, as `Class.function`, with such a sign; annotations and imports are none."""
    found: set[str] = set()

    def visit(node: ast.AST, path: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            path = (*path, node.name)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            children: list[ast.AST] = [*node.body] if isinstance(node, ast.FunctionDef) else [node.body]
            children += node.args.defaults
        else:
            if path and marks_of(node):
                found.add(".".join(path))
            children = [*ast.iter_child_nodes(node)]
        for child in children:
            # The bases of a class are no branch of it.
            if not (isinstance(node, ast.ClassDef) and child in node.bases):
                visit(child, path)

    visit(tree, ())
    return found


def found_branches() -> set[tuple[str, str]]:
    return {
        (path.relative_to(PACKAGE).as_posix(), function)
        for path in sorted(PACKAGE.rglob("*.py"))
        for function in functions_with_marks(ast.parse(path.read_text(encoding="utf-8")))
    }


def listed_rows() -> list[tuple[str, ...]]:
    """The cells of each row of the table: file, function, what a GPU does there, the tests."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]


def test_every_branch_is_listed_and_every_row_is_a_branch() -> None:
    listed = [(file.strip("`"), function.strip("`")) for file, function, *_ in listed_rows()]
    assert len(set(listed)) == len(listed)
    assert set(listed) == found_branches()


def test_no_cell_is_empty_and_every_test_is_there() -> None:
    for row in listed_rows():
        assert len(row) == 4, row
        assert all(row), row
        tests = re.findall(r"`([\w/.]+)::(\w+)`", row[3])
        assert tests, row
        for file, name in tests:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), (file, name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(t):\n    if t.device.type == 'cuda':\n        pass", {"f"}),
        ("def f(t):\n    return t.device.type in ('cuda', 'xpu')", {"f"}),
        ("class A:\n    def g(self):\n        return torch.cuda.Event()", {"A.g"}),
        ("def f(t):\n    try:\n        pass\n    except torch.OutOfMemoryError:\n        pass", {"f"}),
        ("def f(t):\n    return t.to('meta', non_blocking=True)", {"f"}),
        ("class A(torch.OutOfMemoryError):\n    pass", set()),
        ("def f(t: torch.cuda.Stream) -> torch.cuda.Event:\n    return t.device.type == 'meta'", set()),
    ],
)
def test_what_counts_as_a_branch(text: str, found: set[str]) -> None:
    assert functions_with_marks(ast.parse(text)) == found
