# SPDX-License-Identifier: Apache-2.0
"""Which packages are installed, and in which version.

What is imported and what is installed have names of their own: `fla` comes from flash-linear-attention and from
fla-core, `triton` from triton-windows on Windows. And what is imported need not be installed at all: a source folder
on the path, or a build without metadata, says its version in its own file or nowhere. So nothing here asks the
metadata for the name of a module.
"""

import functools
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path

__all__ = ["installed_version", "module_versions"]

UNKNOWN = "unknown"
# Modules that are called otherwise than the package on the index that they come from.
_MODULES = {"flash-linear-attention": "fla"}
_DECLARATION = re.compile(r"^__version__\s*(?::\s*str\s*)?=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_VERSION_FILES = ("version.py", "_version.py")


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of an installed package, by its name on the index; None where it is not there.

    Where no metadata tells, it is what `module_versions` finds of the module; `"unknown"` where that says nothing.
    """
    version = _metadata_version(package)
    if version is not None:
        return version
    found = module_versions(_MODULES.get(package, package.replace("-", "_")))
    return ", ".join(sorted(set(found.values()))) or None


@functools.cache
def module_versions(module: str) -> dict[str, str]:
    """The versions of what an importable top-level module comes from, which is not imported.

    Args:
        module: Its name, as in `import`.

    Returns:
        By distribution, since several may share a module's folder; under the module's own name what its files declare,
        or `"unknown"`, where no metadata tells. Empty where there is no such module.
    """
    spec = importlib.util.find_spec(module)
    # A folder of that name on the path, such as the one that a repository was cloned into, is no module of it.
    if spec is None or spec.origin is None:
        return {}
    usual = next((package for package, name in _MODULES.items() if name == module), module.replace("_", "-"))
    # An installation in place lists none of its modules.
    distributions = _distributions().get(module, (usual,))
    found = {name: version for name in distributions if (version := _metadata_version(name)) is not None}
    return found or {module: _declared_version(spec)}


@functools.cache
def _distributions() -> dict[str, tuple[str, ...]]:
    """Names of the distributions of each top-level module; what an interrupted installation left has none."""
    with _without_warning():
        return {
            module: tuple(sorted({name for name in names if name}))
            for module, names in importlib.metadata.packages_distributions().items()
        }


def _metadata_version(distribution: str) -> str | None:
    try:
        # None, whatever its annotation says, where the metadata is damaged.
        with _without_warning():
            return importlib.metadata.version(distribution) or None
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _without_warning() -> Iterator[None]:
    """Python 3.12 and 3.13 warn where metadata is damaged, of what their own look-up does with it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Implicit None on return values", DeprecationWarning)
        yield


def _declared_version(spec: ModuleSpec) -> str:
    """What a module's own files say, as most do; they are read and not run, since some need a GPU to be imported."""
    assert spec.origin is not None, "a folder is no module"
    files = [Path(spec.origin)]
    files += [Path(folder) / name for folder in spec.submodule_search_locations or () for name in _VERSION_FILES]
    for file in files:
        if file.suffix == ".py" and file.is_file():
            match = _DECLARATION.search(file.read_text(encoding="utf-8", errors="replace"))
            if match:
                return match[1]
    return UNKNOWN
