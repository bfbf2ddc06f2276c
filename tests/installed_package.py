# SPDX-License-Identifier: Apache-2.0
"""The package as a user gets it: a wheel, in an environment that has what the wheel asks for and nothing else."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from shutil import copytree, ignore_patterns, unpack_archive

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["InstalledPackage", "build_wheel", "install_wheel"]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class InstalledPackage:
    """An environment with the package.

    Attributes:
        folder: Of the environment.
    """

    folder: Path

    def run(self, command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment as its user would, without an accelerator, and requires that it succeeds.

        Args:
            command: `python`, `frozen-peft`.
            arguments: What follows.
            cwd: Where, which is not the repository.
        """
        return run([str(self.folder / "bin" / command), *arguments], cwd)


def build_wheel(folder: Path) -> Path:
    """Builds a wheel from the source distribution that the repository's files make."""
    source = folder / "source"
    unwanted = ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("frozen_peft", "recipes"):
        copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    built = folder / "built"
    _build("sdist", built, source)
    (archive,) = built.glob("*.tar.gz")
    unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    _build("wheel", built, unpacked)
    (wheel,) = built.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> InstalledPackage:
    """Makes an environment of what a wheel requires without extras, and installs the wheel there.

    What it requires is linked from this environment, where a second PyTorch would take a minute and gigabytes. pip
    then installs the wheel without an index, so it fails where anything that is asked for is not there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    packages = Path(
        run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).stdout.strip()
    )
    for required in _required(wheel):
        for name in {path.parts[0] for path in required.files or ()} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(required.locate_file(name))).absolute())
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--quiet", str(wheel)], folder)
    return InstalledPackage(folder)


def run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command that knows nothing of this checkout, environment or pip's settings."""
    unknown = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unknown)}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PYTHONNOUSERSITE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def _build(kind: str, target: Path, source: Path) -> None:
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    target.mkdir(exist_ok=True)
    run([sys.executable, "-c", script], source)


def _required(wheel: Path) -> Iterator[Distribution]:
    """All distributions that a wheel needs, directly or not, as they are installed here."""
    (information,) = [path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info")]
    seen: set[tuple[str, frozenset[str]]] = set()
    rest: list[tuple[Distribution, frozenset[str]]] = [(PathDistribution(information), frozenset())]
    while rest:
        parent, extras = rest.pop()
        for requirement in map(Requirement, parent.requires or ()):
            wanted = [{"extra": extra} for extra in extras or {""}]
            if requirement.marker is not None and not any(map(requirement.marker.evaluate, wanted)):
                continue
            key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if key not in seen:
                seen.add(key)
                found = distribution(requirement.name)
                yield found
                rest.append((found, key[1]))
