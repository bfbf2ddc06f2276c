# SPDX-License-Identifier: Apache-2.0
"""Prints constraints for pip that put the dependencies at one end of their bounds.

    python tests/bounds.py oldest > constraints-oldest.txt

`oldest` pins each dependency to its lower bound; `newest` leaves all of them free. torch is pinned to the version of
`constraints.txt` in both: of others there is no build for CPUs alone to be had by a version's number.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lower_bounds() -> dict[str, str]:
    """Lower bound of every dependency that the package declares, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.match(r"([\w.-]+)>=([\d.]+)", dependency) for dependency in project["dependencies"])
    return {match[1]: match[2] for match in found if match is not None}


def constraints(end: str) -> list[str]:
    """Lines for pip's `-c`."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    oldest = [f"{name}=={version}" for name, version in lower_bounds().items() if name != "torch"]
    return [torch, *(oldest if end == "oldest" else ())]


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"]):
        sys.exit(f"usage: {sys.argv[0]} oldest | newest")
    print("\n".join(constraints(sys.argv[1])))
