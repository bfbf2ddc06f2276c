# SPDX-License-Identifier: Apache-2.0
"""What takes long to make is made by one worker of pytest-xdist for all of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

__all__ = ["made_once"]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the session, made by whoever asks first; where that fails, it fails for all.

    Args:
        factory: pytest's.
        name: Of the folder.
        make: Fills the folder, which is there and empty.
    """
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, failure = root / name, root / f"{name}.failure"
    with FileLock(root / f"{name}.lock"):
        if failure.exists():
            pytest.fail(f"{name} could not be made, see the first of the tests that need it.\n{failure.read_text()}")
        if not folder.exists():
            failure.write_text("It was still being made.")
            folder.mkdir()
            try:
                make(folder)
            except BaseException as error:
                failure.write_text(str(error))
                raise
            failure.unlink()
    return folder
