# SPDX-License-Identifier: Apache-2.0
"""What is said of releases of the dependencies that were never tested, and what the bounds promise."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.bounds import ROOT, constraints, lower_bounds

BOUNDED = {"transformers", "trl", "peft", "accelerate"}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def declared() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {own.name: own for own in map(Requirement, project["dependencies"])}


def import_with(folder: Path, **versions: str) -> subprocess.CompletedProcess[str]:
    """Imports the package where metadata of other versions is found first, bounds as in `pyproject.toml`."""
    own = folder / "frozen_peft-0.1.dist-info"
    own.mkdir()
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in declared().values())
    (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: frozen-peft\nVersion: 0.1\n{requires}", "utf-8")
    for name, version in versions.items():
        (folder / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-c", "import frozen_peft; from frozen_peft.cli import COMMANDS"],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_release_that_was_never_tested_is_named_once(tmp_path: Path) -> None:
    done = import_with(tmp_path, transformers="5.99.0", peft="0.99.1")
    assert done.stderr.count("UserWarning") == 1
    assert "not tested with transformers 5.99.0 (tested: <5.25,>=5.23), peft 0.99.1" in done.stderr
    assert "trl" not in done.stderr


def test_releases_within_the_bounds_are_not_mentioned(tmp_path: Path) -> None:
    assert import_with(tmp_path, **{name: pinned()[name] for name in BOUNDED}).stderr == ""


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_bounds_reach_from_what_oldest_runs_to_the_minor_release_after_the_pinned_one(name: str) -> None:
    upper = next(Version(own.version) for own in declared()[name].specifier if own.operator == "<")
    newest = Version(pinned()[name])
    assert (upper.major, upper.minor) == (newest.major, newest.minor + 1)
    assert f"{name}=={lower_bounds()[name]}" in constraints("oldest")


def test_torch_alone_is_pinned_at_both_ends() -> None:
    torch = f"torch=={pinned()['torch']}"
    assert constraints("newest") == [torch]
    assert [pin for pin in constraints("oldest") if pin.startswith("torch==")] == [torch]
    assert set(lower_bounds()) == set(declared())
