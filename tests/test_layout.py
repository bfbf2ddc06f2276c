# SPDX-License-Identifier: Apache-2.0
"""The package's layout: which folder may import which, and what every module and `__init__` promises."""

import ast
import importlib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from trl import DPOTrainer, KTOTrainer, SFTTrainer

import frozen_peft
from frozen_peft.cli import COMMANDS

PACKAGE = Path(frozen_peft.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
DESIGN = PACKAGE.parent / "docs" / "design.md"
# A folder imports folders above it in this list, and none beside it.
LAYERS = (
    ("errors", "utils"),
    ("config", "data", "adapters"),
    ("context", "merging"),
    ("gradient",),
    ("distillation",),
    ("planning",),
    ("training",),
    ("evaluation",),
    ("behavior", "report"),
    ("demo",),
    ("cli",),
    ("__init__", "__main__"),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def side(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(["frozen_peft", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


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


def arrows() -> dict[str, list[str]]:
    """The folders that each folder imports."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        of_others = {name.split(".")[1] for name in imported_modules(path) if "." in name} & RANKS.keys()
        found.setdefault(side(path), set()).update(of_others - {side(path)})
    return {name: sorted(found[name], key=_place) for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return RANKS[name], name


def drawing() -> str:
    """The arrows as `docs/design.md` has them."""
    lines = [f"{name:<12} -> {', '.join(others)}" for name, others in arrows().items() if others and name in FOLDERS]
    return "\n".join(reversed(lines))


FOLDERS = {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"config"}


def test_every_folder_has_its_place() -> None:
    assert {side(path) for path in MODULES} == RANKS.keys()


@pytest.mark.parametrize("folder", RANKS)
def test_imports_go_one_way(folder: str) -> None:
    assert [other for other in arrows()[folder] if RANKS[other] >= RANKS[folder]] == []


def test_no_modules_import_each_other() -> None:
    names = {module_name(path): path for path in MODULES}
    graph = {name: (imported_modules(path) & names.keys()) - {name} for name, path in names.items()}
    # A package's own modules are not those that it hands on.
    for name, path in names.items():
        if path.name == "__init__.py":
            graph[name] = set()
    assert len(list(TopologicalSorter(graph).static_order())) >= len(names)


def test_the_drawing_in_the_design_is_that_of_the_code() -> None:
    assert f"```\n{drawing()}\n```" in DESIGN.read_text(encoding="utf-8"), drawing()


def test_no_name_stands_for_two_modules() -> None:
    names = Counter(path.stem for path in MODULES if not path.stem.startswith("__") and side(path) != "cli")
    assert [name for name, count in names.items() if count > 1] == []


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


@pytest.mark.parametrize(
    ("file", "name", "mixins"),
    [
        ("sft", "FrozenContextTrainer", ["FrozenContextMixin"]),
        ("dpo", "FrozenContextDPOTrainer", ["PreferenceMixin", "FrozenContextMixin"]),
        ("kto", "FrozenContextKTOTrainer", ["PreferenceMixin", "FrozenContextMixin"]),
    ],
)
def test_a_trainer_is_one_class_on_mixins(file: str, name: str, mixins: list[str]) -> None:
    path = PACKAGE / "training" / f"{file}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    own = [kind for kind in getattr(frozen_peft, name).__mro__ if kind.__module__.startswith("frozen_peft")]
    assert [kind.__name__ for kind in own] == [name, *mixins]


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("FrozenContextTrainer", SFTTrainer),
        ("FrozenContextDPOTrainer", DPOTrainer),
        ("FrozenContextKTOTrainer", KTOTrainer),
    ],
)
def test_the_docstrings_of_a_trainer_name_every_hook(name: str, parent: type) -> None:
    own = [kind for kind in getattr(frozen_peft, name).__mro__ if kind.__module__.startswith("frozen_peft")]
    for kind in own:
        hooks = [name for name in vars(kind) if callable(getattr(parent, name, None)) and not name.startswith("__")]
        assert [name for name in hooks if f"`{name}`" not in (kind.__doc__ or "")] == []
