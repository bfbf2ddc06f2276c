# SPDX-License-Identifier: Apache-2.0
"""Which releases of the dependencies this package was tested with."""

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

__all__ = ["warn_of_untested_versions"]

# Built on beyond what they promise, so each of their minor releases is run before the bounds let it in.
BOUNDED = ("transformers", "trl", "peft", "accelerate")


def warn_of_untested_versions() -> None:
    """Warns, once, of all that is installed outside of this package's own bounds."""
    try:
        bounds = {own.name: own.specifier for own in map(Requirement, requires("frozen-peft") or ())}
    except PackageNotFoundError:
        # A checkout that was never installed.
        return
    found = []
    for name in BOUNDED:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not bounds[name].contains(installed, prereleases=True):
            found.append(f"{name} {installed} (tested: {bounds[name]})")
    if found:
        warnings.warn(
            f"frozen_peft was not tested with {', '.join(found)}. What it cannot rely on there, it may refuse. "
            "Install versions within these bounds (`pip install frozen-peft` does), or keep `verify_context` on: it "
            "finds on the first batch what is not exact.",
            UserWarning,
            stacklevel=3,
        )
