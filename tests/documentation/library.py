# SPDX-License-Identifier: Apache-2.0
"""The documentation of the interpreter's own standard library, read without running it.

Modules with Python source are parsed, not imported: no side effects, no slow imports, and the same result on every
machine with that Python. Only modules compiled into the interpreter, whose documentation exists nowhere else, are
imported.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path

# Easter eggs, graphical toolkits, generated tables, packages that are programs or copies of other modules, and
# compiled modules whose import warns or touches the terminal.
SKIPPED_MODULES = frozenset(
    {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "test", "lib2to3", "pydoc_data"}
    | {"encodings", "ensurepip", "venv", "distutils", "posixpath", "ntpath", "genericpath", "nt"}
    | {"audioop", "nis", "ossaudiodev", "readline", "spwd"}
)
MAX_BODY_CHARACTERS = 600
MIN_SUMMARY_CHARACTERS, MAX_SUMMARY_CHARACTERS = 16, 160


@dataclass(frozen=True)
class Entry:
    """One public function, class or method.

    Attributes:
        name: Dotted name from the module on, such as ``json.JSONEncoder.encode``.
        signature: Parameters in parentheses, or empty where unknown.
        summary: The docstring's first sentence, on one line.
        body: What the docstring says after it, cut after a whole paragraph; may be empty.
    """

    name: str
    signature: str
    summary: str
    body: str

    def render(self, *, brief: bool = False) -> str:
        """Returns the entry as it stands in a context; the summary is a line of its own.

        Args:
            brief: Name and summary only.
        """
        lines = [f"## {self.name}", self.summary]
        if not brief:
            lines.append(f"{self.name.rsplit('.', 1)[-1]}{self.signature}")
            lines += [self.body] if self.body else []
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class ModuleDocumentation:
    """A top-level module, its submodules included, and its entries in the order of the source."""

    name: str
    entries: tuple[Entry, ...]


def read_standard_library(progress: Callable[[str], None] | None = None) -> list[ModuleDocumentation]:
    """Reads every public top-level module of the standard library that has documented entries.

    Args:
        progress: Called with each module's name before it is read.

    Returns:
        Modules sorted by name; those without a single usable entry are left out.

    Raises:
        RuntimeError: The interpreter strips docstrings (``python -OO``).
    """
    if sys.flags.optimize >= 2:
        raise RuntimeError(
            "The demo reads docstrings, and this interpreter runs with -OO, which strips them. "
            "Run it without -OO and with PYTHONOPTIMIZE unset."
        )
    modules = []
    for name in list_public_modules():
        if progress is not None:
            progress(name)
        entries = tuple(_unique(_read_module(name)))
        if entries:
            modules.append(ModuleDocumentation(name, entries))
    return modules


def list_public_modules() -> list[str]:
    """Returns the names of the top-level modules that are read, sorted."""
    return sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED_MODULES)


def _read_module(name: str) -> Iterator[Entry]:
    # Some names are platform-specific: the interpreter lists them everywhere and has them on one system only.
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    source = _source_file(spec)
    if source is not None:
        for dotted_name, path in _python_files(name, source):
            yield from _parse_entries(dotted_name, path)
    elif spec.origin == "built-in" or isinstance(spec.loader, ExtensionFileLoader):
        yield from _inspect_entries(name)


def _source_file(spec: ModuleSpec) -> Path | None:
    if spec.origin == "frozen":
        # Frozen modules (os, io, abc) keep their source beside the others.
        standard_library = Path(ast.__file__).parent
        candidate = standard_library / f"{spec.name}.py"
        return candidate if candidate.is_file() else None
    return Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None


def _python_files(name: str, source: Path) -> Iterator[tuple[str, Path]]:
    if source.name != "__init__.py":
        yield name, source
        return
    for path in sorted(source.parent.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") or part in {"test", "tests"} for part in parts):
            yield ".".join((name, *parts)), path


def _parse_entries(dotted_name: str, path: Path) -> Iterator[Entry]:
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in module.body:
        yield from _parse_definition(dotted_name, node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                yield from _parse_definition(f"{dotted_name}.{node.name}", member)


def _parse_definition(owner: str, node: ast.stmt) -> Iterator[Entry]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return
    if isinstance(node, ast.ClassDef):
        signature = f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    else:
        signature = f"({ast.unparse(node.args)})"
    yield from _make_entry(f"{owner}.{node.name}", signature, ast.get_docstring(node))


def _inspect_entries(name: str) -> Iterator[Entry]:
    module = importlib.import_module(name)
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        yield from _make_entry(f"{name}.{attribute}", _signature(value), inspect.getdoc(value))
        if inspect.isclass(value):
            for member, function in sorted(vars(value).items()):
                if not member.startswith("_") and inspect.isroutine(function):
                    documentation = inspect.getdoc(function)
                    yield from _make_entry(f"{name}.{attribute}.{member}", _signature(function), documentation)


def _signature(value: Callable[..., object]) -> str:
    try:
        return str(inspect.signature(value))
    except (AttributeError, TypeError, ValueError):
        # Many compiled functions declare none, or one that cannot be read; they are documented all the same.
        return ""


def _make_entry(name: str, signature: str, documentation: str | None) -> Iterator[Entry]:
    if not documentation or not documentation.isascii():
        return
    paragraphs = [paragraph.rstrip() for paragraph in re.split(r"\n\s*\n", documentation.strip())]
    # Compiled functions without a text signature open their docstring with one: "dict(iterable) -> new dictionary".
    if re.match(r"[\w.]+\(.*\)\s*(->|--|:|$)", paragraphs[0].splitlines()[0]):
        paragraphs = paragraphs[1:]
    if not paragraphs:
        return
    summary, remainder = _split_first_sentence(" ".join(paragraphs[0].split()))
    if not MIN_SUMMARY_CHARACTERS <= len(summary) <= MAX_SUMMARY_CHARACTERS or not summary[0].isalpha():
        return
    body = remainder
    for paragraph in paragraphs[1:]:
        if len(body) + len(paragraph) > MAX_BODY_CHARACTERS:
            break
        body = f"{body}\n{paragraph}" if body else paragraph
    yield Entry(name, signature, summary, body)


def _split_first_sentence(paragraph: str) -> tuple[str, str]:
    match = re.search(r"[.!?](?= [A-Z])", paragraph)
    if match is None:
        return paragraph, ""
    return paragraph[: match.end()], paragraph[match.end() :].strip()


def _unique(entries: Iterator[Entry]) -> Iterator[Entry]:
    # Property setters and platform-dependent definitions repeat a name; a question must name one entry.
    seen: set[str] = set()
    for entry in entries:
        if entry.name not in seen:
            seen.add(entry.name)
            yield entry
