# SPDX-License-Identifier: Apache-2.0
"""The package's layout: which side may import which, and what every module and `__init__` promises."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import frozen_peft
from frozen_peft.cli import COMMANDS

PACKAGE = Path(frozen_peft.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each folder knows of the others. `errors` and `utils` are leaves that anyone may use.
LEAVES = {"errors", "utils"}
ARROWS = {
    "errors": set(),
    "utils": set(),
    "config": {"context"},
    "data": set(),
    "adapters": set(),
    "context": {"adapters"},
    "gradient": {"adapters", "context"},
    "merging": {"adapters"},
    "distillation": {"config", "context", "data", "training"},
    "planning": {"adapters", "config", "context", "distillation", "gradient"},
    "training": {"adapters", "config", "context", "data", "distillation", "gradient", "merging", "planning"},
    "evaluation": {"adapters", "config", "context", "data", "gradient", "merging", "planning", "training"},
    "report": {"adapters", "context", "data", "evaluation"},
    "behavior": {"data", "evaluation"},
}


def side(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or inside functions."""
    package = ".".join(["frozen_peft", *path.relative_to(PACKAGE).parts[:-1]])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found.add(base)
            if base == "frozen_peft":
                found.update(f"frozen_peft.{alias.name}" for alias in node.names)
    return {name for name in found if name.partition(".")[0] == "frozen_peft"}


def public_names(package: str) -> list[str]:
    return importlib.import_module(package).__all__


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = side(path)
    if own not in ARROWS:
        return
    known = {name.split(".")[1]: name for name in imported_modules(path) if len(name.split(".")) > 1}
    forbidden = set(known) - {own} - ARROWS[own] - LEAVES
    assert not forbidden, f"{own} imports {sorted(known[name] for name in forbidden)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_demo_calls_the_command_line(path: Path) -> None:
    imports = {name for name in imported_modules(path) if name.startswith("frozen_peft.cli")}
    assert not imports or side(path) in ("cli", "demo", "__main__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_licence_and_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize(
    "package",
    [f"frozen_peft.{side(path)}" for path in MODULES if path.name == "__init__.py" and path.parent != PACKAGE],
)
def test_packages_export_what_they_name(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in public_names(package) if not hasattr(module, name)]
    assert not missing


@pytest.mark.parametrize("package", ["frozen_peft", "frozen_peft.evaluation"])
def test_no_module_hides_a_name_that_is_imported_at_first_use(package: str) -> None:
    lazy = importlib.import_module(package)._MODULES
    for module in set(lazy.values()):
        importlib.import_module(f"{package}.{module}")
    assert [name for name in lazy if isinstance(getattr(importlib.import_module(package), name), ModuleType)] == []


def test_every_public_name_imports() -> None:
    names = public_names("frozen_peft")
    assert {"FrozenContextTrainer", "FrozenContextConfig", "lora_config", "quantization_config"} <= set(names)
    missing = [name for name in names if not hasattr(frozen_peft, name)]
    assert not missing


def test_every_command_is_one_module_with_run() -> None:
    for name in COMMANDS:
        assert callable(importlib.import_module(f"frozen_peft.cli.{name}").run)
    with_run = {
        path.stem
        for path in (PACKAGE / "cli").glob("*.py")
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "run"
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    }
    assert with_run == set(COMMANDS)
