# SPDX-License-Identifier: Apache-2.0
"""Functions of the user's own, named on the command line as `FILE.py:FUNCTION`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["load_function"]


def load_function(name: str) -> Callable[..., Any]:
    """Runs a Python file and returns one of its functions.

    Only for what the user names on the command line: a name that stands in a dataset or a recipe must not come here.

    Args:
        name: `FILE.py:FUNCTION`.

    Raises:
        ValueError: The name has another form, or the file fails or has no such function.
        FileNotFoundError: There is no such file.
    """
    file, colon, function_name = name.rpartition(":")
    if not colon or not function_name.isidentifier() or not file.endswith(".py"):
        raise ValueError(f"{name!r} does not name a function, expected FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a path that ends with .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's, so anything may be raised in it
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function `{function_name}`")
    return function
